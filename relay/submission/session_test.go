package submission

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

const goodMessage = "From: Joe <joe@acme.example>\nTo: ann@example.net\nSubject: hello\nDate: Thu, 1 Jan 2026 00:00:00 +0000\nMessage-ID: <1@acme.example>\n\nHello  Ann\n\n"

func TestAccept(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	p.do("MAIL FROM:<bounce@acme.example> RET=FULL ENVID=a+2Bb SIZE=100 BODY=8BITMIME", "250 2.1.0")
	p.do("RCPT TO:<ann@EXAMPLE.net> NOTIFY=FAILURE,DELAY ORCPT=rfc822;ann+2B@example.net", "250 2.1.5")
	p.do(`RCPT TO:<"b o b"@example.net> NOTIFY=NEVER`, "250 2.1.5")
	p.do("RCPT TO:<ann@example.net>", "250 2.1.5") // the same again
	p.do("DATA", "354")
	p.send(strings.ReplaceAll(goodMessage, "\n", "\r\n") + ".\r\n")
	reply := p.expect("250 2.0.0 OK queued as msg_")
	got := w.spool.last(t)
	env := got.env
	if !strings.Contains(reply, env.ID.String()) {
		t.Errorf("reply %q does not name %v", reply, env.ID)
	}
	wantRecipients := []relay.Recipient{
		{Address: mailaddr.Address{Local: "ann", Domain: "example.net"}, Notify: relay.NotifyFailure | relay.NotifyDelay, ORCPT: "rfc822;ann+2B@example.net"},
		{Address: mailaddr.Address{Local: `"b o b"`, Domain: "example.net"}, Notify: relay.NotifyNever},
	}
	if len(env.Recipients) != 2 || env.Recipients[0] != wantRecipients[0] || env.Recipients[1] != wantRecipients[1] {
		t.Errorf("recipients are %+v, want %+v", env.Recipients, wantRecipients)
	}
	if env.Tenant != id[ids.Tenant](1) || env.Project != id[ids.Project](4) || env.Credential != id[ids.Credential](1) || env.Pool != id[ids.Pool](7) ||
		env.Stream != "transactional" || env.Kind != policy.Transactional || env.From != "acme.example" || env.Sender.String() != "bounce@acme.example" ||
		env.EnvID != "a+2Bb" || !env.RetFull || env.EightBit || env.ClientDKIM || env.Revision != 7 || env.ClientIP != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("envelope is %+v", env)
	}
	if !env.NotBefore.IsZero() || env.ExpiresAt.Sub(env.AcceptedAt) != 24*time.Hour {
		t.Errorf("not before %v, accepted %v, expires %v", env.NotBefore, env.AcceptedAt, env.ExpiresAt)
	}
	header, body, _ := strings.Cut(got.text, "\r\n\r\n")
	if want := int64(len(header) + 4); got.headerBytes != want {
		t.Errorf("header section has %d octets, recorded are %d", want, got.headerBytes)
	}
	if body != "Hello  Ann\r\n\r\n" || got.hash != sha256.Sum256([]byte("Hello Ann\r\n")) {
		t.Errorf("body is %q, hash %x", body, got.hash)
	}
	received, rest, _ := strings.Cut(got.text, "From: Joe")
	if want := strings.ReplaceAll(strings.TrimPrefix(goodMessage, "From: Joe"), "\n", "\r\n"); rest != want {
		t.Errorf("message is %q, want %q", rest, want)
	}
	if !regexp.MustCompile(`^Received: from client\.example \(\[127\.0\.0\.1\]\)\r\n\tby mx\.example with ESMTPSA\r\n\ttls TLS_[A-Z0-9_]+\r\n\tid msg_\w{26}; \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d \+0000\r\n$`).MatchString(received) {
		t.Errorf("trace field is %q", received)
	}
	p.do("QUIT", "221")
}

func TestTraceNamesTheOnlyRecipient(t *testing.T) {
	w := newWorld(t, nil)
	w.login(t).mail(goodMessage, "250")
	if got := w.spool.last(t).text; !strings.Contains(got, "\r\n\tfor <ann@example.net>; ") {
		t.Errorf("message begins %q", got[:200])
	}
}

