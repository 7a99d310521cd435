package quota

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

const warmPlan = `
[[plan]]
name = "test"
[[plan.track]]
class = "google"
stages = [200, 500, 1000]
target = 1000
[[plan.track]]
class = "other"
stages = [100, 200, 400]
target = 400
`

var warmNoon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// warmLeader is the leader's part of warm-up over the state of a server, with a
// clock and answers that the test sets.
type warmLeader struct {
	t       *testing.T
	part    *Warm
	state   *state.Store
	index   uint64
	now     time.Time
	offsets []time.Duration
	voters  int
	silent  error // of the other servers
	log     strings.Builder
	sent    []*wire.WarmDown
}

func newWarmLeader(t *testing.T) *warmLeader { return newWarmLeaderAt(t, command.FSMVersion) }

// newWarmLeaderAt is of a cluster whose servers know the commands up to a version.
func newWarmLeaderAt(t *testing.T, version uint16) *warmLeader {
	w := &warmLeader{t: t, state: state.New(), now: warmNoon, voters: 1}
	doc, err := policy.Parse(map[string]string{"warmup": warmPlan})
	if err != nil {
		t.Fatal(err)
	}
	w.part = NewWarm(WarmOptions{State: w.state, Propose: w.propose, Send: func(_ ids.Node, m proto.Message) { w.sent = append(w.sent, m.(*wire.WarmDown)) },
		Document: func() (*policy.Document, error) { return &doc, nil },
		Clocks:   func(context.Context) ([]time.Duration, int, error) { return w.offsets, w.voters, w.silent },
		Now:      func() time.Time { return w.now }, Logger: slog.New(slog.NewTextHandler(&w.log, nil))})
	w.must(&command.ClusterInit{Cluster: &command.Cluster{Id: bytesOf(0xc), Generation: 1, FsmVersion: uint32(version), CaBundle: []byte("pem"), CaSealed: []byte("s"), KekId: "kek", RecoverySealed: []byte("r"), CredentialKeySealed: []byte("c")}})
	w.must(&command.PoolPut{Pool: &command.Pool{Id: bytesOf(1), Name: "news", Kind: "shared"}})
	node := relayID(0)
	w.must(&command.TokenCreate{Token: &command.JoinToken{Id: node[:], Role: "relay", SecretHash: append(bytesOf(1), bytesOf(1)...), UsesMax: 1, UsesLeft: 1, NotAfterMs: warmNoon.Add(time.Hour).UnixMilli()}})
	w.must(&command.TokenRedeem{Token: node[:], CsrHash: append(bytesOf(1), bytesOf(1)...), Role: "relay", Node: node[:], Name: "edge", Remote: []byte{198, 51, 100, 7}})
	return w
}

func (w *warmLeader) propose(_ context.Context, c command.Command) (state.Result, error) {
	if err := c.Validate(); err != nil {
		return state.Result{}, err
	}
	b, err := command.Encode(c, w.now, 1)
	if err != nil {
		return state.Result{}, err
	}
	e, err := command.Decode(b)
	if err != nil {
		return state.Result{}, err
	}
	w.index++
	out := w.state.Apply(w.index, e)
	return out, out.Err
}

func (w *warmLeader) must(c command.Command) any {
	w.t.Helper()
	out, err := w.propose(w.t.Context(), c)
	if err != nil {
		w.t.Fatalf("%T: %v", c, err)
	}
	return out.Row
}

