package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func TestDelivers(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept), w.at(lab.Google, 1, lab.Accept))
	e := w.event(env, outbox.Delivered)
	if e.SourceIP != first.Bind || e.Provider != lab.Google || e.Epoch != 1 || e.Attempts != 1 {
		t.Errorf("event %+v", e)
	}
	m := w.arrived(lab.Google)
	if len(m) == 0 || m[0].Hello != first.EHLO || m[0].Source != first.Bind || !strings.HasSuffix(m[0].From, "@rp.brand.test") {
		t.Errorf("arrived %+v", m)
	}
	w.gone(env)
}

func TestBulkNamesTheRecipientInTheReturnPath(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(func(e *relay.Envelope) { e.Kind = policy.Bulk },
		w.at(lab.Google, 0, lab.Accept), w.at(lab.Google, 0, lab.Accept), w.at(lab.Google, 0, lab.Accept))
	w.gone(env)
	senders := make(map[string]bool)
	for _, m := range w.arrived(lab.Google) {
		senders[m.From] = true
	}
	if len(senders) != 3 {
		t.Errorf("%d return paths for 3 recipients: %v", len(senders), senders)
	}
}

// TestBouncesToTheSender has one recipient refused: the sender is told by mail
// from nobody, and nobody is told when that cannot be delivered.
func TestBouncesToTheSender(t *testing.T) {
	w := newWorld(t, nil, first)
	if err := w.lab.HostDomain(lab.Free, "brand.test"); err != nil {
		t.Fatal(err)
	}
	for i, full := range []bool{false, true} {
		env := w.accept(func(e *relay.Envelope) { e.RetFull = full }, w.at(lab.Google, 0, lab.Nobody), w.at(lab.Google, 1, lab.Accept))
		e := w.event(env, outbox.Bounced)
		if e.Reply.Code < 500 || e.Class == "" || e.Phase != relay.PhaseRCPT {
			t.Errorf("event %+v", e)
		}
		w.event(env, outbox.Delivered)
		w.gone(env)
		// Before there is another one: two sessions may carry them in any order.
		w.until("the notification", func() bool { return len(w.arrived(lab.Free)) == i+1 })
	}
	for i, m := range w.arrived(lab.Free) {
		_, text, err := w.lab.Mail(lab.Free, i)
		if err != nil {
			t.Fatal(err)
		}
		if m.From != "" || !strings.Contains(string(text), "multipart/report") || strings.Contains(string(text), "\r\nHello\r\n") != (i == 1) {
			t.Errorf("notification %d from <%s>:\n%s", i, m.From, text)
		}
	}
	lost := w.accept(func(e *relay.Envelope) { e.Sender = mailaddr.Address{Local: "nobody-1", Domain: "brand.test"} }, w.at(lab.Google, 0, lab.Nobody))
	w.event(lost, outbox.Bounced)
	w.until("an empty queue", w.empty)
	if n := len(w.arrived(lab.Free)); n != 2 {
		t.Errorf("%d notifications arrived, want 2: a bounce was bounced", n)
	}
}

func TestRetriesWhatIsDeferred(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(nil, w.at(lab.GMX, 0, lab.Defer))
	if e := w.event(env, outbox.Deferred); e.Reply.Code/100 != 4 || !e.Next.After(e.EndedAt) {
		t.Errorf("event %+v", e)
	}
	if e := w.event(env, outbox.Delivered); e.Attempts < 2 {
		t.Errorf("delivered at attempt %d", e.Attempts)
	}
	w.gone(env)
}

// TestLostReplyIsInDoubt has the peer close the connection instead of saying
// 250: the mail is sent once more, and counted as in doubt.
func TestLostReplyIsInDoubt(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Late))
	w.event(env, outbox.InDoubt)
	w.event(env, outbox.Delivered)
	w.gone(env)
	if n := len(w.arrived(lab.Google)); n != 2 {
		t.Errorf("%d copies arrived, want the one in doubt and another", n)
	}
}

