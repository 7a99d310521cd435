package throttle

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestConnectTakesFromAllOrNone(t *testing.T) {
	source := &Gate{Scope: ScopeSource, Slots: 2}
	provider := &Gate{Scope: ScopeProvider, Slots: 3, Connects: NewBucket(rate(t, 1, time.Second, 2))}
	gates := []*Gate{source, provider}
	for i := range 2 {
		if ok, why := Connect(start, gates); !ok {
			t.Fatalf("connection %d: %+v", i, why)
		}
	}
	ok, why := Connect(start, gates)
	if want := (Refusal{ScopeSource, Connections, start.Add(time.Second), true}); ok || why != want {
		t.Errorf("the third: %v %+v, want %+v", ok, why, want)
	}
	Close(gates)
	ok, why = Connect(start, gates)
	if want := (Refusal{ScopeProvider, Connects, start.Add(time.Second), false}); ok || why != want {
		t.Errorf("after one closed: %v %+v, want %+v", ok, why, want)
	}
	if source.Open() != 1 || provider.Open() != 1 {
		t.Errorf("a refusal took: %d and %d are open", source.Open(), provider.Open())
	}
	if ok, why := Connect(why.At, gates); !ok {
		t.Errorf("at the time that was told: %+v", why)
	}
	Close(gates)
	Close(gates)
	Close(gates) // once too often
	if source.Open() != 0 {
		t.Errorf("%d are open", source.Open())
	}
}

func TestBegin(t *testing.T) {
	lane := &Gate{Scope: ScopeSource, PerSession: 2, Messages: NewBucket(rate(t, 10, time.Second, 1))}
	tenant := &Gate{Scope: ScopeTenant, Messages: NewBucket(rate(t, 1, time.Minute, 1))}
	gates := []*Gate{lane, tenant}
	if ok, why := Begin(start, gates, 0); !ok {
		t.Fatalf("%+v", why)
	}
	ok, why := Begin(start, gates, 1)
	if want := (Refusal{ScopeSource, Messages, start.Add(time.Minute), false}); ok || why != want {
		t.Errorf("the second: %+v, want %+v: named by the smaller scope, until both allow it", why, want)
	}
	if ok, why := Begin(why.At, gates, 2); ok || why.Kind != SessionFull || !why.At.IsZero() {
		t.Errorf("a third in one session: %v %+v", ok, why)
	}
	if ok, _ := Begin(start.Add(time.Minute), gates, 1); !ok {
		t.Error("a refusal took from a rate")
	}
	var none Gate
	if ok, _ := Begin(start, []*Gate{&none}, 1_000_000); !ok {
		t.Error("a gate without limits refused")
	}
}

// TestGatesTellTheTruth: at the time that a refusal tells, the same is granted, and
// not a nanosecond sooner; no gate has more connections open than it may.
func TestGatesTellTheTruth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		gates := make([]*Gate, rapid.IntRange(1, 4).Draw(t, "gates"))
		for i := range gates {
			r, err := NewRate(rapid.IntRange(1, 20).Draw(t, "limit"), time.Second, rapid.IntRange(1, 4).Draw(t, "burst"))
			if err != nil {
				t.Fatal(err)
			}
			gates[i] = &Gate{Scope: Scope(i + 1), Slots: rapid.IntRange(0, 3).Draw(t, "slots"), Connects: NewBucket(r)}
		}
		now, open := start, 0
		for range 60 {
			ok, why := Connect(now, gates)
			switch {
			case ok:
				open++
			case why.OnClose:
				if open == 0 {
					t.Fatalf("nothing is open, and yet: %+v", why)
				}
				Close(gates)
				open--
			default:
				for _, g := range gates {
					if ok, wait := g.Connects.Peek(why.At, 1); !ok {
						t.Fatalf("told %v, then %v more", why.At, wait)
					}
				}
				if ok, _ := Connect(why.At.Add(-1), gates); ok {
					t.Fatal("granted a nanosecond before the time that was told")
				}
				now = why.At
			}
			for _, g := range gates {
				if g.Slots > 0 && g.Open() > g.Slots || g.Open() != open {
					t.Fatalf("%d open of %d, the test holds %d", g.Open(), g.Slots, open)
				}
			}
		}
	})
}

func TestNamesOfScopes(t *testing.T) {
	if ScopeSource.String() != "source" || ScopeProvider.String() != "provider" || Scope(99).String() != "scope" {
		t.Error("scopes are named wrongly")
	}
}

func TestSooner(t *testing.T) {
	later := start.Add(1)
	for _, tc := range [][3]time.Time{{start, later, start}, {later, start, start}, {{}, start, start}, {start, {}, start}} {
		if got := Sooner(tc[0], tc[1]); !got.Equal(tc[2]) {
			t.Errorf("of %v and %v: %v", tc[0], tc[1], got)
		}
	}
}

func fiveGates(t testing.TB) []*Gate {
	gates := make([]*Gate, 5)
	for i := range gates {
		gates[i] = &Gate{Scope: Scope(i + 1), Slots: 10, PerSession: 100, Messages: NewBucket(rate(t, 1000, time.Second, 100))}
	}
	return gates
}

func TestBeginDoesNotAllocate(t *testing.T) {
	gates := fiveGates(t)
	if n := testing.AllocsPerRun(200, func() { Begin(start, gates, 1) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkBegin(b *testing.B) {
	gates, now := fiveGates(b), start
	b.ReportAllocs()
	for b.Loop() {
		if ok, why := Begin(now, gates, 1); !ok {
			now = why.At
		}
	}
}
