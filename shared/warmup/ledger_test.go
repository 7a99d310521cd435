package warmup

import (
	"maps"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/fault"
)

const today = Day(20_000)

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

// TestDaysOfZones: days with 23 and 25 hours, a day that begins at 01:00 and one
// that never was.
func TestDaysOfZones(t *testing.T) {
	for _, tc := range []struct {
		zone, day string
		start     string // in UTC
		hours     int
	}{
		{"UTC", "2026-03-29", "2026-03-29T00:00:00Z", 24},
		{"Europe/Paris", "2026-03-29", "2026-03-28T23:00:00Z", 23},
		{"Europe/Paris", "2026-10-25", "2026-10-24T22:00:00Z", 25},
		{"America/Sao_Paulo", "2018-11-04", "2018-11-04T03:00:00Z", 23}, // begins at 01:00
		{"Pacific/Apia", "2011-12-30", "2011-12-30T10:00:00Z", 0},       // was left out
		{"Pacific/Kiritimati", "2026-01-01", "2025-12-31T10:00:00Z", 24},
	} {
		date, err := time.Parse(time.DateOnly, tc.day)
		if err != nil {
			t.Fatal(err)
		}
		z, day := zone(t, tc.zone), DayOf(date, time.UTC)
		if day.String() != tc.day {
			t.Errorf("%s is shown as %s", tc.day, day)
		}
		start, end := day.Start(z), (day + 1).Start(z)
		if start.Format(time.RFC3339) != tc.start || end.Sub(start) != time.Duration(tc.hours)*time.Hour {
			t.Errorf("%s in %s begins at %s and has %v, want %s and %d h", tc.day, tc.zone, start.Format(time.RFC3339), end.Sub(start), tc.start, tc.hours)
		}
	}
}

// TestDayGuard: what a leader's clock may and may not do to the day.
func TestDayGuard(t *testing.T) {
	paris := zone(t, "Europe/Paris")
	day := Day(20_754) // 2026-10-28
	noon := day.Start(paris).Add(12 * time.Hour)
	for _, tc := range []struct {
		name    string
		wall    time.Time
		offsets []time.Duration
		voters  int
		ordered bool
		want    Day
		kind    fault.Kind
		fails   bool
	}{
		{"not yet", (day + 1).Start(paris).Add(-time.Second), nil, 1, false, day, 0, false},
		{"midnight", (day + 1).Start(paris), []time.Duration{0, time.Second}, 3, false, day + 1, 0, false},
		{"alone of three", (day + 1).Start(paris), nil, 3, false, day, fault.Unavailable, true},
		{"two of three", (day + 1).Start(paris), []time.Duration{time.Second}, 3, false, day + 1, 0, false},
		{"a day ahead", noon.Add(24 * time.Hour), []time.Duration{-24 * time.Hour, -24 * time.Hour}, 3, false, day, fault.Unavailable, true},
		{"a day behind", noon.Add(-24 * time.Hour), []time.Duration{24 * time.Hour, 24 * time.Hour}, 3, false, day, 0, false},
		{"one other is wrong", (day + 1).Start(paris), []time.Duration{0, time.Hour}, 3, false, day + 1, 0, false},
		{"all a week ahead", noon.Add(7 * 24 * time.Hour), []time.Duration{0, 0}, 3, false, day, fault.Conflict, true},
		{"all a week ahead, ordered", noon.Add(7 * 24 * time.Hour), []time.Duration{0, 0}, 3, true, day + 7, 0, false},
		{"a smeared leap second", (day + 1).Start(paris), []time.Duration{500 * time.Millisecond, -500 * time.Millisecond}, 3, false, day + 1, 0, false},
		{"two servers that differ", (day + 1).Start(paris), []time.Duration{10 * time.Second}, 2, false, day, fault.Unavailable, true},
	} {
		got, err := NextDay(day, tc.wall, paris, tc.offsets, tc.voters, tc.ordered)
		if got != tc.want || (err != nil) != tc.fails || tc.fails && !fault.Is(err, tc.kind) {
			t.Errorf("%s: %v, %v; want %v", tc.name, got, err, tc.want)
		}
	}
}