// TestGreylistedMailGoesBackToItsSource has two sources and a peer that
// greylists by address: every retry must leave from where the first try did,
// also after a restart has left the queue on disk.
func TestGreylistedMailGoesBackToItsSource(t *testing.T) {
	w := newWorld(t, func(p *lab.Profile) { p.GreylistDelay = 500 * time.Millisecond }, first, second)
	w.restart(patience) // a retry that is under way below is not cut off: that would be an attempt more
	var envs []*relay.Envelope
	for i := range 8 {
		envs = append(envs, w.accept(nil, w.at(lab.Free, i, lab.Grey)))
	}
	source := make(map[*relay.Envelope]outbox.Event)
	for _, env := range envs {
		source[env] = w.event(env, outbox.Deferred)
	}
	w.restart(time.Second)
	for _, env := range envs {
		if e := w.event(env, outbox.Delivered); e.SourceIP != source[env].SourceIP || e.Attempts != 2 {
			t.Errorf("greylisted at %v, delivered from %v at attempt %d", source[env].SourceIP, e.SourceIP, e.Attempts)
		}
		w.gone(env)
	}
}

// TestPinnedWorkIsFreedWithItsSource takes the source away that greylisted mail
// waits for: another one carries it.
func TestPinnedWorkIsFreedWithItsSource(t *testing.T) {
	w := newWorld(t, func(p *lab.Profile) { p.GreylistDelay = 100 * time.Millisecond }, first)
	env := w.accept(nil, w.at(lab.Free, 0, lab.Grey))
	w.event(env, outbox.Deferred)
	w.view(nil, second)
	if e := w.event(env, outbox.Delivered); e.SourceIP != second.Bind {
		t.Errorf("delivered from %v", e.SourceIP)
	}
}

func TestDomainsThatTakeNoMail(t *testing.T) {
	w := newWorld(t, nil, first)
	for _, domain := range []string{lab.DomainNullMX, lab.DomainAbsent} {
		env := w.accept(nil, "a@"+domain)
		if e := w.event(env, outbox.Bounced); e.Phase != relay.PhaseResolve || !strings.HasPrefix(e.Reply.Enhanced, "5.") {
			t.Errorf("%s: event %+v", domain, e)
		}
		w.gone(env)
	}
}

