package smtpconn

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
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

// testTLS returns the two sides of TLS with a certificate made for the test.
var testTLS = sync.OnceValues(func() (server, client *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mx.example"}, DNSNames: []string{"mx.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: roots, ServerName: "mx.example"}
})

// recorder is a backend that keeps what sessions were given.
type recorder struct {
	mu       sync.Mutex
	messages []string
	gate     chan struct{} // if not nil, Data waits for it before it answers
	entered  chan struct{} // if not nil, told when Data was called
}

func (r *recorder) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.messages...)
}

type recordedSession struct {
	*recorder
	conn *Conn
}

func (s *recordedSession) Reset()                               {}
func (s *recordedSession) Logout() error                        { return nil }
func (s *recordedSession) Mail(string, *smtp.MailOptions) error { return nil }
func (s *recordedSession) AuthMechanisms() []string             { return []string{"PLAIN"} }

func (s *recordedSession) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, _, password string) error {
		if password != "right" {
			return s.conn.Refuse("auth_failed", 535, smtp.EnhancedCode{5, 7, 8}, "wrong")
		}
		return nil
	}), nil
}

func (s *recordedSession) Rcpt(string, *smtp.RcptOptions) error {
	to, err := s.conn.Path()
	if err != nil || to.Local == "nobody" {
		return s.conn.Refuse("recipient", 550, smtp.EnhancedCode{5, 1, 1}, "no such recipient")
	}
	return nil
}

func (s *recordedSession) Data(io.Reader) error {
	if s.entered != nil {
		s.entered <- struct{}{}
	}
	var message []byte
	for {
		chunk, err := s.conn.Chunk()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		message = append(message, chunk...)
	}
	if bytes.HasPrefix(message, []byte("refuse")) {
		return s.conn.Refuse("message_rule", 550, smtp.EnhancedCode{5, 6, 0}, "refused")
	}
	if s.gate != nil {
		<-s.gate
	}
	s.mu.Lock()
	s.messages = append(s.messages, string(message))
	s.mu.Unlock()
	return nil
}

func testLimits() Limits {
	return Limits{
		MaxConnections: 10, MaxConnectionsPerIP: 5, MaxCommandsPerSession: 100, MaxErrorsPerSession: 10,
		MaxMessagesPerSession: 5, MaxRecipients: 10, MaxMessageBytes: 100_000, MaxLineBytes: 998,
		CommandTimeout: 10 * time.Second,
	}
}

// start runs a server and returns it, its backend and its address.
func start(t testing.TB, security Security, change func(*Config, *Limits)) (*Server, *recorder, string) {
	t.Helper()
	serverTLS, _ := testTLS()
	limits := testLimits()
	backend := &recorder{}
	cfg := Config{
		Name: "test", Hostname: "mx.example", TLS: serverTLS, Mechanisms: []string{"PLAIN"},
		NewSession: func(c *Conn) smtp.Session { return &recordedSession{backend, c} },
		Logger:     slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg, &limits)
	}
	cfg.Limits = func() Limits { return limits }
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l, security) }()
	t.Cleanup(func() {
		if !s.draining.Load() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_ = s.Shutdown(ctx)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, backend, l.Addr().String()
}

// peer is a client that says exactly what it is told.
type peer struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// dial connects and reads the greeting.
func dial(t testing.TB, addr string) *peer {
	t.Helper()
	p := connect(t, addr)
	p.expect("220 ")
	return p
}

func connect(t testing.TB, addr string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return newPeer(t, conn)
}

func newPeer(t testing.TB, conn net.Conn) *peer {
	return &peer{t: t, Conn: conn, r: bufio.NewReader(conn)}
}

func (p *peer) send(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.Conn, text); err != nil {
		p.t.Fatalf("sending %q: %v", text, err)
	}
}

// reply reads one reply, all its lines.
func (p *peer) reply() string {
	p.t.Helper()
	var all strings.Builder
	for {
		line, err := p.r.ReadString('\n')
		if err != nil {
			p.t.Fatalf("reading a reply after %q: %v", all.String(), err)
		}
		all.WriteString(line)
		if len(line) < 4 || line[3] == ' ' {
			return all.String()
		}
	}
}

