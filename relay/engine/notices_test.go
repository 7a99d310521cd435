package engine

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/dsn"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// TestNotifyDecides tries every NOTIFY with every end and kind of mail.
func TestNotifyDecides(t *testing.T) {
	const never, success, failure, delay = relay.NotifyNever, relay.NotifySuccess, relay.NotifyFailure, relay.NotifyDelay
	for _, tc := range []struct {
		notify relay.Notify
		kind   policy.StreamKind
		want   string // actions told
	}{
		{0, policy.Transactional, "failed delayed"},
		{0, policy.Bulk, ""},
		{never, policy.Transactional, ""},
		{never | failure, policy.Transactional, ""}, // NEVER stands alone in a command; if it does not, silence is what was asked for
		{success, policy.Transactional, "relayed"},
		{success, policy.Bulk, "relayed"},
		{failure, policy.Transactional, "failed"},
		{failure, policy.Bulk, "failed"},
		{delay, policy.Transactional, "delayed"},
		{delay, policy.Bulk, "delayed"},
		{success | failure | delay, policy.Bulk, "failed delayed relayed"},
	} {
		w := testWork(tc.kind, 1)
		w.Env.Recipients[0].Notify = tc.notify
		var got []string
		for _, action := range []dsn.Action{dsn.Failed, dsn.Delayed, dsn.Relayed} {
			if len(wanted(w.Env, []failedRecipient{{index: 0}}, action)) > 0 {
				got = append(got, string(action))
			}
			for _, silent := range []func(*relay.Envelope){
				func(e *relay.Envelope) { e.Sender = mailaddr.Address{} },
				func(e *relay.Envelope) { e.Internal = true },
			} {
				env := *w.Env
				silent(&env)
				if n := len(wanted(&env, []failedRecipient{{index: 0}}, action)); n > 0 {
					t.Errorf("NOTIFY %b: a bounce or our own mail is reported as %s", tc.notify, action)
				}
			}
		}
		if text := strings.Join(got, " "); text != tc.want {
			t.Errorf("NOTIFY %b of %s mail: told of %q, want %q", tc.notify, tc.kind, text, tc.want)
		}
	}
}

// TestDelayCountsFromTheTimeOfSending defers mail that was to go out a day
// after it was accepted.
func TestDelayCountsFromTheTimeOfSending(t *testing.T) {
	doc := testDocument(t)
	w := testWork(policy.Transactional, 1)
	w.Env.NotBefore = w.Env.AcceptedAt.Add(24 * time.Hour)
	w.Env.ExpiresAt = w.Env.NotBefore.Add(24 * time.Hour)
	later := relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 451, Text: "later"}}
	s := decide(w, testAttempt(w, 24*time.Hour+time.Minute, later), &doc.Queue)
	if len(s.delayed) != 0 {
		t.Error("told of a delay at the first attempt")
	}
	w.Recipients[0].State = s.results[0].State
	if s = decide(w, testAttempt(w, 28*time.Hour, later), &doc.Queue); len(s.delayed) != 1 {
		t.Error("not told of a delay of four hours")
	}
}

// TestDelayIsToldAfterDoubt has the attempts around the time of the notice end
// without an answer: the sender is told all the same, and once.
func TestDelayIsToldAfterDoubt(t *testing.T) {
	doc := testDocument(t)
	doc.Queue.InDoubtRetries = 5
	w := testWork(policy.Transactional, 1)
	told := 0
	for _, tc := range []struct {
		after  time.Duration
		status relay.Status
	}{{3 * time.Hour, relay.InDoubt}, {4 * time.Hour, relay.InDoubt}, {5 * time.Hour, relay.InDoubt}, {6 * time.Hour, relay.Deferred}} {
		s := decide(w, testAttempt(w, tc.after, relay.Outcome{Status: tc.status, Phase: relay.PhaseFinalDot, Reply: relay.Reply{Text: "connection lost"}}), &doc.Queue)
		told += len(s.delayed)
		w.Recipients[0].State = s.results[0].State
	}
	if told != 1 {
		t.Errorf("told %d times, want once", told)
	}
	doc.Queue.DelayNotice = 0
	w = testWork(policy.Transactional, 1)
	if s := decide(w, testAttempt(w, 9*time.Hour, relay.Outcome{Status: relay.Deferred, Phase: relay.PhaseRCPT, Reply: relay.Reply{Code: 451}}), &doc.Queue); len(s.delayed) > 0 {
		t.Error("told of a delay although policy says never")
	}
}

