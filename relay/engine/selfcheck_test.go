package engine

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// otherRecord is the record of a key that nobody has.
func otherRecord(t *testing.T) string {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return "v=DKIM1; k=rsa; p=" + base64.StdEncoding.EncodeToString(public)
}

// checked makes brand.test and shop.test, both of one tenant, sign with the
// selectors, and checks them as policy says.
func (w *world) checked(change func(*policy.Document), selectors ...string) {
	w.t.Helper()
	view := *w.policy.Load().View()
	p := &view.Document.Delivery
	p.SignDKIM, p.DKIMCheckEvery, p.DKIMCheckHold, p.DKIMCheckHoldExcept = true, policy.Duration(5*time.Minute), true, nil
	if change != nil {
		change(&view.Document)
	}
	view.Domains = []policy.Domain{{Name: "brand.test", Tenant: acme, ReturnPath: "rp.brand.test"}, {Name: "shop.test", Tenant: acme, ReturnPath: "rp.shop.test"}}
	for i := range view.Domains {
		for _, s := range selectors {
			key, _ := rsaKey(w.t, s)
			view.Domains[i].DKIM = append(view.Domains[i].DKIM, key)
		}
	}
	dir, err := policy.Compile(&view)
	if err != nil {
		w.t.Fatal(err)
	}
	w.policy.Store(dir)
	w.engine.Changed()
}

// publish makes DNS show a record, or none for an empty text.
func (w *world) publish(name, text string) {
	w.t.Helper()
	w.lab.RemoveRecords(name, dns.TypeTXT)
	if text == "" {
		return
	}
	var parts strings.Builder
	for len(text) > 0 {
		n := min(len(text), 250)
		fmt.Fprintf(&parts, " %q", text[:n])
		text = text[n:]
	}
	if err := w.lab.AddRecords(name + ". 1 IN TXT" + parts.String()); err != nil {
		w.t.Fatal(err)
	}
}

// right publishes the key of a domain.
func (w *world) right(domain, selector string) {
	w.t.Helper()
	_, record := rsaKey(w.t, selector)
	w.publish(selector+"._domainkey."+domain, record)
}

// later turns the relay's clock on, and makes it look.
func (w *world) later(d time.Duration) {
	w.skew.Add(int64(d))
	select {
	case w.engine.checks.view <- struct{}{}:
	default:
	}
}

// from makes the mail one of a domain.
func from(domain mailaddr.Domain) func(*relay.Envelope) {
	return func(e *relay.Envelope) { e.From, e.Sender.Domain = domain, domain }
}

func (w *world) phase(domain mailaddr.Domain) sign.CheckPhase {
	w.engine.checks.mu.Lock()
	defer w.engine.checks.mu.Unlock()
	if d := w.engine.checks.domains[domain]; d != nil {
		return d.Phase
	}
	return sign.CheckPassing
}

// heldFroms are the From domains that the self-check holds.
func (w *world) heldFroms() string {
	var out []string
	for _, h := range w.queue.Holds() {
		if h.Owner == AlertDKIM && !h.Ending {
			out = append(out, string(h.Match.From))
		}
	}
	return strings.Join(out, " ")
}

// send sends one mail of a domain and waits until it arrived.
func (w *world) send(domain mailaddr.Domain) {
	w.t.Helper()
	w.gone(w.accept(from(domain), w.at(lab.Free, 0, lab.Accept)))
}

// goBad has one mail of brand.test checked and found bad twice.
func (w *world) goBad() {
	w.t.Helper()
	w.send("brand.test")
	// On a machine that stands still for MinConfirmWait it is looked at again already.
	w.until("a suspicion", func() bool { return w.phase("brand.test") != sign.CheckPassing })
	w.later(sign.MaxConfirmWait)
	w.until("a hold", func() bool { return w.heldFroms() != "" })
}

