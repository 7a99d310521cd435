package reflex

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/verdict"
)

func TestSignals(t *testing.T) {
	for _, c := range []struct {
		class     verdict.Class
		temporary bool
		want      Signal
	}{
		{verdict.Throttled, true, TooFast},
		{verdict.Throttled, false, TooFast},
		{verdict.Policy, true, TooFast},
		{verdict.Policy, false, Silent},
		{verdict.IPBlock, false, Blocked},
		{verdict.IPBlock, true, Blocked},
		{verdict.Blocklist, false, Blocked},
		{verdict.RemoteSystem, true, Unwell},
		{verdict.NoAnswer, true, Broken},
		{verdict.BadConnection, true, Broken},
		{verdict.Delivered, false, Clean},
		{verdict.BadMailbox, false, Clean},
		{verdict.Quota, true, Clean},
		{verdict.SpamContent, false, Clean},
		{verdict.Greylist, true, Silent},
		{verdict.RecipientRate, true, Silent},
		{verdict.AuthFailure, false, Silent},
		{verdict.Routing, true, Silent},
		{verdict.Undetermined, true, Silent},
	} {
		if got := Of(c.class, c.temporary); got != c.want {
			t.Errorf("%s, temporary %v: %s, want %s", c.class, c.temporary, got, c.want)
		}
	}
}

// busy is a lane that has taken n messages evenly over the last 30 s, on four
// sessions.
func busy(n int, s *Settings) (*Lane, time.Time) {
	l := &Lane{}
	for range 4 {
		l.Opening()
		l.Opened(start)
	}
	for i := range n {
		now := start.Add(30 * time.Second * time.Duration(i) / time.Duration(n))
		l.Began(now)
		l.Ended(now, now, Cause{Signal: Clean}, s)
	}
	return l, start.Add(30 * time.Second)
}

func TestOneBurstCountsOnce(t *testing.T) {
	s := settings()
	l, now := busy(300, &s) // 600 a minute
	began := now
	changes := 0
	for i := range 50 {
		if l.Ended(now.Add(time.Duration(i)*20*time.Millisecond), began, Cause{Signal: TooFast, Class: "throttled"}, &s) {
			changes++
		}
	}
	a := l.Allowance()
	if changes != 1 || a.Phase != Slowed || a.Rate > 27_000 || a.Rate < 26_900 || a.Connections != 3 {
		t.Fatalf("%d changes, %+v, want one, to nearly 27,000 an hour and 3 connections", changes, a)
	}
	// What began after it, but at once, still belongs to it.
	for i := range 50 {
		at := now.Add(2*time.Second + time.Duration(i)*10*time.Millisecond)
		if l.Ended(at, at, Cause{Signal: TooFast}, &s) {
			t.Fatal("a second decrease within the spacing")
		}
	}
	at := now.Add(s.Spacing + time.Second)
	if !l.Ended(at, at, Cause{Signal: TooFast}, &s) {
		t.Fatal("no second decrease after the spacing")
	}
}

func TestFewDeferralsMeanNothing(t *testing.T) {
	s := settings()
	l, now := busy(300, &s)
	for i := range 25 { // 8 %
		if i%2 == 0 {
			l.Ended(now, now, Cause{Signal: Clean}, &s)
		}
		if l.streak < s.After-1 && l.Ended(now, now, Cause{Signal: TooFast}, &s) {
			t.Fatalf("slowed after %d of 325", i)
		}
		l.Ended(now, now, Cause{Signal: Clean}, &s)
	}
}

func TestTwoAreNotEnough(t *testing.T) {
	s := settings()
	var l Lane
	for range s.After - 1 {
		l.Began(start)
		if l.Ended(start.Add(time.Second), start, Cause{Signal: Blocked}, &s) {
			t.Fatal("too early")
		}
	}
	if !l.Ended(start.Add(time.Second), start, Cause{Signal: Blocked}, &s) || l.Allowance().Phase != Held {
		t.Fatalf("%+v", l.Allowance())
	}
}

func TestHoldsDoubleAndEnd(t *testing.T) {
	s := settings()
	s.MaxHold = 5 * time.Minute
	l, now := busy(300, &s)
	for i, want := range []time.Duration{time.Minute, 2 * time.Minute, 4 * time.Minute, 5 * time.Minute, 5 * time.Minute} {
		for range s.After {
			l.Ended(now, now, Cause{Signal: Blocked, Class: "ip-block", Reply: "550 no"}, &s)
		}
		a := l.Allowance()
		if span := a.Until.Sub(now); a.Phase != Held || span < want || span > want*111/100 {
			t.Fatalf("hold %d: %v for %v, want %v", i, a.Phase, span, want)
		}
		if l.Tick(a.Until.Add(-time.Second), &s) {
			t.Fatal("ended early")
		}
		now = a.Until
		if !l.Tick(now, &s) {
			t.Fatal("does not end")
		}
		if p := l.Allowance(); p.Phase != Probing || p.Connections != 1 || p.Rate != 3600 { // a tenth of 36,000
			t.Fatalf("%+v", p)
		}
		now = now.Add(time.Second)
	}
	for range s.Probe {
		l.Ended(now, now, Cause{Signal: Clean}, &s)
	}
	for range 20 {
		if l.Allowance().Phase == Free {
			break
		}
		now = now.Add(s.Step)
		l.Ended(now, now, Cause{Signal: Clean}, &s)
		l.Tick(now, &s)
	}
	if c := l.Cause(); c.Class != "ip-block" && l.Allowance().Phase != Free {
		t.Fatalf("%+v %+v", l.Allowance(), c)
	}
}