func (p *peer) expect(prefix string) string {
	p.t.Helper()
	got := p.reply()
	if !strings.HasPrefix(got, prefix) {
		p.t.Fatalf("reply %q, want %q", got, prefix)
	}
	return got
}

func (p *peer) do(command, prefix string) string {
	p.t.Helper()
	p.send(command + "\r\n")
	return p.expect(prefix)
}

// expectEnd wants no more replies.
func (p *peer) expectEnd() {
	p.t.Helper()
	rest, err := io.ReadAll(p.r)
	if len(rest) > 0 || err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		p.t.Errorf("after the end: %q, error %v", rest, err)
	}
}

func (p *peer) startTLS() {
	p.t.Helper()
	p.do("STARTTLS", "220 2.0.0")
	p.upgrade()
}

func (p *peer) upgrade() {
	p.t.Helper()
	_, clientTLS := testTLS()
	secured := tls.Client(p.Conn, clientTLS)
	if err := secured.Handshake(); err != nil {
		p.t.Fatal(err)
	}
	p.Conn, p.r = secured, bufio.NewReader(secured)
}

// begin brings a peer to the point where data may be sent.
func (p *peer) begin() {
	p.t.Helper()
	p.do("EHLO client.example", "250-")
	p.do("MAIL FROM:<a@example.com>", "250 2.1.0")
	p.do("RCPT TO:<b@example.net>", "250 2.1.5")
	p.do("DATA", "354")
}

func TestDialogue(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, nil)
	p := dial(t, addr)
	hello := p.do("EHLO client.example", "250-mx.example")
	for _, want := range []string{"PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", "SIZE 100000", "STARTTLS"} {
		if !strings.Contains(hello, want+"\r\n") {
			t.Errorf("EHLO does not offer %s:\n%s", want, hello)
		}
	}
	for _, unwanted := range []string{"CHUNKING", "SMTPUTF8", "DSN", "AUTH"} {
		if strings.Contains(hello, unwanted) {
			t.Errorf("EHLO offers %s:\n%s", unwanted, hello)
		}
	}
	p.do("MAIL FROM:<a@example.com> SIZE=10 BODY=8BITMIME", "250 2.1.0")
	p.do("RCPT TO:<b@example.net>", "250 2.1.5")
	p.do("DATA", "354")
	p.send("Subject: x\r\n\r\n..two dots\r\n.x\r\n..\r\n\r\n.\r\n")
	p.expect("250 2.0.0")
	p.do("NOOP", "250")
	p.do("QUIT", "221")
	p.expectEnd()
	want := "Subject: x\r\n\r\n.two dots\r\nx\r\n.\r\n\r\n"
	if got := backend.got(); len(got) != 1 || got[0] != want {
		t.Errorf("stored %q, want %q", got, want)
	}
}

// RFC 2920: a client may send commands together, and the next message right
// behind the end of one.
func TestPipelining(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, nil)
	p := dial(t, addr)
	p.do("EHLO client.example", "250-")
	const transaction = "MAIL FROM:<a@example.com>\r\nRCPT TO:<nobody@example.net>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
	p.send(transaction)
	for _, want := range []string{"250", "550", "250", "354"} {
		p.expect(want)
	}
	p.send("one\r\n.\r\n" + transaction + "two\r\n.\r\nRSET\r\nNOOP\r\nQUIT\r\n")
	for _, want := range []string{"250 2.0.0", "250", "550", "250", "354", "250 2.0.0", "250", "250", "221"} {
		p.expect(want)
	}
	if got := backend.got(); len(got) != 2 || got[0] != "one\r\n" || got[1] != "two\r\n" {
		t.Errorf("stored %q", got)
	}
}

