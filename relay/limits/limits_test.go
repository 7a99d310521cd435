package limits

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

func TestShutUntilTheLeaderLends(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	if g := w.gate(1); !g.NoMessages || g.Reason != Reason || g.Match != (schedule.Match{Provider: "google"}) {
		t.Fatalf("before anything was lent: %+v", g)
	}
	if h := w.begin(); h.Reason != Reason || h.Name != "mail" || !strings.Contains(w.words(h), "no share of it yet") {
		t.Errorf("%+v: %s", h, w.words(h))
	}
	w.wants(1000, 0)
	w.pass(2 * time.Second)
	g := w.gate(1)
	if g.NoMessages || g.Messages.Max != 1 || g.Messages.Per > 115*time.Millisecond || g.Messages.Burst != 9 {
		t.Fatalf("one relay alone wants it, so it has all but the reserve: %+v", g)
	}
	// What is begun over any time is what the limit allows.
	begun, from := 0, w.clock
	for w.clock < from.Add(30*time.Second) {
		for w.begin().Reason == "" {
			begun++
		}
		w.pass(20 * time.Millisecond)
	}
	if begun < 270 || begun > 310 {
		t.Errorf("%d messages in 30 s, the limit is 600 a minute", begun)
	}
	h := w.begin()
	if wait := time.Until(h.Until); wait > time.Second || wait < -time.Second {
		t.Errorf("the next one in %v", wait)
	}
	for _, part := range []string{"the limit mail allows 600 messages in 1m", "provider google, all relays", "this relay may use 5", " of it until ", " UTC)"} {
		if text := w.words(h); !strings.Contains(text, part) {
			t.Errorf("%q lacks %q", text, part)
		}
	}
	if h.Scope != "provider google, all relays" {
		t.Errorf("scope %q", h.Scope)
	}
}

func TestCutOffLeavesTheFloor(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.wants(1000, 0)
	w.pass(10 * time.Second)
	w.cut = true
	w.limits.Linked(false)
	w.pass(6 * time.Second)
	if g := w.gate(1); g.Messages.Per > 115*time.Millisecond {
		t.Errorf("before the lease ends: %+v", g)
	}
	w.pass(5 * time.Second)
	if g := w.gate(1); g.Messages.Per != 500*time.Millisecond || g.Messages.Burst != 2 {
		t.Errorf("a fifth of the limit is left: %+v", g)
	}
	if x, ok := w.limits.Explain(schedule.GateID{Owner: Owner, Number: 1}); !ok || !strings.Contains(x.Text, "may use 120 (its floor); cut off") {
		t.Errorf("%+v", x)
	}
	w.pass(24 * time.Hour)
	if g := w.gate(1); !g.NoMessages {
		t.Errorf("the floor's day is over: %+v", g)
	}
	w.cut = false
	w.limits.Linked(true)
	w.pass(3 * time.Second)
	if g := w.gate(1); g.NoMessages {
		t.Errorf("back again: %+v", g)
	}
}

func TestRestartHasFloorsAndNothingElse(t *testing.T) {
	for name, c := range map[string]struct {
		between func(*world)
		want    time.Duration // from one event to the next; 0: none
	}{
		"process":      {func(*world) {}, 500 * time.Millisecond},
		"machine":      {func(w *world) { w.boot, w.clock = "second", lease.Instant(time.Second) }, 500 * time.Millisecond},
		"disk lost":    {func(w *world) { w.remove() }, 0},
		"disk damaged": {func(w *world) { w.damage("{") }, 0},
		"newer format": {func(w *world) { w.damage(`{"format":99}`) }, 0},
		"clock went back": {func(w *world) {
			w.boot = "second"
			w.edit(`"time": "20`, `"time": "21`)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, rateLimit(1, nil))
			w.wants(1000, 0)
			w.pass(10 * time.Second)
			w.cut = true
			c.between(w)
			w.start()
			w.pass(time.Second)
			g := w.gate(1)
			if c.want == 0 && !g.NoMessages || c.want != 0 && g.Messages.Per != c.want {
				t.Errorf("%+v", g)
			}
			w.cut = false
			w.limits.Linked(true)
			w.pass(3 * time.Second)
			if g := w.gate(1); g.NoMessages || g.Messages.Per > 115*time.Millisecond {
				t.Errorf("heard again: %+v", g)
			}
		})
	}
}