// checks counts the self-checks with a result.
func (w *world) checks(result string) float64 {
	w.t.Helper()
	families, err := w.metrics.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "relais_relay_dkim_checks_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (w *world) count(kind outbox.Type) (n int) {
	for _, e := range w.events() {
		if e.Type == kind && e.Domain == "brand.test" && e.Class == AlertDKIM && e.Tenant == acme {
			n++
		}
	}
	return n
}

// TestSelfCheckHoldsOneDomain: DNS shows another key for one of two domains of a
// tenant. Mail of that one is held, and goes out when DNS is right again; that of
// the other goes on.
func TestSelfCheckHoldsOneDomain(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.right("shop.test", "r1")
	w.publish("r1._domainkey.brand.test", otherRecord(t))
	w.goBad()
	if got := w.heldFroms(); got != "brand.test" {
		t.Errorf("held are %q", got)
	}
	held := w.accept(from("brand.test"), w.at(lab.Free, 1, lab.Accept))
	w.event(held, outbox.Held)
	w.send("shop.test")
	m, err := w.queue.Show(held.ID)
	if err != nil {
		t.Fatal(err)
	}
	x := w.engine.Explain(m.Env, 0, m.States[0])
	for _, part := range []string{AlertDKIM, "selector r1", "another one than mail is signed with", "r1._domainkey.brand.test", "checked next at "} {
		if !strings.Contains(x.Text, part) {
			t.Errorf("why is %+v, which lacks %q", x, part)
		}
	}
	if problem := w.engine.DKIMProblem(); !strings.Contains(problem, "brand.test is held (T08)") || strings.Contains(problem, "shop.test") {
		t.Errorf("health says %q", problem)
	}
	w.until("the alert", func() bool { return w.count(outbox.Alert) == 1 })
	w.later(sign.MaxHeldWait) // still bad
	w.until("another look", func() bool {
		w.engine.checks.mu.Lock()
		defer w.engine.checks.mu.Unlock()
		return w.engine.checks.domains["brand.test"].Checks > 2
	})
	w.right("brand.test", "r1")
	w.later(sign.MaxHeldWait)
	w.gone(held)
	w.until("the end of the alert", func() bool { return w.count(outbox.AlertOver) == 1 })
	if n := w.count(outbox.Alert); n != 1 || w.engine.DKIMProblem() != "" || w.heldFroms() != "" {
		t.Errorf("%d alerts, health says %q, held are %q", n, w.engine.DKIMProblem(), w.heldFroms())
	}
}

// TestSelfCheckAfterRestart: mail that was held stays so, and goes when DNS is
// right.
func TestSelfCheckAfterRestart(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.goBad()
	held := w.accept(from("brand.test"), w.at(lab.Free, 1, lab.Accept))
	w.event(held, outbox.Held)
	w.restart(time.Second)
	if got := w.heldFroms(); got != "brand.test" {
		t.Errorf("held are %q", got)
	}
	w.until("what was known before", func() bool { return w.phase("brand.test") == sign.CheckHolding })
	if problem := w.engine.DKIMProblem(); !strings.Contains(problem, "there is no key at r1._domainkey.brand.test (NXDOMAIN)") {
		t.Errorf("health says %q", problem)
	}
	w.right("brand.test", "r1")
	w.later(sign.MaxHeldWait)
	w.gone(held)
	w.until("the end of the alert", func() bool { return w.count(outbox.AlertOver) == 1 })
	if n := w.count(outbox.Alert); n != 1 {
		t.Errorf("%d alerts", n)
	}
}

