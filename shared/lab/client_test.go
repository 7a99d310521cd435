package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

func sendAll(t *testing.T, ld *Load) *Sent {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testPatience)
	defer cancel()
	s, err := Send(ctx, ld)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestClientAgainstFarm(t *testing.T) {
	for _, overlap := range []bool{false, true} {
		t.Run(fmt.Sprintf("overlap=%v", overlap), func(t *testing.T) {
			l := startLab(t, nil)
			ld := &Load{
				Addr: l.mxAddr(t, Google), TLS: &tls.Config{RootCAs: l.CAPool()},
				Messages: 203, Connections: 3, PerConnection: 20, Size: 5000, Overlap: overlap, Tag: "t",
				From: func(int) string { return "a@sender.test" },
				To: func(i int) string {
					if i%10 == 3 {
						return fmt.Sprintf("nobody-%d@gmail.test", i)
					}
					return fmt.Sprintf("accept-%d@gmail.test", i)
				},
				Headers: "X-Kind: load\r\n",
			}
			s := sendAll(t, ld)
			if s.Accepted != 183 || s.Refused != 20 || s.InDoubt+s.Unsent+s.Redials != 0 {
				t.Errorf("%s", s)
			}
			for i, r := range s.Results {
				want, state, code := 1, StateAccepted, 250
				if i%10 == 3 {
					want, state, code = 0, StateRefused, 550
				}
				if n := l.Deliveries(ld.MessageID(i), ld.To(i)); n != want || r.State != state || r.Code != code || r.Ended < r.Begun {
					t.Fatalf("message %d: %d deliveries, %+v", i, n, r)
				}
			}
			rep := l.Report()
			if len(rep.ProtocolFaults) != 0 || rep.Duplicated != 0 || rep.Lanes[0].MaxPerConnection > 20 || rep.Lanes[0].OverTLS != 183 {
				t.Errorf("%+v", rep)
			}
			m, content, err := l.Mail(Google, 0)
			if err != nil || m.Length < 4900 || m.Length > 5100 || !strings.Contains(string(content), "X-Kind: load\r\n") {
				t.Errorf("%v: %d bytes\n%s", err, m.Length, content)
			}
		})
	}
}

// TestClientSurvivesBrokenConnections cuts sessions at every phase: each
// message ends as accepted exactly where the farm has it, or in doubt.
func TestClientSurvivesBrokenConnections(t *testing.T) {
	for _, overlap := range []bool{false, true} {
		l := startLab(t, nil)
		d := newDice(5, "cuts")
		var mu sync.Mutex
		n, dots := 0, 0
		err := l.SetBehaviour(SFR, Behaviour{Answer: func(e Event) Answer {
			mu.Lock()
			defer mu.Unlock()
			n++
			if e.Phase == PhaseFinalDot {
				dots++
			}
			// Which draw an event gets is a matter of what the connections do at once:
			// two final dots are cut in any case.
			if d.draw("cut", e.Phase.String(), n) < 0.05 || e.Phase == PhaseFinalDot && (dots == 10 || dots == 11) {
				return Answer{Close: true, Keep: n%2 == 0}
			}
			return Answer{}
		}})
		if err != nil {
			t.Fatal(err)
		}
		ld := &Load{
			Addr: l.mxAddr(t, SFR), Messages: 150, Connections: 4, Overlap: overlap, Tag: "cut",
			From: func(int) string { return "a@sender.test" },
			To:   func(i int) string { return fmt.Sprintf("accept-%d@sfr.test", i) },
		}
		s := sendAll(t, ld)
		if s.Redials == 0 || s.InDoubt == 0 || s.Accepted+s.InDoubt != 150 {
			t.Errorf("%s", s)
		}
		for i, r := range s.Results {
			got := l.Deliveries(ld.MessageID(i), ld.To(i))
			if r.State == StateAccepted && got != 1 || got > 1 {
				t.Errorf("message %d is %d and was kept %d times", i, r.State, got)
			}
		}
	}
}

// submitter is a small submission service to test AUTH against.
type submitter struct{ got chan string }

type submission struct {
	s  *submitter
	to string
}