func TestNullSender(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	p.do("MAIL FROM:<>", "250")
	p.do("RCPT TO:<ann@example.net>", "250")
	p.do("DATA", "354")
	p.send(strings.ReplaceAll(goodMessage, "\n", "\r\n") + ".\r\n")
	p.expect("250 2.0.0")
	if env := w.spool.last(t).env; !env.Sender.IsNull() {
		t.Errorf("sender is %v", env.Sender)
	}
}

func TestAuth(t *testing.T) {
	w := newWorld(t, func(v *policy.View) { v.Document.Submission.AuthFailuresPerIP = 100 })
	unknown := id[ids.Credential](99).String()
	tests := []struct {
		name  string
		away  bool
		steps []string
	}{
		{"PLAIN at once", false, []string{"AUTH PLAIN " + plain(w.user, testSecret), "235 2.7.0"}},
		{"PLAIN asked", false, []string{"AUTH PLAIN", "334 ", plain(w.user, testSecret), "235 2.7.0"}},
		{"PLAIN with the identity", false, []string{"AUTH PLAIN " + b64(w.user+"\x00"+w.user+"\x00"+testSecret), "235 2.7.0"}},
		{"PLAIN for somebody else", false, []string{"AUTH PLAIN " + b64("root\x00"+w.user+"\x00"+testSecret), "535 5.7.8"}},
		{"PLAIN malformed", false, []string{"AUTH PLAIN " + b64("x"), "501 5.5.2", "AUTH PLAIN =", "501 5.5.2"}},
		{"LOGIN asked", false, []string{"AUTH LOGIN", "334 VXNlcm5hbWU6", b64(w.user), "334 UGFzc3dvcmQ6", b64(testSecret), "235 2.7.0"}},
		{"LOGIN with the user", false, []string{"AUTH LOGIN " + b64(w.user), "334 UGFzc3dvcmQ6", b64(testSecret), "235 2.7.0"}},
		{"LOGIN wrong", false, []string{"AUTH LOGIN", "334", b64(w.user), "334", b64("wrong"), "535 5.7.8"}},
		{"LOGIN empty", false, []string{"AUTH LOGIN", "334", "", "334", "", "535 5.7.8"}},
		{"LOGIN cancelled", false, []string{"AUTH LOGIN", "334", "*", "501"}},
		{"other mechanism", false, []string{"AUTH CRAM-MD5", "504 5.5.4"}},
		{"wrong secret", false, []string{"AUTH PLAIN " + plain(w.user, "wrong"), "535 5.7.8", "AUTH PLAIN " + plain(w.user, testSecret), "235"}},
		{"unknown", false, []string{"AUTH PLAIN " + plain(unknown, testSecret), "535 5.7.8"}},
		{"unknown while control is away", true, []string{"AUTH PLAIN " + plain(unknown, testSecret), "454 4.7.0"}},
		{"known bad while control is away", true, []string{"AUTH PLAIN " + plain(w.user, "wrong"), "535 5.7.8"}},
		{"known good while control is away", true, []string{"AUTH PLAIN " + plain(w.user, testSecret), "235"}},
		{"not an id", true, []string{"AUTH PLAIN " + plain("joe", testSecret), "535 5.7.8"}},
		{"another kind of id", true, []string{"AUTH PLAIN " + plain(id[ids.Tenant](1).String(), testSecret), "535 5.7.8"}},
		{"empty user", true, []string{"AUTH PLAIN " + plain("", testSecret), "535 5.7.8"}},
		{"expired", false, []string{"AUTH PLAIN " + plain(w.expired, testSecret), "535 5.7.8 This credential expired"}},
		{"expired with a wrong secret", false, []string{"AUTH PLAIN " + plain(w.expired, "wrong"), "535 5.7.8 The user name or the secret is wrong"}},
		{"suspended", false, []string{"AUTH PLAIN " + plain(w.suspended, testSecret), "535 5.7.1"}},
		{"none", false, []string{"MAIL FROM:<a@acme.example>", "530 5.7.0"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w.away.Store(tt.away)
			p := w.dial(t)
			for i := 0; i < len(tt.steps); i += 2 {
				p.do(tt.steps[i], tt.steps[i+1])
			}
		})
	}
	if strings.Contains(w.log.String(), "wrong\"") {
		t.Error("the log shows what was typed for a secret")
	}
}

