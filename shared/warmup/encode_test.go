package warmup

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

// TestRowsAreKeptWhole: a ledger that is taken apart into rows after every change
// and put together again goes on like one that is not.
func TestRowsAreKeptWhole(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 7))
		whole, today := NewLedger(100), Day(100)
		rows := map[Day][]byte{}
		for step := range 300 {
			through := NewLedger(today)
			for d, b := range rows {
				if err := through.SetRow(1, d, b); err != nil {
					t.Fatalf("seed %d step %d: %v", seed, step, err)
				}
			}
			day, class, node := today+Day(rng.IntN(3)-1), Class(rng.IntN(4)), Node(rng.IntN(5))
			settlement := Settlement{Subject: 1, Class: class, Day: day, Node: node, Used: uint32(rng.IntN(80))}
			for _, l := range []*Ledger{whole, through} {
				switch step % 4 {
				case 0:
					_ = l.SetQuota(1, class, max(day, today), uint32(50+step%7*10)) // refused in both or in none
				case 1, 2:
					_, _ = l.Reserve(Request{Subject: 1, Class: class, Day: day, Node: node, Seq: uint64(step), UpTo: uint32(step % 90)}) // likewise
				case 3:
					l.Tell(Told{Subject: 1, Class: class, Day: day, Node: node, Tally: Tally{Attempts: int64(settlement.Used), Accepted: int64(settlement.Used) / 2}})
					l.Cut(Cut{Settlement: settlement, Seq: uint64(step), Amount: settlement.Used + 5})
				}
			}
			clear(rows)
			for d := today - 1; d <= today+1; d++ {
				a, b := whole.AppendRow(nil, 1, d), through.AppendRow(nil, 1, d)
				if !bytes.Equal(a, b) {
					t.Fatalf("seed %d step %d %s: %x, whole %x", seed, step, d, b, a)
				}
				if len(a) > 0 {
					rows[d] = a
				}
			}
			if rng.IntN(40) == 0 {
				today++
				if err := whole.Roll(today, false); err != nil {
					t.Fatal(err)
				}
				delete(rows, today-2)
			}
		}
	}
}

func TestRowsThatAreRefused(t *testing.T) {
	l := NewLedger(100)
	if err := l.SetQuota(1, 2, 100, 50); err != nil {
		t.Fatal(err)
	}
	good := l.AppendRow(nil, 1, 100)
	if err := l.SetRow(1, 102, good); !fault.Is(err, fault.Invalid) {
		t.Errorf("a day that is not open: %v", err)
	}
	for _, b := range [][]byte{{2}, {3}, good[:len(good)-1], append(bytes.Clone(good), 0), {1, 0, 1, 70, 0, 1, 0, 0, 0}, {1, 0, 1, 2, 1, 9, 0, 0, 0}, {1, 0, 2, 2, 0, 9, 0, 0, 2, 0, 9, 0, 0, 0}} {
		if err := l.SetRow(1, 100, b); !fault.Is(err, fault.Invalid) {
			t.Errorf("%x: %v", b, err)
		}
	}
	// Tallies: none at all, of an unknown holder, of no attempt, more than the attempts,
	// out of order, cut off.
	head := append([]byte{rowWithTallies}, good[1:]...)
	l.Tell(Told{Subject: 1, Class: 2, Day: 100, Node: 7, Tally: Tally{Attempts: 3, Accepted: 2, Hard: 1}})
	told := l.AppendRow(nil, 1, 100)
	for _, b := range [][]byte{append(bytes.Clone(head), 0), append(bytes.Clone(head), 1, 2, 3, 0, 0, 0, 1, 0), told[:len(told)-1]} {
		if err := l.SetRow(1, 100, b); !fault.Is(err, fault.Invalid) {
			t.Errorf("%x: %v", b, err)
		}
	}
	// The last seven octets are class and holder, and six counts.
	own := told[len(told)-7:]
	for name, change := range map[string]func(b []byte){
		"no attempt": func(b []byte) { b[1] = 0 }, "too many": func(b []byte) { b[2] = 3 }, "holder": func(b []byte) { b[0] |= MaxClasses }, "signatures": func(b []byte) { b[6] = 4 },
	} {
		bad := bytes.Clone(told)
		change(bad[len(bad)-7:])
		if err := l.SetRow(1, 100, bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	twice := append(bytes.Clone(told[:len(told)-8]), 2)
	twice = append(append(twice, own...), own...)
	if err := l.SetRow(1, 100, twice); !fault.Is(err, fault.Invalid) {
		t.Errorf("a tally twice: %v", err)
	}
	if err := l.SetRow(1, 100, told); err != nil || l.Shown(1, 2, 100) != (Tally{Attempts: 3, Accepted: 2, Hard: 1}) {
		t.Errorf("%x: %v, %+v", told, err, l.Shown(1, 2, 100))
	}
	if quota, _, _ := l.Totals(1, 2, 100); quota != 50 {
		t.Errorf("a row that was refused changed the quota to %d", quota)
	}
	if err := l.SetRow(1, 100, nil); err != nil || len(l.AppendRow(nil, 1, 100)) != 0 {
		t.Errorf("an empty row: %v", err)
	}
}

// FuzzRows: whatever is read is written the same way again.
func FuzzRows(f *testing.F) {
	l := NewLedger(100)
	_ = l.SetQuota(1, 2, 100, 50)                                                                         // a day that is open
	_, _ = l.Reserve(Request{Subject: 1, Class: 2, Day: 100, Node: 1 << 60, Seq: 1 << 33, UpTo: 1 << 20}) // likewise
	_, _ = l.Reserve(Request{Subject: 1, Class: 2, Day: 100, Node: 2, Seq: 1, UpTo: 1})
	f.Add(l.AppendRow(nil, 1, 100))
	l.Tell(Told{Subject: 1, Class: 2, Day: 100, Node: 2, Tally: Tally{Attempts: 300, Accepted: 200, Deferred: 10}})
	f.Add(l.AppendRow(nil, 1, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := NewLedger(100)
		if err := l.SetRow(1, 100, b); err != nil || len(b) == 0 {
			return
		}
		again := NewLedger(100)
		out := l.AppendRow(nil, 1, 100)
		if err := again.SetRow(1, 100, out); err != nil || !bytes.Equal(again.AppendRow(nil, 1, 100), out) {
			t.Fatalf("%x became %x: %v", b, out, err)
		}
		l.Settle(Settlement{Subject: 1, Class: 2, Day: 100, Node: 1, Used: 3})
		l.Recalls(1, 2, 100)
		l.Tell(Told{Subject: 1, Class: 2, Day: 100, Node: 1, Tally: Tally{Attempts: 1}})
		l.Shown(1, 2, 100)
	})
}
