package inbound

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// fakeSpool keeps what was accepted in memory.
type fakeSpool struct {
	mu            sync.Mutex
	mails         []stored
	open          int
	admit, accept error
}

type stored struct {
	in          queue.Inbound
	text        string
	headerBytes int64
}

type fakeBody struct {
	bytes.Buffer
	spool       *fakeSpool
	headerBytes int64
	over        bool
}

func (s *fakeSpool) Admit(int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.admit
}

// fail sets what one of the calls returns from now on.
func (s *fakeSpool) fail(call *error, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*call = err
}

func (s *fakeSpool) NewBody() Body {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return &fakeBody{spool: s}
}

func (s *fakeSpool) AcceptInbound(_ context.Context, in *queue.Inbound, body Body) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.accept != nil {
		return s.accept
	}
	b := body.(*fakeBody)
	b.over = true
	s.open--
	s.mails = append(s.mails, stored{*in, b.String(), b.headerBytes})
	return nil
}

func (b *fakeBody) Seal(headerBytes int64, _ [32]byte) error {
	b.headerBytes = headerBytes
	return nil
}

func (b *fakeBody) Discard() {
	b.spool.mu.Lock()
	defer b.spool.mu.Unlock()
	if !b.over {
		b.over = true
		b.spool.open--
	}
}

var (
	acme, other = ids.Tenant{1, 1}, ids.Tenant{1, 2}
	message     = ids.Message{1, 3}
	keys        = []policy.ReturnPathKey{{ID: 4, Key: [32]byte{5}}}
)

type world struct {
	spool  fakeSpool
	policy atomic.Pointer[policy.Directory]
	server *Server
	addr   string
}

// testTLS makes a certificate for the test.
var testTLS = sync.OnceValue(func() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mx.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
})

func newWorld(t *testing.T, change func(*policy.Inbound)) *world {
	t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&doc.Inbound)
	}
	dir, err := policy.Compile(&policy.View{
		Node: ids.Node{1, 9}, Revision: 7, Document: doc, ReturnPathKeys: keys,
		Tenants: []policy.Tenant{{ID: acme, Name: "acme"}, {ID: other, Name: "other"}},
		Domains: []policy.Domain{
			{Name: "acme.example", Tenant: acme, ReturnPath: "rp.acme.example"},
			{Name: "other.example", Tenant: other, ReturnPath: "rp.other.example"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{}
	w.policy.Store(dir)
	w.server, err = New(Options{Hostname: "mx.example", TLS: testTLS(), Policy: w.policy.Load, Spool: &w.spool, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second) // no client is left
		defer cancel()
		_ = w.server.Shutdown(ctx)
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if w.spool.open != 0 {
			t.Errorf("%d bodies were neither accepted nor discarded", w.spool.open)
		}
	})
	return w
}

// returnPath makes a return path of ours.
func returnPath(t *testing.T, recipient int, expires time.Time) string {
	t.Helper()
	local, err := sign.EncodeReturnPath(keys, message, recipient, expires)
	if err != nil {
		t.Fatal(err)
	}
	return local
}

type peer struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func (w *world) dial(t *testing.T) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	p := &peer{t, conn, bufio.NewReader(conn)}
	p.expect("220 ")
	p.do("EHLO mail.example.net", "250-")
	return p
}

func (p *peer) send(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.Conn, text); err != nil {
		p.t.Fatalf("sending %q: %v", text, err)
	}
}

func (p *peer) expect(prefix string) string {
	p.t.Helper()
	var all strings.Builder
	for {
		line, err := p.r.ReadString('\n')
		if err != nil {
			p.t.Fatalf("reading a reply after %q: %v", all.String(), err)
		}
		all.WriteString(line)
		if len(line) < 4 || line[3] == ' ' {
			break
		}
	}
	if got := all.String(); !strings.HasPrefix(got, prefix) {
		p.t.Fatalf("reply %q, want %q", got, prefix)
	}
	return all.String()
}

func (p *peer) do(command, prefix string) string {
	p.t.Helper()
	p.send(command + "\r\n")
	return p.expect(prefix)
}

