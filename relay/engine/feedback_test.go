package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-msgauth/dkim"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// testRSA is one key for all tests: it takes longer to make than most of them.
var testRSA = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// rsaKey returns the key as a domain has it, and its record.
func rsaKey(t *testing.T, selector string) (policy.DKIMKey, string) {
	t.Helper()
	private, err := testRSA()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return policy.DKIMKey{Selector: selector, Algorithm: policy.AlgorithmRSA, Private: der}, "v=DKIM1; k=rsa; p=" + base64.StdEncoding.EncodeToString(public)
}

// withFeedback makes the world sign mail of brand.test, with rules in front, and
// returns what go-msgauth has to say about a mail of it.
func (w *world) withFeedback(rules string) (verify func(mail []byte) error) {
	w.t.Helper()
	doc, err := policy.Parse(map[string]string{"feedback": rules})
	if err != nil {
		w.t.Fatal(err)
	}
	w.view(func(d *policy.Document) {
		d.Delivery.SignDKIM, d.Delivery.DKIMCheckEvery = true, 0 // no key is in DNS
		d.Feedback = doc.Feedback
	}, first)
	view := *w.policy.Load().View()
	view.Domains = []policy.Domain{view.Domains[0]}
	key, record := rsaKey(w.t, "r1")
	view.Domains[0].DKIM = []policy.DKIMKey{key}
	dir, err := policy.Compile(&view)
	if err != nil {
		w.t.Fatal(err)
	}
	w.policy.Store(dir)
	w.engine.Changed()
	return func(mail []byte) error {
		found, err := dkim.VerifyWithOptions(bytes.NewReader(mail), &dkim.VerifyOptions{LookupTXT: func(name string) ([]string, error) {
			if name != "r1._domainkey.brand.test" {
				return nil, errors.New("no such record: " + name)
			}
			return []string{record}, nil
		}})
		if err != nil {
			return err
		}
		for _, v := range found {
			if v.Domain == "brand.test" && v.Err == nil {
				return nil
			}
		}
		return fmt.Errorf("no good signature in %+v", found)
	}
}

// acceptText stores a message of that text.
func (w *world) acceptText(text string, change func(*relay.Envelope), to ...string) *relay.Envelope {
	w.t.Helper()
	now := w.now()
	env := &relay.Envelope{
		ID: ids.NewMessage(now), Tenant: acme, Stream: "default", Kind: policy.Transactional, Pool: pool, From: "brand.test", Tag: "spring sale:1",
		Sender: mailaddr.Address{Local: "me", Domain: "brand.test"}, AcceptedAt: now, ExpiresAt: now.Add(time.Hour), Revision: 7,
	}
	for _, a := range to {
		address, err := mailaddr.Parse(a)
		if err != nil {
			w.t.Fatal(err)
		}
		env.Recipients = append(env.Recipients, relay.Recipient{Address: address})
	}
	if change != nil {
		change(env)
	}
	body, err := seal(w.store, []byte(text))
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.queue.Accept(context.Background(), env, body); err != nil {
		w.t.Fatal(err)
	}
	return env
}

// fieldsOf returns the values of the fields with a name in a mail's header.
func fieldsOf(mail []byte, name string) (values []string) {
	for at := 0; ; {
		n, end, ok := sign.NextField(mail, at)
		if !ok {
			return values
		}
		if sign.IsField(n, name) {
			values = append(values, strings.TrimSpace(string(mail[at+len(n)+1:end])))
		}
		at = end
	}
}

const feedbackRules = `
[[rule]]
domain      = "*"
stream      = "*"
feedback_id = "{tag}:{stream}:{tenant}:examplecorp"
cfbl        = "return-path"

[[rule]]
domain        = "brand.test"
stream        = "bulk"
feedback_id   = "{tag}:{stream}:x{tenant}"
cfbl          = "fbl@complaints.brand.test"
client_fields = "replace"

[[rule]]
domain = "*"
stream = "transactional"
`