func TestOffFreesTheLane(t *testing.T) {
	s := settings()
	l, now := busy(300, &s)
	for range s.After {
		l.Ended(now, now, Cause{Signal: TooFast}, &s)
	}
	off := s
	off.Off = true
	if !l.Clamp(&off) || l.Allowance() != (Allowance{}) || !l.Next().IsZero() {
		t.Fatalf("%+v", l.Allowance())
	}
	if l.Ended(now, now, Cause{Signal: Blocked}, &off) {
		t.Fatal("works though it is off")
	}
}

func TestClampFollowsPolicy(t *testing.T) {
	s := settings()
	l, now := busy(300, &s)
	for range s.After {
		l.Ended(now, now, Cause{Signal: TooFast}, &s)
	}
	s.MaxRate, s.MaxConnections = 1000, 2
	if !l.Clamp(&s) || l.Allowance().Rate != 1000 || l.Allowance().Connections != 2 {
		t.Fatalf("%+v", l.Allowance())
	}
}

func TestSpaced(t *testing.T) {
	for _, c := range []struct {
		perHour int64
		events  int
		per     time.Duration
	}{
		{0, 1, time.Hour},
		{60, 60, time.Hour},
		{1_000_000, 1_000_000, time.Hour},
		{6_000_000, 100_000, time.Minute},
		{3_600_000_000, 1_000_000, time.Second},
		{1 << 40, 1_000_000, time.Second},
	} {
		if n, per := Spaced(c.perHour, 1_000_000); n != c.events || per != c.per {
			t.Errorf("%d an hour: %d per %v, want %d per %v", c.perHour, n, per, c.events, c.per)
		}
	}
}

// FuzzLane: whatever comes in whatever order, and however the clock jumps, the
// allowance keeps its bounds, and a lane that is not free and hears of nothing
// but good answers is free again in the end.
func FuzzLane(f *testing.F) {
	f.Add([]byte{5, 5, 5, 0, 1, 2, 3, 4, 200, 1, 1, 1}, int64(36_000))
	f.Add([]byte{2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 255}, int64(0))
	f.Fuzz(func(t *testing.T, in []byte, most int64) {
		s := settings()
		s.MaxRate = max(0, min(most, 1<<36))
		if s.MaxRate > 0 {
			s.MaxRate = max(s.MaxRate, s.MinRate)
		}
		s.MaxConnections = 8
		l := &Lane{Seed: uint64(len(in))}
		now := start
		check := func() {
			a := l.Allowance()
			switch {
			case a.Rate < 0 || a.Connections < 0 || l.open < 0:
				t.Fatalf("negative: %+v", a)
			case a.Rate > 0 && a.Rate < s.MinRate, s.MaxRate > 0 && a.Rate > s.MaxRate, a.Rate > maxRate:
				t.Fatalf("%d an hour, of %d to %d", a.Rate, s.MinRate, s.MaxRate)
			case (a.Phase == Held) != !a.Until.IsZero():
				t.Fatalf("%+v", a)
			case a.Phase == Held && a.Until.Sub(now) > s.MaxHold*111/100+time.Hour:
				t.Fatalf("held for %v", a.Until.Sub(now))
			case a.Phase == Free && (a.Rate != 0 || a.Connections != 0):
				t.Fatalf("free with %+v", a)
			}
		}
		for _, b := range in {
			switch signal := Signal(b & 7); {
			case signal == 6:
				l.Opening()
				l.Opened(now)
			case signal == 7:
				l.Closed()
			default:
				l.Began(now)
				l.Ended(now, now.Add(-time.Duration(b>>5)*time.Second), Cause{Signal: signal}, &s)
			}
			check()
			now = now.Add(time.Duration(int64(b>>3)-2) * 700 * time.Millisecond)
			l.Tick(now, &s)
			check()
		}
		now = now.Add(2 * s.MaxHold)
		for range 2000 {
			for range 2 {
				l.Began(now)
				l.Ended(now, now, Cause{Signal: Clean}, &s)
			}
			now = now.Add(s.Step)
			l.Tick(now, &s)
			check()
		}
		if l.Allowance().Phase != Free {
			t.Fatalf("not free after all: %+v", l.Allowance())
		}
	})
}

func BenchmarkEnded(b *testing.B) {
	s := settings()
	var l Lane
	now := start
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Millisecond)
		l.Began(now)
		l.Ended(now, now, Cause{Signal: Clean}, &s)
	}
}