// TestSelfCheckAndDNSThatFails: DNS that does not answer holds nothing, not even a
// domain that was found bad once.
func TestSelfCheckAndDNSThatFails(t *testing.T) {
	w := newWorld(t, nil, first)
	const name = "r1._domainkey.brand.test"
	w.checked(nil, "r1")
	w.lab.SetDNSFault(name, lab.FaultServfail)
	asked := func(n int) func() bool { return func() bool { return w.lab.DNSQueries(name, dns.TypeTXT) >= n } }
	w.send("brand.test")
	w.until("questions", asked(3))
	// Nothing is remembered of a domain that passes; a check that is under way still
	// would see what DNS says below.
	w.until("their result", func() bool { return w.checks("unknown") == 1 })
	if p := w.phase("brand.test"); p != sign.CheckPassing {
		t.Fatalf("DNS that fails made it %v", p)
	}
	w.lab.SetDNSFault(name, lab.FaultNone)
	w.later(time.Hour)
	w.send("brand.test")
	w.until("a suspicion", func() bool { return w.phase("brand.test") == sign.CheckSuspect })
	w.lab.SetDNSFault(name, lab.FaultServfail)
	for range 5 {
		before := w.lab.DNSQueries(name, dns.TypeTXT)
		w.later(sign.MaxHeldWait)
		w.until("a question", asked(before+1))
		w.until("its result", func() bool { return !w.busy("brand.test") })
		if p := w.phase("brand.test"); p != sign.CheckSuspect || w.heldFroms() != "" {
			t.Fatalf("DNS that fails made it %v, held are %q", p, w.heldFroms())
		}
	}
	w.right("brand.test", "r1")
	w.lab.SetDNSFault(name, lab.FaultNone)
	w.later(sign.MaxHeldWait)
	w.until("the end of the suspicion", func() bool { return w.phase("brand.test") == sign.CheckPassing })
	w.send("brand.test")
}

// busy reports whether a domain is still due to be looked at.
func (w *world) busy(domain mailaddr.Domain) bool {
	w.engine.checks.mu.Lock()
	defer w.engine.checks.mu.Unlock()
	d := w.engine.checks.domains[domain]
	return d != nil && !d.Next.IsZero() && !d.Next.After(w.now())
}

// TestSelfCheckOverridden: an operator lets mail go, by the rule or by policy.
func TestSelfCheckOverridden(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.goBad()
	rule := w.queue.Holds()[0].ID
	held := w.accept(from("brand.test"), w.at(lab.Free, 1, lab.Accept))
	w.event(held, outbox.Held)
	if err := w.queue.RemoveHold(rule, "ada"); err != nil {
		t.Fatal(err)
	}
	w.gone(held)
	w.later(sign.MaxHeldWait)
	w.until("word of the operator", func() bool { return w.phase("brand.test") == sign.CheckReleased })
	w.later(sign.MaxHeldWait)
	w.send("brand.test")
	if got := w.heldFroms(); got != "" || !strings.Contains(w.engine.DKIMProblem(), "goes out all the same") {
		t.Errorf("held are %q, health says %q", got, w.engine.DKIMProblem())
	}
	// Policy is asked anew once the domain was good in between.
	w.right("brand.test", "r1")
	w.later(sign.MaxHeldWait)
	w.until("the end", func() bool { return w.phase("brand.test") == sign.CheckPassing })
	w.publish("r1._domainkey.brand.test", "v=DKIM1; k=rsa; p=")
	w.later(time.Hour)
	w.goBad()
	w.checked(func(d *policy.Document) { d.Delivery.DKIMCheckHoldExcept = []string{"brand.test"} }, "r1")
	w.later(sign.MaxHeldWait)
	w.until("a release", func() bool { return w.heldFroms() == "" && w.phase("brand.test") == sign.CheckTold })
	w.checked(nil, "r1")
	w.later(sign.MaxHeldWait)
	w.until("a hold", func() bool { return w.heldFroms() == "brand.test" })
	w.checked(func(d *policy.Document) { d.Delivery.DKIMCheckEvery = 0 }, "r1")
	w.until("no check", func() bool { return w.heldFroms() == "" && w.phase("brand.test") == sign.CheckPassing })
}

// TestSelfCheckOfOtherKeys: a domain that signs with other keys is judged by
// those, and a key that does not sign is not asked for.
func TestSelfCheckOfOtherKeys(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.goBad()
	w.right("brand.test", "r2")
	w.checked(nil, "r2")
	w.until("a release", func() bool { return w.heldFroms() == "" && w.phase("brand.test") == sign.CheckPassing })
	w.send("brand.test")
	if n := w.lab.DNSQueries("r3._domainkey.brand.test", dns.TypeTXT); n != 0 {
		t.Errorf("%d questions for a key that does not sign", n)
	}
}