func TestRoll(t *testing.T) {
	l := NewLedger(today)
	if err := l.SetQuota(1, 0, today, 100); err != nil {
		t.Fatal(err)
	}
	if err := l.SetQuota(1, 0, today+1, 200); err != nil {
		t.Fatal(err)
	}
	for _, d := range []Day{today - 1, today + 2} {
		if err := l.SetQuota(1, 0, d, 100); !fault.Is(err, fault.Invalid) {
			t.Errorf("a quota of %v: %v", d, err)
		}
	}
	for _, d := range []Day{today, today - 5, today + 2} {
		if err := l.Roll(d, false); !fault.Is(err, fault.Conflict) {
			t.Errorf("rolled from %v to %v: %v", today, d, err)
		}
	}
	if err := l.Roll(today+1, false); err != nil || l.Today() != today+1 {
		t.Fatal(err)
	}
	if q, _, _ := l.Totals(1, 0, today+1); q != 200 {
		t.Errorf("tomorrow's quota became %d", q)
	}
	if q, _, _ := l.Totals(1, 0, today); q != 100 {
		t.Errorf("yesterday's quota is %d", q)
	}
	if err := l.Roll(today+100, true); err != nil || l.Today() != today+100 {
		t.Errorf("an ordered step: %v, %v", l.Today(), err)
	}
	for d := today; d <= today+101; d++ {
		if q, _, _ := l.Totals(1, 0, d); q != 0 {
			t.Errorf("%v still has the quota %d", d, q)
		}
	}
}

func reserve(t testing.TB, l *Ledger, n Node, epoch, seq uint64, upTo uint32) uint32 {
	t.Helper()
	r, err := l.Reserve(Request{Subject: 1, Day: today, Node: n, Epoch: epoch, Seq: seq, UpTo: upTo})
	if err != nil {
		t.Fatal(err)
	}
	return r.Amount
}

func TestReserveSettleCut(t *testing.T) {
	l := NewLedger(today)
	if err := l.SetQuota(1, 0, today, 100); err != nil {
		t.Fatal(err)
	}
	if got := reserve(t, l, 1, 0, 1, 60); got != 60 {
		t.Errorf("reserved %d of 60", got)
	}
	if got := reserve(t, l, 1, 0, 1, 80); got != 60 {
		t.Errorf("the same request again reserved %d", got)
	}
	if got := reserve(t, l, 2, 0, 1, 60); got != 40 {
		t.Errorf("the other relay reserved %d of the 40 left", got)
	}
	cut := Cut{Settlement: Settlement{Subject: 1, Day: today, Node: 1, Used: 20}, Seq: 2, Amount: 30}
	if r := l.Cut(cut); r.Amount != 30 || r.Used != 20 {
		t.Errorf("cut to 30: %+v", r)
	}
	if got := reserve(t, l, 2, 0, 2, 70); got != 70 {
		t.Errorf("of what was given back %d are reserved, want 70", got)
	}
	// The former cut once more, after its relay reserved again.
	l.Cut(Cut{Settlement: Settlement{Subject: 1, Day: today, Node: 2, Used: 65}, Seq: 3, Amount: 65})
	if got := reserve(t, l, 1, 0, 3, 35); got != 35 {
		t.Errorf("reserved %d, want 35", got)
	}
	if r := l.Cut(cut); r.Amount != 35 {
		t.Errorf("a cut that came twice left %d of 35", r.Amount)
	}
	l.Settle(Settlement{Subject: 1, Day: today, Node: 1, Used: 30})
	l.Settle(Settlement{Subject: 1, Day: today, Node: 1, Used: 25})
	if q, reserved, used := l.Totals(1, 0, today); q != 100 || reserved != 100 || used != 95 {
		t.Errorf("quota %d, reserved %d, used %d", q, reserved, used)
	}
	if amount, used := l.Reserved(1, 0, today, 1, 0); amount != 35 || used != 30 {
		t.Errorf("relay 1 reserved %d and used %d, want 35 and 30", amount, used)
	}
	if amount, used := l.Reserved(1, 0, today, 9, 0); amount != 0 || used != 0 {
		t.Errorf("a relay that is not known reserved %d and used %d", amount, used)
	}
	// A smaller quota takes nothing back and gives nothing out.
	if err := l.SetQuota(1, 0, today, 97); err != nil {
		t.Fatal(err)
	}
	if got := reserve(t, l, 2, 0, 4, 90); got != 65 {
		t.Errorf("beyond the quota %d are reserved", got)
	}
	if got := l.Recalls(1, 0, today); !reflect.DeepEqual(got, []Recall{{Node: 1, Amount: 32}}) {
		t.Errorf("recalls %+v", got)
	}
}