func (w *world) remove() {
	if err := os.Remove(filepath.Join(w.dir, floorsFile)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) damage(text string) {
	if err := os.WriteFile(filepath.Join(w.dir, floorsFile), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) edit(from, to string) {
	text, err := os.ReadFile(filepath.Join(w.dir, floorsFile))
	if err != nil || !strings.Contains(string(text), from) {
		w.t.Fatalf("%v: %s", err, text)
	}
	w.damage(strings.Replace(string(text), from, to, 1))
}

// A floor that became smaller is confirmed only when the disk knows it: a restart
// would have the former one while the leader has lent the difference.
func TestASmallerFloorIsSavedBeforeItIsConfirmed(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.wants(1000, 0)
	w.pass(10 * time.Second)
	grant := func(seq uint64, floor int64) {
		w.limits.Grant(&wire.LeaseGrant{Incarnation: 1, Generation: 1, Term: 2, Lines: []*wire.LeaseGrantLine{
			{Limit: 1, Kind: uint32(lease.Rate), PerMs: 60_000, Seq: seq, Amount: 1000, Burst: 1, FloorAmount: floor, FloorBurst: 1},
		}})
	}
	confirmed := func() uint64 {
		w.clock = w.clock.Add(5 * time.Second)
		w.limits.round()
		return last[*wire.LeaseReport](w).GetLines()[0].GetStamp().GetSeq()
	}
	w.cut = true // the other end is the test
	grant(50, 60_000)
	if got := confirmed(); got == 50 {
		t.Fatal("it was confirmed before the disk knew it")
	}
	if len(w.limits.saves) != 1 {
		t.Fatal("nothing is on its way to the disk")
	}
	w.disk()
	if got := confirmed(); got != 50 {
		t.Fatalf("saved, and confirmed is %d", got)
	}
	w.start()
	if g := w.gate(1); g.Messages.Per != time.Second {
		t.Errorf("the disk holds %+v", g)
	}
	// What cannot be saved is not confirmed.
	w.limits.Linked(true)
	w.limits.Welcome(&wire.LeaseWelcome{Incarnation: 2})
	w.limits.cfg.Dir = filepath.Join(w.dir, "gone")
	w.limits.Grant(&wire.LeaseGrant{Incarnation: 2, Generation: 1, Term: 3, Lines: []*wire.LeaseGrantLine{
		{Limit: 1, Kind: uint32(lease.Rate), PerMs: 60_000, Seq: 7, Amount: 1000, Burst: 1, FloorAmount: 30_000, FloorBurst: 1},
	}})
	confirmed()
	w.disk()
	if got := confirmed(); got == 7 {
		t.Error("it was confirmed though it could not be saved")
	}
}

// What a report earns counts from before it is written.
func TestTheLeaseCountsFromBeforeTheReport(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.wants(1000, 0)
	w.pass(5 * time.Second)
	w.cut = true // no grant comes by itself any more
	send, sent := w.limits.cfg.Send, w.clock
	w.limits.cfg.Send = nil
	_ = send
	report := func() {
		w.limits.mu.Lock()
		defer w.limits.mu.Unlock()
		sent = w.clock
		r := w.limits.holder.Report(w.clock)
		w.clock = w.clock.Add(4 * time.Second) // the answer takes long
		w.limits.holder.Grant(w.clock, &lease.Grant{Node: self, Incarnation: 1, Generation: 1, Term: 9, Nonce: r.Nonce, Lines: []lease.GrantLine{
			{Limit: 1, Kind: lease.Rate, Per: time.Minute, Seq: 1, Share: lease.Share{Amount: 1000, Burst: 1}},
		}})
	}
	report()
	w.limits.mu.Lock()
	defer w.limits.mu.Unlock()
	if end := w.limits.table.Load().limits[0].rights.Ends(w.clock); end != sent.Add(10*time.Second-200*time.Millisecond) {
		t.Errorf("the lease ends %v after the report was made", end.Sub(sent))
	}
}

func TestGreetsUntilWelcomed(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.cut = true
	w.limits.Linked(true)
	w.pass(10 * time.Second)
	hellos := 0
	for _, m := range w.said {
		switch m.(type) {
		case *wire.LeaseHello:
			hellos++
		case *wire.LeaseReport:
			t.Fatal("it reports to a leader that does not know it")
		}
	}
	if hellos != 4 {
		t.Errorf("%d greetings in 10 s, one every 3 s is due", hellos)
	}
	w.cut = false
	w.wants(10, 0)
	w.pass(4 * time.Second)
	if r := last[*wire.LeaseReport](w); r.GetIncarnation() != 1 || len(r.GetLines()) != 1 {
		t.Fatalf("%v", r)
	}
	// A leader that does not know the process is greeted at once, however often it
	// says so.
	before := len(w.said)
	w.cut = true
	for range 5 {
		w.limits.HelloWanted()
		w.limits.round()
	}
	if got := w.said[before:]; len(got) != 1 {
		t.Errorf("said %v", got)
	}
	w.limits.Welcome(&wire.LeaseWelcome{Incarnation: 7}) // of another process
	w.limits.round()
	if got := w.said[before:]; len(got) != 1 {
		t.Errorf("said %v", got)
	}
}

func TestNothingIsSaidWithoutLimits(t *testing.T) {
	w := newWorld(t)
	w.pass(time.Minute)
	if len(w.said) > 0 || len(w.gates) > 0 {
		t.Errorf("said %v, set %v", w.said, w.gates)
	}
	w.see(rateLimit(1, nil))
	w.wants(10, 0)
	w.pass(5 * time.Second)
	if g := w.gate(1); g.Messages.Max == 0 {
		t.Errorf("%+v", g)
	}
	w.see()
	if len(w.gates) > 0 || w.begin().Reason != "" {
		t.Error("a limit that is gone holds")
	}
}

func TestRelease(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil))
	w.wants(1000, 0)
	w.pass(5 * time.Second)
	w.limits.Release()
	w.lead()
	if got := w.table.Holding(1, self).Ceiling.Amount; got != 0 {
		t.Errorf("%d is still lent", got)
	}
	w.limits.refresh()
	if g := w.gate(1); g.Messages.Per != 500*time.Millisecond {
		t.Errorf("only the floor is the relay's own: %+v", g)
	}
}

