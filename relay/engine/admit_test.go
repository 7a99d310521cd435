package engine

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// gatekeeper is an Admitter that counts, and refuses as it is told.
type gatekeeper struct {
	mu       sync.Mutex
	connect  Hold
	begin    Hold
	asked    int
	sessions int // admitted and not given back
	open     int // transactions likewise
	begun    int
	unused   int // admitted and not offered
	offered  int
	aborts   []func()
}

func (g *gatekeeper) Connect(now time.Time, p *Place) Hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked++
	if g.connect.Reason == "" {
		g.sessions++
		g.aborts = append(g.aborts, p.Abort)
	}
	return g.connect
}

func (g *gatekeeper) Closed(time.Time, *Place) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sessions--
}

func (g *gatekeeper) Begin(now time.Time, p *Place) Hold {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked++
	h := g.begin
	if h.Reason == "" || !h.Until.IsZero() && !now.Before(h.Until) {
		g.begun++
		g.open++
		return Hold{}
	}
	return h
}

func (g *gatekeeper) Done(_ time.Time, _ *Place, outcomes []relay.Outcome) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if outcomes == nil {
		g.unused++
	} else {
		g.offered += len(outcomes)
	}
}

func (g *gatekeeper) set(connect, begin Hold) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.connect, g.begin = connect, begin
}

func (g *gatekeeper) read(f func() bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return f()
}

// admitted returns a world whose engine asks gatekeepers.
func admitted(t *testing.T, keepers ...Admitter) *world {
	t.Helper()
	w := newWorld(t, nil, first)
	w.close()
	w.admit = keepers
	w.open()
	w.run(time.Second)
	return w
}

func TestNoSessionIsOpenedThatIsRefused(t *testing.T) {
	before, g := &gatekeeper{}, &gatekeeper{connect: Hold{Reason: "brake", Name: "b1", Scope: "everything", Text: "held by hand"}}
	w := admitted(t, before, g)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	state := relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt}
	var x Explanation
	w.until("the queue to be left alone", func() bool {
		x = w.engine.Explain(env, 0, state)
		return x.Reason == "brake"
	})
	if x.Limit != "b1" || x.Scope != "everything" || x.Text != "held by hand" || !x.Until.IsZero() {
		t.Errorf("%+v", x)
	}
	w.until("the first one to be told", func() bool { return before.read(func() bool { return before.sessions == 0 }) })
	if lanes := w.lab.Report().Lanes; len(lanes) > 0 {
		t.Errorf("it was connected: %+v", lanes)
	}
	g.set(Hold{}, Hold{})
	w.engine.Recall("b1")
	w.event(env, outbox.Delivered)
	w.settled(before, 1)
	w.settled(g, 1)
}

// TestAHoldSaysWhenItEnds: mail is asked about again long before a hold ends that
// lasts for hours, which is no news for people.
func TestAHoldSaysWhenItEnds(t *testing.T) {
	end := time.Now().Add(3 * time.Hour)
	w := admitted(t, &gatekeeper{connect: Hold{Reason: "warmup", Text: "the day's quota is spent", Until: end}})
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	var x Explanation
	w.until("the queue to be left alone", func() bool {
		x = w.engine.Explain(env, 0, relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt})
		return x.Reason == "warmup"
	})
	if !x.Until.Equal(end) {
		t.Errorf("it waits until %v, want %v", x.Until, end)
	}
}

// settled waits until all that was admitted was given back, and asks how many
// recipients were offered.
func (w *world) settled(g *gatekeeper, offered int) {
	w.t.Helper()
	w.until("the transactions to end", func() bool { return g.read(func() bool { return g.open == 0 && g.offered == offered }) })
	w.close()
	if !g.read(func() bool {
		return g.sessions == 0 && g.open == 0 && g.offered == offered && g.begun == offered+g.unused
	}) {
		w.t.Errorf("%+v", g)
	}
}

