package e2e

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// The limits of the test, and what must come of them.
const (
	sharedPerMinute   = 600
	sharedBurst       = 60
	sharedConnections = 2
	sharedUse         = 0.9              // of the limit, while there is demand
	sharedBack        = 35 * time.Second // after the end of a fault that much is used again
	sharedWindow      = 15 * time.Second // over which that is measured
	sharedLong        = 90 * time.Second // without a fault
	sharedStart       = 2 * time.Minute  // until there is mail, and the limits are lent at first
	sharedBlocks      = 1500             // of 6 messages, one for each stream of each relay
	sharedPattern     = 11               // of as many blocks 4 go to the provider with connections, 7 to that with the rate: more than goes in the test
	sharedAnswer      = 400 * time.Millisecond
	sharedStop        = 15 * time.Second // a relay is stopped for
	sharedLook        = 10 * time.Millisecond
	sharedOverlap     = 500 * time.Millisecond // an end of a connection takes so long to be seen, at most
	sharedResume      = 5 * time.Second        // a relay that was stopped has closed what it held, on a busy machine
	sharedMost        = 15 * time.Minute       // all of it, with leaders that come by themselves
	sharedTries       = 4
)

const sharedPolicy = `[[limit]]
name = "rate"
provider = "google"
messages = "600/1m"
burst = 60

[[limit]]
name = "open"
provider = "yahoo"
connections = 2

[lease]
ttl = "10s"
linger = "5s"
hold = "30s"
`

// mx is what the providers see: when transactions began, and how many connections
// are open.
type mx struct {
	t       *testing.T
	lab     *lab.Lab
	slots   string // the provider whose connections are counted
	servers []*fleet.ControlServer
	end     chan struct{}
	run     sync.WaitGroup

	mu     sync.Mutex
	begun  []begin
	open   []opened
	frozen atomic.Value // of netip.Addr: a stopped relay's source, whose connections nobody can close
}

func watchMX(t *testing.T, l *lab.Lab) *mx {
	t.Helper()
	m := &mx{t: t, lab: l, slots: "yahoo", end: make(chan struct{})}
	m.watch(0)
	if err := l.SetBehaviour("yahoo", lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
		if e.Phase == lab.PhaseFinalDot {
			return lab.Answer{Delay: sharedAnswer}
		}
		return lab.Answer{}
	}}); err != nil {
		t.Fatal(err)
	}
	return m
}

// watch begins to look: when transactions of one provider begin, which takes so
// long for each, and how many connections are open.
func (m *mx) watch(answer time.Duration) {
	m.t.Helper()
	m.frozen.Store(netip.Addr{})
	if err := m.lab.SetBehaviour("google", lab.Behaviour{Answer: func(e lab.Event) (a lab.Answer) {
		switch e.Phase {
		case lab.PhaseMail:
			m.mu.Lock()
			m.begun = append(m.begun, begin{time.Now(), e.Source})
			m.mu.Unlock()
		case lab.PhaseFinalDot:
			a.Delay = answer
		}
		return a
	}}); err != nil {
		m.t.Fatal(err)
	}
	end := m.end
	m.run.Go(func() { m.count(end) })
	m.t.Cleanup(m.stop)
}

func (m *mx) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.end != nil {
		close(m.end)
		m.end = nil
	}
}

// count looks at the connections all the time.
func (m *mx) count(end <-chan struct{}) {
	tick := time.NewTicker(sharedLook)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-end:
			return
		}
		n := m.connections(m.frozen.Load().(netip.Addr))
		m.mu.Lock()
		m.open = append(m.open, opened{time.Now(), n})
		m.mu.Unlock()
	}
}

// connections counts those that are open now, but for one source's.
func (m *mx) connections(but netip.Addr) (n int) {
	for _, l := range m.lab.Report().Lanes {
		if l.Provider == m.slots && l.Source != but {
			n += l.ConnectionsNow
		}
	}
	return n
}

// use returns which part of the rate, and of the connections, was used from a time
// on, and how many messages the source had of it.
func (m *mx) use(from, to time.Time, source netip.Addr) (rate, open float64, of int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, b := range m.begun {
		if b.at.After(from) && !b.at.After(to) {
			n++
			if b.source == source {
				of++
			}
		}
	}
	looks, sum := 0, 0
	for _, o := range m.open {
		if o.at.After(from) && !o.at.After(to) {
			looks++
			sum += min(o.count, sharedConnections)
		}
	}
	rate = float64(n) / (sharedPerMinute * to.Sub(from).Minutes())
	if looks > 0 {
		open = float64(sum) / float64(looks) / sharedConnections
	}
	return rate, open, of
}

// check asserts that no span of time in the whole test saw more than the limits
// allow, and that it would have been noticed.
func (m *mx) check() {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	at := times(m.begun)
	over, from, to := overRate(at, sharedPerMinute)
	if over > sharedBurst+1e-6 { // so much for rounding
		m.t.Errorf("%d messages in %v: the limit allows %d a minute and a burst of %d", to-from+1, at[to].Sub(at[from]), sharedPerMinute, sharedBurst)
		return
	}
	if long := overOpen(m.open, sharedConnections); long > sharedOverlap {
		m.t.Errorf("more than %d connections for %v", sharedConnections, long)
		return
	}
	m.t.Logf("%d messages in %v, in no span of it more than %.1f above the rate; the burst allows %d", len(at), at[len(at)-1].Sub(at[0]).Round(time.Second), over, sharedBurst)
	noticed(m.t, at, sharedPerMinute, sharedBurst, m.open, sharedConnections, sharedOverlap)
}

