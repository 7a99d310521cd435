package state

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

const warmDay warmup.Day = 20_000

// warmWorld has two relays, a pool, an address of the first relay and a domain.
func warmWorld(t fataler) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 4, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.node(1)
	w.node(2)
	w.tenant(1, "acme")
	w.pool(1, "main", nil)
	w.source(1, 1)
	w.ok(&command.IPAssign{Source: id(1), Node: id(1), Pool: id(1)})
	w.ok(domainPut("example.com", id(1)))
	w.ok(&command.WarmRoll{Day: int32(warmDay)})
	return w
}

func warmPut(kind string, ref []byte, quota uint32) *command.WarmPut {
	return &command.WarmPut{Kind: kind, Ref: ref, Plan: "standard", Steps: []*command.WarmStep{{Class: "google", Stage: 1}, {Class: "other", Stage: 1}},
		Quotas: []*command.WarmQuota{{Class: "google", Day: int32(warmDay), Quota: quota}, {Class: "other", Day: int32(warmDay), Quota: quota}}}
}

func item(kind uint32, subject uint64, node byte, seq uint64, amount uint32) *command.WarmItem {
	return &command.WarmItem{Kind: kind, Subject: subject, Day: int32(warmDay), Node: id(node), Seq: seq, Amount: amount}
}

// batch applies one item and returns its reply.
func (w *world) batch(i *command.WarmItem) control.WarmReply {
	w.t.Helper()
	return w.ok(&command.WarmBatch{Items: []*command.WarmItem{i}}).(*control.WarmOutcome).Replies[0]
}

func TestWarmUpOfAPoolIsShared(t *testing.T) {
	w := warmWorld(t)
	s := w.ok(warmPut("pool", id(1), 500)).(*control.WarmSubject)
	if s.Number != 1 || s.StartDay != warmDay || s.Judged != warmDay-1 || s.QuotaDay != warmDay || len(s.Tracks) != 2 {
		t.Fatalf("%+v", s)
	}
	if r := w.batch(item(command.WarmReserve, 1, 1, 1, 300)); r.Err != nil || r.Amount != 300 || r.Quota != 500 || r.Committed != 300 {
		t.Errorf("%+v", r)
	}
	if r := w.batch(item(command.WarmReserve, 1, 2, 1, 300)); r.Err != nil || r.Amount != 200 || r.Committed != 500 { // W1
		t.Errorf("%+v", r)
	}
	if r := w.batch(item(command.WarmReserve, 1, 2, 1, 400)); r.Amount != 200 { // W5
		t.Errorf("a number that was used: %+v", r)
	}
	settle := item(command.WarmSettle, 1, 1, 0, 0)
	settle.Used = 120
	if r := w.batch(settle); r.Used != 120 || r.Amount != 300 {
		t.Errorf("%+v", r)
	}
	cut := item(command.WarmCut, 1, 1, 2, 150)
	cut.Used = 130
	if r := w.batch(cut); r.Amount != 150 || r.Used != 130 || r.Committed != 350 {
		t.Errorf("%+v", r)
	}
	if r := w.batch(item(command.WarmReserve, 2, 1, 3, 5)); !fault.Is(r.Err, fault.NotFound) {
		t.Errorf("a subject that is not there: %+v", r)
	}
	w.ok(&command.NodeSetState{Node: id(2), State: "evicted"})
	if r := w.batch(item(command.WarmReserve, 1, 2, 9, 400)); !fault.Is(r.Err, fault.Denied) || r.Amount != 200 {
		t.Errorf("an evicted relay: %+v", r)
	}
}

