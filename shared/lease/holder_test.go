package lease

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

const at0 = Instant(time.Hour)

// grantee is a relay that has reported once, at at0, for one rate of a second.
func grantee() (*Holder, *Rights) {
	h := NewHolder(DefaultConfig(), 7, 3, 1, nil, at0)
	r := h.Rights(1, Rate, time.Second)
	h.SetDemand(r, 100_000)
	h.Report(at0)
	return h, r
}

func grant(nonce, term, seq uint64, amount, burst int64) *Grant {
	return &Grant{Node: 7, Incarnation: 3, Generation: 1, Term: term, Nonce: nonce, Reply: nonce > 0, Lines: []GrantLine{
		{Limit: 1, Kind: Rate, Per: time.Second, Seq: seq, Share: Share{amount, burst}},
	}}
}

// TestLeaseCountsFromTheReport: however late a grant comes, it ends a TTL after
// the report that earned it was sent.
func TestLeaseCountsFromTheReport(t *testing.T) {
	h, r := grantee()
	late := at0.Add(20 * time.Second)
	h.Grant(late, grant(1, 1, 1, 10_000, 5))
	if got := r.Usable(late); got.Amount != 10_000 {
		t.Fatalf("granted 10000, uses %v", got)
	}
	end := at0.Add(30*time.Second - 200*time.Millisecond)
	if got := r.Usable(end - 1); got.Amount != 10_000 {
		t.Errorf("just before the guard it uses %v", got)
	}
	if got := r.Usable(end); !got.zero() {
		t.Errorf("within the guard it uses %v", got)
	}
	h, r = grantee()
	tooLate := at0.Add(45 * time.Second)
	h.Grant(tooLate, grant(1, 1, 1, 10_000, 5))
	if got := r.Usable(tooLate); !got.zero() {
		t.Errorf("a grant that came after its end gave %v", got)
	}
	if ok, wait := r.Take(tooLate, 1); ok || wait >= 0 {
		t.Errorf("took: %v, wait %v; want never", ok, wait)
	}
}

// TestGrantsInOrder (I3): a former grant changes nothing, whichever leader gave it.
func TestGrantsInOrder(t *testing.T) {
	h, r := grantee()
	h.Grant(at0, grant(1, 2, 5, 10_000, 5))
	for _, g := range []*Grant{grant(1, 2, 4, 90_000, 9), grant(1, 1, 99, 90_000, 9)} {
		h.Grant(at0, g)
	}
	other := grant(1, 2, 6, 90_000, 9)
	other.Incarnation = 2
	h.Grant(at0, other)
	other = grant(1, 2, 6, 90_000, 9)
	other.Node = 8
	h.Grant(at0, other)
	if got := r.Usable(at0); got.Amount != 10_000 {
		t.Errorf("a grant out of order changed 10000 to %v", got)
	}
	h.Grant(at0, grant(1, 3, 1, 20_000, 5))
	if got := r.Usable(at0); got.Amount != 20_000 {
		t.Errorf("a later leader's grant of 20000 gave %v", got)
	}
	if want := (Stamp{1, 3, 1}); r.Stamp() != want || h.Report(at0).Lines[0].Stamp != want {
		t.Errorf("the stamp is %v, want %v", r.Stamp(), want)
	}
}

// TestPushProlongsNothing: a grant that nobody asked for changes the share and not
// its end.
func TestPushProlongsNothing(t *testing.T) {
	h, r := grantee()
	h.Grant(at0, grant(1, 1, 1, 10_000, 5))
	h.Report(at0.Add(10 * time.Second))
	h.Grant(at0.Add(10*time.Second), grant(0, 1, 2, 4_000, 5))
	if share, until, _ := r.Lease(); share.Amount != 4_000 || until != at0.Add(30*time.Second) {
		t.Errorf("pushed 4000: has %v until %v after the report", share, until.Sub(at0))
	}
	h.Grant(at0.Add(11*time.Second), grant(2, 1, 2, 4_000, 5))
	if _, until, _ := r.Lease(); until != at0.Add(40*time.Second) {
		t.Errorf("the reply prolonged to %v", until.Sub(at0))
	}
	h.Grant(at0.Add(12*time.Second), grant(1, 1, 2, 4_000, 5))
	if _, until, _ := r.Lease(); until != at0.Add(40*time.Second) {
		t.Errorf("the reply to an older report shortened the lease to %v", until.Sub(at0))
	}
}

