package sign

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

var checkStart = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)

// judged is a check with a result.
func judged(v CheckVerdict, confirms, mayHold bool) CheckEvent {
	e := CheckEvent{Judgement: Judgement{Verdict: v, Decided: Finding{Selector: "r1", Verdict: v, TTL: 20 * time.Second}}, Confirms: confirms, MayHold: mayHold}
	if v == CheckBad {
		e.Judgement.Decided.Fault, e.Judgement.Decided.Words = FaultKey, "gone"
	}
	return e
}

func TestCheckSteps(t *testing.T) {
	good, temporary := judged(CheckGood, false, true), judged(CheckUnknown, true, true)
	bad, confirmed := judged(CheckBad, false, true), judged(CheckBad, true, true)
	quiet := judged(CheckBad, true, false)
	other := confirmed
	other.Judgement.Decided.Words = "revoked"
	letGo, off, replaced := CheckEvent{Kind: LetGo}, CheckEvent{Kind: NotToBe}, CheckEvent{Kind: Replaced}
	begin, end := CheckEffects{Hold: true, Begin: true}, CheckEffects{Release: true, End: true}
	for _, tc := range []struct {
		name    string
		events  []CheckEvent
		phase   CheckPhase
		effects CheckEffects  // of the last event
		next    time.Duration // after the last event, -1: not by itself
	}{
		{"good", []CheckEvent{good}, CheckPassing, CheckEffects{}, -1},
		{"temporary", []CheckEvent{temporary, temporary, temporary}, CheckPassing, CheckEffects{}, -1},
		{"bad once", []CheckEvent{bad}, CheckSuspect, CheckEffects{}, 20 * time.Second},
		{"bad once, even if every server was asked", []CheckEvent{confirmed}, CheckSuspect, CheckEffects{}, 20 * time.Second},
		{"bad, then good", []CheckEvent{bad, good}, CheckPassing, CheckEffects{}, -1},
		{"bad, then temporary", []CheckEvent{bad, temporary}, CheckSuspect, CheckEffects{}, 30 * time.Second},
		{"bad, then bad mail", []CheckEvent{bad, bad}, CheckSuspect, CheckEffects{}, 20 * time.Second},
		{"bad, confirmed", []CheckEvent{bad, confirmed}, CheckHolding, begin, firstHeldWait},
		{"bad, temporary, confirmed", []CheckEvent{bad, temporary, temporary, confirmed}, CheckHolding, begin, firstHeldWait},
		{"held and still bad", []CheckEvent{bad, confirmed, confirmed}, CheckHolding, CheckEffects{}, 15 * time.Second},
		{"held for another reason", []CheckEvent{bad, confirmed, other}, CheckHolding, CheckEffects{Reword: true}, 15 * time.Second},
		{"held, DNS is away", []CheckEvent{bad, confirmed, temporary, temporary, temporary, temporary, temporary, temporary}, CheckHolding, CheckEffects{}, MaxHeldWait},
		{"held, then good", []CheckEvent{bad, confirmed, good}, CheckPassing, end, -1},
		{"held, then not to be checked", []CheckEvent{bad, confirmed, off}, CheckPassing, end, -1},
		{"held, other keys", []CheckEvent{bad, confirmed, replaced}, CheckHolding, CheckEffects{}, 0},
		{"suspect, other keys", []CheckEvent{bad, replaced}, CheckPassing, CheckEffects{}, -1},
		{"let go", []CheckEvent{bad, confirmed, letGo}, CheckReleased, CheckEffects{}, firstHeldWait},
		{"let go and still bad", []CheckEvent{bad, confirmed, letGo, confirmed, bad}, CheckReleased, CheckEffects{}, 22500 * time.Millisecond},
		{"let go, then good", []CheckEvent{bad, confirmed, letGo, good}, CheckPassing, CheckEffects{End: true}, -1},
		{"let go when nothing was held", []CheckEvent{bad, letGo}, CheckSuspect, CheckEffects{}, 20 * time.Second},
		{"policy does not hold", []CheckEvent{bad, quiet}, CheckTold, CheckEffects{Begin: true}, firstHeldWait},
		{"policy holds after all", []CheckEvent{bad, quiet, confirmed}, CheckHolding, CheckEffects{Hold: true}, 15 * time.Second},
		{"policy holds no more", []CheckEvent{bad, confirmed, quiet}, CheckTold, CheckEffects{Release: true}, 15 * time.Second},
		{"told, then good", []CheckEvent{bad, quiet, good}, CheckPassing, CheckEffects{End: true}, -1},
	} {
		var s CheckState
		var f CheckEffects
		for _, e := range tc.events {
			s, f = s.Step(e, checkStart)
		}
		next := time.Duration(-1)
		if !s.Next.IsZero() {
			next = s.Next.Sub(checkStart)
		}
		if s.Phase != tc.phase || f != tc.effects || next != tc.next {
			t.Errorf("%s: %v %+v next %v, want %v %+v %v", tc.name, s.Phase, f, next, tc.phase, tc.effects, tc.next)
		}
	}
	if s := HeldCheck("gone", checkStart, checkStart); s.Phase != CheckHolding || !s.Next.Equal(checkStart) {
		t.Errorf("after a restart %+v", s)
	}
}