func TestNoticeLimits(t *testing.T) {
	var l noticeLimiter
	q := &policy.Queue{NoticesPerHour: 3, NoticesPerDay: 5}
	at := time.Unix(1_800_000_000, 0)
	a, b := noticeSender{ids.Tenant{1}, "a@brand.test"}, noticeSender{ids.Tenant{2}, "a@brand.test"}
	for i, tc := range []struct {
		s          noticeSender
		after      time.Duration
		ok, begins bool
	}{
		{a, 0, true, false}, {a, time.Minute, true, false}, {a, 59 * time.Minute, true, false},
		{a, time.Hour - 1, false, true}, {a, time.Hour - 1, false, false}, // the hour is full
		{b, time.Hour - 1, true, false},                              // another tenant's sender is another sender
		{a, time.Hour, true, false}, {a, 2 * time.Hour, true, false}, // new hours
		{a, 3 * time.Hour, false, true}, {a, 24*time.Hour - 1, false, false}, // the day is full
		{a, 24 * time.Hour, true, false},
		{a, -time.Hour, true, false}, // the clock went back
	} {
		if ok, begins := l.allow(tc.s, at.Add(tc.after), q); ok != tc.ok || begins != tc.begins {
			t.Errorf("%d after %v: %v and %v, want %v and %v", i, tc.after, ok, begins, tc.ok, tc.begins)
		}
	}
	free := &policy.Queue{}
	for range 10_000 {
		if ok, _ := l.allow(a, at, free); !ok {
			t.Fatal("kept back without a bound")
		}
	}
	for i := range maxNoticeSenders + 1000 {
		l.allow(noticeSender{ids.Tenant{3}, fmt.Sprint(i)}, at, q)
	}
	if len(l.senders) != maxNoticeSenders || l.recent.Len() != maxNoticeSenders {
		t.Errorf("%d senders in a table of %d", len(l.senders), maxNoticeSenders)
	}
}

// reports returns the notifications that arrived at the sending domain.
func (w *world) reports() []string {
	w.t.Helper()
	var out []string
	for i := range w.arrived(lab.Free) {
		_, text, err := w.lab.Mail(lab.Free, i)
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, string(text))
	}
	return out
}

func (w *world) hostSender() {
	w.t.Helper()
	if err := w.lab.HostDomain(lab.Free, "brand.test"); err != nil {
		w.t.Fatal(err)
	}
}

// TestSuccessIsToldOnRequest asks for a notification of success for one of two
// recipients, and for the whole message, which only failures return.
func TestSuccessIsToldOnRequest(t *testing.T) {
	w := newWorld(t, nil, first)
	w.hostSender()
	env := w.accept(func(e *relay.Envelope) {
		e.RetFull, e.EnvID = true, "order+2042"
		e.Recipients[0].Notify, e.Recipients[0].ORCPT = relay.NotifySuccess, "rfc822;first+2Bone@there.test"
	}, w.at(lab.Google, 0, lab.Accept), w.at(lab.Google, 1, lab.Accept))
	w.gone(env)
	w.until("the report", func() bool { return len(w.reports()) > 0 })
	w.until("an empty queue", w.empty)
	all := w.reports()
	if len(all) != 1 {
		t.Fatalf("%d reports", len(all))
	}
	for _, want := range []string{"Action: relayed\r\n", "\r\nOriginal-Envelope-Id: order 42\r\n", "Original-Recipient: rfc822; first+one@there.test\r\n",
		"Final-Recipient: rfc822; " + env.Recipients[0].Address.String(), "\r\nStatus: 2.", "\r\nRemote-MTA: dns; ", "\r\nContent-Type: text/rfc822-headers\r\n"} {
		if !strings.Contains(all[0], want) {
			t.Errorf("the report lacks %q:\n%s", want, all[0])
		}
	}
	if strings.Contains(all[0], "\r\nHello\r\n") || strings.Contains(all[0], env.Recipients[1].Address.String()) {
		t.Errorf("the body, or the recipient of whom nothing was asked, is in the report:\n%s", all[0])
	}
}

// TestExpiryInManyDomainsIsToldOnce lets a message to three providers and one
// to a domain twice expire.
func TestExpiryInManyDomainsIsToldOnce(t *testing.T) {
	w := newWorld(t, nil) // no source: mail stays
	w.hostSender()
	env := w.accept(func(e *relay.Envelope) { e.ExpiresAt = time.Now().Add(200 * time.Millisecond) },
		w.at(lab.Google, 0, lab.Accept), w.at(lab.Yahoo, 0, lab.Accept), w.at(lab.GMX, 0, lab.Accept), w.at(lab.Yahoo, 0, lab.Accept))
	w.gone(env)
	count := make(map[outbox.Type]int)
	for _, e := range w.events() {
		count[e.Type]++
	}
	if count[outbox.Expired] != 4 || count[outbox.DSN] != 1 {
		t.Errorf("events %v, want four ends and one notification", count)
	}
	w.view(nil, first)
	w.until("the report", func() bool { return len(w.reports()) == 1 })
	if text := w.reports()[0]; strings.Count(text, "\r\nStatus: 4.4.7\r\n") != 4 || strings.Count(text, "\r\nFinal-Recipient:") != 4 {
		t.Errorf("not of all four:\n%s", text)
	}
}