func TestAuthLockout(t *testing.T) {
	w := newWorld(t, func(v *policy.View) { v.Document.Submission.AuthFailuresPerIP = 2 })
	p := w.dial(t)
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535")
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535")
	w.dial(t).do("AUTH PLAIN "+plain(w.user, testSecret), "454 4.7.0")
}

func TestSTARTTLSPort(t *testing.T) {
	w := newWorld(t, nil)
	conn, err := net.Dial("tcp", w.explicit)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	p := &peer{t, conn, bufio.NewReader(conn)}
	p.expect("220")
	p.do("EHLO c", "250-")
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "538 5.7.11")
	p.do("MAIL FROM:<a@acme.example>", "530 5.7.0")
	p.do("STARTTLS", "220")
	_, clientTLS := testTLS()
	secured := tls.Client(conn, clientTLS)
	p = &peer{t, secured, bufio.NewReader(secured)}
	p.do("EHLO c", "250-")
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "235")
	p.mail(goodMessage, "250 2.0.0")
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, func(v *policy.View) {
		v.Document.Submission.MaxRecipients = 2
		v.Document.Submission.MaxMessageBytes = 5000
		v.Document.Submission.MaxHeaderBytes = 2000
		v.Document.Submission.MaxReceivedFields = 5
	})
	t.Run("transaction", func(t *testing.T) {
		p := w.login(t)
		p.do("MAIL FROM:<a@acme.example> SIZE=5001", "552 5.3.4")
		p.do("MAIL FROM:a@acme.example", "501 5.1.7")
		p.do("MAIL FROM:<a@-acme.example>", "501 5.1.7")
		p.do("MAIL FROM:<a@acme.example> SIZE=5000", "250")
		p.do("RCPT TO:<>", "501")
		p.do("RCPT TO:<ann>", "501")
		p.do("RCPT TO:<ann@exa mple.net>", "501")
		p.do("RCPT TO:<ann@-example.net>", "501 5.1.3")
		p.do("RCPT TO:<a..b@example.net>", "501 5.1.3")
		p.do("RCPT TO:<ann@[192.0.2.300]>", "501 5.1.3")
		p.do("RCPT TO:<one@example.net>", "250")
		p.do("RCPT TO:<two@example.net>", "250")
		p.do("RCPT TO:<three@example.net>", "452 4.5.3")
	})
	big := strings.Repeat(strings.Repeat("x", 99)+"\n", 60)
	tests := []struct{ name, message, reply string }{
		{"too large", goodMessage + big, "552 5.3.4"},
		{"header too large", "From: joe@acme.example\nX-A: " + strings.Repeat("a\n ", 1000) + "\n\nx\n", "552 5.3.4"},
		{"loop", strings.Repeat("Received: from a by b\n", 6) + goodMessage, "554 5.4.6"},
		{"no From", "To: ann@example.net\n\nx\n", "550 5.6.0"},
		{"two From", "From: a@acme.example\nFrom: b@acme.example\n\nx\n", "550 5.6.0"},
		{"two From in disguise", "From: a@acme.example\nfrom : b@other.example\n\nx\n", "550 5.6.0"},
		{"two Sender", "From: a@acme.example\nSender: a@acme.example\nSender: b@acme.example\n\nx\n", "550 5.6.0"},
		{"From unreadable", "From: joe at acme.example\n\nx\n", "550 5.6.0"},
		{"From empty", "From: \n\nx\n", "550 5.6.0"},
		{"From without an address", "From: nobody:;\n\nx\n", "550 5.6.0"},
		{"From with a broken domain", "From: joe@acme..example\n\nx\n", "550 5.6.0"},
		{"foreign From", "From: joe@other.example\n\nx\n", "550 5.7.1 other.example is not a verified"},
		{"unknown From", "From: joe@nowhere.example\n\nx\n", "550 5.7.1 nowhere.example is not"},
		{"foreign second author", "From: joe@acme.example, ann@other.example\nSender: joe@acme.example\n\nx\n", "550 5.7.1 other.example"},
		{"authors without Sender", "From: joe@acme.example, ann@acme.example\n\nx\n", "550 5.6.0"},
		{"foreign Sender", "From: joe@acme.example\nSender: ann@other.example\n\nx\n", "550 5.7.1 other.example"},
		{"lookalike parent", "From: joe@evilacme.example\n\nx\n", "550 5.7.1"},
		{"display name trick", "From: \"joe@acme.example\" <ann@other.example>\n\nx\n", "550 5.7.1"},
		{"not a header", "Hello Ann\n\nx\n", "550 5.6.0"},
		{"folded first line", " From: joe@acme.example\n\nx\n", "550 5.6.0"},
		{"name with a space", "From: joe@acme.example\nBad Name: x\n\nx\n", "550 5.6.0"},
		{"unknown stream", "X-Relais-Stream: nope\n" + goodMessage, "550 5.6.0"},
		{"foreign pool", "X-Relais-Stream: foreign\n" + goodMessage, "550 5.7.1"},
		{"stream elsewhere", "X-Relais-Stream: far\n" + goodMessage, "451 4.3.5 Pool far"},
		{"unknown option", "X-Relais-Foo: 1\n" + goodMessage, "550 5.6.0 X-Relais-Foo"},
		{"long unknown option", "X-Relais-Something-That-Is-Long: 1\n" + goodMessage, "550 5.6.0 X-Relais-Something"},
		{"bad time", "X-Relais-Send-At: tomorrow\n" + goodMessage, "550 5.6.0 X-Relais-Send-At"},
		{"far time", "X-Relais-Send-At: 2100-01-01T00:00:00Z\n" + goodMessage, "550 5.6.0 X-Relais-Send-At"},
		{"bad expiry", "X-Relais-Expire: 1 hour\n" + goodMessage, "550 5.6.0 X-Relais-Expire"},
		{"past expiry", "X-Relais-Expire: 2020-01-01T00:00:00Z\n" + goodMessage, "550 5.6.0 X-Relais-Expire"},
		{"no expiry", "X-Relais-Expire: 0\n" + goodMessage, "550 5.6.0 X-Relais-Expire"},
		{"twice", "X-Relais-Tag: a\nX-Relais-Tag: b\n" + goodMessage, "550 5.6.0 X-Relais-Tag"},
		{"empty tag", "X-Relais-Tag:\n" + goodMessage, "550 5.6.0 X-Relais-Tag"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := w.login(t)
			p.mail(tt.message, tt.reply)
			p.do("NOOP", "250") // still in step
		})
	}
	if n := w.spool.count(); n != 0 {
		t.Errorf("%d messages were accepted", n)
	}
}

