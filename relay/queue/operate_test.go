package queue

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

func TestFilterOfStates(t *testing.T) {
	source, sticky := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	tried := relay.RecipientState{
		State: relay.StateWaiting, Attempts: 2, LastClass: "greylist", LastReply: relay.Reply{Code: 450, Enhanced: "4.2.0", Text: "Greylisted, see FAQ"},
		Source: source, Sticky: sticky, Provider: "orange",
	}
	doubted := relay.RecipientState{State: relay.StateWaiting, InDoubt: 1}
	fresh := relay.RecipientState{State: relay.StateWaiting}
	held := relay.RecipientState{State: relay.StateHeld, Held: &relay.Held{}}
	ended := relay.RecipientState{State: relay.StateDelivered}
	for _, tc := range []struct {
		name string
		f    Filter
		want []bool // tried, doubted, fresh, held, ended
	}{
		{"nothing", Filter{}, []bool{true, true, true, true, false}},
		{"waiting", Filter{State: relay.StateWaiting}, []bool{true, true, true, false, false}},
		{"held", Filter{State: relay.StateHeld}, []bool{false, false, false, true, false}},
		{"in doubt", Filter{State: relay.StateWaiting, InDoubt: true}, []bool{false, true, false, false, false}},
		{"class", Filter{LastReply: "greylist"}, []bool{true, false, false, false, false}},
		{"part of a class", Filter{LastReply: "grey"}, []bool{true, false, false, false, false}}, // of the text, in any case
		{"code", Filter{LastReply: "450 4.2.0"}, []bool{true, false, false, false, false}},
		{"text in another case", Filter{LastReply: "SEE FAQ"}, []bool{true, false, false, false, false}},
		{"other reply", Filter{LastReply: "451"}, []bool{false, false, false, false, false}},
		{"last source", Filter{Match: Match{Source: source}}, []bool{true, false, false, false, false}},
		{"sticky source", Filter{Match: Match{Source: sticky}}, []bool{true, false, false, false, false}},
		{"other source", Filter{Match: Match{Source: netip.MustParseAddr("192.0.2.3")}}, []bool{false, false, false, false, false}},
		{"provider of the last attempt", Filter{Match: Match{Provider: "orange"}}, []bool{true, false, false, false, false}},
		{"other provider", Filter{Match: Match{Provider: "google"}}, []bool{false, false, false, false, false}},
		{"no provider known", Filter{Match: Match{Provider: UnknownProvider}}, []bool{false, true, true, true, false}},
		{"domain", Filter{Match: Match{Domain: "one.example"}}, []bool{true, true, true, true, false}},
		{"other domain", Filter{Match: Match{Domain: "two.example"}}, []bool{false, false, false, false, false}},
		{"two at once", Filter{LastReply: "450", State: relay.StateHeld}, []bool{false, false, false, false, false}},
	} {
		for i, s := range []relay.RecipientState{tried, doubted, fresh, held, ended} {
			if got := tc.f.state(&s, "one.example", func(mailaddr.Domain) string { return "" }); got != tc.want[i] {
				t.Errorf("%s: state %d: %v", tc.name, i, got)
			}
		}
	}
	now := func(mailaddr.Domain) string { return "google" }
	if f := (Filter{Match: Match{Provider: "orange"}}); f.state(&tried, "one.example", now) {
		t.Error("a domain that moved to another provider is still with the former one")
	}
}

func TestFilterOfMessages(t *testing.T) {
	f := newFixture(t)
	env := f.envelope("a@one.example")
	at := env.AcceptedAt
	for _, tc := range []struct {
		name string
		f    Filter
		want bool
	}{
		{"older", Filter{AcceptedBefore: at.Add(time.Second)}, true},
		{"not older", Filter{AcceptedBefore: at}, false},
		{"younger", Filter{AcceptedAfter: at.Add(-time.Second)}, true},
		{"not younger", Filter{AcceptedAfter: at}, false},
		{"between", Filter{AcceptedAfter: at.Add(-time.Second), AcceptedBefore: at.Add(time.Second)}, true},
		{"other stream", Filter{Match: Match{Stream: "x"}}, false},
	} {
		if got := tc.f.message(env); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
		if tc.f.Empty() {
			t.Errorf("%s: seems to be empty", tc.name)
		}
	}
}