// TestDNSFailureIsTemporary wants the reason on the recipient, and delivery
// once the name server answers again.
func TestDNSFailureIsTemporary(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(nil, "a@"+lab.DomainServfail)
	if e := w.event(env, outbox.Deferred); e.Phase != relay.PhaseResolve || !strings.HasPrefix(e.Reply.Enhanced, "4.") {
		t.Errorf("event %+v", e)
	}
	info, err := w.queue.Show(env.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s := info.States[0]; s.State != relay.StateWaiting || s.LastReply.Text == "" {
		t.Errorf("state %+v", s)
	}
}

func TestTriesTheNextHost(t *testing.T) {
	w := newWorld(t, nil, first)
	env := w.accept(nil, "accept@"+lab.DomainDeadFirst)
	if e := w.event(env, outbox.Delivered); e.Attempts != 1 {
		t.Errorf("delivered at attempt %d", e.Attempts)
	}
}

// TestUnreachableHostsAreLeftAlone says 421 at every connection: the site backs
// off, the mail waits with the reason, and goes when the peer is well again.
func TestUnreachableHostsAreLeftAlone(t *testing.T) {
	w := newWorld(t, nil, first)
	away := lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 closing for maintenance", Close: true})}
	if err := w.lab.SetBehaviour(lab.Yahoo, away); err != nil {
		t.Fatal(err)
	}
	to := w.at(lab.Yahoo, 0, lab.Accept)
	one := w.accept(nil, to)
	if e := w.event(one, outbox.Deferred); e.Reply.Code != 421 || e.Phase != relay.PhaseConnect {
		t.Errorf("event %+v", e)
	}
	two := w.accept(nil, to)
	w.until("the reason why mail waits", func() bool {
		info, err := w.queue.Show(two.ID)
		if err != nil {
			t.Fatal(err)
		}
		why := w.engine.Explain(two, 0, info.States[0])
		return (why.Reason == "backoff" || why.Reason == "retry") && why.Until.After(time.Now())
	})
	if err := w.lab.SetBehaviour(lab.Yahoo, lab.Behaviour{}); err != nil {
		t.Fatal(err)
	}
	w.event(one, outbox.Delivered)
	w.event(two, outbox.Delivered)
}

func TestExpiresWithTheReason(t *testing.T) {
	w := newWorld(t, nil)
	w.trusted.Store(false)
	soon := func(e *relay.Envelope) { e.ExpiresAt = time.Now().Add(50 * time.Millisecond) }
	env := w.accept(soon, w.at(lab.Google, 0, lab.Accept))
	w.until("the deadline", func() bool { return time.Now().After(env.ExpiresAt) })
	info, err := w.queue.Show(env.ID)
	if err != nil || info.States[0].State != relay.StateWaiting {
		t.Fatalf("while the clock was not trusted: %+v, %v", info, err)
	}
	w.until("the source is missed", func() bool { return w.engine.Explain(env, 0, info.States[0]).Reason == "source" })
	w.trusted.Store(true)
	w.engine.Changed()
	if e := w.event(env, outbox.Expired); e.Reply.Enhanced != "4.4.7" || !strings.Contains(e.Reply.Text, "source") {
		t.Errorf("event %+v: it must say that there was no source", e)
	}
	w.gone(env)
}

func TestExplainsWhatMailWaitsFor(t *testing.T) {
	w := newWorld(t, nil) // no source: mail stays
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	state := relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt}
	w.until("the source is named", func() bool { return w.engine.Explain(env, 0, state).Reason == "source" })
	later := relay.RecipientState{State: relay.StateWaiting, Next: time.Now().Add(30 * time.Minute), LastReply: relay.Reply{Code: 451, Enhanced: "4.7.1", Text: "later"}}
	for _, tc := range []struct {
		state  relay.RecipientState
		reason string
		text   string
	}{
		{relay.RecipientState{State: relay.StateHeld}, "held", "operator"},
		{relay.RecipientState{State: relay.StateBounced}, "bounced", "nothing more"},
		{later, "retry", "451 4.7.1 later"},
		{relay.RecipientState{State: relay.StateHeld, Held: &relay.Held{By: "local:ada", Why: "wrong list"}}, "held", "local:ada holds it until it is released; its deadline counts: wrong list"},
		{relay.RecipientState{State: relay.StateHeld, Held: &relay.Held{Rule: ids.Hold{1}}}, "held", "is being released"},
		{relay.RecipientState{State: relay.StateWaiting, Next: env.ExpiresAt}, "deadline", "no further attempt fits in"},
		{relay.RecipientState{State: relay.StateWaiting, Next: time.Now().Add(30 * time.Minute), InDoubt: 1, LastClass: classInDoubt}, "in-doubt", "may have arrived"},
		{relay.RecipientState{State: relay.StateWaiting, Next: time.Now().Add(time.Minute), Sticky: first.Bind, LastReply: later.LastReply}, "retry", "greylisted"},
	} {
		if x := w.engine.Explain(env, 0, tc.state); x.Reason != tc.reason || !strings.Contains(x.Text, tc.text) {
			t.Errorf("explained %+v, want %s", x, tc.reason)
		}
	}
	w.view(nil, first)
	w.event(env, outbox.Delivered)
	if x := w.engine.Explain(env, 0, state); x.Reason != "in-flight" {
		t.Errorf("mail that is gone: %+v", x)
	}
}

// TestExplainsASlowDelivery: mail that a host is slow to take is on a lane, and for
// how long it has been is said.
func TestExplainsASlowDelivery(t *testing.T) {
	w := newWorld(t, nil, first)
	reached := w.holdAt(lab.Google, lab.PhaseRcpt, time.Hour)
	env := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	reached()
	w.skew.Add(int64(time.Hour))
	x := w.engine.ExplainInFlight(env, 0, relay.RecipientState{State: relay.StateWaiting, Next: env.AcceptedAt})
	if x.Reason != "in-flight" || !strings.HasPrefix(x.Text, "it is being delivered, for 1h") || x.Source != first.Bind.String() || x.Provider != lab.Google {
		t.Errorf("%+v", x)
	}
	other := *env
	other.ID = ids.Message{1}
	if x := w.engine.ExplainInFlight(&other, 0, relay.RecipientState{State: relay.StateWaiting, Provider: lab.Yahoo}); x.Text != "it is being delivered" || x.Provider != lab.Yahoo || x.Source != "" {
		t.Errorf("mail that no session has: %+v", x)
	}
}