// TestSmallerFloorIsConfirmedOnceSaved: a crash must not bring back a floor that
// the leader took to be given up.
func TestSmallerFloorIsConfirmedOnceSaved(t *testing.T) {
	h, r := grantee()
	give := func(seq uint64, floor int64) {
		g := grant(1, 1, seq, 0, 0)
		g.Lines[0].Floor = Share{floor, 1}
		h.Grant(at0, g)
	}
	give(1, 5_000)
	if h.FloorsUnsaved() {
		t.Error("a larger floor need not be saved before it is confirmed")
	}
	floors, version := h.SaveFloors()
	if len(floors) != 1 || floors[0].Share.Amount != 5_000 || floors[0].Until != at0.Add(24*time.Hour) {
		t.Fatalf("to be saved: %+v", floors)
	}
	h.FloorsSaved(version)
	give(2, 2_000)
	if got := r.Usable(at0); got.Amount != 2_000 {
		t.Errorf("the smaller floor is used at once, but it is %v", got)
	}
	if got := h.Report(at0).Lines[0].Stamp.Seq; got != 1 {
		t.Errorf("confirmed grant %d before its floor was saved", got)
	}
	_, version = h.SaveFloors()
	give(3, 1_000)
	h.FloorsSaved(version)
	if got := h.Report(at0).Lines[0].Stamp.Seq; got != 2 || !h.FloorsUnsaved() {
		t.Errorf("confirmed grant %d, saved was that of grant 2", got)
	}
	_, newer := h.SaveFloors()
	h.FloorsSaved(version) // an older write that ended late
	if got := h.Report(at0).Lines[0].Stamp.Seq; got != 2 {
		t.Errorf("an older save confirmed grant %d", got)
	}
	h.FloorsSaved(newer)
	if got := h.Report(at0).Lines[0].Stamp.Seq; got != 3 || h.FloorsUnsaved() {
		t.Errorf("confirmed grant %d after everything was saved", got)
	}
}

// TestRestartHasFloorsOnly: a new process begins with what is on disk, as long as
// that lasts, and with an empty bucket.
func TestRestartHasFloorsOnly(t *testing.T) {
	floors := []Floor{
		{Limit: 1, Kind: Rate, Per: time.Second, Share: Share{1_000, 4}, Until: at0.Add(time.Hour)},
		{Limit: 2, Kind: Rate, Per: time.Second, Share: Share{1_000, 1}, Until: at0},
		{Limit: 3, Kind: Slots, Share: Share{Amount: 2}, Until: at0, Soft: true},
	}
	h := NewHolder(DefaultConfig(), 7, 4, 1, floors, at0)
	r := h.Rights(1, Rate, time.Second)
	if ok, wait := r.Take(at0, 1); ok || wait != time.Second {
		t.Errorf("took at once: %v, wait %v; want an empty bucket", ok, wait)
	}
	if ok, _ := r.Take(at0.Add(time.Second), 1); !ok {
		t.Error("the floor of one a second was refused after a second")
	}
	if got := h.Rights(2, Rate, time.Second).Usable(at0); !got.zero() {
		t.Errorf("an ended floor gives %v", got)
	}
	slots := h.Rights(3, Slots, 0)
	for want := range int64(4) {
		if got := slots.Opened(); got != min(want, 2) {
			t.Errorf("a soft floor of two slots opened %d of %d", got, want)
		}
		slots.Open(at0)
	}
	if got := r.Usable(at0.Add(time.Hour)); !got.zero() {
		t.Errorf("past its end the floor gives %v", got)
	}
}

// TestSlotsLinger: at the end of a lease nothing new is opened, and what is open
// may stay for a linger and no longer.
func TestSlotsLinger(t *testing.T) {
	h := NewHolder(DefaultConfig(), 7, 3, 1, nil, at0)
	r := h.Rights(1, Slots, 0)
	h.SetDemand(r, 5)
	h.Report(at0)
	slots := func(seq uint64, n int64) *Grant {
		return &Grant{Node: 7, Incarnation: 3, Generation: 1, Term: 1, Nonce: 1, Lines: []GrantLine{{Limit: 1, Kind: Slots, Seq: seq, Share: Share{Amount: n}}}}
	}
	h.Grant(at0, slots(1, 5))
	for range 5 {
		if !r.Open(at0) {
			t.Fatal("a granted slot was refused")
		}
	}
	if r.Open(at0) {
		t.Fatal("a sixth slot was opened")
	}
	h.Grant(at0, slots(2, 2))
	if soon, atOnce := r.Excess(at0); soon != 3 || atOnce != 0 {
		t.Errorf("two of five are left: close %d soon, %d at once", soon, atOnce)
	}
	if got := h.Report(at0).Lines[0].Held; got != 5 {
		t.Errorf("reports %d held while 5 are open", got)
	}
	for range 3 {
		r.Close()
	}
	if due := h.ReportAt(0); due != at0 {
		t.Errorf("that a slot came free is reported after %v", due.Sub(at0))
	}
	end := at0.Add(30 * time.Second)
	if r.Close(); r.Open(end) {
		t.Error("opened after the lease")
	}
	if soon, atOnce := r.Excess(end.Add(time.Minute - 1)); soon != 1 || atOnce != 0 {
		t.Errorf("within the linger: %d soon, %d at once", soon, atOnce)
	}
	if _, atOnce := r.Excess(end.Add(time.Minute)); atOnce != 1 {
		t.Errorf("after the linger %d are closed at once, want 1", atOnce)
	}
}