// TestFeedbackFields: what arrives has the fields that the rule of its domain
// and stream wants, its own otherwise as they were, and a good signature.
func TestFeedbackFields(t *testing.T) {
	w := newWorld(t, nil, first)
	verify := w.withFeedback(feedbackRules)
	tenant := policy.FeedbackTenant([32]byte{}, acme)
	long := strings.Repeat(strings.Repeat("0123456789", 9)+"\r\n", 2000) // streamed
	const own = "Feedback-ID: mine:a:b:senderx\r\n"
	const ownCFBL = "CFBL-Address: me@brand.test; report=arf\r\nCFBL-Feedback-ID: 1\r\n"
	bulk := func(e *relay.Envelope) { e.Stream = "bulk" }
	for _, tc := range []struct {
		name, fields, body string
		change             func(*relay.Envelope)
		id, cfbl, cfblID   string // what arrives; "path" is the return path
		gone               string // of what the client wrote
	}{
		{name: "added", id: "spring-sale-1:default:" + tenant + ":examplecorp", cfbl: "path"},
		{name: "added to a long one", body: long, id: "spring-sale-1:default:" + tenant + ":examplecorp", cfbl: "path"},
		{name: "no tag", change: func(e *relay.Envelope) { e.Tag = "" }, id: ":default:" + tenant + ":examplecorp", cfbl: "path"},
		{name: "null sender", change: func(e *relay.Envelope) { e.Sender = mailaddr.Address{} }, id: "spring-sale-1:default:" + tenant + ":examplecorp", cfbl: "token"},
		{name: "kept", fields: own + ownCFBL, id: "mine:a:b:senderx", cfbl: "me@brand.test; report=arf", cfblID: "1"},
		{name: "off", change: func(e *relay.Envelope) { e.Stream = "transactional" }},
		{name: "ours", change: func(e *relay.Envelope) { e.Internal = true }},
		{name: "below the sending domain", change: func(e *relay.Envelope) { e.From = "news.brand.test" }, id: "spring-sale-1:default:" + tenant + ":examplecorp"},
		{name: "an address below the sending domain", change: func(e *relay.Envelope) { e.From, e.Stream = "complaints.brand.test", "bulk" }, id: "spring-sale-1:bulk:x" + tenant,
			cfbl: "fbl@complaints.brand.test; report=arf", cfblID: "path"},
		{name: "an address", change: bulk, id: "spring-sale-1:bulk:x" + tenant, cfbl: "fbl@complaints.brand.test; report=arf", cfblID: "path"},
		{name: "replaced", change: bulk, fields: own + "X-Other: 1\r\n" + ownCFBL, id: "spring-sale-1:bulk:x" + tenant, cfbl: "fbl@complaints.brand.test; report=arf", cfblID: "path", gone: own + ownCFBL},
		{name: "replaced in a long one", body: long, change: bulk, fields: own + "X-Other: 1\r\n" + ownCFBL + "feedback-id : 2\r\n\t3\r\n", id: "spring-sale-1:bulk:x" + tenant,
			cfbl: "fbl@complaints.brand.test; report=arf", cfblID: "path", gone: own + ownCFBL + "feedback-id : 2\r\n\t3\r\n"},
		{name: "signed by the client", change: func(e *relay.Envelope) { e.Stream, e.ClientDKIM = "bulk", true }, fields: "DKIM-Signature: v=1; d=x.test; h=From:\r\n\tFeedback-ID:Feedback-Id; b=x\r\n" + own,
			id: "mine:a:b:senderx", cfbl: "fbl@complaints.brand.test; report=arf", cfblID: "path"},
		{name: "signed by the client to have none", change: func(e *relay.Envelope) { e.ClientDKIM = true }, fields: "DKIM-Signature: v=1; d=x.test; h=From:Feedback-ID:CFBL-Address; b=x\r\n"},
	} {
		text := "Received: from a by b; Thu, 1 Jan 2026 00:00:00 +0000\r\n" + tc.fields + "From: me@brand.test\r\nSubject: x\r\nMessage-ID: <1@brand.test>\r\n\r\n" + tc.body + "Hello\r\n.\r\n"
		before := len(w.arrived(lab.Free))
		env := w.acceptText(text, tc.change, w.at(lab.Free, 0, lab.Accept))
		w.gone(env)
		all := w.arrived(lab.Free)
		if len(all) != before+1 {
			t.Fatalf("%s: %d mails arrived, want one more than %d", tc.name, len(all), before)
		}
		meta, mail, err := w.lab.Mail(lab.Free, all[before].ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(mail); err != nil {
			t.Errorf("%s: %v\n%.1500s", tc.name, err, mail)
		}
		cfbl, cfblID := tc.cfbl, tc.cfblID
		token, _, _ := strings.Cut(meta.From, "@")
		if tc.cfbl == "token" { // of the same form, though the mail has no return path
			if token, err = sign.EncodeReturnPath([]policy.ReturnPathKey{{ID: 1, Key: [32]byte{1}}}, env.ID, sign.NoRecipient, env.AcceptedAt.AddDate(0, 0, 30)); err != nil {
				t.Fatal(err)
			}
			cfbl = "path"
		}
		if cfbl == "path" {
			cfbl = token + "@rp.brand.test; report=arf"
		}
		if cfblID == "path" {
			cfblID = token
		}
		for name, want := range map[string]string{"Feedback-ID": tc.id, "CFBL-Address": cfbl, "CFBL-Feedback-ID": cfblID} {
			got := fieldsOf(mail, name)
			if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || got[0] != want) {
				t.Errorf("%s: %s is %q, want %q", tc.name, name, got, want)
			}
		}
		rest := text
		for gone := range strings.SplitSeq(strings.ReplaceAll(tc.gone, "\r\n\t", "\x00"), "\r\n") {
			if gone = strings.ReplaceAll(gone, "\x00", "\r\n\t"); gone != "" {
				rest = strings.Replace(rest, gone+"\r\n", "", 1)
			}
		}
		if !bytes.HasSuffix(mail, []byte(rest)) {
			t.Errorf("%s: behind the fields there is\n%.800s\nwant\n%.800s", tc.name, mail, rest)
		}
	}
}

