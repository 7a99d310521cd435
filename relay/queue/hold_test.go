package queue

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// put makes a rule and waits until what waited is held.
func (f *fixture) put(m Match) ids.Hold {
	f.t.Helper()
	id, err := f.q.PutHold(HoldRule{Match: m, Cause: "a complaint of the owner", Owner: "operator", Actor: "ada"})
	if err != nil {
		f.t.Fatal(err)
	}
	f.swept()
	return id
}

// swept waits until the rules have nothing left to do.
func (f *fixture) swept() {
	f.t.Helper()
	limit := time.Now().Add(30 * time.Second)
	for {
		task, _, _ := f.q.nextRule()
		if task == ruleNothing && !slices.ContainsFunc(f.q.Holds(), func(h HoldInfo) bool { return h.Ending }) {
			return
		}
		if time.Now().After(limit) {
			f.t.Fatalf("the rules do not come to an end: %+v", f.q.Holds())
		}
		// The loop commits; a commit of our own passes behind it.
		if err := f.st.Barrier(func() {}); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fixture) remove(id ids.Hold) {
	f.t.Helper()
	if err := f.q.RemoveHold(id, "ada"); err != nil {
		f.t.Fatal(err)
	}
	f.swept()
}

// states counts the states of all recipients in the queue.
func (f *fixture) states() map[relay.State]int {
	f.t.Helper()
	out := map[relay.State]int{}
	list, _, err := f.q.List(Filter{}, maxListed)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, m := range list {
		for _, s := range m.States {
			out[s.State]++
		}
	}
	return out
}

// events counts the events by type.
func (f *fixture) events() map[outbox.Type]int {
	f.t.Helper()
	out := map[outbox.Type]int{}
	for after := uint64(0); ; {
		events, err := f.ob.Read(after, 1<<20)
		if err != nil {
			f.t.Fatal(err)
		}
		if len(events) == 0 {
			return out
		}
		for _, e := range events {
			out[e.Type]++
			after = e.Seq
		}
	}
}

// index counts what the index of held recipients has under a rule.
func (f *fixture) index(rule ids.Hold) (n int) {
	f.t.Helper()
	snap := f.st.Snapshot()
	defer snap.Close()
	if err := snap.Iterate(store.AppendHeldPrefix(nil, rule), nil, true, func(_, _ []byte) bool { n++; return true }); err != nil {
		f.t.Fatal(err)
	}
	return n
}

func TestRuleHoldsWhatWaitsAndWhatComes(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example", "b@two.example")
	id := f.put(Match{Domain: "one.example"})
	if got := f.states(); got[relay.StateHeld] != 1 || got[relay.StateWaiting] != 1 {
		t.Fatalf("after the rule: %v", got)
	}
	late := f.accept("c@one.example")
	info, err := f.q.Show(late.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s := info.States[0]; s.State != relay.StateHeld || s.Attempts != 0 || s.LastReply.Code != 0 || s.Held.Rule != id || s.Held.Why != "a complaint of the owner" {
		t.Errorf("mail that comes is %+v", s)
	}
	if w := f.take(10); w.Key.Domain != "two.example" {
		t.Errorf("took %s", w.Key.Domain)
	}
	if holds := f.q.Holds(); len(holds) != 1 || holds[0].Held != 2 || holds[0].Sweeping || f.index(id) != 2 {
		t.Errorf("rules: %+v, %d in the index", holds, f.index(id))
	}
	events, err := f.ob.Read(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.Type == outbox.Held && (e.Actor != "ada" || e.Reply.Text != "a complaint of the owner" || e.Attempts != 0) {
			t.Errorf("event %+v", e)
		}
	}
	f.remove(id)
	if got := f.states(); got[relay.StateHeld] != 0 || f.index(id) != 0 || len(f.q.Holds()) != 0 || f.q.Holding() {
		t.Errorf("after its end: %v, rules %+v", got, f.q.Holds())
	}
	for range 2 {
		if w := f.take(10); w.Key.Domain != "one.example" {
			t.Errorf("took %s", w.Key.Domain)
		}
	}
	if n := f.events(); n[outbox.Held] != 2 || n[outbox.Released] != 2 {
		t.Errorf("events %v", n)
	}
}

func TestRuleTakesWorkInHand(t *testing.T) {
	source := netip.MustParseAddr("192.0.2.7")
	for _, tc := range []struct {
		name  string
		match Match
		taken bool
	}{
		{"provider", Match{Provider: "google"}, true},
		{"other provider", Match{Provider: "orange"}, false},
		{"source", Match{Source: source}, true},
		{"other source", Match{Source: netip.MustParseAddr("192.0.2.8")}, false},
		{"provider and source", Match{Provider: "google", Source: source}, true},
		{"one of two", Match{Provider: "google", Stream: "other"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t).open()
			f.accept("a@one.example")
			w := f.take(1)
			id := f.put(tc.match)
			if got := f.q.HoldIfRuled(w, "google", source); got != tc.taken {
				t.Fatalf("taken: %v", got)
			}
			if !tc.taken {
				f.q.Return(w)
				return
			}
			f.remove(id) // waits for what is under way
			w = f.take(1)
			if w.Recipients[0].State.Attempts != 0 {
				t.Errorf("an attempt was counted")
			}
			f.delivered(w, nil)
			f.empty()
		})
	}
}

func TestMatchesOfRules(t *testing.T) {
	f := newFixture(t)
	env := f.envelope("a@one.example")
	env.Tag = "june"
	other := func(id byte) (out [16]byte) { out[0] = id; return }
	for _, tc := range []struct {
		name string
		m    Match
		want bool
	}{
		{"nothing named", Match{}, true},
		{"tenant", Match{Tenant: env.Tenant}, true},
		{"other tenant", Match{Tenant: other(9)}, false},
		{"stream", Match{Stream: "default"}, true},
		{"other stream", Match{Stream: "bulk"}, false},
		{"pool", Match{Pool: env.Pool}, true},
		{"other pool", Match{Pool: other(9)}, false},
		{"from", Match{From: "example.com"}, true},
		{"other from", Match{From: "sub.example.com"}, false},
		{"tag", Match{Tag: "june"}, true},
		{"other tag", Match{Tag: "jun"}, false},
		{"recipient domain", Match{Domain: "one.example"}, true},
		{"other recipient domain", Match{Domain: "two.example"}, false},
		{"all of them", Match{Tenant: env.Tenant, Stream: "default", Pool: env.Pool, From: "example.com", Domain: "one.example", Tag: "june"}, true},
		{"all but one", Match{Tenant: env.Tenant, Stream: "default", Pool: env.Pool, From: "example.com", Domain: "one.example", Tag: "july"}, false},
	} {
		if got := tc.m.message(env) && tc.m.domain(env.Recipients[0].Address.Domain); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestRuleIsRefused(t *testing.T) {
	f := newFixture(t).open()
	good := HoldRule{Match: Match{Stream: "bulk"}, Cause: "why", Owner: "operator"}
	for _, tc := range []struct {
		name  string
		edit  func(*HoldRule)
		field string
	}{
		{"names nothing", func(r *HoldRule) { r.Match = Match{} }, "rule"},
		{"names some and all", func(r *HoldRule) { r.All = true }, "all"},
		{"no cause", func(r *HoldRule) { r.Cause = " " }, "cause"},
		{"long cause", func(r *HoldRule) { r.Cause = fmt.Sprintf("%600d", 1) }, "cause"},
		{"no owner", func(r *HoldRule) { r.Owner = "" }, "owner"},
		{"over already", func(r *HoldRule) { r.Until = f.clock.Now() }, "until"},
	} {
		r := good
		tc.edit(&r)
		_, err := f.q.PutHold(r)
		var e *fault.Error
		if !asFault(err, &e) || e.Field != tc.field {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if f.q.Holding() || len(f.q.Holds()) != 0 {
		t.Error("a refused rule holds")
	}
	if err := f.q.RemoveHold(ids.NewHold(f.clock.Now()), "ada"); !fault.Is(err, fault.NotFound) {
		t.Errorf("removing none: %v", err)
	}
	for range maxHoldRules {
		if _, err := f.q.PutHold(good); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.q.PutHold(good); !fault.Is(err, fault.Conflict) {
		t.Errorf("one too many: %v", err)
	}
}

func asFault(err error, e **fault.Error) (ok bool) {
	*e, ok = err.(*fault.Error)
	return ok
}

// A rule survives a restart, with its words and what it has left to do.
func TestRuleSurvivesARestart(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example")
	r := HoldRule{
		Match: Match{Tag: "june", From: "example.com", Stream: "default", Domain: "one.example", Provider: "google", Source: netip.MustParseAddr("2001:db8::1")},
		Cause: "words", Owner: "T08", Actor: "check", Until: f.clock.Now().Add(time.Hour),
	}
	r.Match.Tenant[3], r.Match.Pool[4] = 1, 2
	odd, err := f.q.PutHold(r)
	if err != nil {
		t.Fatal(err)
	}
	mine := f.put(Match{Domain: "one.example"})
	f.reopen()
	f.swept()
	f.accept("b@one.example")
	if got := f.states(); got[relay.StateHeld] != 2 {
		t.Errorf("after a restart: %v", got)
	}
	f.loaded()
	f.eventually("the count", func() bool { return f.q.Summary().Counted })
	for _, h := range f.q.Holds() {
		switch h.ID {
		case odd:
			if h.Match != r.Match || h.Cause != r.Cause || h.Owner != r.Owner || h.Actor != r.Actor || !h.Until.Equal(r.Until) {
				t.Errorf("read back %+v", h)
			}
		case mine:
			if h.Held != 2 {
				t.Errorf("holds %d", h.Held)
			}
		}
	}
	// Replacing its words keeps what it holds.
	if _, err := f.q.PutHold(HoldRule{ID: mine, Match: Match{Domain: "one.example"}, Cause: "other words", Owner: "operator"}); err != nil {
		t.Error(err)
	}
	if _, err := f.q.PutHold(HoldRule{ID: mine, Match: Match{Domain: "two.example"}, Cause: "other words", Owner: "operator"}); !fault.Is(err, fault.Conflict) {
		t.Errorf("other mail under the same rule: %v", err)
	}
	f.remove(mine)
	if got := f.states(); got[relay.StateHeld] != 0 || got[relay.StateWaiting] != 2 {
		t.Errorf("released: %v", got)
	}
}

func TestRuleEndsByItself(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example")
	if _, err := f.q.PutHold(HoldRule{All: true, Cause: "maintenance", Owner: "operator", Until: f.clock.Now().Add(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	f.swept()
	if got := f.states(); got[relay.StateHeld] != 1 {
		t.Fatalf("held: %v", got)
	}
	f.clock.Add(time.Minute)
	f.q.wakeRules()
	f.swept()
	if w := f.take(1); w == nil || len(f.q.Holds()) != 0 {
		t.Errorf("after its time: %v", f.q.Holds())
	}
}

// Held mail ends at its deadline, and leaves nothing behind.
func TestHeldMailExpires(t *testing.T) {
	f := newFixture(t).open()
	env := f.envelope("a@one.example", "b@two.example")
	env.ExpiresAt = env.AcceptedAt.Add(time.Hour)
	id := f.put(Match{Domain: "one.example"})
	if err := f.q.Accept(context.Background(), env, f.body("x")); err != nil {
		t.Fatal(err)
	}
	f.clock.Add(2 * time.Hour)
	f.loaded()
	works := f.q.PopExpired(f.clock.Now(), 10)
	for _, w := range works {
		f.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
	}
	f.empty()
	if f.index(id) != 0 || f.q.Holds()[0].Held != 0 {
		t.Errorf("%d left in the index, %+v", f.index(id), f.q.Holds())
	}
}

// A release before this one ends held mail without knowing the index. Releasing
// the rule clears up.
func TestReleaseDropsStaleEntries(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept("a@one.example", "b@two.example")
	id := f.put(Match{Stream: "default"})
	b := f.st.NewBatch()
	b.Set(store.AppendHeldKey(nil, id, ids.NewMessage(f.clock.Now()), 0), nil)
	b.Set(store.AppendHeldKey(nil, id, env.ID, 1), nil)
	state := relay.RecipientState{State: relay.StateExpired}
	b.Set(store.AppendStateKey(nil, env.ID, 1), appendState(nil, &state))
	if err := f.st.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	f.remove(id)
	if n := f.index(id); n != 0 {
		t.Errorf("%d entries left", n)
	}
	if w := f.take(5); w.Key.Domain != "one.example" {
		t.Errorf("took %v", w.Key)
	}
}

// TestReleaseSurvivesACrash stops in the middle of a release of many messages
// and opens the disk again: everything waits once, nothing is held.
func TestReleaseSurvivesACrash(t *testing.T) {
	f := newFixture(t)
	f.sizes.stepMessages = 16
	f.open()
	const n = 600
	for i := range n {
		f.accept(fmt.Sprintf("u%d@d%d.example", i, i%7))
	}
	id := f.put(Match{Stream: "default"})
	if got := f.states(); got[relay.StateHeld] != n {
		t.Fatalf("held: %v", got)
	}
	if err := f.q.RemoveHold(id, "ada"); err != nil {
		t.Fatal(err)
	}
	f.eventually("a part of the release", func() bool { return f.q.Summary().Waiting >= n/8 })
	f.reopen()
	left := f.index(id)
	f.swept()
	t.Logf("%d of %d were held when it stopped", left, n)
	if got := f.states(); got[relay.StateWaiting] != n || got[relay.StateHeld] != 0 || len(f.q.Holds()) != 0 {
		t.Errorf("after the restart: %v, rules %+v", got, f.q.Holds())
	}
	if e := f.events(); e[outbox.Released] != n || e[outbox.Held] != n {
		t.Errorf("events %v", e)
	}
	seen := map[ids.Message]bool{}
	for range n {
		w := f.take(1)
		if seen[w.Env.ID] {
			t.Fatalf("%s was given twice", w.Env.ID)
		}
		seen[w.Env.ID] = true
		f.delivered(w, nil)
	}
	f.empty()
}

// Without a rule nothing is allocated, and with rules that do not match neither.
func TestAskingRulesAllocatesNothing(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example")
	w := f.take(1)
	source := netip.MustParseAddr("192.0.2.7")
	ask := func() { f.q.HoldIfRuled(w, "google", source) }
	if n := testing.AllocsPerRun(100, ask); n != 0 {
		t.Errorf("%v allocations without a rule", n)
	}
	f.put(Match{Domain: mailaddr.Domain("elsewhere.example"), Provider: "orange"})
	if n := testing.AllocsPerRun(100, ask); n != 0 {
		t.Errorf("%v allocations with a rule", n)
	}
	f.q.Return(w)
}
