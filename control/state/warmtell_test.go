package state

import (
	"bytes"
	"slices"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/warmup"
)

func told(subject uint64, node byte, day warmup.Day, attempts, accepted uint32) *command.WarmTold {
	return &command.WarmTold{Subject: subject, Day: int32(day), Node: id(node), Attempts: attempts, Accepted: accepted, Hard: attempts - accepted}
}

// TestWhatWasAnsweredIsKept: relays tell what providers answered; it is added up, kept
// beside the ledger and with it in snapshots, and forgotten with its day.
func TestWhatWasAnsweredIsKept(t *testing.T) {
	w := warmWorld(t)
	w.ok(warmPut("pool", id(1), 500))
	tell := func(items ...*command.WarmTold) []int64 {
		t.Helper()
		return w.ok(&command.WarmTell{Items: items}).(*control.WarmHeard).Attempts
	}
	got := tell(told(1, 1, warmDay, 10, 9), told(1, 2, warmDay, 20, 20), told(1, 1, warmDay, 7, 7), told(2, 1, warmDay, 5, 5), told(1, 1, warmDay+7, 5, 5))
	if want := []int64{10, 20, 10, 0, 0}; !slices.Equal(got, want) {
		t.Errorf("heard %v, want %v", got, want)
	}
	shown := func(s *Store, day warmup.Day) warmup.Tally {
		r := s.Read()
		return r.WarmDay(r.WarmSubject(1), day).Shown(1, 0, day)
	}
	want := warmup.Tally{Attempts: 30, Accepted: 29, Hard: 1}
	if got := shown(w.store, warmDay); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := w.batch(item(command.WarmReserve, 1, 1, 1, 300)); got.Err != nil || got.Amount != 300 {
		t.Errorf("beside it is reserved %+v", got)
	}
	if got := shown(w.store, warmDay); got != want {
		t.Errorf("after a reservation %+v", got)
	}
	var b bytes.Buffer
	if _, err := w.store.Read().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	again := New()
	if err := again.Restore(&b); err != nil || shown(again, warmDay) != want {
		t.Errorf("after a snapshot %v, %+v", err, shown(again, warmDay))
	}
	w.store = again
	w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
	tell(told(1, 2, warmDay, 25, 24))
	if got := shown(w.store, warmDay); got.Attempts != 35 {
		t.Errorf("what comes late is lost: %+v", got)
	}
	w.ok(&command.WarmRoll{Day: int32(warmDay + 2)})
	if got := tell(told(1, 2, warmDay, 26, 24)); got[0] != 0 {
		t.Errorf("a day that is history: %v", got)
	}
}

// TestGoldenWarmTell replays a log that this release wrote.
func TestGoldenWarmTell(t *testing.T) {
	checkGolden(t, "warmtell5", func(t *testing.T) *world {
		w := warmWorld(t)
		w.ok(&command.FSMVersionSet{Version: 5})
		w.ok(warmPut("pool", id(1), 500))
		w.ok(warmPut("source", id(1), 100))
		mine := told(2, 1, warmDay, 40, 30)
		mine.Epoch = w.store.Read().Source(ids.Source(id(1))).Epoch
		w.ok(&command.WarmBatch{Items: []*command.WarmItem{item(command.WarmReserve, 1, 1, 1, 300)}})
		w.ok(&command.WarmTell{Items: []*command.WarmTold{mine, told(1, 1, warmDay, 10, 9), told(1, 2, warmDay, 1000, 900), told(1, 1, warmDay, 9, 9), told(1, 1, warmDay+1, 3, 3)}})
		w.ok(&command.WarmRoll{Day: int32(warmDay + 1)})
		w.ok(&command.WarmTell{Items: []*command.WarmTold{told(1, 1, warmDay, 12, 11), told(1, 1, warmDay+1, 5, 5)}})
		return w
	})
}