func TestWhatALimitMatches(t *testing.T) {
	match := func(change func(*policy.SharedLimit)) bool {
		w := newWorld(t, rateLimit(1, change))
		return w.begin().Reason != ""
	}
	for name, c := range map[string]struct {
		change func(*policy.SharedLimit)
		want   bool
	}{
		"everything":      {func(l *policy.SharedLimit) { l.Provider = "" }, true},
		"other provider":  {func(l *policy.SharedLimit) { l.Provider = "yahoo" }, false},
		"tenant":          {func(l *policy.SharedLimit) { l.Tenant = acme }, true},
		"other tenant":    {func(l *policy.SharedLimit) { l.Tenant = [16]byte{9} }, false},
		"domain":          {func(l *policy.SharedLimit) { l.Domain, l.Provider = "gmail.test", "" }, true},
		"other domain":    {func(l *policy.SharedLimit) { l.Domain = "x.test" }, false},
		"pool":            {func(l *policy.SharedLimit) { l.Pool, l.Provider = pool, "" }, true},
		"other pool":      {func(l *policy.SharedLimit) { l.Pool = [16]byte{9} }, false},
		"tenant, domain":  {func(l *policy.SharedLimit) { l.Tenant, l.Domain = acme, "gmail.test" }, true},
		"tenant, another": {func(l *policy.SharedLimit) { l.Tenant, l.Domain = acme, "x.test" }, false},
	} {
		if got := match(c.change); got != c.want {
			t.Errorf("%s: held %v", name, got)
		}
	}
}

// All limits or none: what is refused by one takes nothing of another.
func TestARefusalTakesNothing(t *testing.T) {
	w := newWorld(t, rateLimit(1, nil), rateLimit(2, func(l *policy.SharedLimit) { l.Name, l.Domain = "small", "gmail.test"; l.Max, l.Burst = lease.Milli, 1 }))
	w.wants(1000, 0)
	w.pass(2 * time.Minute)
	if h := w.begin(); h.Reason != "" {
		t.Fatalf("%+v", h)
	}
	for range 100 {
		if h := w.begin(); h.Name != "small" {
			t.Fatalf("the smaller scope is named: %+v", h)
		}
	}
	lim := w.limits.table.Load().byNumber[1]
	if lim.used != 1 {
		t.Errorf("%d rights of the other limit were used", lim.used)
	}
}

func TestDemand(t *testing.T) {
	lim := &limit{SharedLimit: rateLimit(1, nil)}
	if got := lim.demand(&schedule.GateState{}, time.Second); got != 0 {
		t.Errorf("nothing to do, wanted %d", got)
	}
	if got := lim.demand(&schedule.GateState{Waiting: 1}, time.Second); got < lease.Milli {
		t.Errorf("one waits, wanted %d", got)
	}
	for range 60 { // 5 a second come and go at once
		lim.begun = 5
		lim.demand(&schedule.GateState{}, time.Second)
	}
	lim.begun = 5
	if got := lim.demand(&schedule.GateState{}, time.Second); got < 299_000 || got > 301_000 {
		t.Errorf("300 a minute arrive, wanted %d", got)
	}
	if got := lim.demand(&schedule.GateState{Waiting: 1_000_000, Held: true}, time.Second); got != demandFactor*lim.Max {
		t.Errorf("very many wait, wanted %d", got)
	}
	for range 120 {
		lim.demand(&schedule.GateState{}, time.Second)
	}
	if got := lim.demand(&schedule.GateState{}, time.Second); got != 0 {
		t.Errorf("long after the end, wanted %d", got)
	}
	open := &limit{SharedLimit: slotLimit(2, 10)}
	for _, c := range []struct {
		s    schedule.GateState
		want int64
	}{{schedule.GateState{}, 0}, {schedule.GateState{Sessions: 3}, 3}, {schedule.GateState{Sessions: 3, Waiting: 1}, 4}, {schedule.GateState{Waiting: 9}, 3}, {schedule.GateState{Waiting: 900}, 10}} {
		if got := open.demand(&c.s, time.Second); got != c.want {
			t.Errorf("%+v: wanted %d, want %d", c.s, got, c.want)
		}
	}
}