func TestPoolElsewhereIsRefusedAtRCPT(t *testing.T) {
	w := newWorld(t, nil)
	p := w.dial(t)
	p.do("AUTH PLAIN "+plain(w.onlyRemote, testSecret), "235")
	p.do("MAIL FROM:<a@acme.example>", "250")
	p.do("RCPT TO:<ann@example.net>", "451 4.3.5 Pool far of stream far")
}

func TestPolicyChangesHoldForOpenSessions(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	p.mail(goodMessage, "250")
	w.setView(func(v *policy.View) { v.Tenants[0].Suspended = true })
	p.do("MAIL FROM:<a@acme.example>", "550 5.7.1")
	w.setView(func(v *policy.View) { v.Credentials = v.Credentials[1:] })
	p.do("MAIL FROM:<a@acme.example>", "530 5.7.0")
	w.policy.Store(nil)
	p.do("MAIL FROM:<a@acme.example>", "451 4.3.2")
	w.setView(nil)
	p.mail(goodMessage, "250")
	w.policy.Store(nil)
	w.dial(t).do("AUTH PLAIN "+plain(w.user, testSecret), "454 4.7.0")
}

// TestRotatedSecret: the old secret is good until its end, then also an open
// session that used it is over.
func TestRotatedSecret(t *testing.T) {
	rotated := func(until time.Time) func(*policy.View) {
		return func(v *policy.View) {
			mac := hmac.New(sha256.New, v.CredentialKey[:])
			_, _ = mac.Write([]byte("the new one"))
			c := &v.Credentials[0]
			c.PreviousHash, c.PreviousUntil, c.SecretHash = c.SecretHash, until, [32]byte(mac.Sum(nil))
		}
	}
	w := newWorld(t, rotated(time.Now().Add(time.Hour)))
	old := w.login(t)
	fresh := w.dial(t)
	fresh.do("AUTH PLAIN "+plain(w.user, "the new one"), "235")
	w.setView(rotated(time.Now().Add(-time.Second)))
	old.do("MAIL FROM:<a@acme.example>", "530 5.7.0")
	fresh.do("MAIL FROM:<a@acme.example>", "250")
	w.dial(t).do("AUTH PLAIN "+plain(w.user, testSecret), "535 5.7.8")
	w.setView(func(v *policy.View) { rotated(time.Time{})(v); v.Credentials[0].PreviousHash = [32]byte{} })
	w.dial(t).do("AUTH PLAIN "+plain(w.user, testSecret), "535 5.7.8")
}

