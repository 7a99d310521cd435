package engine

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestExpiresAtFiveMinutes lets a deadline of five minutes pass in virtual time:
// nothing at 4:59.999, the end at 5:00, and no delivery when work goes on later.
func TestExpiresAtFiveMinutes(t *testing.T) {
	w := newWorld(t, nil)
	w.stop()
	env := w.accept(func(e *relay.Envelope) { e.ExpiresAt = e.AcceptedAt.Add(5 * time.Minute) }, w.at(lab.Google, 0, lab.Accept))
	w.until("the deadline in memory", func() bool { // a page of deadlines may be under way
		_, ok := w.queue.NextDeadline()
		return ok
	})
	w.engine.expire(env.ExpiresAt.Add(-time.Millisecond))
	if info, err := w.queue.Show(env.ID); err != nil || info.States[0].State != relay.StateWaiting {
		t.Fatalf("a millisecond before the deadline: %+v, %v", info, err)
	}
	if at, ok := w.queue.NextDeadline(); !ok || at.Sub(env.ExpiresAt).Abs() >= time.Millisecond {
		t.Errorf("the loop would look at %v, the deadline is %v", at, env.ExpiresAt)
	}
	if idle := w.engine.untilDeadline(env.ExpiresAt.Add(-30 * time.Second)); idle > 30*time.Second {
		t.Errorf("the loop would sleep %v, thirty seconds before the deadline", idle)
	}
	w.engine.expire(env.ExpiresAt)
	w.event(env, outbox.Expired)
	w.gone(env)
	w.view(nil, first)
	w.restart(time.Second)
	w.gone(w.accept(nil, w.at(lab.Google, 1, lab.Accept)))
	if n := len(w.arrived(lab.Google)); n != 1 {
		t.Errorf("%d mails arrived, want the fresh one only", n)
	}
}

// TestDeadlinesDoNotWaitForTheScheduler ends mail while somebody else has the
// scheduler's lock. Its hour passes in no time, once the lock is taken.
func TestDeadlinesDoNotWaitForTheScheduler(t *testing.T) {
	w := newWorld(t, nil) // no source: mail stays
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	var work *queue.Work
	w.queue.Queues(func(info queue.QueueInfo) bool {
		work, _ = w.queue.Take(info.Number, w.now(), 1)
		return work == nil
	})
	if work == nil || !w.queue.Load(work) {
		t.Fatal("the message cannot be taken")
	}
	// The last reply is known, so that nothing has to be asked about the mail.
	state := work.Recipients[0].State
	state.Next, state.LastReply = env.ExpiresAt, relay.Reply{Code: 450, Text: "try again later"}
	stored := make(chan error, 1)
	w.queue.Finish(work, nil, []queue.Result{{State: state}}, nil, func(err error) { stored <- err })
	if err := <-stored; err != nil {
		t.Fatal(err)
	}
	w.engine.mu.Lock()
	defer w.engine.mu.Unlock()
	w.skew.Store(int64(2 * time.Hour))
	w.engine.lookAtDeadlines() // its timer goes by the time that it saw
	w.until("the end of the message", func() bool {
		_, err := w.queue.Show(env.ID)
		return fault.Is(err, fault.NotFound)
	})
}

// TestNoAttemptIsPlannedBeyondTheDeadline defers mail of several lifetimes until
// its end, with the retries of the default policy.
func TestNoAttemptIsPlannedBeyondTheDeadline(t *testing.T) {
	doc := testDocument(t)
	for _, life := range []time.Duration{time.Second, 30 * time.Second, time.Minute, 5 * time.Minute, 7 * time.Minute, time.Hour, 24 * time.Hour} {
		for _, reply := range []relay.Reply{{Text: "connection refused"}, {Code: 450, Enhanced: "4.7.1", Text: "greylisted, try again later"}, {Code: 421, Text: "try again in 2 hours"}} {
			w := testWork(policy.Transactional, 1)
			w.Env.ExpiresAt = w.Env.AcceptedAt.Add(life)
			state := &w.Recipients[0].State
			at, attempts := w.Env.AcceptedAt, 0
			for ; at.Before(w.Env.ExpiresAt); attempts++ {
				if attempts > 200 {
					t.Fatalf("life of %v: more than %d attempts", life, attempts)
				}
				s := decide(w, testAttempt(w, at.Sub(w.Env.AcceptedAt), relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseConnect, Reply: reply}), &doc.Queue)
				*state = s.results[0].State
				if state.Next.After(w.Env.ExpiresAt) || !state.Next.After(at) {
					t.Fatalf("life of %v: after an attempt at %v the next one is at %v", life, at.Sub(w.Env.AcceptedAt), state.Next.Sub(w.Env.AcceptedAt))
				}
				at = state.Next
			}
			if life >= 5*time.Minute && attempts < 2 && reply.Code != 421 { // who asks for two hours is left alone
				t.Errorf("life of %v: %d attempts", life, attempts)
			}
		}
	}
}

