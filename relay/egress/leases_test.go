package egress

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// leader stands for control: it has the relay's reports, and answers when it is told
// to.
type leader struct {
	t      *testing.T
	leases *Leases

	mu      sync.Mutex
	at      lease.Instant // the clock, where a test moves it by hand
	prompt  bool          // it answers at once
	reports []*wire.AddressReport
	changes int
}

// newLeader returns the leases of relay 1 under a clock.
func newLeader(t *testing.T, clock func() lease.Instant) *leader {
	w := &leader{t: t}
	if clock == nil {
		clock = func() lease.Instant { w.mu.Lock(); defer w.mu.Unlock(); return w.at }
	}
	var err error
	w.leases, err = NewLeases(LeaseConfig{Node: nodeID(1), Incarnation: 7, Clock: clock, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		Send: func(m proto.Message) error {
			w.mu.Lock()
			w.reports = append(w.reports, m.(*wire.AddressReport))
			prompt := w.prompt
			w.mu.Unlock()
			if prompt {
				w.answer(m.(*wire.AddressReport).GetNonce(), 7, 3)
			}
			return nil
		},
		Changed: func() { w.mu.Lock(); w.changes++; w.mu.Unlock() }})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// said returns how many reports came, and how often it was told of a change.
func (w *leader) said() (reports, changes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.reports), w.changes
}

// answer answers the report of a nonce: address 5 is relay 1's under an epoch.
func (w *leader) answer(nonce, incarnation, epoch uint64) {
	id := sourceID(5)
	w.leases.Answer(&wire.AddressAnswer{Incarnation: incarnation, Nonce: nonce, Leased: []*wire.LeasedSource{{SourceId: wire.EncodeID(id), Epoch: epoch}}})
}

// newest returns the nonce of the newest report.
func (w *leader) newest() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.reports) == 0 {
		w.t.Fatal("nothing was reported")
	}
	return w.reports[len(w.reports)-1].GetNonce()
}

// asked returns when the newest report, which was not answered, was made.
func (w *leader) asked() time.Duration {
	nonce := w.newest()
	w.leases.mu.Lock()
	defer w.leases.mu.Unlock()
	at, waits := w.leases.asked[nonce]
	if !waits {
		w.t.Fatal("the newest report was answered")
	}
	return time.Duration(at - 1)
}

func floatingSource(owner byte, epoch uint64) []policy.Source {
	return []policy.Source{{ID: sourceID(5), Owner: nodeID(owner), Bind: netip.MustParseAddr("127.0.0.45"), Epoch: epoch, Leased: true}}
}

// connect opens a connection from the address, to the end that is returned.
func (w *leader) connect() (here *leasedConn, there net.Conn) {
	w.t.Helper()
	status := Status{Source: floatingSource(1, 3)[0]}
	if here = w.leases.admit(&status, func() {}); here == nil {
		w.t.Fatal("no connection may be opened")
	}
	conn, there := net.Pipe()
	w.t.Cleanup(func() { there.Close() })
	if !here.opened(conn) {
		w.t.Fatal("the lease ended while it was opened")
	}
	return here, there
}

func (w *leader) usable() bool { return w.leases.usable(sourceID(5)) }

// ends returns when the other end of a connection sees it end.
func ends(there net.Conn, start time.Time) <-chan time.Duration {
	out := make(chan time.Duration, 1)
	go func() {
		_, _ = io.Copy(io.Discard, there)
		out <- time.Since(start)
	}()
	return out
}

// wait returns when a connection ended, which it does within two leases.
func (w *leader) wait(ended <-chan time.Duration) (at time.Duration) {
	w.t.Helper()
	never := time.NewTimer(2 * ownership.DefaultConfig().TTL)
	select {
	case at = <-ended:
	case <-never.C:
		w.t.Error("the connection never ended")
	}
	return at
}

// inBubble runs the loop of leases in a bubble with a clock of its own.
func inBubble(t *testing.T, test func(t *testing.T, w *leader, start time.Time)) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		w := newLeader(t, func() lease.Instant { return lease.Instant(time.Since(start)) + 1 })
		done := make(chan struct{})
		go func() { defer close(done); w.leases.Run(t.Context()) }()
		test(t, w, start)
	})
}

func pass(d time.Duration) {
	timer := time.NewTimer(d)
	<-timer.C
	synctest.Wait()
}