// TestDraining: a draining relay takes no new mail and says so at RCPT, so that
// a client with several relays takes another.
func TestDraining(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	try := func(want string) {
		t.Helper()
		p.do("MAIL FROM:<a@acme.example>", "250")
		p.do("RCPT TO:<b@example.net>", want)
		p.do("RSET", "250")
	}
	try("250")
	w.setView(func(v *policy.View) { v.Draining = true })
	try("451 4.3.5 This relay is draining")
	w.setView(nil)
	try("250")
}

func TestStoreFailures(t *testing.T) {
	noSpace := fault.New(fault.NoSpace, "test", "full")
	broken := fault.Wrap(errors.New("disk"), fault.Internal, "test", "broken")
	w := newWorld(t, nil)
	set := func(admit, write, accept error) {
		w.spool.mu.Lock()
		defer w.spool.mu.Unlock()
		w.spool.admit, w.spool.write, w.spool.accept = admit, write, accept
	}
	p := w.login(t)
	set(noSpace, nil, nil)
	p.do("MAIL FROM:<a@acme.example>", "452 4.3.1")
	set(broken, nil, nil)
	p.do("MAIL FROM:<a@acme.example>", "451 4.3.0")
	set(nil, noSpace, nil)
	p.mail(goodMessage, "452 4.3.1")
	set(nil, nil, noSpace)
	p.mail(goodMessage, "452 4.3.1")
	set(nil, nil, broken)
	p.mail(goodMessage, "451 4.3.0")
	// Trying again does not make it smaller.
	set(nil, nil, fault.New(fault.TooLarge, "test", "one record has 2 MiB"))
	p.mail(goodMessage, "552 5.3.4 The message and its recipients are too large")
	set(nil, nil, nil)
	p.mail(goodMessage, "250")
}

func TestMetrics(t *testing.T) {
	w := newWorld(t, nil)
	p := w.dial(t)
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535")
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "235")
	p.mail(goodMessage, "250")
	p.mail("From: a@other.example\n\n", "550")
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	want := map[string]float64{
		"relais_relay_submission_connections":                1,
		"relais_relay_submission_connections_total":          1,
		"relais_relay_submission_tls_handshakes_total ok":    1,
		"relais_relay_submission_auth_total bad":             1,
		"relais_relay_submission_auth_total ok":              1,
		"relais_relay_submission_refusals_total auth_failed": 1,
		"relais_relay_submission_refusals_total from_domain": 1,
		"relais_relay_submission_accepted_messages_total":    1,
		"relais_relay_submission_accepted_recipients_total":  1,
		"relais_relay_submission_accepted_bytes_total":       float64(len(w.spool.last(t).text)),
		"relais_relay_submission_accept_seconds":             1,
	}
	for name, v := range want {
		if got[name] != v {
			t.Errorf("%s is %v, want %v", name, got[name], v)
		}
	}
	opt := w.server.opt
	if _, err := New(opt); !fault.Is(err, fault.Internal) {
		t.Errorf("a second server on one registry: error %v, want internal", err)
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := New(Options{Hostname: "mx.example"})
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("error %v, want invalid", err)
	}
}