func TestAccept(t *testing.T) {
	w := newWorld(t, nil)
	local := returnPath(t, 5, time.Now())
	p := w.dial(t)
	p.do("MAIL FROM:<> SIZE=100", "250")
	p.do("RCPT TO:<"+strings.ToUpper(local)+"@RP.acme.example>", "250")
	p.do("RCPT TO:<"+local+"@rp.acme.example>", "250") // the same again
	p.do("DATA", "354")
	p.send("Subject: bounce\r\n\r\nit did not arrive\r\n.\r\n")
	reply := p.expect("250 2.0.0 OK stored as msg_")
	if len(w.spool.mails) != 1 {
		t.Fatalf("%d mails are stored", len(w.spool.mails))
	}
	got := w.spool.mails[0]
	in := got.in
	if in.Tenant != acme || in.Original != message || in.Index != 5 || !in.PerRecipient || !in.Sender.IsNull() || in.RemoteIP != netip.MustParseAddr("127.0.0.1") ||
		!strings.Contains(reply, in.ID.String()) || in.ReceivedAt.IsZero() || !strings.EqualFold(in.To.String(), local+"@rp.acme.example") {
		t.Errorf("stored %+v, reply %q", in, reply)
	}
	if !regexp.MustCompile(`^Received: from mail\.example\.net \(\[127\.0\.0\.1\]\)\r\n\tby mx\.example with ESMTP\r\n\tid msg_\w+\r\n\tfor <\w+@rp\.acme\.example>; [^\r]+\r\nSubject: bounce\r\n\r\nit did not arrive\r\n$`).MatchString(got.text) {
		t.Errorf("stored %q", got.text)
	}
	if want := int64(strings.Index(got.text, "\r\n\r\n") + 4); got.headerBytes != want {
		t.Errorf("header section has %d octets, recorded are %d", want, got.headerBytes)
	}
}

func TestSeveralReturnPaths(t *testing.T) {
	w := newWorld(t, func(p *policy.Inbound) { p.MaxRecipients = 2 })
	p := w.dial(t)
	p.do("MAIL FROM:<joe@example.net>", "250")
	p.do("RCPT TO:<"+returnPath(t, sign.NoRecipient, time.Now())+"@rp.acme.example>", "250")
	p.do("RCPT TO:<stranger@rp.acme.example>", "550 5.7.1")
	p.do("RCPT TO:<"+returnPath(t, 1, time.Now())+"@rp.acme.example>", "250")
	p.do("RCPT TO:<"+returnPath(t, 2, time.Now())+"@rp.acme.example>", "452 4.5.3")
	p.do("DATA", "354")
	p.send("x\r\n.\r\n")
	p.expect("250 2.0.0")
	if len(w.spool.mails) != 2 || w.spool.mails[0].in.PerRecipient || w.spool.mails[1].in.Index != 1 || w.spool.mails[0].in.ID == w.spool.mails[1].in.ID {
		t.Errorf("stored %+v", w.spool.mails)
	}
	for _, m := range w.spool.mails {
		if strings.Contains(m.text, "rp.acme.example") || m.headerBytes != int64(len(m.text)) {
			t.Errorf("stored %q with a header section of %d octets", m.text, m.headerBytes)
		}
	}
}

// Nothing but our own valid return paths may pass: this port never relays.
func TestNeverRelays(t *testing.T) {
	w := newWorld(t, nil)
	good := returnPath(t, 1, time.Now())
	forged, err := sign.EncodeReturnPath([]policy.ReturnPathKey{{ID: 4}}, message, 1, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ to, reply string }{
		{"ann@example.net", "550 5.7.1 Relaying denied"},
		{good + "@example.net", "550 5.7.1 Relaying denied"},
		{good + "@acme.example", "550 5.7.1 Relaying denied"},
		{good + "@sub.rp.acme.example", "550 5.7.1 Relaying denied"},
		{good + "@[127.0.0.1]", "550 5.7.1 Relaying denied"},
		{"@rp.acme.example:ann@example.net", "550 5.7.1 Relaying denied"},
		{`"ann@example.net"@rp.acme.example`, "550 5.7.1"},
		{"ann%example.net@rp.acme.example", "550 5.7.1"},
		{"joe@rp.acme.example", "550 5.7.1 this is not a return path"},
		{"Postmaster@rp.acme.example", "550 5.7.1 This domain takes bounces only, write to postmaster@acme.example"},
		{forged + "@rp.acme.example", "550 5.7.1 the signature"},
		{returnPath(t, 1, time.Now().Add(-48*time.Hour)) + "@rp.acme.example", "550 5.7.1 this return path has expired"},
		{"", "501"},
		{"postmaster", "501"},
		{good, "501"},
	}
	for _, tt := range tests {
		t.Run(tt.to, func(t *testing.T) {
			p := w.dial(t)
			p.do("MAIL FROM:<joe@example.net>", "250")
			p.do("RCPT TO:<"+tt.to+">", tt.reply)
			p.do("DATA", "554 5.5.1")
		})
	}
	p := w.dial(t)
	p.do("AUTH PLAIN AGEAYg==", "502 5.5.1")
	if n := len(w.spool.mails); n != 0 {
		t.Errorf("%d mails are stored", n)
	}
}