// operate runs an operation to its end.
func (f *fixture) operate(action Action, filter Filter) Progress {
	f.t.Helper()
	p, err := f.q.Operate(context.Background(), Operation{Action: action, Filter: filter, Actor: "ada", Reason: "because", End: f.bounce}, func(Progress) {})
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

func TestOperationsOnNamedMail(t *testing.T) {
	f := newFixture(t).open()
	one, two := f.accept("a@one.example", "b@two.example", "c@one.example"), f.accept("d@one.example")
	chosen := []Chosen{{two.ID, AllRecipients}, {one.ID, 2}, {ids.NewMessage(f.clock.Now()), AllRecipients}, {one.ID, 1}}
	SortChosen(chosen)
	if p := f.operate(ActionHold, Filter{Chosen: chosen}); p.Done != 3 || p.Matched != 3 || !p.Finished {
		t.Fatalf("held %+v", p)
	}
	info, err := f.q.Show(one.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []relay.State{relay.StateWaiting, relay.StateHeld, relay.StateHeld} {
		if info.States[i].State != want {
			t.Errorf("recipient %d is %v, want %v", i, info.States[i].State, want)
		}
	}
	if h := info.States[1].Held; h.By != "ada" || h.Why != "because" || !h.Rule.IsZero() {
		t.Errorf("held %+v", h)
	}
	if list, _, err := f.q.List(Filter{Chosen: chosen, State: relay.StateHeld}, 10); err != nil || len(list) != 2 {
		t.Errorf("%d listed, %v", len(list), err)
	}
	if p := f.operate(ActionRelease, Filter{Match: Match{Domain: "two.example"}}); p.Done != 1 {
		t.Errorf("released %+v", p)
	}
	if p := f.operate(ActionPurge, Filter{Chosen: []Chosen{{one.ID, AllRecipients}}}); p.Done != 3 {
		t.Errorf("purged %+v", p)
	}
	if p := f.operate(ActionBounce, Filter{}); p.Done != 1 {
		t.Errorf("bounced %+v", p)
	}
	f.eventually("the end of both", func() bool { return f.q.Summary().Messages == 0 })
	f.empty()
	if n := f.events(); n[outbox.Purged] != 3 || n[outbox.Held] != 3 || n[outbox.Released] != 1 || n[outbox.Bounced] != 1 {
		t.Errorf("events %v", n)
	}
	if f.index(ids.Hold{}) != 0 || f.q.Summary().Held != 0 {
		t.Errorf("%d held entries are left", f.index(ids.Hold{}))
	}
}

func TestRetryIsDueNowButNotBeforeItsTime(t *testing.T) {
	f := newFixture(t).open()
	later := f.envelope("later@one.example")
	later.NotBefore = f.clock.Now().Add(time.Hour)
	if err := f.q.Accept(context.Background(), later, f.body("x")); err != nil {
		t.Fatal(err)
	}
	deferred := f.accept("deferred@two.example")
	doubted := f.accept("doubted@three.example")
	due := f.accept("due@four.example")
	for range 3 {
		w := f.take(1)
		next := f.clock.Now().Add(time.Hour)
		switch w.Env.ID {
		case deferred.ID:
			f.finish(w, nil, all(w, relay.StateWaiting, outbox.Deferred, next))
		case doubted.ID:
			r := all(w, relay.StateWaiting, outbox.InDoubt, next)
			r[0].State.InDoubt = 1
			f.finish(w, nil, r)
		default:
			defer f.q.Return(w)
			if w.Env.ID != due.ID {
				t.Fatalf("took %s", w.Env.ID)
			}
		}
	}
	if p := f.operate(ActionRetry, Filter{}); p.Done != 1 || p.Skipped != 2 || p.InFlight != 1 || p.Matched != 4 {
		t.Errorf("retried %+v", p)
	}
	w := f.take(1)
	if w.Env.ID != deferred.ID || w.Recipients[0].State.Attempts != 1 {
		t.Errorf("took %s, %+v", w.Env.ID, w.Recipients[0].State)
	}
	f.q.Return(w)
	if p := f.operate(ActionRetry, Filter{InDoubt: true}); p.Done != 1 {
		t.Errorf("retried what is in doubt: %+v", p)
	}
	if info, err := f.q.Show(later.ID); err != nil || !info.States[0].Next.Equal(later.NotBefore) {
		t.Errorf("mail for later is due at %v, %v", info.States[0].Next, err)
	}
	if n := f.events(); n[outbox.Hastened] != 2 {
		t.Errorf("events %v", n)
	}
}

func TestOperationIsRefused(t *testing.T) {
	f := newFixture(t).open()
	for name, tc := range map[string]struct {
		op    Operation
		field string
	}{
		"unknown":            {Operation{Action: "burn"}, "action"},
		"bounce of nothing":  {Operation{Action: ActionBounce, End: f.bounce}, "reason"},
		"retry of held":      {Operation{Action: ActionRetry, Filter: Filter{State: relay.StateHeld}}, "state"},
		"release of waiting": {Operation{Action: ActionRelease, Filter: Filter{State: relay.StateWaiting}}, "state"},
		"long reason":        {Operation{Action: ActionPurge, Reason: fmt.Sprintf("%600d", 1)}, "reason"},
		"reason on lines":    {Operation{Action: ActionPurge, Reason: "a\r\nb: c"}, "reason"},
	} {
		_, err := f.q.Operate(context.Background(), tc.op, func(Progress) {})
		var e *fault.Error
		if !asFault(err, &e) || e.Field != tc.field {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An operation that is interrupted ends behind the step in hand, and goes on
// from its token; nothing is done twice or left out.
func TestOperationGoesOn(t *testing.T) {
	f := newFixture(t)
	f.sizes.stepMessages = 10
	f.open()
	const n = 95
	for i := range n {
		f.accept(fmt.Sprintf("u%d@one.example", i))
	}
	op := Operation{Action: ActionPurge, Filter: Filter{Match: Match{Domain: "one.example"}}, Actor: "ada"}
	var done int64
	for part := 0; ; part++ {
		ctx, cancel := context.WithCancel(context.Background())
		p, err := f.q.Operate(ctx, op, func(p Progress) {
			if p.Looked >= 30 {
				cancel()
			}
			if p.Total < p.Looked {
				t.Errorf("%d of %d", p.Looked, p.Total)
			}
		})
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		done += p.Done
		if p.Looked > 30 && p.Finished || p.Looked > 40 {
			t.Errorf("part %d looked at %d", part, p.Looked)
		}
		if got := f.states()[relay.StateWaiting]; int64(got) != n-done {
			t.Errorf("%d are left, %d were purged", got, done)
		}
		if p.Finished {
			break
		}
		op.Filter.After = p.After
		f.reopen()
	}
	if done != n || f.events()[outbox.Purged] != n {
		t.Errorf("%d purged, events %v", done, f.events())
	}
	f.empty()
}

// Actions and deliveries at the same time: each recipient ends once, and those
// in hand are left alone. Strict panics on anything that has two owners.
func TestOperationsBesideDeliveries(t *testing.T) {
	f := newFixture(t)
	f.sizes = sizes{minMemory: 40, minPage: 8, maxPage: 16, maxDeadlines: 64, floorEvery: 16, stepMessages: 32}
	f.policy.MaxMemoryRecipients = 40
	f.open()
	const n = 600
	for i := range n {
		f.accept(fmt.Sprintf("u%d@d%d.example", i, i%5), fmt.Sprintf("v%d@d%d.example", i, i%3))
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	end := sync.OnceFunc(func() {
		close(stop)
		wg.Wait()
	})
	defer end() // before the queue is closed, whatever fails
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				f.q.Queues(func(info QueueInfo) bool {
					if w, ok := takeLoaded(f.q, info.Number, f.clock.Now(), 4); ok && !f.q.HoldIfRuled(w, "google", netip.Addr{}) {
						f.delivered(w, nil)
					}
					return true
				})
			}
		})
	}
	op := func(a Action, m Match) { f.operate(a, Filter{Match: m}) }
	rule, err := f.q.PutHold(HoldRule{Match: Match{Domain: "d4.example"}, Cause: "why", Owner: "operator"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		d := Match{Domain: mailaddr.Domain(fmt.Sprintf("d%d.example", i))}
		op(ActionHold, d)
		op(ActionRetry, d)
		op(ActionRelease, d)
		op([]Action{ActionPurge, ActionBounce}[i%2], Match{Domain: "d0.example"})
	}
	if err := f.q.RemoveHold(rule, "ada"); err != nil {
		t.Fatal(err)
	}
	f.eventually("the end of all", func() bool { s := f.q.Summary(); return s.Waiting+s.Held == 0 && s.InFlight == 0 && s.Messages == 0 })
	end()
	f.empty()
	e := f.events()
	if got := e[outbox.Delivered] + e[outbox.Purged] + e[outbox.Bounced]; got != 2*n {
		t.Errorf("%d ends of %d recipients: %v", got, 2*n, e)
	}
	t.Logf("%v", e)
}

// TestResumingWaitsForWhatWasInterrupted: an operation that is interrupted holds the
// mail of its next step for a moment. Who resumes it at once leaves none of it out.
func TestResumingWaitsForWhatWasInterrupted(t *testing.T) {
	f := newFixture(t)
	f.sizes.stepMessages = 10
	f.open()
	const n = 95
	for i := range n {
		f.accept(fmt.Sprintf("u%d@one.example", i))
	}
	ctx, interrupt := context.WithCancel(t.Context())
	op := Operation{Action: ActionPurge, Actor: "ada"}
	type ended struct {
		Progress
		err error
	}
	resumed := make(chan ended, 1)
	reports := 0
	first, err := f.q.Operate(ctx, op, func(p Progress) {
		if reports++; reports > 1 {
			return
		}
		interrupt()
		go func() {
			again := op
			again.Filter.After = p.After
			got, err := f.q.Operate(t.Context(), again, func(Progress) {})
			resumed <- ended{got, err}
		}()
		for waiting := 0; waiting == 0 && len(resumed) == 0; runtime.Gosched() { // else it takes what there is now
			f.q.operations.mu.Lock()
			waiting = f.q.operations.waiting
			f.q.operations.mu.Unlock()
		}
	})
	if err != nil || first.Finished {
		t.Fatalf("interrupted: %+v %v", first, err)
	}
	if got := <-resumed; got.err != nil || !got.Finished || got.InFlight != 0 || got.Done+first.Done != n {
		t.Errorf("interrupted at %+v, resumed to %+v", first, got)
	}
	f.empty()
}

// BenchmarkPurge measures the purge of 100,000 waiting recipients, most of them
// on disk only.
func BenchmarkPurge(b *testing.B) {
	const n = 100_000
	for b.Loop() {
		b.StopTimer()
		f := newFixtureIn(b, b.TempDir())
		f.policy.MaxMemoryRecipients = 10_000
		f.open()
		f.fill(n)
		b.StartTimer()
		p := f.operate(ActionPurge, Filter{})
		b.StopTimer()
		if p.Done != n {
			b.Fatalf("%+v", p)
		}
		f.empty()
		f.close()
		b.StartTimer()
	}
	b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds(), "recipients/s")
}

// fill accepts n messages of one recipient each, in 1,000 domains.
func (f *fixture) fill(n int) {
	f.t.Helper()
	var wg sync.WaitGroup
	for part := range slices.Chunk(numbered("%d", n), n/64+1) {
		wg.Go(func() {
			for i, s := range part {
				f.accept(fmt.Sprintf("u%s@d%d.example", s, i%1000))
			}
		})
	}
	wg.Wait()
}

// An operation of which a step fails ends in front of that step, and goes on from
// there.
func TestOperationEndsInFrontOfAStepThatFails(t *testing.T) {
	f := newFixture(t)
	f.sizes.stepMessages = 10
	f.open()
	const n = 55
	var failing ids.Message
	for i := range n {
		f.clock.Add(time.Millisecond) // or their ids were in any order
		if env := f.accept(fmt.Sprintf("u%d@one.example", i)); i == 34 {
			failing = env.ID
		}
	}
	broken := fault.New(fault.Unavailable, "test", "no room for a notification")
	op := Operation{Action: ActionBounce, Actor: "ada", Reason: "because", End: func(works []*Work, done func(error)) {
		if works[0].Env.ID == failing {
			for _, w := range works {
				f.q.Return(w)
			}
			done(broken)
			return
		}
		f.bounce(works, done)
	}}
	p, err := f.q.Operate(context.Background(), op, func(p Progress) {
		if p.Looked > 30 {
			t.Errorf("reported %d, the fourth ten failed", p.Looked)
		}
	})
	if !fault.Is(err, fault.Unavailable) || p.Finished || slices.Compare(p.After[:], failing[:]) >= 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	op.End, op.Filter.After = f.bounce, p.After
	rest, err := f.q.Operate(context.Background(), op, func(Progress) {})
	if err != nil || !rest.Finished || p.Done+rest.Done != n {
		t.Fatalf("%+v after %+v, %v", rest, p, err)
	}
	f.empty()
	if got := f.events()[outbox.Bounced]; got != n {
		t.Errorf("%d bounced", got)
	}
}
