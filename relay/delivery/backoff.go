package delivery

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/shared/policy"
)

// maxBackoffs bounds the pairs of source and host that are left alone.
const maxBackoffs = 8192

type pair struct{ source, remote netip.Addr }

// backoff remembers which host refused connections from which source, or took
// them and did not speak SMTP. Many
// hosts drop connections from an address that they dislike, so one source's
// failure says nothing about another's.
type backoff struct {
	mu    sync.Mutex
	pairs map[pair]time.Time // not before
}

func newBackoff() *backoff { return &backoff{pairs: make(map[pair]time.Time)} }

func (b *backoff) until(source, remote netip.Addr, now time.Time) (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := pair{source, remote}
	at, ok := b.pairs[key]
	if ok && !now.Before(at) {
		delete(b.pairs, key)
		ok = false
	}
	return at, ok
}

func (b *backoff) add(source, remote netip.Addr, at, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.pairs) >= maxBackoffs {
		for key, until := range b.pairs {
			if !now.Before(until) {
				delete(b.pairs, key)
			}
		}
		if len(b.pairs) >= maxBackoffs {
			return // forgetting costs a connection attempt, nothing more
		}
	}
	b.pairs[pair{source, remote}] = at
}

// connectFailure turns an error of Egress into a failure and remembers a host
// that would not be connected to.
func (d *Dialer) connectFailure(t *Target, addr netip.Addr, err error, p *policy.Delivery) *Failure {
	cause := egress.Other
	var de *egress.DialError
	switch {
	case errors.As(err, &de):
		cause = de.Cause
	case errors.Is(err, context.Canceled):
		cause = egress.Canceled
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded):
		cause = egress.TimedOut
	}
	f := &Failure{Status: relay.Deferred, Phase: relay.PhaseConnect, Cause: err,
		// RFC 3463 section 3.5: X.4.1, no answer from host.
		Reply: relay.Reply{Enhanced: "4.4.1", Text: cause.String()}}
	if cause.Local() {
		// Our own trouble costs the recipient no attempt.
		f.Status = relay.NotTried
		f.Phase = relay.PhaseLocal
		f.Reply.Enhanced = "4.3.5"
		if cause != egress.Unusable {
			f.Reply.Enhanced = "4.3.2"
		}
		return f
	}
	d.leaveAlone(t, addr, p)
	return f
}

// leaveAlone keeps a host from being tried again for a while; its fellows are.
func (d *Dialer) leaveAlone(t *Target, addr netip.Addr, p *policy.Delivery) {
	if keep := p.HostBackoff.D(); keep > 0 {
		now := time.Now()
		d.backoff.add(t.Source.Bind, addr, now.Add(keep), now)
	}
}