// supply gives relays mail while the test goes on: a slow machine takes minutes for
// all of it, and limits are used as soon as there is some. It ends with the test, or
// by what is returned.
func supply(t *testing.T, f *fleet.Fleet, s fleet.Stream) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := f.Submit(ctx, s); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// rest waits.
func rest(t *testing.T, d time.Duration, what string) {
	t.Helper()
	end := time.Now().Add(d)
	eventually(t, d+time.Minute, what, func() bool { return time.Now().After(end) })
}

// used asserts that the limits are used as far as they should be, over a window at
// the end of a time. A leader that came to lend meanwhile, because the machine was
// too busy for the servers to hear each other, is a fault of its own: then the time
// begins anew.
func (m *mx) used(after string, wait, window time.Duration) {
	m.t.Helper()
	for try := 1; ; try++ {
		before := lenders(m.t, m.servers)
		rest(m.t, wait, "use to be measured "+after)
		now := time.Now()
		rate, open, _ := m.use(now.Add(-window), now, netip.Addr{})
		m.t.Logf("%s: %.0f %% of the rate and %.0f %% of the connections were used over %v", after, 100*rate, 100*open, window)
		if rate >= sharedUse && open >= sharedUse {
			return
		}
		if more := lenders(m.t, m.servers) - before; more > 0 && try < sharedTries {
			m.t.Logf("%d leaders came meanwhile", more)
			wait = sharedBack + window
			continue
		}
		m.t.Errorf("%s: %.1f %% of the rate and %.1f %% of the connections were used, want %.0f %%", after, 100*rate, 100*open, 100*sharedUse)
		return
	}
}

// lenders counts how often a server began to lend.
func lenders(t *testing.T, servers []*fleet.ControlServer) (n int) {
	t.Helper()
	for _, s := range servers {
		text, err := os.ReadFile(s.Log)
		if err != nil {
			t.Fatal(err)
		}
		n += strings.Count(string(text), `"msg":"this server lends shared limits out"`)
	}
	return n
}

// back waits until a fault has been over for long enough, and measures.
func (m *mx) back(fault string) {
	m.t.Helper()
	m.used("after "+fault, sharedBack+sharedWindow, sharedWindow)
}

// TestSharedLimits has three relays with more mail than two limits let pass that
// the whole cluster has in common, and looks at the mail hosts: a leader is killed,
// a relay stopped for longer than its lease, and one cut off from all servers; for 90 s
// there is no fault. It runs in a network namespace, where a rule can cut one relay off.
func TestSharedLimits(t *testing.T) {
	if inNamespace(t, sharedMost) {
		allowCuts(t)
		sharedLimits(t)
	}
}

func sharedLimits(t *testing.T) {
	if err := os.Chmod(binaries, 0o711); err != nil { // another user starts one of them
		t.Fatal(err)
	}
	f := startTrio(t, fleet.Config{Relays: 3, Open: true, NoDKIM: true, Users: map[int]uint32{2: sharedCutUser}, Policy: map[string]string{"limits": sharedPolicy}})
	m := watchMX(t, f.Lab)
	m.servers = f.servers
	var to []string
	for i := range 6 * sharedBlocks {
		provider := "google"
		if i/6%sharedPattern < 4 {
			provider = "yahoo"
		}
		address, err := f.Lab.Recipient(provider, i%200, lab.Accept)
		if err != nil {
			t.Fatal(err)
		}
		to = append(to, address)
	}
	supply(t, f.Fleet, fleet.Stream{Recipients: to, Size: 1000, Connections: 4, Tag: "limits"})
	eventually(t, sharedStart, "both limits to be used", func() bool {
		now := time.Now()
		rate, open, _ := m.use(now.Add(-5*time.Second), now, netip.Addr{})
		return rate > sharedUse && open > sharedUse
	})
	f.explained(f.Relays[0])

	leader, _ := f.leader()
	leader.Kill()
	f.leader() // another one
	if err := f.StartServer(within(t, time.Minute), leader); err != nil {
		t.Fatal(err)
	}
	m.back("the leader was killed")
	m.used("without a fault", sharedLong-sharedWindow, sharedLong) // what back looked at is the beginning of it

	stopped := f.Relays[1]
	m.frozen.Store(stopped.Sources[0])
	if err := stopped.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	rest(t, sharedStop, "the lease of the stopped relay to end")
	if err := stopped.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, sharedResume, "it to close what it held", func() bool { return m.connections(netip.Addr{}) <= sharedConnections })
	m.frozen.Store(netip.Addr{})
	m.back("a relay was stopped")

	m.cutOff(f, f.Relays[2])

	m.stop()
	m.run.Wait()
	m.check()
}

// explained asserts that the relay says which limit its mail waits for.
func (f *trio) explained(r *fleet.Relay) {
	f.t.Helper()
	var last []laneRow
	defer func() {
		if f.t.Failed() {
			f.t.Logf("%s shows the lanes %+v", r.Name, last)
		}
	}()
	eventually(f.t, 20*time.Second, "a lane to be held by the limit", func() bool {
		last = f.lanes(r)
		return slices.ContainsFunc(last, func(l laneRow) bool {
			return l.Provider == "google" && l.Hold == "limit" && strings.Contains(l.HoldText, "the limit rate allows 600 messages in 1m") && strings.Contains(l.HoldText, "this relay may use")
		})
	})
}

type laneRow struct {
	Provider string `json:"provider"`
	Hold     string `json:"hold"`
	HoldText string `json:"hold_text"`
}

func (f *trio) lanes(r *fleet.Relay) (rows []laneRow) {
	f.t.Helper()
	out, err := program(f.t, "relais-relay", "lanes", "--json", "--data", r.Dir)
	if err == nil {
		err = json.Unmarshal([]byte(out), &rows)
	}
	if err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
	return rows
}
