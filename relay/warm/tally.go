package warm

import (
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

// tellAgain is after how long what was told and not answered is told again.
const tellAgain = time.Minute

// offered reports whether recipients may have been offered to a host: RCPT may go
// out with MAIL, before its answer.
func offered(outcomes []relay.Outcome) bool {
	for i := range outcomes {
		switch outcomes[i].Phase {
		case relay.PhaseResolve, relay.PhaseConnect, relay.PhaseEHLO, relay.PhaseSTARTTLS:
		default:
			return true
		}
	}
	return false
}

// tallyOf counts what a host answered; what has no answer does not count.
func tallyOf(provider string, outcomes []relay.Outcome) (t warmup.Tally) {
	for i := range outcomes {
		o := &outcomes[i]
		if o.Reply.Code == 0 && o.Status != relay.Delivered || o.Phase == relay.PhaseLocal || o.Status == relay.NotTried || o.Status == relay.InDoubt {
			continue
		}
		v := verdict.Of(provider, o)
		if v.Action == verdict.RetryNow {
			continue // it asks for smaller transactions, not for less mail
		}
		t.Attempts++
		switch v.Class {
		case verdict.IPBlock, verdict.Blocklist:
			t.Signatures++
		}
		switch {
		case v.Action == verdict.Deliver:
			t.Accepted++
		case v.Action != verdict.Fail:
			t.Deferred++
		case verdict.ScopeOf(v.Class) == verdict.ScopeSender, verdict.ScopeOf(v.Class) == verdict.ScopeSenderConfig:
			t.Blocked++
		case v.Class == verdict.SpamContent || v.Class == verdict.Content || v.Class == verdict.Virus:
			t.Blocked++
		case v.Class == verdict.BadMailbox || v.Class == verdict.InactiveMailbox || v.Class == verdict.BadDomain:
			t.Hard++
		}
	}
	return t
}

// count adds what was answered, unless that is more than can be told.
func (s *slot) count(t warmup.Tally) {
	sum := s.tally
	sum.Add(t)
	if sum.Sound() {
		s.tally = sum
	}
}

// Observe implements engine.Observer: hosts that refuse a session refuse the address,
// though nothing was offered to them. It counts for the address and for the pool; the
// sending domain was not named to them.
func (k *Keeper) Observe(a *relay.Attempt) {
	if offered(a.Outcomes) {
		return // Done has counted it
	}
	dir := k.cfg.Directory()
	if dir == nil || !dir.Warming() {
		return
	}
	t := tallyOf(a.Provider, a.Outcomes)
	if t.Attempts == 0 {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	today := k.day(k.cfg.Now(), dir)
	for _, src := range dir.Sources() {
		if src.ID != a.Source {
			continue
		}
		var buf [3]*policy.WarmSubject
		for _, subject := range dir.WarmSubjects(buf[:0], src.ID, src.Pool, "") {
			class, _, ok := dir.WarmClass(subject, a.Provider)
			if !ok {
				continue
			}
			of := key{Subject: warmup.Subject(subject.Number), Class: warmup.Class(class), Day: today}
			if !subject.Source.IsZero() {
				of.Epoch = a.Epoch
			}
			if s := k.slot(of); s != nil {
				s.count(t)
			}
		}
	}
}

// heardTally takes the leader's answer: how many attempts it knows of. More than before
// but fewer than it was told last, it answers what it was told before that. No more than
// before, and it has not taken it, so it does not want it.
func (s *slot) heardTally(attempts int64) {
	if attempts > s.known && attempts < s.said {
		s.known = attempts
		return
	}
	s.known = s.said
}

// tell is what providers answered, if the leader does not know it; nil: it does, or
// was told a moment ago. Only what is on the disk is told: of two tallies the one with
// more attempts counts, so a relay that was killed must not have fewer than it told.
func (s *slot) tell(now time.Time, t *warmup.Tally, last bool) *wire.WarmItem {
	if t.Attempts <= s.known || !s.saved {
		return nil
	}
	wait := settleEvery
	if t.Attempts == s.said {
		wait = tellAgain
	}
	if now.Sub(s.saidWhen) < wait && !last {
		return nil
	}
	s.said, s.saidWhen = t.Attempts, now
	return &wire.WarmItem{Kind: wire.WarmTell, Subject: uint64(s.Subject), Class: uint32(s.Class), Day: int32(s.Day), Epoch: s.Epoch, Attempts: uint32(t.Attempts),
		Accepted: uint32(t.Accepted), Deferred: uint32(t.Deferred), Blocked: uint32(t.Blocked), Hard: uint32(t.Hard), Signatures: uint32(t.Signatures)}
}