func TestReservationsThatAreRefused(t *testing.T) {
	l := NewLedger(today)
	if err := l.SetQuota(1, 0, today, 100); err != nil {
		t.Fatal(err)
	}
	if err := l.SetQuota(1, 0, today+1, 100); err != nil {
		t.Fatal(err)
	}
	if err := l.Assign(1, 7); err != nil {
		t.Fatal(err)
	}
	if err := l.Assign(1, 7); !fault.Is(err, fault.Conflict) {
		t.Errorf("the same epoch again: %v", err)
	}
	for _, tc := range []struct {
		r    Request
		kind fault.Kind
		text string
	}{
		{Request{Subject: 1, Day: today - 1, Epoch: 7, Seq: 1, UpTo: 5}, fault.Conflict, "is over"},
		{Request{Subject: 1, Day: today + 2, Epoch: 7, Seq: 1, UpTo: 5}, fault.Conflict, "not open"},
		{Request{Subject: 2, Day: today, Epoch: 7, Seq: 1, UpTo: 5}, fault.NotFound, "no quota"},
		{Request{Subject: 1, Class: 3, Day: today, Epoch: 7, Seq: 1, UpTo: 5}, fault.NotFound, "class 3"},
		{Request{Subject: 1, Day: today, Epoch: 6, Seq: 1, UpTo: 5}, fault.Denied, "epoch 6"},
	} {
		if _, err := l.Reserve(tc.r); !fault.Is(err, tc.kind) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%+v: %v", tc.r, err)
		}
	}
	r, err := l.Reserve(Request{Subject: 1, Day: today + 1, Node: 1, Epoch: 7, Seq: 1, UpTo: 80})
	if err != nil || r.Amount != 50 {
		t.Errorf("of tomorrow %d are reserved before it begins, %v; want half", r.Amount, err)
	}
}

// TestLateSettlementsOfAnOldOwnerCount (W4).
func TestLateSettlementsOfAnOldOwnerCount(t *testing.T) {
	l := NewLedger(today)
	if err := l.SetQuota(1, 0, today, 100); err != nil {
		t.Fatal(err)
	}
	if err := l.Assign(1, 7); err != nil {
		t.Fatal(err)
	}
	reserve(t, l, 1, 7, 1, 90)
	if err := l.Assign(1, 9); err != nil {
		t.Fatal(err)
	}
	if got := reserve(t, l, 2, 9, 1, 90); got != 10 {
		t.Errorf("the new owner reserved %d, the old one still holds all but 10", got)
	}
	for range 2 {
		l.Settle(Settlement{Subject: 1, Day: today, Node: 1, Epoch: 7, Used: 50})
		l.Settle(Settlement{Subject: 1, Day: today, Node: 3, Epoch: 5, Used: 4}) // whom the ledger does not know
	}
	if _, reserved, used := l.Totals(1, 0, today); reserved != 104 || used != 54 {
		t.Errorf("reserved %d, used %d", reserved, used)
	}
}

// dump makes ledgers comparable.
func dump(l *Ledger) map[Subject][3]row {
	out := make(map[Subject][3]row)
	for i, p := range l.pages {
		for s, w := range maps.All(p.rows) {
			rows := out[s]
			rows[i] = *w
			out[s] = rows
		}
	}
	return out
}