func (s *submitter) NewSession(*smtp.Conn) (smtp.Session, error) { return &submission{s: s}, nil }
func (s *submission) AuthMechanisms() []string                   { return []string{sasl.Plain} }
func (s *submission) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		if user != "user" || password != "secret" {
			return smtp.ErrAuthFailed
		}
		return nil
	}), nil
}
func (s *submission) Mail(string, *smtp.MailOptions) error      { return nil }
func (s *submission) Rcpt(to string, _ *smtp.RcptOptions) error { s.to = to; return nil }
func (s *submission) Reset()                                    {}
func (s *submission) Logout() error                             { return nil }
func (s *submission) Data(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	s.s.got <- s.to
	return err
}

func TestClientSubmits(t *testing.T) {
	certs, err := newCertificates()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := certs.leaf([]string{"relay.lab.test"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	l := startLab(t, nil) // only for its pool type: the service below has its own CA
	pool := l.CAPool()
	pool.AddCert(certs.cert)
	for _, implicit := range []bool{false, true} {
		t.Run(fmt.Sprintf("implicit=%v", implicit), func(t *testing.T) {
			s := &submitter{got: make(chan string, 10)}
			srv := smtp.NewServer(s)
			srv.Domain, srv.TLSConfig, srv.ErrorLog = "relay.lab.test", cfg, log.New(io.Discard, "", 0)
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			serving := ln
			if implicit {
				serving = tls.NewListener(ln, cfg)
			}
			served := make(chan error, 1)
			go func() { served <- srv.Serve(serving) }()
			ld := Load{
				Addr: ln.Addr().String(), ImplicitTLS: implicit, TLS: &tls.Config{RootCAs: pool},
				Username: "user", Password: "secret", Messages: 10, Connections: 2, Overlap: implicit,
				From: func(int) string { return "a@sender.test" }, To: func(i int) string { return fmt.Sprintf("r%d@x.test", i) },
			}
			if sent := sendAll(t, &ld); sent.Accepted != 10 || len(s.got) != 10 {
				t.Errorf("%s", sent)
			}
			ld.Password = "wrong-secret"
			sent, err := Send(t.Context(), &ld)
			if err == nil || sent.Unsent != 10 || !strings.Contains(err.Error(), "535") {
				t.Errorf("wrong password: %v, %s", err, sent)
			}
			if err != nil && strings.Contains(err.Error(), "wrong-secret") {
				t.Errorf("the password is in the error: %v", err)
			}
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
			<-served
		})
	}
}

func TestSendRefusesBadLoads(t *testing.T) {
	name := func(int) string { return "a@b.test" }
	good := Load{Addr: "127.0.0.1:1", Messages: 1, From: name, To: name}
	for what, change := range map[string]func(*Load){
		"Addr":        func(l *Load) { l.Addr = "" },
		"Messages":    func(l *Load) { l.Messages = 0 },
		"Connections": func(l *Load) { l.Connections = 5000 },
		"Size":        func(l *Load) { l.Size = 1 << 30 },
		"TLS":         func(l *Load) { l.Username = "u" },
		"ImplicitTLS": func(l *Load) { l.ImplicitTLS = true },
		"From":        func(l *Load) { l.From = nil },
	} {
		ld := good
		change(&ld)
		if _, err := Send(t.Context(), &ld); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestSendEndsWithItsContext(t *testing.T) {
	l := startLab(t, nil)
	if err := l.SetBehaviour(Free, Behaviour{Answer: At(PhaseFinalDot, Answer{Delay: 2 * testPatience})}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ld := &Load{
		Addr: l.mxAddr(t, Free), Messages: 3,
		From: func(int) string { return "a@sender.test" }, To: func(int) string { return "accept-1@free.test" },
	}
	go func() {
		if err := l.WaitFor(t.Context(), func(r Report) bool { return len(r.Lanes) == 1 }); err != nil {
			t.Error(err)
		}
		cancel()
	}()
	s, err := Send(ctx, ld)
	if !errors.Is(err, context.Canceled) || s.Accepted != 0 || s.InDoubt+s.Unsent != 3 {
		t.Errorf("%v, %s", err, s)
	}
}