// TestFormerFloorIsOver: slots that linger after a floor ended do so once. A floor
// that came later and was taken back leaves nothing.
func TestFormerFloorIsOver(t *testing.T) {
	h := NewHolder(DefaultConfig(), 7, 3, 1, nil, at0)
	r := h.Rights(1, Slots, 0)
	now, seq := at0, uint64(0)
	report := func(floor int64) {
		seq++
		h.SetDemand(r, 5)
		nonce := h.Report(now).Nonce
		h.Grant(now, &Grant{Node: 7, Incarnation: 3, Generation: 1, Term: 1, Nonce: nonce, Reply: true, Lines: []GrantLine{
			{Limit: 1, Kind: Slots, Seq: seq, Share: Share{Amount: 2}, Floor: Share{Amount: floor}},
		}})
		_, version := h.SaveFloors()
		h.FloorsSaved(version)
	}
	report(1)
	now = now.Add(25 * time.Hour)
	if got := r.Usable(now); !got.zero() {
		t.Fatalf("after a day of silence it uses %v", got)
	}
	report(1)
	now = now.Add(10 * time.Second)
	report(0)
	if !r.Open(now) {
		t.Fatal("there is no slot")
	}
	now = now.Add(DefaultConfig().TTL + DefaultConfig().Linger)
	if _, atOnce := r.Excess(now); atOnce != 1 {
		t.Errorf("past the linger of its lease %d slots must be closed, want 1", atOnce)
	}
}

// TestReportsComeInTime: every third of a TTL more or less a fifth, earlier when
// demand moves, and of that one each second after the first.
func TestReportsComeInTime(t *testing.T) {
	h, r := grantee()
	for _, spread := range []int{0, 500, 999} {
		if wait := h.ReportAt(spread).Sub(at0); wait < 8*time.Second || wait > 12*time.Second {
			t.Errorf("spread %d: the next report after %v", spread, wait)
		}
	}
	h.SetDemand(r, 119_000)
	if wait := h.ReportAt(500).Sub(at0); wait < 8*time.Second {
		t.Errorf("a small change of demand is reported after %v", wait)
	}
	now := at0
	for i, want := range []time.Duration{quickReport, time.Second - quickReport, time.Second, time.Second} {
		h.SetDemand(r, r.told*2)
		if wait := h.ReportAt(500).Sub(now); wait != want {
			t.Errorf("large change %d of demand is reported after %v, want %v", i, wait, want)
		}
		now = h.ReportAt(500)
		h.Report(now)
	}
	// What others wait for is told at once, and does not put off what is told next.
	for range 20 {
		h.Soon()
		if h.ReportAt(500) > now {
			t.Fatal("what others wait for is not told at once")
		}
		h.Report(now)
	}
	h.SetDemand(r, r.told*2)
	if wait := h.ReportAt(500).Sub(now); wait > time.Second {
		t.Errorf("after many reports a change of demand waits for %v", wait)
	}
}