// TestFeedbackFieldsAfterDowngrade: a message that becomes quoted-printable for
// its host has the fields and a good signature.
func TestFeedbackFieldsAfterDowngrade(t *testing.T) {
	w := newWorld(t, nil, first)
	verify := w.withFeedback(feedbackRules)
	if err := w.lab.SetBehaviour(lab.Free, lab.Behaviour{Without: []string{"8BITMIME"}}); err != nil {
		t.Fatal(err)
	}
	text := "From: me@brand.test\r\nFeedback-ID: mine:a:b:senderx\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\ncaf\xc3\xa9\r\n"
	env := w.acceptText(text, func(e *relay.Envelope) { e.Stream, e.EightBit = "bulk", true }, w.at(lab.Free, 0, lab.Accept))
	w.gone(env)
	if n := len(w.arrived(lab.Free)); n != 1 {
		t.Fatalf("%d mails arrived", n)
	}
	_, mail, err := w.lab.Mail(lab.Free, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(mail); err != nil {
		t.Errorf("%v\n%s", err, mail)
	}
	if got := fieldsOf(mail, "Feedback-ID"); len(got) != 1 || !strings.HasPrefix(got[0], "spring-sale-1:bulk:x") || !strings.Contains(string(mail), "caf=C3=A9") {
		t.Errorf("what arrived is\n%s", mail)
	}
}

// TestSizeCountsFeedbackFields: a host that says how much it takes is not offered
// what is too large only with its fields.
func TestSizeCountsFeedbackFields(t *testing.T) {
	const most = 8192
	w := newWorld(t, func(p *lab.Profile) {
		if p.Name == lab.Free {
			p.MaxMessageSize = most
		}
	}, first)
	w.withFeedback(feedbackRules)
	head := "From: me@brand.test\r\n\r\n"
	text := func(n int) string { return head + strings.Repeat("0123456789\r\n", most/12)[:n-len(head)-2] + "\r\n" }
	fits := w.acceptText(text(most-signatureBytes-400), nil, w.at(lab.Free, 0, lab.Accept))
	w.event(fits, outbox.Delivered)
	over := w.acceptText(text(most-signatureBytes-20), nil, w.at(lab.Free, 0, lab.Accept))
	if e := w.event(over, outbox.Bounced); e.Reply.Enhanced != "5.3.4" || e.Phase != relay.PhaseLocal {
		t.Errorf("event %+v", e)
	}
}
