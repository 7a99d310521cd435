package delivery

import (
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// What a session with a hostile host may cost: far above what is needed, the sum of
// all timeouts, also on a busy machine, and far below what the host would like, a
// minute or all time.
const (
	maxHostileBytes = 2 << 20
	maxHostileTime  = 30 * time.Second
)

// TestHostilePeers plays the corpus of shared/lab/transcripts: every host costs
// bounded time and memory, and leaves a clear reason on the recipient.
func TestHostilePeers(t *testing.T) {
	corpus, err := lab.Transcripts()
	if err != nil {
		t.Fatal(err)
	}
	if len(corpus) < 30 {
		t.Fatalf("a corpus of %d", len(corpus))
	}
	for i := range corpus {
		h := &corpus[i]
		t.Run(h.Name, func(t *testing.T) {
			const patient = policy.Duration(500 * time.Millisecond) // shorter than any drip, longer than a busy machine takes for a reply
			f := newFixture(t, play(t, h))
			f.policy.GreetingTimeout, f.policy.EHLOTimeout, f.policy.MailTimeout = patient, patient, patient
			f.policy.RcptTimeout, f.policy.DataTimeout, f.policy.BlockTimeout, f.policy.FinalDotTimeout = patient, patient, patient, patient
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			started := time.Now()
			var out relay.Outcome
			s, failure := f.dialer.Dial(t.Context(), target(policy.TLSOpportunistic, hostsAt("127.0.0.1")...))
			if failure != nil {
				out = failure.Outcome(0)
			} else {
				out = s.Send(transaction(1))[0]
				s.Quit()
			}
			took := time.Since(started)
			runtime.ReadMemStats(&after)
			if got := brief([]relay.Outcome{out}); got != h.Expect || !strings.Contains(out.Reply.Text, h.Reason) {
				t.Errorf("%s with %q, want %s with %q", got, out.Reply.Text, h.Expect, h.Reason)
			}
			if len(out.Reply.Text) > relay.MaxReplyTextBytes {
				t.Errorf("a reason of %d bytes", len(out.Reply.Text))
			}
			if took > maxHostileTime {
				t.Errorf("it took %v", took)
			}
			if spent := after.TotalAlloc - before.TotalAlloc; spent > maxHostileBytes {
				t.Errorf("it cost %d bytes of memory", spent)
			}
		})
	}
}

// play listens as the host of a transcript.
func play(t *testing.T, h *lab.Transcript) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var n atomic.Int64
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go h.Play(t.Context(), c, int(n.Add(1)-1), 30*time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}
