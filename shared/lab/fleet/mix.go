package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
)

// share is how often an outcome occurs among a hundred recipients.
var shares = []struct {
	outcome lab.Outcome
	percent int
}{
	{lab.Accept, 80}, {lab.Nobody, 4}, {lab.Bounce, 2}, {lab.Disabled, 2}, {lab.Full, 2},
	{lab.Grey, 3}, {lab.Defer, 3}, {lab.Throttle, 2}, {lab.Spam, 1}, {lab.Drop, 1},
}

// Recipients returns n addresses spread over all providers. In open mode all
// of them accept and unlisted providers get their share as one of a hundred
// domains; otherwise outcomes follow a fixed mix, chosen by the seed.
func (f *Fleet) Recipients(n int) ([]string, error) {
	rng := rand.New(rand.NewPCG(f.cfg.Seed, 0x6d6978))
	providers := f.Lab.Providers()
	usable := providers[:0:0]
	for _, p := range providers {
		if len(p.Addrs) > 0 && p.Name != f.smallProvider() {
			usable = append(usable, p)
		}
	}
	out := make([]string, n)
	for i := range out {
		outcome := lab.Accept
		if !f.cfg.Open {
			outcome = draw(rng)
		}
		address, err := f.Lab.Recipient(usable[i%len(usable)].Name, i, outcome)
		if err != nil {
			return nil, err
		}
		out[i] = address
	}
	return out, nil
}

func draw(rng *rand.Rand) lab.Outcome {
	at := rng.IntN(100)
	for _, s := range shares {
		if at -= s.percent; at < 0 {
			return s.outcome
		}
	}
	return lab.Accept
}

// Stream is mail to submit through the relays of the fleet.
type Stream struct {
	Recipients  []string
	Size        int // bytes of a message
	Connections int // at once, to each relay
	Tag         string
	Only        *Relay // that gets it all; nil: the relays in turn
	// Done is called as each message is decided, from several goroutines; may be nil.
	Done func(*lab.Result)
}

// Submitted is a message a relay answered for.
type Submitted struct {
	Relay     *Relay
	Recipient string
	MessageID string // header field, with angle brackets
	Result    lab.Result
}

// Submit sends the stream, the messages in turn to each relay, every second
// one of a relay on the bulk stream, and returns what was answered.
func (f *Fleet) Submit(ctx context.Context, s Stream) ([]Submitted, error) {
	type part struct {
		relay *Relay
		load  *lab.Load
		to    []string
	}
	var parts []part
	streams := 2
	relays := f.Relays
	if s.Only != nil {
		relays = []*Relay{s.Only}
	}
	for i, r := range relays {
		for kind := range streams {
			var to []string
			for j := i*streams + kind; j < len(s.Recipients); j += len(relays) * streams {
				to = append(to, s.Recipients[j])
			}
			if len(to) == 0 {
				continue
			}
			load := &lab.Load{
				Addr: r.Submissions(), ImplicitTLS: true, TLS: f.ClientTLS(r), Username: f.User, Password: f.Secret,
				Messages: len(to), Connections: max(1, s.Connections/streams), Size: s.Size, Overlap: true,
				Tag: fmt.Sprintf("%s-%d-%d", s.Tag, i, kind), From: func(int) string { return "news@" + Domain },
				To: func(i int) string { return to[i] },
			}
			if s.Done != nil {
				load.Done = func(_ int, r *lab.Result) { s.Done(r) }
			}
			if kind == 1 {
				load.Headers = "X-Relais-Stream: " + secondStream + "\r\n"
			}
			parts = append(parts, part{r, load, to})
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var out []Submitted
	var failed error
	for _, p := range parts {
		wg.Go(func() {
			sent, err := lab.Send(ctx, p.load)
			mu.Lock()
			defer mu.Unlock()
			if err != nil && failed == nil {
				failed = fault.Wrap(err, fault.Unavailable, "fleet.Submit", "%s could not be given the mail", p.relay.Name)
			}
			if sent == nil {
				return
			}
			for i := range sent.Results {
				out = append(out, Submitted{Relay: p.relay, Recipient: p.to[i], MessageID: p.load.MessageID(i), Result: sent.Results[i]})
			}
		})
	}
	wg.Wait()
	return out, failed
}

// Ledger gathers the final states that the relays report.
type Ledger struct {
	fleet *Fleet
	after map[*Relay]uint64
	Final map[string]int // event type → recipients of messages of clients
	Notes int            // notifications queued
}

// NewLedger begins before the first event.
func (f *Fleet) NewLedger() *Ledger {
	return &Ledger{fleet: f, after: make(map[*Relay]uint64), Final: make(map[string]int)}
}

// Read takes in the new events of all relays. Recipients at the sending domain
// get notifications only, which are not counted as mail of clients.
func (l *Ledger) Read(ctx context.Context, each func(*Relay, *Event)) error {
	for _, r := range l.fleet.Relays {
		for {
			events, err := r.Events(ctx, l.after[r])
			if err != nil {
				return err
			}
			if len(events) == 0 {
				break
			}
			for i := range events {
				e := &events[i]
				l.after[r] = e.Seq
				if e.Type == "dsn" {
					l.Notes++
				}
				if e.Final() && !atDomain(e.Address) {
					l.Final[e.Type]++
				}
				if each != nil {
					each(r, e)
				}
			}
		}
	}
	return nil
}

func atDomain(address string) bool {
	const suffix = "@" + Domain
	return len(address) > len(suffix) && address[len(address)-len(suffix):] == suffix
}

// InQueue counts the recipients that wait or are being delivered, on all relays.
// They are asked one after the other: mail that goes from one to another
// meanwhile may be counted twice, or not at all.
func (f *Fleet) InQueue(ctx context.Context) (int64, error) {
	var n int64
	for _, r := range f.Relays {
		s, err := r.Queue(ctx)
		if err != nil {
			return 0, err
		}
		n += s.Waiting
	}
	return n, nil
}

// WaitEmpty returns when nothing is queued any more. It believes that when it has
// seen it twice in a row: mail that was handed to a relay after that one had been
// asked, by one that was asked later, is there at the second look.
func (f *Fleet) WaitEmpty(ctx context.Context, progress func(waiting int64)) error {
	for empty := 0; ; {
		n, err := f.InQueue(ctx)
		if err != nil {
			return err
		}
		if progress != nil {
			progress(n)
		}
		if n > 0 {
			empty = 0
		} else if empty++; empty == 2 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Timeout, "fleet.WaitEmpty", "%d recipients are still queued", n)
		case <-time.After(5 * pollInterval):
		}
	}
}