// TestLease: what an answer earns counts from when the report was made; nothing is
// opened in the last five seconds, and what is open ends to the instant.
func TestLease(t *testing.T) {
	times := ownership.DefaultConfig()
	inBubble(t, func(t *testing.T, w *leader, start time.Time) {
		w.leases.SetView(floatingSource(1, 3), nil)
		pass(time.Second)
		if n, _ := w.said(); n != 0 || w.usable() {
			t.Fatalf("without a link there are %d reports", n)
		}
		if why := w.leases.Why(sourceID(5)); why != "floating address 127.0.0.45: this process has no lease of it yet, control is not reached" {
			t.Errorf("why: %s", why)
		}
		w.leases.Linked(true)
		pass(time.Second)
		nonce := w.newest()
		w.answer(nonce, 6, 3)   // of the former process
		w.answer(nonce+1, 7, 3) // of no report
		if w.usable() {
			t.Error("an answer to somebody else counts")
		}
		w.answer(nonce, 7, 2) // under a former assignment
		pass(askAgain)
		if w.usable() {
			t.Error("an answer about a former assignment counts")
		}
		pass(times.TTL / renewals)
		sent := w.asked()
		nonce = w.newest()
		pass(time.Second)
		w.answer(nonce, 7, 3)
		synctest.Wait()
		if _, changes := w.said(); !w.usable() || changes != 1 || w.leases.Why(sourceID(5)) != "" {
			t.Fatalf("after the answer: usable %v, %d changes, %s", w.usable(), changes, w.leases.Why(sourceID(5)))
		}
		before, _ := w.said()
		here, there := w.connect()
		ended := ends(there, start)
		pass(sent + times.TTL - times.Guard - time.Since(start) - time.Nanosecond)
		if !w.usable() {
			t.Error("not usable before the guard")
		}
		pass(time.Millisecond)
		if _, changes := w.said(); w.usable() || changes != 2 || !strings.Contains(w.leases.Why(sourceID(5)), "its lease ends at ") {
			t.Errorf("in the guard: usable %v, %d changes, %s", w.usable(), changes, w.leases.Why(sourceID(5)))
		}
		if status := (Status{Source: floatingSource(1, 3)[0]}); w.leases.admit(&status, func() {}) != nil {
			t.Error("a connection is opened in the guard")
		}
		if _, err := here.Write([]byte("QUIT\r\n")); err != nil {
			t.Errorf("what is open is not open any more: %v", err)
		}
		w.leases.Linked(false)
		if at := w.wait(ended); at < sent+times.TTL || at > sent+times.TTL+2*time.Millisecond {
			t.Errorf("the connection ended at %v, the lease of a report of %v does after %v", at, sent, times.TTL)
		}
		if n, _ := w.said(); n < before+int(times.TTL*(renewals-1)/renewals/askAgain)-2 {
			t.Errorf("%d reports while none was answered", n-before)
		}
		if why := w.leases.Why(sourceID(5)); !strings.Contains(why, "its lease ended at ") || !strings.HasSuffix(why, ", control is not reached") {
			t.Errorf("why: %s", why)
		}
		if _, err := here.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("written after the end: %v", err)
		}
		w.answer(w.newest()-maxAsked, 7, 3) // it comes far too late
		if w.usable() {
			t.Error("an answer to a report that is forgotten counts")
		}
		w.leases.Linked(true)
		pass(time.Millisecond)
		w.answer(w.newest(), 7, 3)
		if !w.usable() {
			t.Error("never usable again")
		}
	})
}

// TestLeaseIsRenewed: reports come at least every quarter of a lease, so that one
// that is lost ends nothing.
func TestLeaseIsRenewed(t *testing.T) {
	times := ownership.DefaultConfig()
	inBubble(t, func(t *testing.T, w *leader, start time.Time) {
		w.prompt = true
		w.leases.SetView(floatingSource(1, 3), nil)
		w.leases.Linked(true)
		pass(time.Millisecond)
		_, there := w.connect()
		ended := ends(there, start)
		pass(5 * times.TTL)
		reports, changes := w.said()
		if least := 5 * renewals; reports < least || reports > least*10/9+2 || !w.usable() || changes != 1 {
			t.Errorf("%d reports in five leases, usable %v, %d changes", reports, w.usable(), changes)
		}
		select {
		case at := <-ended:
			t.Errorf("the connection ended at %v", at)
		default:
		}
		there.Close()
	})
}