// TestMovedShareIsNotUsedTwice: whatever is moved between buckets, in any window
// no more starts than the sum of the shares allows and the burst of the limit.
func TestMovedShareIsNotUsedTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		whole := Share{rapid.Int64Range(10, 10_000_000).Draw(t, "amount"), rapid.Int64Range(2, 50).Draw(t, "burst")}
		per := time.Duration(rapid.Int64Range(int64(time.Second), int64(time.Minute)).Draw(t, "per"))
		var buckets [3]bucket
		var shares [3]Share
		now, free := at0, whole
		var starts []Instant
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(per)).Draw(t, "gap")))
			i := rapid.IntRange(0, 2).Draw(t, "bucket")
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0: // lowered first, so that there is something to give
				next := Share{rapid.Int64Range(0, shares[i].Amount).Draw(t, "a"), rapid.Int64Range(0, shares[i].Burst).Draw(t, "b")}
				free, shares[i] = free.add(shares[i]).sub(next), next
				buckets[i].set(now, next, per)
			case 1:
				next := shares[i].add(Share{rapid.Int64Range(0, free.Amount).Draw(t, "a"), rapid.Int64Range(0, free.Burst).Draw(t, "b")})
				free, shares[i] = free.add(shares[i]).sub(next), next
				buckets[i].set(now, next, per)
			default:
				for ok := true; ok; {
					if ok, _ = buckets[i].take(now, 1); ok {
						starts = append(starts, now)
					}
				}
			}
		}
		for i := range starts {
			for j := i; j < len(starts); j++ {
				// count ≤ amount·w/(1000·per) + burst, in whole numbers.
				count, w := int64(j-i+1), int64(starts[j]-starts[i])
				if over := count - whole.Burst; over > 0 && float64(over)*Milli*float64(per) > float64(whole.Amount)*float64(w)*(1+1e-9) {
					t.Fatalf("%d started in %v under %v per %v", count, time.Duration(w), whole, per)
				}
			}
		}
	})
}

// TestTakeWaits: after the wait that it says, a share lets the event start.
func TestTakeWaits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var b bucket
		per := time.Duration(rapid.Int64Range(int64(time.Second), int64(MaxPer)).Draw(t, "per"))
		b.set(at0, Share{rapid.Int64Range(Milli, MaxEvents*Milli).Draw(t, "amount"), rapid.Int64Range(1, 100).Draw(t, "burst")}, per)
		now := at0
		for range 50 {
			ok, wait := b.take(now, 1)
			if ok {
				continue
			}
			if wait <= 0 {
				t.Fatalf("refused with the wait %v", wait)
			}
			if ok, _ := b.take(now.Add(wait-1), 1); ok {
				t.Fatal("started a nanosecond early")
			}
			now = now.Add(wait)
			if ok, wait := b.take(now, 1); !ok {
				t.Fatalf("refused after its own wait, %v more", wait)
			}
		}
	})
}

// TestTakeOfNothing gives nothing back either.
func TestTakeOfNothing(t *testing.T) {
	h, r := grantee()
	h.Grant(at0, grant(1, 1, 1, 1_000, 1))
	later := at0.Add(2 * time.Second)
	if ok, _ := r.Take(later, 1); !ok {
		t.Fatal("the first event was refused")
	}
	for _, n := range []int64{0, -1, -100} {
		if ok, _ := r.Take(later, n); !ok {
			t.Errorf("%d events were refused", n)
		}
	}
	if ok, wait := r.Take(later, 1); ok || wait != time.Second {
		t.Errorf("after taking less than nothing: %v, wait %v; want 1s", ok, wait)
	}
}

func TestTakeDoesNotAllocate(t *testing.T) {
	h, r := grantee()
	h.Grant(at0, grant(1, 1, 1, 1_000_000, 100))
	now := at0
	if n := testing.AllocsPerRun(100, func() { now++; r.Take(now, 1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkTake(b *testing.B) {
	h, r := grantee()
	h.Grant(at0, grant(1, 1, 1, 1_000_000, 100))
	now := at0
	b.ReportAllocs()
	for b.Loop() {
		now++
		r.Take(now, 1)
	}
}

// TestAReleaseWaitsForTheDisk (R2): a release confirms the last grant. While the disk
// does not know of the smaller floor that came with it nothing is released, for after
// a crash the relay would use the former one. Found by random worlds, seed 51931.
func TestAReleaseWaitsForTheDisk(t *testing.T) {
	h, r := grantee()
	withFloor := grant(1, 1, 1, 10_000, 5)
	withFloor.Lines[0].Floor = Share{1000, 1}
	h.Grant(at0, withFloor)
	_, version := h.SaveFloors()
	h.FloorsSaved(version)
	h.Grant(at0, grant(1, 1, 2, 5_000, 5)) // without the floor
	if m, ok := h.Release(at0, r); ok || r.Usable(at0) != (Share{5_000, 5}) {
		t.Fatalf("released by %+v, uses %v", m, r.Usable(at0))
	}
	_, version = h.SaveFloors()
	if m, ok := h.Release(at0, r); ok {
		t.Fatalf("released before it was synced: %+v", m)
	}
	h.FloorsSaved(version)
	if m, ok := h.Release(at0, r); !ok || m.Stamp != (Stamp{1, 1, 2}) || !r.Usable(at0).zero() {
		t.Errorf("%v, %+v, uses %v", ok, m, r.Usable(at0))
	}
}