// TestSlowHostDoesNotHoldMailBeyondItsDeadline has hosts fall silent in every
// phase before the final dot: the mail expires on time, is not delivered when
// they wake up, and the host is not blamed.
func TestSlowHostDoesNotHoldMailBeyondItsDeadline(t *testing.T) {
	for _, phase := range []lab.Phase{lab.PhaseConnect, lab.PhaseEhlo, lab.PhaseMail, lab.PhaseRcpt, lab.PhaseData} {
		t.Run(phase.String(), func(t *testing.T) {
			w := newWorld(t, nil, first)
			there := w.held(lab.Google, phase, time.Hour)
			env, e := w.expiresAt(there)
			if late := e.At.Sub(env.ExpiresAt); late < 0 {
				t.Errorf("expired %v before its deadline", -late)
			}
			if e.Reply.Enhanced != "4.4.7" {
				t.Errorf("reason %+v", e.Reply)
			}
			w.gone(env)
			if err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{}); err != nil {
				t.Fatal(err)
			}
			fresh := w.accept(nil, w.at(lab.Google, 100, lab.Accept))
			if e := w.event(fresh, outbox.Delivered); e.Attempts != 1 {
				t.Errorf("the next mail took %d attempts", e.Attempts)
			}
			if n := len(w.arrived(lab.Google)); n != 1 {
				t.Errorf("%d mails arrived, want the fresh one only", n)
			}
		})
	}
}

// expiresAt has mail expire while a session waits at the phase of there. A machine
// that is busy may not get it there in time: then mail that lives longer is next.
func (w *world) expiresAt(there <-chan struct{}) (*relay.Envelope, outbox.Event) {
	w.t.Helper()
	for i, life := 0, 700*time.Millisecond; life < patience; i, life = i+1, 2*life {
		env := w.accept(func(e *relay.Envelope) { e.ExpiresAt = e.AcceptedAt.Add(life) }, w.at(lab.Google, i, lab.Accept))
		e := w.event(env, outbox.Expired)
		select {
		case <-there:
			if strings.Contains(e.Reply.Text, "expired before the mail host") {
				return env, e
			}
			w.t.Logf("expired elsewhere: %s", e.Reply.Text)
		default:
		}
	}
	w.t.Fatal("in vain: mail that expires while a session is at the held phase")
	return nil, outbox.Event{}
}

// TestAnswerToTheFinalDotIsAwaited has a host think about the mail until after
// the deadline: it has the mail, so its answer counts.
func TestAnswerToTheFinalDotIsAwaited(t *testing.T) {
	w := newWorld(t, nil, first)
	for i, life := 0, 900*time.Millisecond; life < patience; i, life = i+1, 2*life {
		var expires atomic.Pointer[time.Time]
		err := w.lab.SetBehaviour(lab.Google, lab.Behaviour{Answer: func(e lab.Event) lab.Answer {
			if e.Phase != lab.PhaseFinalDot {
				return lab.Answer{}
			}
			return lab.Answer{Delay: time.Until(*expires.Load()) + 100*time.Millisecond}
		}})
		if err != nil {
			t.Fatal(err)
		}
		env := w.accept(func(e *relay.Envelope) {
			e.ExpiresAt = e.AcceptedAt.Add(life)
			expires.Store(&e.ExpiresAt)
		}, w.at(lab.Google, i, lab.Accept))
		w.gone(env)
		for _, e := range w.events() {
			if e.Message != env.ID || e.Type != outbox.Delivered {
				continue
			}
			if !e.EndedAt.After(env.ExpiresAt) {
				t.Errorf("answered at %v, before the deadline at %v", e.EndedAt, env.ExpiresAt)
			}
			return
		}
		// The final dot came too late on a busy machine: that mail expired.
	}
	t.Fatal("in vain: mail whose deadline is over when the final dot is answered")
}

func TestGuard(t *testing.T) {
	w := newWorld(t, nil)
	env := &relay.Envelope{ExpiresAt: time.Now().Add(2 * guardWithin)}
	if g := w.engine.watch(env, time.Now(), nil); g != nil {
		t.Error("mail that has hours left is watched")
	}
	env.ExpiresAt = time.Now().Add(guardWithin / 2)
	w.trusted.Store(false)
	if g := w.engine.watch(env, time.Now(), nil); g != nil {
		t.Error("mail is watched by a clock that is not trusted")
	}
	w.trusted.Store(true)
	for _, tc := range []struct {
		at   time.Duration
		pass bool
	}{{-time.Millisecond, true}, {0, false}, {time.Second, false}} {
		g := w.engine.watch(env, time.Now(), func() { t.Error("aborted before the deadline") })
		if err := g.pass(env.ExpiresAt.Add(tc.at)); (err == nil) != tc.pass {
			t.Errorf("%v from the deadline: %v", tc.at, err)
		}
		if late := g.end(); late == tc.pass {
			t.Errorf("%v from the deadline: late is %v", tc.at, late)
		}
	}
	outcomes := []relay.Outcome{{Status: relay.Delivered}, {Status: relay.NotTried, Phase: relay.PhaseLocal}, {Status: relay.Deferred, Reply: relay.Reply{Code: 451}}, {Status: relay.Failed}}
	late(outcomes, relay.PhaseConnect)
	if v := verdict.Of("mx:there.test", &outcomes[1]); v.Action == verdict.Fail {
		t.Error("the attempt ends the recipient, which is for the deadline to do")
	}
	if outcomes[0].Status != relay.Delivered || outcomes[1].Status != relay.Deferred || outcomes[1].Reply != lateReply || outcomes[2].Reply.Code != 451 || outcomes[3].Reply.Text != "" {
		t.Errorf("%+v", outcomes)
	}
}