func TestMailWaitsOnItsSessionForAShortWhile(t *testing.T) {
	g := &gatekeeper{}
	w := admitted(t, g)
	g.set(Hold{}, Hold{Reason: "limit", Name: "l1", Until: time.Now().Add(maxBeginWait / 2)})
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	if e := w.event(env, outbox.Delivered); e.Attempts != 1 {
		t.Errorf("%d attempts", e.Attempts)
	}
	if n := w.lab.Report().Lanes[0].Connections; n != 1 {
		t.Errorf("%d connections", n)
	}
	w.settled(g, 1)
}

func TestRefusedMailIsNoAttempt(t *testing.T) {
	g, after := &gatekeeper{}, &gatekeeper{}
	w := admitted(t, g, after)
	g.set(Hold{}, Hold{})
	after.set(Hold{}, Hold{Reason: "warm-up", Name: "plan"})
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	w.until("it to be refused on its session", func() bool { return g.read(func() bool { return g.unused > 0 }) })
	after.set(Hold{}, Hold{})
	if e := w.event(env, outbox.Delivered); e.Attempts != 1 {
		t.Errorf("%d attempts", e.Attempts)
	}
	w.settled(g, 1)
}

// What an Admitter aborts ends although nothing happens on it.
func TestAnIdleSessionIsAborted(t *testing.T) {
	g := &gatekeeper{}
	w := admitted(t, g)
	w.view(func(d *policy.Document) { d.Delivery.IdleSession = policy.Duration(5 * time.Minute) }, first)
	w.event(w.accept(nil, w.at(lab.Google, 0, lab.Accept)), outbox.Delivered)
	if !g.read(func() bool { return g.sessions == 1 && len(g.aborts) == 1 }) {
		t.Fatalf("%+v", g)
	}
	g.aborts[0]()
	w.until("the session to end", func() bool { return g.read(func() bool { return g.sessions == 0 }) })
	w.event(w.accept(nil, w.at(lab.Google, 1, lab.Accept)), outbox.Delivered)
}

// talker is a gatekeeper with a gate in the scheduler.
type talker struct{ gatekeeper }

func (*talker) Explain(id schedule.GateID) (Hold, bool) {
	return Hold{Name: "night", Scope: "provider google", Text: "shut at night"}, id == schedule.GateID{Owner: "test", Number: 1}
}

func TestAGateKeepsMailFromSessions(t *testing.T) {
	g := &talker{}
	w := admitted(t, g)
	gate := schedule.Gate{ID: schedule.GateID{Owner: "test", Number: 1}, Match: schedule.Match{Provider: lab.Google}, Reason: "brake", NoMessages: true}
	w.engine.SetGates(gate)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	w.event(w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept)), outbox.Delivered)
	state := relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt}
	w.until("the gate to be named", func() bool { return w.engine.Explain(env, 0, state).Reason == "brake" })
	if x := w.engine.Explain(env, 0, state); x.Limit != "night" || x.Text != "shut at night" || x.Scope != "provider google" {
		t.Errorf("%+v", x)
	}
	held := false
	for _, l := range w.engine.Lanes() {
		held = held || l.Provider == lab.Google && l.Hold == "brake" && l.HoldText == "shut at night"
	}
	if !held {
		t.Errorf("no lane says it: %+v", w.engine.Lanes())
	}
	w.engine.KeepGates("test", nil)
	w.event(env, outbox.Delivered)
}

// An address that vanished from the machine takes its sessions with it: they would
// wait for answers that cannot come.
func TestSessionsEndWithTheirAddress(t *testing.T) {
	w := newWorld(t, nil, first)
	long := func(d *policy.Document) { d.Delivery.IdleSession = policy.Duration(5 * time.Minute) }
	w.view(long, first)
	w.event(w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept)), outbox.Delivered) // its session is idle now
	reached := w.holdAt(lab.Google, lab.PhaseMail, 5*time.Minute)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	reached()
	gone := first
	gone.Bind = netip.MustParseAddr("192.0.2.7")
	w.view(long, gone)
	w.event(env, outbox.Deferred)
	w.until("both sessions to end", func() bool {
		w.engine.mu.Lock()
		defer w.engine.mu.Unlock()
		return len(w.engine.sessions) == 0
	})
	if err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{}); err != nil {
		t.Fatal(err)
	}
	w.view(long, first)
	w.event(env, outbox.Delivered)
}
