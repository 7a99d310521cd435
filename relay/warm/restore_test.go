package warm

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// TestWhatIsSpentIsToldAgainAfterARestore (W2): a restored ledger does not know what
// was spent since the backup, all of a reservation or a part, until the relay says so.
func TestWhatIsSpentIsToldAgainAfterARestore(t *testing.T) {
	for _, spent := range []int{100, 30} {
		l, relays := newRelays(t, 1, 100)
		r := relays[0]
		r.reserve(1)
		sent := 0
		for range 300 {
			if sent < spent {
				if _, ok := r.send(1); ok {
					sent++
				}
			}
			r.look()
			r.now = r.now.Add(time.Second)
		}
		today, used := l.ledger.Today(), uint32(0)
		for _, slot := range r.k.slots {
			u, _ := slot.spender.Peek()
			used += u
		}
		if int(used) < spent-1 {
			t.Fatalf("%d were spent, want %d", used, spent)
		}
		l.ledger = warmup.NewLedger(today) // as it was before
		if err := l.ledger.SetQuota(1, 0, today, 100); err != nil {
			t.Fatal(err)
		}
		view := *r.view.View()
		view.Generation++
		restored, err := policy.Compile(&view)
		if err != nil {
			t.Fatal(err)
		}
		r.view = restored
		// What it says is lost at first. It says that all is told when that is so.
		lost := 6
		l.lost = func() bool { lost--; return lost > 0 }
		for range 120 {
			r.look()
			if _, _, known := l.ledger.Totals(1, 0, today); l.declared[r.node] == view.Generation && known != uint64(used) {
				t.Fatalf("it says that all is told, and the ledger knows of %d of %d", known, used)
			}
			r.now = r.now.Add(time.Second)
		}
		if l.declared[r.node] != view.Generation || r.k.declared != view.Generation {
			t.Errorf("it says that all is told in generation %d, and knows that it said so in %d; the cluster's is %d", l.declared[r.node], r.k.declared, view.Generation)
		}
		if _, _, known := l.ledger.Totals(1, 0, today); known != uint64(used) {
			t.Errorf("after a restore the ledger knows of %d, %d were spent", known, used)
		}
	}
}

// TestACutThatIsNotSavedIsMadeAgain: the disk fails when a reservation is to be given
// back, and works again.
func TestACutThatIsNotSavedIsMadeAgain(t *testing.T) {
	l, relays := newRelays(t, 1, 100)
	r := relays[0]
	r.reserve(1)
	for range 10 {
		r.look()
		r.now = r.now.Add(time.Second)
	}
	today := l.ledger.Today()
	if err := l.ledger.SetQuota(1, 0, today, 5); err != nil {
		t.Fatal(err)
	}
	good := r.k.cfg.Dir
	r.k.cfg.Dir = filepath.Join(good, "gone")
	for range 20 { // it hears that it must give back, and cannot save that
		r.send(1)
		for len(r.k.downs) > 0 {
			r.k.read(<-r.k.downs)
		}
		r.k.tidy(r.now)
		r.k.say(r.now, false)
		r.now = r.now.Add(time.Second)
	}
	r.k.cfg.Dir = good
	for range 20 {
		r.look()
		r.now = r.now.Add(time.Second)
	}
	_, reserved, used := l.ledger.Totals(1, 0, today)
	if reserved > max(5, used) {
		t.Errorf("%d are reserved of a quota that was lowered to 5, %d are used", reserved, used)
	}
}

// TestANewLifeTellsAllBeforeItSaysSo: a relay is killed after it has heard of a
// restore and before the ledger knows what it spent.
func TestANewLifeTellsAllBeforeItSaysSo(t *testing.T) {
	l, relays := newRelays(t, 1, 100)
	r := relays[0]
	r.reserve(1)
	for range 30 {
		r.send(1)
		r.look()
		r.now = r.now.Add(time.Second)
	}
	today := l.ledger.Today()
	view := *r.view.View()
	view.Generation++
	restored, err := policy.Compile(&view)
	if err != nil {
		t.Fatal(err)
	}
	l.ledger = warmup.NewLedger(today)
	if err := l.ledger.SetQuota(1, 0, today, 100); err != nil {
		t.Fatal(err)
	}
	r.view, l.lost = restored, func() bool { return true }
	r.look()
	r.start()
	used := uint32(0)
	for _, slot := range r.k.slots {
		u, _ := slot.spender.Peek()
		used += u
	}
	if used == 0 {
		t.Fatal("nothing was spent")
	}
	l.lost = nil
	for range 60 {
		r.look()
		if _, _, known := l.ledger.Totals(1, 0, today); l.declared[r.node] == view.Generation && known < uint64(used) {
			t.Fatalf("it says that all is told, and the ledger knows of %d of %d", known, used)
		}
		r.now = r.now.Add(time.Second)
	}
	if l.declared[r.node] != view.Generation {
		t.Error("it never says that all is told")
	}
}
