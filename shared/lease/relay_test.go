package lease

import (
	"testing"
	"time"
)

func TestPeekTakesNothing(t *testing.T) {
	h := NewHolder(DefaultConfig(), 1, 1, 1, nil, 0)
	r := h.Rights(7, Rate, time.Second)
	if ok, wait := r.Peek(0, 1); ok || wait >= 0 {
		t.Errorf("without a right: %v %v", ok, wait)
	}
	report := h.Report(0)
	h.Grant(0, &Grant{Node: 1, Incarnation: 1, Term: 1, Nonce: report.Nonce, Reply: true, Lines: []GrantLine{
		{Limit: 7, Kind: Rate, Per: time.Second, Seq: 1, Share: Share{Amount: Milli, Burst: 1}, Floor: Share{Amount: Milli, Burst: 1}},
	}})
	now := Instant(0).Add(2 * time.Second)
	for range 3 {
		if ok, _ := r.Peek(now, 2); !ok {
			t.Fatal("two were saved up")
		}
	}
	if ok, _ := r.Take(now, 2); !ok {
		t.Fatal("Peek took something")
	}
	if ok, wait := r.Peek(now, 1); ok || wait != time.Second/2 {
		t.Errorf("%v %v", ok, wait)
	}
	if got := h.Report(now).Lines[0]; got.Used != 2 || got.Denied != 0 {
		t.Errorf("Peek was counted: %+v", got)
	}
	cfg := DefaultConfig()
	if end := r.Ends(now); end != Instant(cfg.TTL-cfg.Guard) {
		t.Errorf("the lease ends at %v", end)
	}
	if end := r.Ends(Instant(cfg.TTL)); end != Instant(cfg.FloorTTL) || end != r.FloorEnds() {
		t.Errorf("the floor ends at %v", end)
	}
}

func TestShorterLeasesEndSooner(t *testing.T) {
	cfg := DefaultConfig()
	h := NewHolder(cfg, 1, 1, 1, nil, 0)
	r := h.Rights(7, Slots, 0)
	report := h.Report(0)
	h.Grant(0, &Grant{Node: 1, Incarnation: 1, Term: 1, Nonce: report.Nonce, Reply: true, Lines: []GrantLine{
		{Limit: 7, Kind: Slots, Seq: 1, Share: Share{Amount: 3}, Floor: Share{Amount: 1}},
	}})
	if at := h.ReportAt(0); at == 0 {
		t.Error("nothing is to be reported at once")
	}
	h.Soon()
	if at := h.ReportAt(0); at != 0 {
		t.Errorf("the next report is due at %v", at)
	}
	cfg.TTL, cfg.FloorTTL, cfg.Guard = 10*time.Second, time.Minute, time.Second
	h.Configure(Instant(time.Second), cfg)
	for at, want := range map[time.Duration]int64{9 * time.Second: 4, 10 * time.Second: 1, 60 * time.Second: 1} {
		fresh := *r
		if got := fresh.Usable(Instant(at)).Amount; got != want {
			t.Errorf("after %v %d slots, want %d", at, got, want)
		}
	}
	if got := r.Usable(Instant(61 * time.Second)).Amount; got != 0 {
		t.Errorf("%d slots when the floor has ended", got)
	}
}
