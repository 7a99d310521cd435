package warm

import (
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

const testPlan = `
[[plan]]
name = "test"
hour_percent = 100
[[plan.track]]
class = "other"
stages = [500]
target = 500
`

var (
	testPool   = ids.Pool{1}
	testSource = ids.Source{2}
	testStart  = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
)

// leader answers relays as control does, from a ledger.
type leader struct {
	t      *testing.T
	ledger *warmup.Ledger
	relays uint32
	quota  uint32
	lost   func() bool // loses a message

	tells    int
	declared map[warmup.Node]uint64 // generations in which relays had told all
}

func (l *leader) answer(node warmup.Node, up *wire.WarmUp) *wire.WarmDown {
	down := &wire.WarmDown{Today: int32(l.ledger.Today())}
	for _, i := range up.GetItems() {
		if i.GetKind() == 4 {
			if l.declared == nil {
				l.declared = make(map[warmup.Node]uint64)
			}
			l.declared[node] = i.GetEpoch()
			down.Replies = append(down.Replies, &wire.WarmReply{Kind: 4, Epoch: i.GetEpoch()})
			continue
		}
		if i.GetKind() == wire.WarmTell {
			l.tells++
			told := warmup.Told{Subject: warmup.Subject(i.GetSubject()), Class: warmup.Class(i.GetClass()), Day: warmup.Day(i.GetDay()), Node: node, Epoch: i.GetEpoch(),
				Tally: warmup.Tally{Attempts: int64(i.GetAttempts()), Accepted: int64(i.GetAccepted()), Deferred: int64(i.GetDeferred()), Blocked: int64(i.GetBlocked()), Hard: int64(i.GetHard()), Signatures: int64(i.GetSignatures())}}
			l.ledger.Tell(told)
			known := l.ledger.ShownBy(told.Subject, told.Class, told.Day, node, told.Epoch).Attempts
			down.Replies = append(down.Replies, &wire.WarmReply{Kind: wire.WarmTell, Subject: i.GetSubject(), Class: i.GetClass(), Day: i.GetDay(), Epoch: i.GetEpoch(), Attempts: uint32(known)})
			continue
		}
		s := warmup.Settlement{Subject: warmup.Subject(i.GetSubject()), Class: warmup.Class(i.GetClass()), Day: warmup.Day(i.GetDay()), Node: node, Epoch: i.GetEpoch(), Used: i.GetUsed()}
		r := &wire.WarmReply{Kind: i.GetKind(), Subject: i.GetSubject(), Class: i.GetClass(), Day: i.GetDay(), Epoch: i.GetEpoch(), Seq: i.GetSeq(), Relays: l.relays, Stage: 1}
		switch i.GetKind() {
		case 1:
			if _, err := l.ledger.Reserve(warmup.Request{Subject: s.Subject, Class: s.Class, Day: s.Day, Node: node, Epoch: s.Epoch, Seq: i.GetSeq(), UpTo: i.GetAmount()}); err != nil {
				r.Refused = err.Error()
			}
		case 2:
			l.ledger.Settle(s)
		case 3:
			l.ledger.Cut(warmup.Cut{Settlement: s, Seq: i.GetSeq(), Amount: i.GetAmount()})
		}
		r.Amount, r.Used = l.ledger.Reserved(s.Subject, s.Class, s.Day, node, s.Epoch)
		quota, reserved, _ := l.ledger.Totals(s.Subject, s.Class, s.Day)
		r.Quota, r.Committed = uint32(quota), uint32(reserved)
		if reserved > uint64(l.quota) {
			l.t.Fatalf("W1: %d reserved of %d", reserved, l.quota)
		}
		down.Replies = append(down.Replies, r)
		for _, recall := range l.ledger.Recalls(s.Subject, s.Class, s.Day) {
			if recall.Node == node {
				down.Recalls = append(down.Recalls, &wire.WarmRecall{Subject: i.GetSubject(), Class: i.GetClass(), Day: i.GetDay(), Epoch: recall.Epoch, Amount: recall.Amount})
			}
		}
	}
	return down
}

// testRelay is a keeper whose goroutine is the test's.
type testRelay struct {
	t      *testing.T
	dir    string
	node   warmup.Node
	leader *leader
	view   *policy.Directory
	now    time.Time
	k      *Keeper
	gates  []schedule.Gate

	recalled []string
}

func (r *testRelay) SetGates(gates ...schedule.Gate) { r.gates = gates }
func (r *testRelay) KeepGates(_ string, n map[uint64]bool) {
	kept := r.gates[:0]
	for _, g := range r.gates {
		if n[g.ID.Number] {
			kept = append(kept, g)
		}
	}
	r.gates = kept
}
func (r *testRelay) Recall(name string) { r.recalled = append(r.recalled, name) }

// start begins a life; the one before was killed.
func (r *testRelay) start() {
	r.t.Helper()
	var err error
	r.k, err = New(Config{Dir: r.dir, Directory: func() *policy.Directory { return r.view }, Send: func(m proto.Message) error {
		if l := r.leader; l.lost == nil || !l.lost() {
			if down := l.answer(r.node, m.(*wire.WarmUp)); l.lost == nil || !l.lost() {
				r.k.Down(down)
			}
		}
		return nil
	}, Now: func() time.Time { return r.now }, ClockTrusted: func() bool { return true }, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		r.t.Fatal(err)
	}
	r.k.Attach(r)
	r.k.Linked(true)
}

// look is one round of Run.
func (r *testRelay) look() {
	r.t.Helper()
	for len(r.k.downs) > 0 {
		r.k.read(<-r.k.downs)
	}
	r.k.tidy(r.now)
	if err := r.k.save(); err != nil {
		r.t.Fatal(err)
	}
	r.k.say(r.now, false)
	r.k.setGates(r.now)
}

func place(recipients int) *engine.Place {
	return &engine.Place{Lane: schedule.Lane{Source: testSource, Provider: "mx:example.net"}, Source: policy.Source{ID: testSource, Bind: netip.MustParseAddr("192.0.2.1"), Epoch: 7}, Key: schedule.Key{Pool: testPool}, Recipients: recipients}
}

func testView(t *testing.T, today warmup.Day, subjects ...policy.WarmSubject) *policy.Directory {
	t.Helper()
	doc, err := policy.Parse(map[string]string{"warmup": testPlan})
	if err != nil {
		t.Fatal(err)
	}
	d, err := policy.Compile(&policy.View{Document: doc, Node: ids.Node{1}, Pools: []policy.Pool{{ID: testPool, Name: "news", Kind: policy.PoolShared}},
		Sources: []policy.Source{{ID: testSource, Bind: netip.MustParseAddr("192.0.2.1"), Public: netip.MustParseAddr("192.0.2.1"), EHLO: "mta.example.com", Pool: testPool, Owner: ids.Node{1}, Epoch: 7}},
		Warm:    policy.Warm{Today: int32(today), Classes: []string{"other"}, Subjects: subjects}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// newRelays returns relays that share a pool with a quota.
func newRelays(t *testing.T, n int, quota uint32) (*leader, []*testRelay) {
	today := warmup.DayOf(testStart, time.UTC)
	l := &leader{t: t, ledger: warmup.NewLedger(today), relays: uint32(n), quota: quota}
	for d := today; d <= today+1; d++ {
		if err := l.ledger.SetQuota(1, 0, d, quota); err != nil {
			t.Fatal(err)
		}
	}
	view := testView(t, today, policy.WarmSubject{Number: 1, Pool: testPool, Plan: "test"})
	var out []*testRelay
	for i := range n {
		r := &testRelay{t: t, dir: t.TempDir(), node: warmup.Node(i + 1), leader: l, view: view, now: testStart}
		r.start()
		out = append(out, r)
	}
	return l, out
}

// send offers n recipients if it may and reports whether it did.
func (r *testRelay) send(n int) (engine.Hold, bool) {
	p := place(n)
	h := r.k.Begin(r.now, p)
	if h.Reason != "" {
		return h, false
	}
	r.k.Done(r.now, p, []relay.Outcome{{Phase: relay.PhaseFinalDot, Status: relay.Delivered}})
	return h, true
}

// TestQuotaOfRelaysThatAreKilled: two relays that share a quota of 500 and are
// killed at random never offer more, and waste at most a step each time.
func TestQuotaOfRelaysThatAreKilled(t *testing.T) {
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 1))
		l, relays := newRelays(t, 2, 500)
		l.lost = func() bool { return rng.IntN(10) == 0 }
		offered, kills := 0, 0
		for range 3000 {
			r := relays[rng.IntN(2)]
			for _, one := range relays {
				one.now = one.now.Add(100 * time.Millisecond)
			}
			switch rng.IntN(40) {
			case 0:
				if kills < 10 {
					kills++
					r.start()
				}
			case 1, 2, 3, 4, 5, 6, 7, 8:
				r.look()
			default:
				if _, ok := r.send(1); ok {
					offered++
				}
			}
			if offered > 500 {
				t.Fatalf("seed %d: %d recipients were offered of 500", seed, offered)
			}
		}
		// At most a step of 8, or what half a second sent, for each kill.
		if least := 500 - kills*16; offered < least {
			t.Errorf("seed %d: %d of 500 were offered after %d kills, %d at least should be", seed, offered, kills, least)
		}
	}
}

// reserve has the relay get what it wants.
func (r *testRelay) reserve(n int) {
	r.t.Helper()
	for range 50 {
		if _, ok := r.send(n); ok {
			return
		}
		r.look()
		r.now = r.now.Add(300 * time.Millisecond)
	}
	r.t.Fatal("nothing was reserved")
}

func TestMailWaitsWhenTheQuotaIsSpent(t *testing.T) {
	_, relays := newRelays(t, 1, 20)
	r := relays[0]
	if h, ok := r.send(1); ok || h.Reason != Reason || !strings.Contains(h.Text, "no reservation") {
		t.Fatalf("before anything was reserved: %+v", h)
	}
	offered := 0
	var last engine.Hold
	for range 400 {
		if h, ok := r.send(1); ok {
			offered++
		} else {
			last = h
		}
		r.look()
		r.now = r.now.Add(100 * time.Millisecond)
	}
	if offered != 20 {
		t.Errorf("%d of 20 were offered", offered)
	}
	if !strings.Contains(last.Text, "stage 1, 20 a day") || !strings.Contains(last.Text, "spent 20") || last.Name != "test" || !last.Until.Equal(testStart.Truncate(24*time.Hour).Add(24*time.Hour)) {
		t.Errorf("%+v", last)
	}
	if len(r.gates) != 1 || r.gates[0].Match.Pool != testPool || !r.gates[0].NoSessions {
		t.Errorf("gates: %+v", r.gates)
	}
	if h, ok := r.k.Explain(r.gates[0].ID); !ok || h.Name != "test" || !strings.Contains(h.Text, "of it reserved by all relays; this relay has") {
		t.Errorf("%+v", h)
	}
	// The next day has a quota of its own.
	day := r.leader.ledger.Today() + 1
	if err := r.leader.ledger.Roll(day, false); err != nil {
		t.Fatal(err)
	}
	r.view = testView(t, day, policy.WarmSubject{Number: 1, Pool: testPool, Plan: "test"})
	r.now = day.Start(time.UTC)
	r.reserve(5)
	r.look()
	if len(r.gates) != 0 {
		t.Errorf("gates of a day that is over: %+v", r.gates)
	}
}

func TestOnlyWhatReachedNoHostIsRefunded(t *testing.T) {
	_, relays := newRelays(t, 1, 20)
	r := relays[0]
	r.reserve(1)
	for _, tc := range []struct {
		outcomes []relay.Outcome
		spent    uint32
	}{
		{nil, 1}, {[]relay.Outcome{{Phase: relay.PhaseConnect}}, 1}, {[]relay.Outcome{{Phase: relay.PhaseSTARTTLS}}, 1},
		{[]relay.Outcome{{Phase: relay.PhaseMAIL}}, 2}, {[]relay.Outcome{{Phase: relay.PhaseRCPT}}, 3}, {[]relay.Outcome{{Phase: relay.PhaseConnect}, {Phase: relay.PhaseRCPT}}, 4},
	} {
		p := place(1)
		if h := r.k.Begin(r.now, p); h.Reason != "" {
			t.Fatalf("%+v", h)
		}
		r.k.Done(r.now, p, tc.outcomes)
		for _, s := range r.k.slots {
			if used, _ := s.spender.Peek(); used != tc.spent {
				t.Errorf("%+v: %d spent, want %d", tc.outcomes, used, tc.spent)
			}
		}
	}
}

func TestLostMarksCountAsSpent(t *testing.T) {
	l, relays := newRelays(t, 1, 20)
	r := relays[0]
	r.reserve(1)
	_, before, _ := l.ledger.Totals(1, 0, l.ledger.Today())
	if err := os.Remove(filepath.Join(r.dir, marksFile)); err != nil {
		t.Fatal(err)
	}
	r.start()
	offered := uint64(0)
	for range 200 {
		if _, ok := r.send(1); ok {
			offered++
		}
		r.look()
		r.now = r.now.Add(300 * time.Millisecond)
	}
	if offered+before != 20 {
		t.Errorf("%d were reserved before, %d were offered after", before, offered)
	}
}

func TestWhatIsRecalledIsGivenBack(t *testing.T) {
	l, relays := newRelays(t, 1, 100)
	r := relays[0]
	r.reserve(1)
	for range 10 {
		r.look()
		r.now = r.now.Add(time.Second)
	}
	today := l.ledger.Today()
	if err := l.ledger.SetQuota(1, 0, today, 10); err != nil {
		t.Fatal(err)
	}
	for range 60 {
		r.send(1)
		r.look()
		r.now = r.now.Add(time.Second)
	}
	if _, reserved, used := l.ledger.Totals(1, 0, today); reserved > 100 || used > 100 || reserved < used {
		t.Errorf("%d reserved, %d used", reserved, used)
	}
	if _, ok := r.send(1); ok {
		if _, reserved, _ := l.ledger.Totals(1, 0, today); reserved > 10 {
			t.Errorf("%d are reserved of a quota that was lowered to 10", reserved)
		}
	}
}

func TestAnHourHasItsPart(t *testing.T) {
	l, relays := newRelays(t, 1, 100)
	r := relays[0]
	doc, err := policy.Parse(map[string]string{"warmup": strings.Replace(testPlan, "hour_percent = 100", "hour_percent = 20", 1)})
	if err != nil {
		t.Fatal(err)
	}
	v := *r.view.View()
	v.Document = doc
	if r.view, err = policy.Compile(&v); err != nil {
		t.Fatal(err)
	}
	offered := 0
	for range 300 {
		if _, ok := r.send(1); ok {
			offered++
		}
		r.look()
		r.now = r.now.Add(100 * time.Millisecond)
	}
	if offered != 20 || len(r.gates) != 1 {
		t.Fatalf("%d were offered within an hour, gates %+v", offered, r.gates)
	}
	h, ok := r.k.Explain(r.gates[0].ID)
	if !ok || !strings.HasSuffix(h.Text, "; of its 20 an hour 20 are spent") || !h.Until.Equal(r.now.Truncate(time.Hour).Add(time.Hour)) {
		t.Errorf("the hour is explained as %+v", h)
	}
	r.now = r.now.Add(time.Hour)
	r.look()
	if _, ok := r.send(1); !ok || l.ledger.Today() != warmup.DayOf(r.now, time.UTC) {
		t.Error("the next hour has no part")
	}
}