func TestReplies(t *testing.T) {
	tests := []struct {
		name  string
		steps []string // command, reply, command, reply …
	}{
		{"no greeting", []string{"MAIL FROM:<a@example.com>", "503 5.5.1", "RCPT TO:<b@example.net>", "503 5.5.1", "DATA", "503 5.5.1"}},
		{"HELO", []string{"HELO client.example", "250 mx.example", "MAIL FROM:<>", "250 2.1.0"}},
		{"no name", []string{"EHLO", "501 5.5.4", "HELO ", "501 5.5.4", "EHLO a b", "501 5.5.4", "EHLO a;b", "501 5.5.4"}},
		{"address literal", []string{"EHLO [IPv6:::1]", "250-"}},
		{"order", []string{"EHLO c", "250-", "RCPT TO:<b@example.net>", "503 5.5.1", "DATA", "503 5.5.1",
			"MAIL FROM:<a@example.com>", "250", "MAIL FROM:<a@example.com>", "503 5.5.1", "DATA", "554 5.5.1",
			"RSET", "250", "MAIL FROM:<a@example.com>", "250"}},
		{"EHLO resets", []string{"EHLO c", "250-", "MAIL FROM:<a@example.com>", "250", "EHLO c", "250-", "RCPT TO:<b@example.net>", "503 5.5.1"}},
		{"all recipients refused", []string{"EHLO c", "250-", "MAIL FROM:<>", "250", "RCPT TO:<nobody@example.net>", "550 5.1.1", "DATA", "554 5.5.1"}},
		{"unknown", []string{"FOO", "500 5.5.2", "", "500 5.5.2", "MA", "500 5.5.2", "MAILFROM:<a@b>", "500 5.5.2", "STARTTLSX", "500 5.5.2"}},
		{"not offered", []string{"EXPN list", "502 5.5.1", "HELP", "502 5.5.1", "TURN", "502 5.5.1"}},
		{"VRFY tells nothing", []string{"EHLO c", "250-", "VRFY joe", "252"}},
		{"MAIL syntax", []string{"EHLO c", "250-", "MAIL", "501 5.5.2", "MAIL TO:<a@example.com>", "501 5.5.2"}},
		{"MAIL parameters", []string{"EHLO c", "250-", "MAIL FROM:<a@example.com> FOO=1", "555 5.5.4", "MAIL FROM:<a@example.com> RET=FULL", "555 5.5.4",
			"MAIL FROM:<a@example.com> SMTPUTF8", "555 5.5.4", "MAIL FROM:<a@example.com> BODY=BINARYMIME", "555 5.5.4", "MAIL FROM:<a@example.com> SIZE=x", "501 5.5.4"}},
		{"RCPT parameters", []string{"EHLO c", "250-", "MAIL FROM:<>", "250", "RCPT TO:<b@example.net> NOTIFY=NEVER", "555 5.5.4", "RCPT TO:<b@example.net> FOO", "555 5.5.4"}},
		{"DATA has no argument", []string{"EHLO c", "250-", "MAIL FROM:<>", "250", "RCPT TO:<b@example.net>", "250", "DATA now", "501 5.5.4"}},
		{"STARTTLS has no argument", []string{"EHLO c", "250-", "STARTTLS now", "501 5.5.4", "MAIL FROM:<>", "250", "STARTTLS", "503 5.5.1"}},
		{"AUTH in clear text", []string{"EHLO c", "250-", "AUTH PLAIN AGEAcmlnaHQ=", "538 5.7.11"}},
		{"verbs in any case", []string{"ehlo c", "250-", "mail from:<a@example.com>", "250", "Rcpt To:<b@example.net>", "250", "rset", "250"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, addr := start(t, OfferSTARTTLS, nil)
			p := dial(t, addr)
			for i := 0; i < len(tt.steps); i += 2 {
				p.do(tt.steps[i], tt.steps[i+1])
			}
		})
	}
}