func TestOnlyTheOwnerReservesOfAnAddress(t *testing.T) {
	w := warmWorld(t)
	w.ok(warmPut("source", id(1), 100))
	src := w.store.Read().Source(ids.Source(id(1)))
	mine := item(command.WarmReserve, 1, 1, 1, 60)
	mine.Epoch = src.Epoch
	if r := w.batch(mine); r.Err != nil || r.Amount != 60 {
		t.Fatalf("%+v", r)
	}
	other := item(command.WarmReserve, 1, 2, 1, 60)
	other.Epoch = src.Epoch
	if r := w.batch(other); !fault.Is(r.Err, fault.Denied) || r.Amount != 0 {
		t.Errorf("not the owner: %+v", r)
	}
	w.ok(&command.IPAssign{Source: id(1), Node: id(2), Pool: id(1), OldOwnerIsOff: true, Expect: src.Revision})
	again := item(command.WarmReserve, 1, 1, 2, 80)
	again.Epoch = src.Epoch
	if r := w.batch(again); !fault.Is(r.Err, fault.Denied) || r.Amount != 60 {
		t.Errorf("a former owner: %+v", r)
	}
	late := item(command.WarmSettle, 1, 1, 0, 0)
	late.Epoch, late.Used = src.Epoch, 55
	if r := w.batch(late); r.Err != nil || r.Used != 55 { // W4
		t.Errorf("a late settlement: %+v", r)
	}
	other.Seq, other.Epoch = 2, w.store.Read().Source(ids.Source(id(1))).Epoch
	if r := w.batch(other); r.Err != nil || r.Amount != 40 {
		t.Errorf("the new owner gets what is left: %+v", r)
	}
}

func TestDaysBeginOnceAndInOrder(t *testing.T) {
	w := warmWorld(t)
	w.ok(warmPut("pool", id(1), 500))
	w.ok(&command.WarmRoll{Day: int32(warmDay)}) // repeated
	w.refused(&command.WarmRoll{Day: int32(warmDay - 1)}, fault.Conflict, "")
	w.refused(&command.WarmRoll{Day: int32(warmDay + 2)}, fault.Conflict, "")
	w.batch(item(command.WarmReserve, 1, 1, 1, 300))
	before := w.store.Read().Hash()
	w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
	w.ok(&command.WarmRoll{Day: int32(warmDay + 2)})
	if n := len(all(w.store.Read().txn, warmBlocksTable)); n != 0 {
		t.Errorf("%d blocks are left of a day that is over", n)
	}
	w.ok(&command.WarmRoll{Day: int32(warmDay + 9), Ordered: true})
	if w.store.Read().Hash() == before || w.store.Read().WarmCalendar().Today != warmDay+9 {
		t.Error("the day did not begin")
	}
	if r := w.batch(item(command.WarmReserve, 1, 1, 2, 5)); !fault.Is(r.Err, fault.Conflict) {
		t.Errorf("a day that is over: %+v", r)
	}
}

func TestJudgementsAreTakenOnce(t *testing.T) {
	w := warmWorld(t)
	s := w.ok(warmPut("pool", id(1), 500)).(*control.WarmSubject)
	w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
	judge := func(expect uint64, stage, quota uint32) *command.WarmJudge {
		return &command.WarmJudge{Items: []*command.WarmJudgement{{Number: 1, Expect: expect, JudgedDay: int32(warmDay), Steps: []*command.WarmStep{{Class: "google", Stage: stage, Why: "passed"}},
			Quotas: []*command.WarmQuota{{Class: "google", Day: int32(warmDay + 1), Quota: quota}}}}}
	}
	w.ok(judge(s.Revision, 2, 700))
	w.ok(judge(s.Revision, 3, 900)) // repeated: the row has changed since
	got := w.store.Read().WarmSubject(1)
	quota, _, _ := w.store.Read().WarmDay(got, warmDay+1).Totals(1, 0, warmDay+1)
	if got.Tracks[0].Stage != 2 || quota != 700 || got.Judged != warmDay || got.QuotaDay != warmDay+1 {
		t.Errorf("%+v, quota %d", got, quota)
	}
	w.ok(judge(got.Revision, 3, 900))
	if got = w.store.Read().WarmSubject(1); got.Tracks[0].Stage != 3 {
		t.Errorf("%+v", got)
	}
}