// TestSessionsAreKept sends one after the other to one provider: the second
// mail takes the connection of the first, and the lane is listed meanwhile.
func TestSessionsAreKept(t *testing.T) {
	w := newWorld(t, nil, first)
	to := w.at(lab.Google, 0, lab.Accept)
	w.event(w.accept(nil, to), outbox.Delivered)
	lanes := w.engine.Lanes()
	if len(lanes) != 1 || lanes[0].Source != first.Bind.String() || lanes[0].Provider != lab.Google || lanes[0].Pool != "default" || lanes[0].Sessions != 1 {
		t.Errorf("lanes %+v", lanes)
	}
	w.event(w.accept(nil, to), outbox.Delivered)
	for _, lane := range w.lab.Report().Lanes {
		if lane.Provider == lab.Google && lane.Connections != 1 {
			t.Errorf("%d connections for two mails", lane.Connections)
		}
	}
}

// TestStopsAfterTheMessageInHand stops the engine while a peer takes its time:
// the message is finished, and what did not begin stays.
func TestStopsAfterTheMessageInHand(t *testing.T) {
	w := newWorld(t, nil, first)
	w.restart(patience)
	reached := w.holdAt(lab.Apple, lab.PhaseFinalDot, 100*time.Millisecond)
	env := w.accept(nil, w.at(lab.Apple, 0, lab.Accept))
	reached()
	w.stop()
	w.event(env, outbox.Delivered)
	kept := w.accept(nil, w.at(lab.Apple, 0, lab.Accept))
	w.restart(time.Second)
	w.event(kept, outbox.Delivered)
	if n := len(w.arrived(lab.Apple)); n != 2 {
		t.Errorf("%d mails arrived, want 2", n)
	}
}

// TestGraceIsBounded stops the engine while a peer never answers.
func TestGraceIsBounded(t *testing.T) {
	w := newWorld(t, nil, first)
	w.restart(50 * time.Millisecond)
	reached := w.holdAt(lab.Apple, lab.PhaseMail, time.Hour)
	env := w.accept(nil, w.at(lab.Apple, 0, lab.Accept))
	reached()
	begun := time.Now()
	w.stop()
	if took := time.Since(begun); took > patience {
		t.Errorf("the engine took %v to stop", took)
	}
	info, err := w.queue.Show(env.ID)
	if err != nil || info.States[0].State.Final() {
		t.Errorf("the message that was cut off: %+v, %v", info, err)
	}
}

// TestDiskBacklog delivers what waited on disk only, through both sources and
// to many domains, after a restart.
func TestDiskBacklog(t *testing.T) {
	w := newWorld(t, nil)
	const mails = 300
	providers := []string{lab.Google, lab.Yahoo, lab.Free, lab.GMX, lab.SFR}
	for i := range mails {
		w.accept(nil, w.at(providers[i%len(providers)], i/len(providers), lab.Accept))
	}
	w.close()
	w.view(nil, first, second)
	w.open()
	w.run(time.Second)
	w.until("all mails", func() bool {
		got := 0
		for _, p := range providers {
			got += len(w.arrived(p))
		}
		return got >= mails
	})
	w.until("an empty queue", w.empty)
	for _, p := range providers {
		if n := len(w.arrived(p)); n != mails/len(providers) {
			t.Errorf("%d mails arrived at %s, want %d", n, p, mails/len(providers))
		}
	}
}

func TestNewWantsAllItsParts(t *testing.T) {
	if _, err := New(Config{}); !fault.Is(err, fault.Internal) {
		t.Errorf("an engine of nothing: %v", err)
	}
}
