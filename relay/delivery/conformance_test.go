package delivery

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// backend records what an independent SMTP server understood.
type backend struct {
	mu    sync.Mutex
	mails []received
}

type received struct {
	from string
	size int64
	body smtp.BodyType
	to   []string
	tls  bool
	data []byte
}

type backendSession struct {
	b    *backend
	conn *smtp.Conn
	mail received
}

func (b *backend) NewSession(c *smtp.Conn) (smtp.Session, error) {
	return &backendSession{b: b, conn: c}, nil
}

func (s *backendSession) Reset()        { s.mail = received{} }
func (s *backendSession) Logout() error { return nil }

func (s *backendSession) Mail(from string, opts *smtp.MailOptions) error {
	_, encrypted := s.conn.TLSConnectionState()
	s.mail = received{from: from, size: opts.Size, body: opts.Body, tls: encrypted}
	return nil
}

func (s *backendSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	switch {
	case strings.HasPrefix(to, "nobody"):
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "nobody here"}
	case strings.HasPrefix(to, "later"):
		return &smtp.SMTPError{Code: 450, EnhancedCode: smtp.EnhancedCode{4, 2, 1}, Message: "come again"}
	}
	s.mail.to = append(s.mail.to, to)
	return nil
}

func (s *backendSession) Data(r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if bytes.Contains(data, []byte("X-Refuse")) {
		return &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 7, 1}, Message: "not this"}
	}
	s.mail.data = data
	s.b.mu.Lock()
	s.b.mails = append(s.b.mails, s.mail)
	s.b.mu.Unlock()
	return nil
}

func certificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "somebody else"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// library starts an independent server, with STARTTLS if encrypted.
func library(t testing.TB, encrypted bool) (*backend, uint16) {
	t.Helper()
	b := &backend{}
	server := smtp.NewServer(b)
	server.Domain = "library.example"
	server.MaxMessageBytes = 32 << 20
	server.MaxRecipients = MaxRecipients
	if encrypted {
		server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	return b, l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestAgainstLibraryServer(t *testing.T) {
	for _, tc := range []struct {
		name string
		mode policy.TLSMode
		tls  bool
		want string
	}{
		{"clear", policy.TLSOpportunistic, false, ""},
		{"opportunistic", policy.TLSOpportunistic, true, "TLS1.3"},
		{"required", policy.TLSRequired, true, "TLS1.3"},
		{"off", policy.TLSOff, true, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, port := library(t, tc.tls)
			f := newFixture(t, port)
			s, failure := f.dialer.Dial(t.Context(), target(tc.mode, hostsAt("127.0.0.1")...))
			if failure != nil {
				t.Fatalf("%+v", failure)
			}
			defer s.Quit()
			if s.Peer().TLS != tc.want || !s.Extensions().Pipelining || !s.Extensions().EightBit || s.Extensions().MaxBytes != 32<<20 {
				t.Fatalf("peer %+v, extensions %+v", s.Peer(), s.Extensions())
			}
			exerciseLibrary(t, s, b, tc.want != "")
		})
	}
}

func exerciseLibrary(t *testing.T, s *Session, b *backend, encrypted bool) {
	t.Helper()
	tx := transaction(3)
	tx.Recipients[0].Address.Local = "nobody"
	tx.Recipients[2].Address.Local = "later"
	if got := brief(s.Send(tx)); got != "failed/rcpt/550/5.1.1 delivered/final-dot/250/2.0.0 deferred/rcpt/450/4.2.1" {
		t.Errorf("mixed recipients: %s", got)
	}
	tx = transaction(1)
	tx.Recipients[0].Address.Local = "nobody"
	if got := brief(s.Send(tx)); got != "failed/rcpt/550/5.1.1" {
		t.Errorf("no recipient: %s", got)
	}
	tx = transaction(1)
	tx.Content.Bytes = []byte("X-Refuse: yes\r\n\r\n.\r\n..\r\n")
	if got := brief(s.Send(tx)); got != "failed/final-dot/554/5.7.1" {
		t.Errorf("refused content: %s", got)
	}
	tx = transaction(2)
	tx.EightBit = true
	large := bytes.Repeat([]byte("..a line with dots . and \xc3\xa9\r\n.\r\n"), 100_000)
	tx.Content = Content{Reader: bytes.NewReader(large), Length: int64(len(large))}
	if got := brief(s.Send(tx)); got != "delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0" {
		t.Errorf("large message: %s", got)
	}
	if !s.Alive() || s.Delivered() != 2 || s.Transactions() != 4 {
		t.Errorf("alive %v, delivered %d of %d", s.Alive(), s.Delivered(), s.Transactions())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.mails) != 2 {
		t.Fatalf("%d mails arrived, want 2", len(b.mails))
	}
	m := b.mails[0]
	if m.from != "b+1@bounce.sender.example" || m.size != int64(len(testMessage)) || m.tls != encrypted || len(m.to) != 1 || m.to[0] != "r1@example.com" || string(m.data) != testMessage {
		t.Errorf("first mail arrived as %+v", m)
	}
	m = b.mails[1]
	if m.body != smtp.Body8BitMIME || len(m.to) != 2 || !bytes.Equal(m.data, large) {
		t.Errorf("large mail arrived with %d bytes of %d, body %s", len(m.data), len(large), m.body)
	}
}

func TestTLSSessionsAreResumed(t *testing.T) {
	_, port := library(t, true)
	f := newFixture(t, port)
	for i := range 2 {
		s, failure := f.dialer.Dial(t.Context(), target(policy.TLSRequired, hostsAt("127.0.0.1")...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
			t.Fatal(got)
		}
		if resumed := s.conn.(*tls.Conn).ConnectionState().DidResume; resumed != (i == 1) {
			t.Errorf("connection %d resumed: %v", i, resumed)
		}
		s.Quit()
	}
}

func TestEmptyMessage(t *testing.T) {
	b, port := library(t, false)
	f := newFixture(t, port)
	s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	defer s.Quit()
	tx := transaction(1)
	tx.Content = Content{}
	if out := s.Send(tx); out[0].Status != relay.Delivered {
		t.Errorf("%+v", out)
	}
	if len(b.mails) != 1 || len(b.mails[0].data) != 0 {
		t.Errorf("arrived as %+v", b.mails)
	}
}