// TestRepeatedMessagesChangeNothing (W5): any messages, any of them repeated later,
// give the same ledger, and W1 holds at every grant.
func TestRepeatedMessagesChangeNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		once, twice := NewLedger(today), NewLedger(today)
		for c := range Class(2) {
			for _, l := range []*Ledger{once, twice} {
				if err := l.SetQuota(1, c, today, 100); err != nil {
					t.Fatal(err)
				}
			}
		}
		var said []func(*Ledger)
		for seq := uint64(1); seq <= 30; seq++ {
			n, c := Node(rapid.IntRange(1, 3).Draw(t, "node")), Class(rapid.IntRange(0, 1).Draw(t, "class"))
			amount := uint32(rapid.IntRange(0, 80).Draw(t, "amount"))
			s := Settlement{Subject: 1, Class: c, Day: today, Node: n, Used: amount / 4}
			switch rapid.IntRange(0, 2).Draw(t, "what") {
			case 0:
				said = append(said, func(l *Ledger) {
					before := l.pages[1].rows[1].committed(c)
					if _, err := l.Reserve(Request{Subject: 1, Class: c, Day: today, Node: n, Seq: seq, UpTo: amount}); err != nil {
						t.Fatal(err)
					}
					if after := l.pages[1].rows[1].committed(c); after > before && after > 100 {
						t.Fatalf("a grant raised what is committed from %d to %d of 100", before, after)
					}
				})
			case 1:
				said = append(said, func(l *Ledger) { l.Settle(s) })
			case 2:
				said = append(said, func(l *Ledger) { l.Cut(Cut{s, seq, amount}) })
			}
			last := said[len(said)-1]
			last(once)
			last(twice)
			again := rapid.IntRange(-1, len(said)-1).Draw(t, "again")
			if again >= 0 {
				said[again](twice)
			}
			if a, b := dump(once), dump(twice); !reflect.DeepEqual(a, b) {
				t.Fatalf("message %d, then %d again:\n%+v\n%+v", seq, again, a, b)
			}
		}
	})
}

// TestSpenderNeverPassesItsMark: against a disk that loses what was not synced, at
// every point, what was spent is at most what a restart takes for spent, and a
// TestCutWaitsForItsOwnMark: a mark that was made before a cut and has the same
// amount is not the cut's.
func TestCutWaitsForItsOwnMark(t *testing.T) {
	s := Resume(Mark{Amount: 104})
	before, ok := s.Raise(10)
	if !ok {
		t.Fatal("there is nothing to raise")
	}
	cut := s.CutTo(122)
	if cut.Amount != before.Amount {
		t.Fatalf("the marks %v and %v are of different amounts", before, cut)
	}
	if s.Saved(before); !s.Cutting() {
		t.Error("the cut counts as saved when a mark before it is")
	}
	if s.Saved(cut); s.Cutting() {
		t.Error("the cut is saved and does not count as saved")
	}
}

// restart wastes a step at most (W3).
func TestSpenderNeverPassesItsMark(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const step = 8
		var s Spender
		var disk Mark     // synced
		var flight []Mark // written, in order
		spent, reserved, seq := uint32(0), uint32(0), uint64(0)
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 6).Draw(t, "what") {
			case 0:
				seq++
				reserved += uint32(rapid.IntRange(0, 30).Draw(t, "more"))
				s.Ask(seq)
				if s.Granted(Reply{Seq: seq - 1, Amount: 1_000_000}) {
					t.Fatal("took the reply to another request")
				}
				s.Granted(Reply{Seq: seq, Amount: reserved})
			case 1:
				if m, ok := s.Raise(step); ok {
					flight = append(flight, m)
				}
			case 2, 3:
				if len(flight) > 0 {
					disk, flight = flight[0], flight[1:]
					s.Saved(disk)
				}
			case 4:
				if n := uint32(rapid.IntRange(1, 5).Draw(t, "n")); s.Take(n) {
					spent += n
				}
			case 5:
				flight = append(flight, s.CutTo(uint32(rapid.IntRange(0, 200).Draw(t, "to"))))
				for ; len(flight) > 0; flight = flight[1:] {
					disk = flight[0]
					s.Saved(disk)
				}
				if s.Cutting() {
					t.Fatal("a saved cut is not known to be")
				}
				_, reserved = s.Settle()
			case 6:
				if disk.Used > spent+step {
					t.Fatalf("a restart takes %d for spent, %d are", disk.Used, spent)
				}
				s, flight = Resume(disk), nil
				spent = max(spent, disk.Used) // wasted
			}
			if spent > disk.Used {
				t.Fatalf("%d spent, the disk says %d", spent, disk.Used)
			}
			if spent > reserved {
				t.Fatalf("%d spent of %d", spent, reserved)
			}
		}
	})
}

