package warmup

import "testing"

// TestTallies: what relays tell of a day is added up; what is told twice, late or
// out of order changes nothing, and what cannot be is passed over.
func TestTallies(t *testing.T) {
	l := NewLedger(100)
	for _, c := range []Class{2, 3} {
		if err := l.SetQuota(1, c, 100, 500); err != nil {
			t.Fatal(err)
		}
	}
	tell := func(c Class, n Node, epoch uint64, counts Tally) {
		l.Tell(Told{Subject: 1, Class: c, Day: 100, Node: n, Epoch: epoch, Tally: counts})
	}
	tell(2, 1, 4, Tally{Attempts: 10, Accepted: 9, Deferred: 1})
	tell(2, 1, 5, Tally{Attempts: 7, Accepted: 3, Blocked: 2, Hard: 1, Signatures: 2}) // the same relay, later
	tell(2, 2, 5, Tally{Attempts: 5, Accepted: 5})
	tell(3, 2, 5, Tally{Attempts: 1, Deferred: 1, Signatures: 1})
	want := Tally{Attempts: 22, Accepted: 17, Deferred: 1, Blocked: 2, Hard: 1, Signatures: 2}
	if got := l.Shown(1, 2, 100); got != want {
		t.Fatalf("%+v, want %+v", got, want)
	}
	row := string(l.AppendRow(nil, 1, 100))
	for name, again := range map[string]func(){
		"the same":           func() { tell(2, 2, 5, Tally{Attempts: 5, Accepted: 5}) },
		"an earlier one":     func() { tell(2, 2, 5, Tally{Attempts: 4, Deferred: 4}) },
		"as many, other":     func() { tell(2, 2, 5, Tally{Attempts: 5, Hard: 5}) },
		"nothing":            func() { tell(3, 9, 9, Tally{}) },
		"more than tried":    func() { tell(2, 2, 5, Tally{Attempts: 6, Accepted: 4, Hard: 3}) },
		"negative":           func() { tell(2, 2, 5, Tally{Attempts: 6, Hard: -1}) },
		"too many":           func() { tell(2, 2, 5, Tally{Attempts: MaxQuota + 1}) },
		"more signatures":    func() { tell(2, 2, 5, Tally{Attempts: 6, Signatures: 7}) },
		"of another class":   func() { tell(MaxClasses, 2, 5, Tally{Attempts: 6}) },
		"without quotas":     func() { l.Tell(Told{Subject: 2, Class: 2, Day: 100, Node: 1, Tally: Tally{Attempts: 6}}) },
		"a day not open":     func() { l.Tell(Told{Subject: 1, Class: 2, Day: 98, Node: 1, Tally: Tally{Attempts: 6}}) },
		"of an unopened day": func() { l.Tell(Told{Subject: 1, Class: 2, Day: 101, Node: 1, Tally: Tally{Attempts: 6}}) },
	} {
		again()
		if got := string(l.AppendRow(nil, 1, 100)); got != row {
			t.Errorf("%s: %x, want %x", name, got, row)
			row = got
		}
	}
	// A relay that forgot its last attempts is heard again when it has more.
	tell(2, 2, 5, Tally{Attempts: 6, Accepted: 4, Deferred: 2})
	if got := l.ShownBy(1, 2, 100, 2, 5); got != (Tally{Attempts: 6, Accepted: 4, Deferred: 2}) {
		t.Errorf("%+v", got)
	}
	if got := l.ShownBy(1, 2, 100, 3, 5); got != (Tally{}) {
		t.Errorf("of a relay that told nothing: %+v", got)
	}
	// A day that is over is still told of until the next one ends; then it is history.
	if err := l.Roll(101, false); err != nil {
		t.Fatal(err)
	}
	tell(2, 2, 5, Tally{Attempts: 8, Accepted: 8})
	if got := l.Shown(1, 2, 100); got.Attempts != 25 {
		t.Errorf("yesterday: %+v", got)
	}
	if err := l.Roll(102, false); err != nil {
		t.Fatal(err)
	}
	if got := l.Shown(1, 2, 100); got != (Tally{}) {
		t.Errorf("the day before: %+v", got)
	}
	if quota, reserved, used := l.Totals(1, 2, 102); quota+reserved+used != 0 {
		t.Errorf("telling reserved something: %d %d %d", quota, reserved, used)
	}
}