// look is one look of the part, twice what it does in a second.
func (w *warmLeader) look() {
	w.t.Helper()
	for range 2 {
		if err := w.part.look(w.t.Context()); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *warmLeader) today() warmup.Day {
	if cal := w.state.Read().WarmCalendar(); cal != nil {
		return cal.Today
	}
	return 0
}

// put starts the pool's warm-up at stages, or puts it there.
func (w *warmLeader) put(google, other uint32, quota uint32, hold string) *control.WarmSubject {
	w.t.Helper()
	var expect uint64
	if s := w.pool(); s != nil {
		expect = s.Revision
	}
	day := int32(w.today())
	return w.must(&command.WarmPut{Expect: expect, Kind: "pool", Ref: bytesOf(1), Plan: "test", Hold: hold, Steps: []*command.WarmStep{{Class: "google", Stage: google}, {Class: "other", Stage: other}},
		Quotas: []*command.WarmQuota{{Class: "google", Day: day, Quota: quota}, {Class: "other", Day: day, Quota: 100}}}).(*control.WarmSubject)
}

func (w *warmLeader) pool() *control.WarmSubject {
	return w.state.Read().WarmSubjectByRef(control.WarmPool, string(bytesOf(1)))
}

// say has the relay say one thing about mail to google today, and returns the answer.
func (w *warmLeader) say(i *wire.WarmItem) *wire.WarmDown {
	w.t.Helper()
	class, _ := w.state.Read().WarmCalendar().Class("google")
	i.Subject, i.Class, i.Day = uint64(w.pool().Number), uint32(class), int32(w.today())
	w.sent = nil
	w.part.take(Message{Node: relayID(0), Body: &wire.WarmUp{Items: []*wire.WarmItem{i}}})
	if err := errors.Join(w.part.commit(w.t.Context()), w.part.hear(w.t.Context())); err != nil {
		w.t.Fatal(err)
	}
	if len(w.sent) != 1 || len(w.sent[0].Replies) != 1 {
		w.t.Fatalf("%v was answered", w.sent)
	}
	return w.sent[0]
}

// stage returns where the pool stands with a class: stage, today's quota and why.
func (w *warmLeader) stage(class string) (int, uint64, string) {
	w.t.Helper()
	r := w.state.Read()
	number, ok := r.WarmCalendar().Class(class)
	s := w.pool()
	for _, t := range s.Tracks {
		if ok && t.Class == number {
			quota, _, _ := r.WarmDay(s, w.today()).Totals(s.Number, number, w.today())
			return t.Stage, uint64(quota), t.Why
		}
	}
	w.t.Fatalf("there is no class %q in %+v", class, s)
	return 0, 0, ""
}

// TestADayBeginsWhenTheClockIsConfirmed: by a majority of servers within two
// seconds, one day at a time, and never back.
func TestADayBeginsWhenTheClockIsConfirmed(t *testing.T) {
	w := newWarmLeader(t)
	w.look()
	first := warmup.DayOf(warmNoon, time.UTC)
	if w.today() != first {
		t.Fatalf("today is %v, want %v", w.today(), first)
	}
	w.now, w.voters = warmNoon.AddDate(0, 0, 1), 3
	for _, c := range []struct {
		name    string
		offsets []time.Duration
		silent  error
		told    string
	}{
		{"no other server answers", nil, nil, "only 1 of 3 servers told their time"},
		{"they cannot be asked", nil, errors.New("the servers cannot be asked"), "the servers cannot be asked"},
		{"the leader's clock is wrong", []time.Duration{-3 * time.Second, -4 * time.Second}, nil, "from the median of the servers"},
	} {
		w.offsets, w.silent = c.offsets, c.silent
		w.log.Reset()
		w.look()
		if w.today() != first {
			t.Fatalf("%s: %v began", c.name, w.today())
		}
		if text := w.log.String(); strings.Count(text, c.told) != 1 {
			t.Errorf("%s: the log says %q, want %q once", c.name, text, c.told)
		}
	}
	w.offsets, w.silent = []time.Duration{time.Second, time.Hour}, nil
	w.look()
	if w.today() != first+1 {
		t.Fatalf("today is %v, want %v", w.today(), first+1)
	}
	w.now, w.offsets = warmNoon, []time.Duration{0, 0}
	w.look()
	if w.today() != first+1 {
		t.Errorf("a day was taken back: today is %v", w.today())
	}
	w.now = warmNoon.AddDate(0, 0, 3)
	w.log.Reset()
	w.look()
	if w.today() != first+1 || !strings.Contains(w.log.String(), "does not begin by itself") {
		t.Errorf("today is %v, after a day was missed: %s", w.today(), w.log.String())
	}
}

// TestADayIsJudgedByWhatWasUsed: a class that used its quota goes on, one that did
// not or is held stays; tomorrow has a quota from two hours before.
func TestADayIsJudgedByWhatWasUsed(t *testing.T) {
	for _, hold := range []string{"", "a ticket"} {
		w := newWarmLeader(t)
		w.look()
		w.put(1, 1, 200, hold)
		first := w.today()
		if d := w.say(&wire.WarmItem{Kind: 1, Seq: 1, Amount: 200}); d.Replies[0].GetAmount() != 200 {
			t.Fatalf("%v", d)
		}
		if d := w.say(&wire.WarmItem{Kind: 2, Used: 190}); d.Replies[0].GetUsed() != 190 {
			t.Fatalf("%v", d)
		}
		if d := w.say(&wire.WarmItem{Kind: wire.WarmTell, Attempts: 195, Accepted: 188, Deferred: 5, Hard: 2}); d.Replies[0].GetAttempts() != 195 {
			t.Fatalf("%v", d)
		}
		w.now = (first + 1).Start(time.UTC).Add(-warmAhead - time.Second)
		w.look()
		if s := w.pool(); s.QuotaDay != first {
			t.Errorf("%v has quotas already", s.QuotaDay)
		}
		w.now = w.now.Add(2 * time.Second)
		w.look()
		if s := w.pool(); s.QuotaDay != first+1 || s.Judged != first-1 {
			t.Errorf("two hours before midnight: quotas until %v, judged until %v", s.QuotaDay, s.Judged)
		}
		w.now = (first + 1).Start(time.UTC)
		w.look()
		if s := w.pool(); s.Judged != first || s.QuotaDay != first+1 {
			t.Errorf("on the next day: quotas until %v, judged until %v", s.QuotaDay, s.Judged)
		}
		want, quota, because := 2, uint64(500), "passed"
		if hold != "" {
			want, quota, because = 1, 200, "held by an operator"
		}
		if stage, q, why := w.stage("google"); stage != want || q != quota || why != because {
			t.Errorf("hold %q: google is at stage %d with %d: %s", hold, stage, q, why)
		}
		if stage, q, _ := w.stage("other"); stage != 1 || q != 100 {
			t.Errorf("what was not used is at stage %d with %d", stage, q)
		}
		revision := w.pool().Revision
		w.look()
		if w.pool().Revision != revision {
			t.Error("a day was judged twice")
		}
	}
}

// TestALoweredQuotaIsRecalled: who says something about a reservation of a quota
// that was lowered is told what to give back, until it has.
func TestALoweredQuotaIsRecalled(t *testing.T) {
	w := newWarmLeader(t)
	w.look()
	w.put(2, 1, 500, "")
	if d := w.say(&wire.WarmItem{Kind: 1, Seq: 1, Amount: 400}); d.Replies[0].GetAmount() != 400 || len(d.Recalls) != 0 || d.Replies[0].GetStage() != 2 {
		t.Fatalf("%v", d)
	}
	w.put(1, 1, 200, "")
	for range 2 {
		d := w.say(&wire.WarmItem{Kind: 2, Used: 50})
		if len(d.Recalls) != 1 || d.Recalls[0].GetAmount() != 200 || d.Replies[0].GetQuota() != 200 || d.Replies[0].GetCommitted() != 400 {
			t.Fatalf("%v", d)
		}
	}
	if d := w.say(&wire.WarmItem{Kind: 3, Seq: 2, Used: 60, Amount: 200}); len(d.Recalls) != 0 || d.Replies[0].GetCommitted() != 200 {
		t.Errorf("%v", d)
	}
	if d := w.say(&wire.WarmItem{Kind: 1, Seq: 3, Amount: 300}); d.Replies[0].GetAmount() != 200 || len(d.Recalls) != 0 {
		t.Errorf("more than the quota: %v", d)
	}
}