func TestRefund(t *testing.T) {
	s := Resume(Mark{})
	s.Ask(1)
	s.Granted(Reply{Seq: 1, Amount: 50})
	m, _ := s.Raise(20)
	s.Saved(m)
	s.Take(10)
	s.Refund(4)
	if used, _ := s.Settle(); used != 6 {
		t.Errorf("used %d after 4 of 10 came back", used)
	}
	s.Take(2)
	s.Refund(5)
	if used, _ := s.Settle(); used != 6 {
		t.Errorf("used %d: what was settled came back", used)
	}
	if s.Left() != 44 {
		t.Errorf("%d left of 50", s.Left())
	}
}

func TestChunk(t *testing.T) {
	for _, tc := range []struct {
		quota, committed, own uint32
		relays                int
		quarter, want         uint32
	}{
		{1000, 0, 0, 1, 0, 900}, {1000, 900, 900, 1, 0, 10}, {50_000, 45_000, 45_000, 1, 0, 500}, {1000, 995, 995, 1, 0, 5}, {1000, 1000, 0, 1, 0, 0},
		{1000, 0, 0, 5, 1000, 100}, {1000, 0, 0, 5, 30, 30}, {1000, 0, 0, 5, 1, 10}, {1000, 993, 0, 5, 30, 7}, {10, 20, 0, 5, 30, 0},
	} {
		if got := Chunk(tc.quota, tc.committed, tc.own, tc.relays, tc.quarter); got != tc.want {
			t.Errorf("%+v: %d", tc, got)
		}
	}
}

// TestLedgerIsSmall: 100,000 addresses with 20 classes each, all reserved, take at
// most 64 MiB a day.
func TestLedgerIsSmall(t *testing.T) {
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	l := NewLedger(today)
	before := heap()
	const subjects, classes = 100_000, 20
	for s := range Subject(subjects) {
		for c := range Class(classes) {
			if err := l.SetQuota(s+1, c, today, 1000); err != nil {
				t.Fatal(err)
			}
			if _, err := l.Reserve(Request{Subject: s + 1, Class: c, Day: today, Node: Node(s % 1000), Seq: uint64(c) + 1, UpTo: 900}); err != nil {
				t.Fatal(err)
			}
		}
	}
	used := heap() - before
	t.Logf("%.1f MiB", float64(used)/(1<<20))
	if used > 64<<20 {
		t.Errorf("%d bytes, more than 64 MiB", used)
	}
	if q, reserved, _ := l.Totals(subjects, classes-1, today); q != 1000 || reserved != 900 {
		t.Error("the last row is wrong")
	}
}

func BenchmarkReserve(b *testing.B) {
	l := NewLedger(today)
	if err := l.SetQuota(1, 0, today, MaxQuota); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := uint64(1); b.Loop(); i++ {
		if _, err := l.Reserve(Request{Subject: 1, Day: today, Node: Node(i % 10), Seq: i, UpTo: uint32(i)}); err != nil {
			b.Fatal(err)
		}
	}
}

// TestMarkOnItsWayAtACut: a mark is on its way to the disk when a reservation is cut,
// and the mark of the cut, which is lower, comes after it. What the first would have
// allowed is not spent: a crash after the second would forget that.
func TestMarkOnItsWayAtACut(t *testing.T) {
	var s Spender
	s.Ask(1)
	s.Granted(Reply{Seq: 1, Amount: 100})
	first, _ := s.Raise(8)
	s.Saved(first)
	if !s.Take(6) {
		t.Fatal("below the mark nothing is spent")
	}
	second, raised := s.Raise(8)
	cut := s.CutTo(12)
	s.Saved(second)
	took := s.Take(6)
	s.Saved(cut)
	if used, _ := s.Settle(); !raised || took || used > cut.Used {
		t.Errorf("%d are spent, the disk says %d of %d", used, cut.Used, cut.Amount)
	}
	if !s.Take(2) || s.Take(1) {
		t.Error("after the cut not all of what its mark allows is spent, or more")
	}
}