func TestWarmUpsThatAreStoppedKeepTheirDay(t *testing.T) {
	w := warmWorld(t)
	w.refused(warmPut("pool", id(9), 500), fault.NotFound, "")
	w.refused(&command.WarmStop{Kind: "pool", Ref: id(1)}, fault.NotFound, "")
	w.ok(warmPut("pool", id(1), 500))
	other := warmPut("pool", id(1), 900)
	w.ok(other) // the same again, without a revision: it was repeated
	other.Plan = "slow"
	w.refused(other, fault.Exists, "")
	w.batch(item(command.WarmReserve, 1, 1, 1, 300))
	w.ok(&command.WarmStop{Kind: "pool", Ref: id(1)})
	var v policy.View
	if w.store.Read().viewWarm(&v); len(v.Warm.Subjects) > 0 || v.Warm.Today != int32(warmDay) {
		t.Errorf("relays are told of what was stopped: %+v", v.Warm)
	}
	if r := w.batch(item(command.WarmReserve, 1, 1, 2, 400)); !fault.Is(r.Err, fault.NotFound) {
		t.Errorf("%+v", r)
	}
	s := w.ok(warmPut("pool", id(1), 500)).(*control.WarmSubject)
	if r := w.batch(item(command.WarmReserve, 1, 2, 1, 400)); s.Number != 1 || r.Amount != 200 { // W2: begun again on the same day
		t.Errorf("%+v, subject %d", r, s.Number)
	}
	w.ok(&command.WarmStop{Kind: "pool", Ref: id(1)})
	w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
	w.ok(&command.WarmRoll{Day: int32(warmDay + 2)})
	if got := w.store.Read().WarmSubjects(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

func TestClassesAreBounded(t *testing.T) {
	w := warmWorld(t)
	put := warmPut("pool", id(1), 5)
	put.Steps = nil
	for i := range warmup.MaxClasses {
		put.Steps = append(put.Steps, &command.WarmStep{Class: fmt.Sprint("c", i), Stage: 1})
	}
	put.Quotas = nil
	w.ok(put)
	w.refused(warmPut("domain", []byte("example.com"), 5), fault.Exhausted, "")
}

// TestStateIsTheLedger: whatever relays say, the state holds what shared/warmup
// would, and a state that went through a snapshot goes on like one that did not.
func TestStateIsTheLedger(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 3))
		w := warmWorld(t)
		w.ok(warmPut("pool", id(1), 500))
		w.ok(warmPut("domain", []byte("example.com"), 300))
		model := warmup.NewLedger(warmDay)
		for subject := warmup.Subject(1); subject <= 2; subject++ {
			for class := warmup.Class(0); class < 2; class++ {
				if err := model.SetQuota(subject, class, warmDay, 700-200*uint32(subject)); err != nil {
					t.Fatal(err)
				}
			}
		}
		today := warmDay
		for step := range 200 {
			i := item(uint32(1+rng.IntN(3)), uint64(1+rng.IntN(2)), byte(1+rng.IntN(2)), uint64(rng.IntN(300)), uint32(rng.IntN(400)))
			i.Class, i.Day, i.Used = uint32(rng.IntN(2)), int32(today)+int32(rng.IntN(3))-1, uint32(rng.IntN(300))
			got := w.batch(i)
			settlement := warmup.Settlement{Subject: warmup.Subject(i.Subject), Class: warmup.Class(i.Class), Day: warmup.Day(i.Day), Node: control.WarmNode(ids.Node(i.Node)), Used: i.Used}
			var want error
			switch i.Kind {
			case command.WarmReserve:
				_, want = model.Reserve(warmup.Request{Subject: settlement.Subject, Class: settlement.Class, Day: settlement.Day, Node: settlement.Node, Seq: i.Seq, UpTo: i.Amount})
			case command.WarmSettle:
				model.Settle(settlement)
			case command.WarmCut:
				model.Cut(warmup.Cut{Settlement: settlement, Seq: i.Seq, Amount: i.Amount})
			}
			amount, used := model.Reserved(settlement.Subject, settlement.Class, settlement.Day, settlement.Node, 0)
			if got.Amount != amount || got.Used != used || fault.KindOf(got.Err) != fault.KindOf(want) {
				t.Fatalf("seed %d step %d: %+v, want %d %d %v", seed, step, got, amount, used, want)
			}
			if rng.IntN(60) == 0 {
				today++
				w.ok(&command.WarmRoll{Day: int32(today)})
				if err := model.Roll(today, false); err != nil {
					t.Fatal(err)
				}
			}
			if rng.IntN(50) == 0 {
				var b bytes.Buffer
				if _, err := w.store.Read().WriteTo(&b); err != nil {
					t.Fatal(err)
				}
				again := New()
				if err := again.Restore(&b); err != nil {
					t.Fatal(err)
				}
				w.store = again
			}
		}
	}
}