// TestFloodOfFailuresIsBounded has policy allow two notifications an hour and
// five messages fail: two are told, and of the others the events say that they
// were not.
func TestFloodOfFailuresIsBounded(t *testing.T) {
	w := newWorld(t, nil, first)
	w.hostSender()
	w.view(func(d *policy.Document) { d.Queue.NoticesPerHour = 2 }, first)
	for range 5 {
		w.gone(w.accept(nil, w.at(lab.Google, 0, lab.Nobody)))
	}
	w.until("an empty queue", w.empty)
	count := make(map[outbox.Type]int)
	for _, e := range w.events() {
		if count[e.Type]++; e.Type == outbox.Untold && (e.Reply.Code < 500 || e.Address != w.at(lab.Google, 0, lab.Nobody)) {
			t.Errorf("event %+v", e)
		}
	}
	if count[outbox.Bounced] != 5 || count[outbox.DSN] != 2 || count[outbox.Untold] != 3 || len(w.reports()) != 2 {
		t.Errorf("events %v and %d reports, want 5 bounced, 2 told, 3 untold", count, len(w.reports()))
	}
	families, err := w.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "relais_relay_dsns_kept_back_total" && f.Metric[0].Counter.GetValue() == 3 {
			return
		}
	}
	t.Error("the metric does not say 3")
}

// TestManyRecipientsGetSeveralReports ends more recipients at once than one
// report has room for.
func TestManyRecipientsGetSeveralReports(t *testing.T) {
	w := newWorld(t, nil)
	env := *w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	s := &settlement{}
	for i := range dsn.MaxRecipients + 500 {
		at := uint16(i)
		env.Recipients = append(env.Recipients, env.Recipients[0])
		s.failed = append(s.failed, failedRecipient{at, relay.RecipientState{State: relay.StateExpired}, classExpired})
		s.results = append(s.results, queue.Result{Index: at})
	}
	mail := w.engine.notices(&env, time.Now(), w.policy.Load(), s)
	for _, m := range mail {
		m.Body.Discard()
	}
	if len(mail) != 2 || mail[0].Env.ID == mail[1].Env.ID {
		t.Errorf("%d reports, want two", len(mail))
	}
}

// TestDelayIsToldByMail defers four messages again and again: one sender hears
// of it, once; the others asked for something else, or are nobody.
func TestDelayIsToldByMail(t *testing.T) {
	w := newWorld(t, nil, first)
	w.hostSender()
	w.view(func(d *policy.Document) {
		d.Queue.DelayNotice, d.Queue.RetryMax = policy.Duration(time.Second), policy.Duration(time.Second)
	}, first)
	if err := w.lab.SetBehaviour(lab.Yahoo, lab.Behaviour{Answer: lab.At(lab.PhaseRcpt, lab.Answer{Reply: "451 4.3.0 later"})}); err != nil {
		t.Fatal(err)
	}
	to := w.at(lab.Yahoo, 0, lab.Accept)
	told := w.accept(func(e *relay.Envelope) { e.RetFull = true }, to)
	silent := []*relay.Envelope{
		w.accept(func(e *relay.Envelope) { e.Recipients[0].Notify = relay.NotifyFailure }, to),
		w.accept(func(e *relay.Envelope) { e.Sender = mailaddr.Address{} }, to),
		w.accept(func(e *relay.Envelope) { e.Internal = true }, to),
	}
	count := func(env *relay.Envelope, kind outbox.Type) (n int) {
		for _, e := range w.events() {
			if e.Message == env.ID && e.Type == kind {
				n++
			}
		}
		return n
	}
	for _, env := range append(silent, told) {
		w.until("four attempts", func() bool { return count(env, outbox.Deferred) >= 4 })
	}
	for i, env := range silent {
		if n := count(env, outbox.Delayed); n != 0 {
			t.Errorf("the sender of message %d was told", i)
		}
	}
	w.until("the report", func() bool { return len(w.reports()) > 0 })
	all := w.reports()
	if n := count(told, outbox.Delayed); n != 1 || len(all) != 1 {
		t.Errorf("told %d times, %d reports, want one", n, len(all))
	}
	for _, want := range []string{"Action: delayed\r\n", "\r\nStatus: 4.3.0\r\n", "\r\nWill-Retry-Until: ", "\r\nLast-Attempt-Date: ", "\r\nContent-Type: text/rfc822-headers\r\n"} {
		if !strings.Contains(all[0], want) {
			t.Errorf("the report lacks %q:\n%s", want, all[0])
		}
	}
}