func TestLimitsAndFailures(t *testing.T) {
	w := newWorld(t, func(p *policy.Inbound) { p.MaxMessageBytes = 65536 })
	to := "RCPT TO:<" + returnPath(t, 1, time.Now()) + "@rp.acme.example>"
	p := w.dial(t)
	p.do("MAIL FROM:<> SIZE=65537", "552 5.3.4")
	p.do("MAIL FROM:x", "501")
	send := func(data, reply string) {
		t.Helper()
		p.do("MAIL FROM:<>", "250")
		p.do(to, "250")
		p.do("DATA", "354")
		p.send(data + ".\r\n")
		p.expect(reply)
	}
	send(strings.Repeat("0123456\r\n", 8000), "552 5.3.4")
	w.spool.fail(&w.spool.accept, fault.New(fault.NoSpace, "test", "full"))
	send("x\r\n", "452 4.3.1")
	w.spool.fail(&w.spool.accept, fault.New(fault.Exhausted, "test", "full"))
	send("x\r\n", "452 4.3.1")
	w.spool.fail(&w.spool.accept, fault.Wrap(errors.New("disk"), fault.Internal, "test", "broken"))
	send("x\r\n", "451 4.3.0")
	w.spool.fail(&w.spool.accept, nil)
	send("x\r\n", "250")
	w.spool.fail(&w.spool.admit, fault.New(fault.NoSpace, "test", "full"))
	p.do("MAIL FROM:<>", "452 4.3.1")
	w.policy.Store(nil)
	p.do("MAIL FROM:<>", "451 4.3.2")
	p.send("MAIL FROM:<>\n")
	p.expect("500 5.5.2")
}

func TestSTARTTLS(t *testing.T) {
	w := newWorld(t, nil)
	p := w.dial(t)
	p.do("STARTTLS", "220")
	secured := tls.Client(p.Conn, &tls.Config{InsecureSkipVerify: true}) // as other people's servers do
	p = &peer{t, secured, bufio.NewReader(secured)}
	p.do("EHLO mail.example.net", "250-")
	p.do("MAIL FROM:<>", "250")
	p.do("RCPT TO:<"+returnPath(t, 1, time.Now())+"@rp.acme.example>", "250")
	p.do("DATA", "354")
	p.send("x\r\n.\r\n")
	p.expect("250")
	if got := w.spool.mails[0].text; !strings.Contains(got, "with ESMTPS\r\n\ttls TLS_") {
		t.Errorf("stored %q", got)
	}
}

func TestCopierFindsTheHeader(t *testing.T) {
	const text = "Received: x\r\nA: b\r\n\r\nbody\r\n\r\nmore\r\n"
	for step := 1; step < len(text); step++ {
		t.Run(fmt.Sprint(step), func(t *testing.T) {
			var w copier
			for rest := text; rest != ""; rest = rest[min(step, len(rest)):] {
				w.write([]byte(rest[:min(step, len(rest))]))
			}
			if got, want := w.headerBytes(), int64(strings.Index(text, "\r\n\r\n")+4); got != want {
				t.Errorf("header section has %d octets, want %d", got, want)
			}
		})
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	if _, err := New(Options{Hostname: "mx.example"}); !fault.Is(err, fault.Invalid) {
		t.Errorf("error %v, want invalid", err)
	}
}