// TestWarmLedgerIsSmall: the open day of 100,000 addresses with 20 classes each,
// all reserved, has at most 64 MiB in the replicated state.
func TestWarmLedgerIsSmall(t *testing.T) {
	const subjects, classes, limit = 100_000, 20, 64 << 20
	s := New()
	a := newApplier(s.db.Load().Txn(true), &progress{}, 1, command.Envelope{})
	k := warmup.NewLedger(warmDay)
	for c := range warmup.Class(classes) {
		if err := k.SetQuota(1, c, warmDay, 40_000); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Reserve(warmup.Request{Subject: 1, Class: c, Day: warmDay, Node: 1 << 60, Seq: 1<<32 + uint64(c) + 1, UpTo: 36_000}); err != nil {
			t.Fatal(err)
		}
		k.Settle(warmup.Settlement{Subject: 1, Class: c, Day: warmDay, Node: 1 << 60, Used: 35_000})
		k.Tell(warmup.Told{Subject: 1, Class: c, Day: warmDay, Node: 1 << 60, Tally: warmup.Tally{Attempts: 35_000, Accepted: 33_000, Deferred: 1500, Blocked: 100, Hard: 300, Signatures: 50}})
	}
	row := k.AppendRow(nil, 1, warmDay)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for n := warmup.Subject(0); n < subjects; n += 8 {
		b := &control.WarmBlock{Day: warmDay, Block: control.WarmBlockOf(control.WarmSource, n), Lines: make([]control.WarmLine, 0, 8)}
		for i := range warmup.Subject(8) {
			b.Lines = append(b.Lines, control.WarmLine{Subject: n + i, Row: bytes.Clone(row)})
		}
		if err := put(a, warmBlocksTable, b); err != nil {
			t.Fatal(err)
		}
	}
	a.finish()
	a.txn.Commit()
	used := heap() - before
	t.Logf("%d subjects with %d classes: %.1f MiB", subjects, classes, float64(used)/(1<<20))
	if used > limit {
		t.Errorf("%d bytes, allowed are %d", used, limit)
	}
	runtime.KeepAlive(s)
}

// BenchmarkWarmBatch applies a full batch of reservations of different addresses.
func BenchmarkWarmBatch(b *testing.B) {
	w := warmWorld(b)
	w.ok(warmPut("pool", id(1), 1_000_000))
	batch := &command.WarmBatch{}
	for i := range 1000 {
		batch.Items = append(batch.Items, &command.WarmItem{Kind: command.WarmReserve, Subject: 1, Class: uint32(i % 2), Day: int32(warmDay), Node: id(1), Seq: uint64(i + 1), Amount: uint32(i)})
	}
	for b.Loop() {
		w.ok(batch)
	}
}

// TestGoldenWarmUp replays a log that this release wrote.
func TestGoldenWarmUp(t *testing.T) {
	checkGolden(t, "warmup4", func(t *testing.T) *world {
		w := warmWorld(t)
		w.ok(warmPut("pool", id(1), 500))
		w.ok(warmPut("domain", []byte("example.com"), 300))
		w.ok(warmPut("source", id(1), 100))
		mine := item(command.WarmReserve, 3, 1, 1, 60)
		mine.Epoch = w.store.Read().Source(ids.Source(id(1))).Epoch
		settle, cut := item(command.WarmSettle, 1, 1, 0, 0), item(command.WarmCut, 2, 1, 2, 10)
		settle.Used = 7
		w.ok(&command.WarmBatch{Items: []*command.WarmItem{mine, item(command.WarmReserve, 1, 1, 1, 300), item(command.WarmReserve, 1, 2, 1, 300), item(command.WarmReserve, 2, 1, 1, 40), settle, cut}})
		w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
		s := w.store.Read().WarmSubject(1)
		w.ok(&command.WarmJudge{Items: []*command.WarmJudgement{{Number: 1, Expect: s.Revision, JudgedDay: int32(warmDay), Steps: []*command.WarmStep{{Class: "google", Stage: 2, LastActive: int32(warmDay), Why: "passed"}},
			Quotas: []*command.WarmQuota{{Class: "google", Day: int32(warmDay + 1), Quota: 1000}, {Class: "google", Day: int32(warmDay + 2), Quota: 1000}}}}})
		w.ok(&command.WarmStop{Kind: "domain", Ref: []byte("example.com")})
		w.ok(&command.WarmRoll{Day: int32(warmDay + 4), Ordered: true})
		return w
	})
}