// TestSelfCheckOfDomainsBelow: mail from below the signing domain is held like
// its own.
func TestSelfCheckOfDomainsBelow(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.goBad()
	w.send("news.brand.test") // shows itself
	w.until("a hold", func() bool { return strings.Contains(w.heldFroms(), "news.brand.test") })
	held := w.accept(from("news.brand.test"), w.at(lab.Free, 1, lab.Accept))
	w.event(held, outbox.Held)
	w.right("brand.test", "r1")
	w.later(sign.MaxHeldWait)
	w.gone(held)
}

// TestSelfCheckOfSignaturesThatAreWrong: the key in DNS is right and the
// signature is not. Another message must say the same, then the mail is held
// until somebody looks.
func TestSelfCheckOfSignaturesThatAreWrong(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.right("brand.test", "r1")
	wrong := func() {
		t.Helper()
		signer := w.engine.signerOf("brand.test")
		s := sample{signer: signer, from: "brand.test", live: true}
		message, err := s.standIn(w.now())
		if err != nil {
			t.Fatal(err)
		}
		s.message = append(message, "more\r\n"...)
		w.engine.checks.samples <- s
	}
	wrong()
	w.until("a suspicion", func() bool { return w.phase("brand.test") == sign.CheckSuspect })
	w.later(sign.MaxConfirmWait) // the same message says nothing new
	w.until("its result", func() bool { return !w.busy("brand.test") })
	if got := w.heldFroms(); got != "" {
		t.Fatalf("held are %q", got)
	}
	wrong()
	w.until("a hold", func() bool { return w.heldFroms() == "brand.test" })
	w.later(sign.MaxHeldWait)
	w.until("its result", func() bool { return !w.busy("brand.test") })
	if got := w.heldFroms(); got != "brand.test" || !strings.Contains(w.engine.DKIMProblem(), "is right, but: body hash did not verify") {
		t.Errorf("held are %q, health says %q", got, w.engine.DKIMProblem())
	}
}

// TestSelfCheckOfAllKindsOfMail: large, binary and ordinary mail all have
// something to check.
func TestSelfCheckOfAllKindsOfMail(t *testing.T) {
	w := newWorld(t, nil, first)
	w.checked(nil, "r1")
	w.right("brand.test", "r1")
	good := func() float64 { return w.checks("good") }
	for i, text := range []string{
		"From: me@brand.test\r\nMessage-ID: <1@brand.test>\r\n\r\nHello\r\n",
		"From: me@brand.test\r\nMessage-ID: <2@brand.test>\r\n\r\n",
		"From: me@brand.test\r\nMessage-ID: <3@brand.test>\r\n\r\n" + strings.Repeat(strings.Repeat("0123456789", 9)+"\r\n", 2000),
		"From: me@brand.test\r\nX-Long: " + strings.Repeat(strings.Repeat("0123456789", 9)+"\r\n ", 1000) + "x\r\n\r\nHello\r\n",
		"From: me@brand.test\r\n" + strings.Repeat("DKIM-Signature: v=1; d=brand.test; s=client; b=x\r\n", 20) + "\r\nHello\r\n",
	} {
		w.gone(w.acceptText(text, nil, w.at(lab.Free, 0, lab.Accept)))
		w.until(fmt.Sprintf("check %d", i+1), func() bool { return good() == float64(i+1) })
		w.later(time.Hour)
	}
	w.gone(w.acceptText("From: me@brand.test\r\nMessage-ID: <4@brand.test>\r\n\r\nHello\r\n", nil, w.at(lab.Free, 0, lab.Accept)))
	w.until("the last check", func() bool { return good() == 6 })
	if p := w.phase("brand.test"); p != sign.CheckPassing {
		t.Errorf("it is %v", p)
	}
	var none ids.Hold
	for _, h := range w.queue.Holds() {
		if h.ID != none {
			t.Errorf("a rule: %+v", h)
		}
	}
}
