package sign

import "time"

// Times of the self-check of a domain.
const (
	MinConfirmWait = 5 * time.Second  // between a bad signature and its second check
	MaxConfirmWait = 30 * time.Second // however long DNS may be remembered: every name server is asked then
	firstHeldWait  = 10 * time.Second // between the checks of a domain whose mail is held, at first
	MaxHeldWait    = time.Minute      // and at the most
)

// CheckPhase is where the self-check of a domain stands.
type CheckPhase uint8

// The phases.
const (
	CheckPassing  CheckPhase = iota // nothing is known against it
	CheckSuspect                    // one check found a signature bad, a second one is due
	CheckHolding                    // two did: the domain's mail is held
	CheckReleased                   // an operator let the mail go all the same
	CheckTold                       // it would be held, but policy says not to
)

var checkPhaseNames = [...]string{"passing", "suspect", "holding", "released", "told"}

// String returns the name that people read.
func (p CheckPhase) String() string {
	if int(p) < len(checkPhaseNames) {
		return checkPhaseNames[p]
	}
	return "?"
}

// CheckState is what is known about the signatures of one domain. The zero
// state is that of a domain that was never checked.
type CheckState struct {
	Phase  CheckPhase
	Since  time.Time     // of the phase
	Fault  CheckFault    // why it is not passing
	Why    string        // the same in words, with the selector
	Next   time.Time     // when it is checked again without mail; zero: it is not
	Wait   time.Duration // before Next
	Checks int           // that found it bad, in a row
}

// CheckEvent is what happened to the self-check of a domain.
type CheckEvent struct {
	Kind      CheckEventKind
	Judgement Judgement // of a check
	Confirms  bool      // it is a second look: every name server was asked, or it is another message that was sent
	MayHold   bool      // policy lets the domain's mail be held
}

// CheckEventKind is the kind of a CheckEvent.
type CheckEventKind uint8

// The kinds.
const (
	Checked  CheckEventKind = iota // there is a judgement
	LetGo                          // an operator ended the hold
	NotToBe                        // the domain is not to be checked any more: it is gone, has no key, or policy says so
	Replaced                       // the domain signs with other keys than were checked
)

// CheckEffects says what is to be done. An alert that began ends exactly once.
type CheckEffects struct {
	Hold, Reword, Release bool
	Begin, End            bool // of the alert
}

// Step returns the state after an event, and what is to be done. It is a
// function of its arguments alone.
//
// A temporary failure of DNS changes nothing but when to look again. One bad
// signature makes a domain suspect; only a second look holds its mail, and one
// good signature is enough to let it go.
func (s CheckState) Step(e CheckEvent, now time.Time) (CheckState, CheckEffects) {
	switch e.Kind {
	case NotToBe:
		return s.end(now)
	case LetGo:
		if s.Phase == CheckHolding {
			s.Phase, s.Since = CheckReleased, now
		}
		return s, CheckEffects{}
	case Replaced:
		if s.Phase == CheckPassing || s.Phase == CheckSuspect {
			return CheckState{Since: now}, CheckEffects{}
		}
		// What was found is of keys that sign no more.
		s.Next, s.Wait, s.Fault = now, firstHeldWait, FaultKey
		return s, CheckEffects{}
	}
	switch e.Judgement.Verdict {
	case CheckGood:
		return s.end(now)
	case CheckBad:
		return s.bad(&e, now)
	}
	if s.Phase != CheckPassing {
		s.later(now)
	}
	return s, CheckEffects{}
}

// end returns to passing.
func (s CheckState) end(now time.Time) (CheckState, CheckEffects) {
	told := s.Phase == CheckHolding || s.Phase == CheckReleased || s.Phase == CheckTold
	return CheckState{Since: now}, CheckEffects{Release: s.Phase == CheckHolding, End: told}
}

func (s CheckState) bad(e *CheckEvent, now time.Time) (CheckState, CheckEffects) {
	var f CheckEffects
	words := "selector " + e.Judgement.Decided.Selector + ": " + e.Judgement.Decided.Words
	reworded := words != s.Why
	s.Why, s.Fault = words, e.Judgement.Decided.Fault
	s.Checks++
	switch s.Phase {
	case CheckPassing:
		s.Phase, s.Since = CheckSuspect, now
		s.Wait = min(max(e.Judgement.Decided.TTL, MinConfirmWait), MaxConfirmWait)
		s.Next = now.Add(s.Wait)
		return s, f
	case CheckSuspect:
		if !e.Confirms {
			if !now.Before(s.Next) {
				s.later(now)
			}
			return s, f // else the look that does is due already
		}
		s.Since, s.Wait = now, firstHeldWait
		s.Phase, f.Begin = CheckTold, true
		if e.MayHold {
			s.Phase, f.Hold = CheckHolding, true
		}
		s.Next = now.Add(s.Wait)
		return s, f
	case CheckHolding:
		if f.Reword = reworded; !e.MayHold {
			s.Phase, s.Since, f = CheckTold, now, CheckEffects{Release: true}
		}
	case CheckTold:
		if e.MayHold && e.Confirms {
			s.Phase, s.Since, f.Hold = CheckHolding, now, true
		}
	}
	s.later(now)
	return s, f
}

// later makes the next look due, with a wait that grows.
func (s *CheckState) later(now time.Time) {
	s.Wait = min(max(s.Wait+s.Wait/2, MinConfirmWait), MaxHeldWait)
	s.Next = now.Add(s.Wait)
}

// HeldCheck is the state of a domain whose mail was held before a restart.
func HeldCheck(why string, since, now time.Time) CheckState {
	return CheckState{Phase: CheckHolding, Since: since, Fault: FaultKey, Why: why, Next: now, Wait: firstHeldWait, Checks: 2}
}