func TestRequireSTARTTLS(t *testing.T) {
	_, backend, addr := start(t, RequireSTARTTLS, func(_ *Config, l *Limits) { l.MaxErrorsPerSession = 50 })
	p := dial(t, addr)
	if hello := p.do("EHLO c", "250-"); !strings.Contains(hello, "STARTTLS") || strings.Contains(hello, "AUTH") {
		t.Errorf("EHLO in clear text: %s", hello)
	}
	p.do("MAIL FROM:<a@example.com>", "530 5.7.0")
	p.do("AUTH PLAIN AGEAcmlnaHQ=", "538 5.7.11")
	p.do("VRFY joe", "530 5.7.0")
	p.startTLS()
	p.do("MAIL FROM:<a@example.com>", "503 5.5.1") // RFC 3207: EHLO is forgotten
	if hello := p.do("EHLO c", "250-"); strings.Contains(hello, "STARTTLS") || !strings.Contains(hello, "AUTH PLAIN") {
		t.Errorf("EHLO over TLS: %s", hello)
	}
	p.do("STARTTLS", "503 5.5.1")
	p.do("AUTH", "501 5.5.4")
	p.do("AUTH PLAIN !!!", "501 5.5.2")
	p.do("AUTH PLAIN AGEAd3Jvbmc=", "535 5.7.8")
	p.do("AUTH PLAIN", "334")
	p.do("*", "501 5.7.0")
	p.do("AUTH PLAIN", "334")
	p.do("not base64", "501 5.5.2")
	p.do("AUTH PLAIN", "334")
	p.do("AGEAcmlnaHQ=", "235 2.7.0")
	p.do("AUTH PLAIN AGEAcmlnaHQ=", "503 5.5.1")
	p.begin()
	p.send("x\r\n.\r\n")
	p.expect("250 2.0.0")
	if got := backend.got(); len(got) != 1 {
		t.Errorf("stored %q", got)
	}
}

func TestImplicitTLS(t *testing.T) {
	_, backend, addr := start(t, ImplicitTLS, nil)
	p := connect(t, addr)
	p.upgrade()
	p.expect("220 mx.example")
	p.begin()
	p.send("x\r\n.\r\n")
	p.expect("250 2.0.0")
	if got := backend.got(); len(got) != 1 {
		t.Errorf("stored %q", got)
	}
	// Clear text on this port gets nothing.
	p = connect(t, addr)
	p.send("EHLO c\r\nMAIL FROM:<>\r\n")
	rest, _ := io.ReadAll(p.r)
	if bytes.Contains(rest, []byte("250")) {
		t.Errorf("clear text was answered with %q", rest)
	}
}

// RFC 3207: what is sent in clear text behind STARTTLS must not be taken for
// part of the protected session.
func TestSTARTTLSInjection(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, nil)
	p := dial(t, addr)
	p.do("EHLO c", "250-")
	p.send("STARTTLS\r\nMAIL FROM:<evil@example.com>\r\n")
	p.expect("554 5.5.1")
	p.expectEnd()
	if got := backend.got(); len(got) != 0 {
		t.Errorf("stored %q", got)
	}
}

func TestPathAndParameter(t *testing.T) {
	tests := []struct {
		argument, want string // "!" for an error
	}{
		{"FROM:<a@example.com>", "a@example.com"},
		{"from: <a@EXAMPLE.com> SIZE=1", "a@example.com"},
		{"FROM:<>", ""},
		{"FROM:<> SIZE=1", ""},
		{`FROM:<"a b>c"@example.com> SIZE=1`, `"a b>c"@example.com`},
		{`FROM:<"a\"@b"@example.com>`, `"a\"@b"@example.com`},
		{"FROM:<@r1.example,@r2.example:a@example.com>", "a@example.com"},
		{"FROM:a@example.com", "!"},
		{"FROM:<a@example.com", "!"},
		{"FROM:<a@example.com>x", "!"},
		{"FROM:<a>", "!"},
		{"FROM:<a@b@example.com>", "!"},
		{"FROM:<@r1.example>", "!"},
		{"TO:<a@example.com>", "!"},
	}
	for _, tt := range tests {
		got, err := parsePath(tt.argument, "FROM:", false)
		if err != nil && tt.want != "!" || err == nil && got.String() != tt.want {
			t.Errorf("ParsePath(%q) = %q, %v; want %q", tt.argument, got, err, tt.want)
		}
	}
}

func TestReplyIsOneLine(t *testing.T) {
	got := Reply(550, smtp.EnhancedCode{5, 6, 0}, "bad\r\n250 fine é%s", strings.Repeat("x", 600))
	if strings.ContainsAny(got.Message, "\r\n") || len(got.Message) > maxReplyTextBytes {
		t.Errorf("reply text %q", got.Message)
	}
}

func ExampleReply() {
	fmt.Println(Reply(451, smtp.EnhancedCode{4, 3, 0}, "try %s", "later"))
	// Output: SMTP error 451: try later
}