// TestLeaseEndsWithItsAssignment: what control says of the address ends it at once,
// but for a release, after which what was begun is finished within the lease.
func TestLeaseEndsWithItsAssignment(t *testing.T) {
	times := ownership.DefaultConfig()
	leaving := []policy.LeavingSource{{ID: sourceID(5), Owner: nodeID(1), Epoch: 3}}
	for _, tc := range []struct {
		name    string
		sources []policy.Source
		leaving []policy.LeavingSource
		lasts   time.Duration // from the last answered report
	}{
		{"it is another relay's", floatingSource(2, 9), nil, 0},
		{"it is nobody's", nil, nil, 0},
		{"it was assigned anew", floatingSource(1, 9), nil, 0},
		{"it is released", nil, leaving, times.TTL},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, w *leader, start time.Time) {
				w.leases.SetView(floatingSource(1, 3), nil)
				w.leases.Linked(true)
				pass(time.Millisecond)
				w.answer(w.newest(), 7, 3)
				_, there := w.connect()
				ended := ends(there, start)
				pass(10 * time.Second)
				sent := time.Duration(0)
				told := time.Since(start)
				w.leases.SetView(tc.sources, tc.leaving)
				synctest.Wait()
				if w.usable() {
					t.Error("it is still used")
				}
				if tc.lasts > 0 { // it is renewed while something is open
					w.leases.Linked(true)
					pass(time.Second)
					sent = w.asked()
					w.answer(w.newest(), 7, 3)
					told = 0
				}
				if at := w.wait(ended); at < sent+tc.lasts || at > max(told, sent+tc.lasts)+2*time.Millisecond {
					t.Errorf("the connection ended at %v", at)
				}
				if w.usable() {
					t.Error("it is used again")
				}
			})
		})
	}
}

// TestAStoppedProcessSendsNothing: the loop has not had its turn since the process
// goes on, and yet nothing is written, nor a connection opened.
func TestAStoppedProcessSendsNothing(t *testing.T) {
	w := newLeader(t, nil)
	m, err := New(Config{Node: nodeID(1), Leases: w.leases, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	l, remote := listen(t, "127.0.0.50")
	sources := append(floatingSource(1, 3), testSources()[0])
	w.leases.SetView(sources, nil)
	m.SetSources(sources)
	unusable := func(err error) bool {
		var failure *DialError
		return errors.As(err, &failure) && failure.Cause == Unusable
	}
	if _, err := m.Dial(t.Context(), sourceID(5), remote, time.Minute); m.State(sourceID(5)) != NotLeased || !unusable(err) {
		t.Fatalf("without a lease the address is %s: %v", m.State(sourceID(5)), err)
	}
	w.leases.mu.Lock()
	w.leases.linked, w.leases.nonce, w.leases.asked[1] = true, 1, 0
	w.leases.mu.Unlock()
	w.answer(1, 7, 3)
	m.Refresh()
	c, err := m.Dial(t.Context(), sourceID(5), remote, time.Minute)
	if err != nil || m.State(sourceID(5)) != Usable {
		t.Fatalf("with a lease the address is %s: %v", m.State(sourceID(5)), err)
	}
	there, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	if at := there.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); at != netip.MustParseAddr("127.0.0.45") {
		t.Errorf("it comes from %s", at)
	}
	if _, err := c.(*leasedConn).SyscallConn(); err != nil {
		t.Errorf("nobody sees whether it lives: %v", err)
	}
	if _, err := c.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.at = lease.Instant(ownership.DefaultConfig().TTL)
	w.mu.Unlock()
	if _, err := c.Write([]byte("b")); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("written after the end: %v", err)
	}
	if got, _ := io.ReadAll(there); string(got) != "a" && string(got) != "" { // a reset may overtake what came before it
		t.Errorf("the host got %q", got)
	}
	if _, err := m.Dial(t.Context(), sourceID(5), remote, time.Minute); !unusable(err) {
		t.Errorf("a connection after the end: %v", err)
	}
	pinned, err := m.Dial(t.Context(), sourceID(1), remote, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if _, plain := pinned.(*net.TCPConn); !plain {
		t.Errorf("a pinned address has a %T", pinned)
	}
}

// TestNewAddressIsAskedForAtOnce: the answer to a report of before an address came does
// not put off the report that earns it.
func TestNewAddressIsAskedForAtOnce(t *testing.T) {
	w := newLeader(t, nil)
	l := w.leases
	w.at = lease.Instant(time.Second)
	l.SetView(floatingSource(1, 3), nil)
	l.Linked(true)
	l.round()
	<-l.speak
	l.nonce, l.asked[1] = 1, w.at // as report does
	other := floatingSource(1, 9)[0]
	other.ID = sourceID(6)
	l.SetView(append(floatingSource(1, 3), other), nil)
	w.answer(1, 7, 3)
	l.round()
	select {
	case <-l.speak:
	default:
		t.Error("nothing is reported of the new address")
	}
	l.nonce, l.asked[2] = 2, w.at
	w.answer(2, 7, 3)
	w.at = lease.Instant(20 * time.Second)
	if l.round(); len(l.speak) > 0 {
		t.Error("it is reported on although all was answered")
	}
}
