package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
)

const (
	// lookPeriod is the time between two looks at whether the server spoke.
	// Silence is counted in looks, not read from a clock: a relay that was paused,
	// or gets no processor, looks less often and blames nobody for it.
	lookPeriod = 250 * time.Millisecond
	// quietLooks without a byte of the server's, and it is asked: after a second.
	quietLooks = 4
	// minSilentLooks and maxSilentLooks without a byte after the question was
	// sent, and the session is dead: 1.5 s, up to 10 s where round trips are long.
	minSilentLooks = 6
	maxSilentLooks = 40
	// patientRoundTrips is how many round trips an answer may take at least.
	patientRoundTrips = 3
)

// pulse watches that the server of a session lives. Neither transport tells soon
// that a path carries nothing any more: QUIC waits for 30 s, TCP for minutes.
type pulse struct {
	spoke     atomic.Bool   // set by every byte of the server's, cleared by every look
	period    time.Duration // between two looks
	patience  int           // looks without a byte after a question
	ask       func() error  // puts a question to the server, which answers at once
	questions chan struct{}
	asked     chan struct{}
}

// begin prepares for watching a server whose answers take roundTrip.
func (p *pulse) begin(period, roundTrip time.Duration, ask func() error) {
	p.period, p.ask = period, ask
	p.patience = max(minSilentLooks, int(min(patientRoundTrips*roundTrip/period, maxSilentLooks)))
	p.questions, p.asked = make(chan struct{}, 1), make(chan struct{}, 1)
}

// watch returns errSilent once the server is silent though asked, or ctx's
// error. Where no question can be sent, there is no answer to be missed.
func (p *pulse) watch(ctx context.Context) error {
	ticker := time.NewTicker(p.period)
	defer ticker.Stop()
	var quiet, unanswered int // looks: without a byte, and of these since the question was sent
	var asking, sent bool
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.asked:
			asking, sent = false, quiet >= quietLooks
			continue
		case <-ticker.C:
		}
		if p.spoke.Swap(false) {
			quiet, unanswered, sent = 0, 0, false
			continue
		}
		quiet++
		switch {
		case sent:
			if unanswered++; unanswered >= p.patience {
				return fault.Wrap(errSilent, fault.Timeout, "agent.watch", "the server has said nothing for %v, though asked", time.Duration(quiet)*p.period)
			}
		case quiet >= quietLooks && !asking:
			asking = true
			p.questions <- struct{}{} // has room for the one that is asked at a time
		}
	}
}

// speak puts the questions. It is apart from watch, because a path that carries
// nothing may hold up whoever writes to it.
func (p *pulse) speak(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.questions:
		}
		if err := p.ask(); err != nil {
			return err
		}
		p.asked <- struct{}{} // has room, as above
	}
}

// errSilent is why a session ends whose server is silent.
var errSilent = errors.New("the server is silent")

// listening is a stream of a session that notes every byte of the server's.
type listening struct {
	link.Stream
	pulse *pulse
}

func (l listening) Read(b []byte) (int, error) {
	n, err := l.Stream.Read(b)
	if n > 0 {
		l.pulse.spoke.Store(true)
	}
	return n, err
}