// TestCheckOfRandomAnswers drives the state with DNS that breaks, heals, fails
// for a while and answers wrongly once in a while, and holds what it does
// against the rules.
func TestCheckOfRandomAnswers(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var s CheckState
		now := checkStart
		broken, dark := false, false
		holding, alerted := false, false
		bads := 0                 // in a row, with no good one between
		var healed time.Time      // when DNS became right and stayed so
		var trace strings.Builder // what happened, for a failure
		for range 400 {
			if now = now.Add(time.Duration(rng.IntN(20)+1) * time.Second); !s.Next.IsZero() && now.After(s.Next) {
				now = s.Next
			}
			if rng.IntN(25) == 0 {
				if broken = !broken; !broken {
					healed = now
				}
			}
			if rng.IntN(30) == 0 {
				dark = !dark
			}
			e := judged(CheckGood, false, true)
			due := !s.Next.IsZero() && !now.Before(s.Next)
			hiccup := rng.IntN(40) == 0
			switch {
			case rng.IntN(100) == 0:
				e = CheckEvent{Kind: CheckEventKind(1 + rng.IntN(3))}
			case dark:
				e = judged(CheckUnknown, due, true)
			case broken || hiccup && !due: // the second look asks every server, which do not err all at once
				e = judged(CheckBad, due, true)
			}
			before := s
			var f CheckEffects
			s, f = s.Step(e, now)
			fmt.Fprintf(&trace, "%v %v/%v → %v %+v\n", now.Sub(checkStart), e.Kind, e.Judgement.Verdict, s.Phase, f)
			fail := func(what string) { t.Fatalf("seed %d: %s\n%s", seed, what, trace.String()) }
			switch {
			case e.Kind == Checked && e.Judgement.Verdict == CheckBad:
				bads++
			case e.Kind == Checked && e.Judgement.Verdict == CheckGood, e.Kind == Replaced && before.Phase <= CheckSuspect, e.Kind == NotToBe:
				bads = 0
			}
			if e.Kind == Checked && e.Judgement.Verdict == CheckUnknown && (s.Phase != before.Phase || f != CheckEffects{}) {
				fail("a temporary failure did something")
			}
			if f.Hold && (holding || bads < 2 || !e.Confirms) || f.Release && !holding {
				fail("held or released out of turn")
			}
			if f.Begin && alerted || f.End && !alerted {
				fail("an alert began or ended twice")
			}
			holding = (holding || f.Hold) && !f.Release && s.Phase == CheckHolding
			alerted = (alerted || f.Begin) && !f.End
			if holding != (s.Phase == CheckHolding) || alerted != (s.Phase >= CheckHolding) {
				fail("the state does not fit what was done")
			}
			if s.Phase == CheckPassing != s.Next.IsZero() || s.Next.After(now.Add(MaxHeldWait)) {
				fail("the next look is not due within its bound")
			}
			if e.Kind == Checked && e.Judgement.Verdict == CheckGood && s.Phase != CheckPassing {
				fail("a good signature did not end it")
			}
			if holding && !broken && !dark && now.Sub(healed) > 2*MaxHeldWait+time.Minute && before.Phase == CheckHolding && bads == 0 {
				fail("it is held although DNS is right for long")
			}
		}
	}
}
