package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"net/mail"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// life is short in the ordinary run; -args -life 5m takes the five minutes that
// a one-time password has.
var life = flag.Duration("life", 20*time.Second, "how long the mail of TestMailExpiresWhileItsMXIsDown lives")

// lifeError is how far from its deadline mail may end.
const lifeError = 5 * time.Second

// TestMailExpiresWhileItsMXIsDown has mail expire whose MX refuses connections,
// is silent, says 421, or falls silent after DATA. It ends on time, its senders
// are told, and when the MX hosts come up nothing of it is delivered.
func TestMailExpiresWhileItsMXIsDown(t *testing.T) {
	t.Parallel()
	f := start(t, fleet.Config{Open: true})
	for i, domain := range []string{"refusing.test", "silent.test"} {
		if err := f.PublishMX(i, domain, "mx."+domain); err != nil {
			t.Fatal(err)
		}
	}
	silent := silence(t, f.PeerAddr(1).String())
	behave := func(provider string, b lab.Behaviour) {
		t.Helper()
		if err := f.Lab.SetBehaviour(provider, b); err != nil {
			t.Fatal(err)
		}
	}
	behave(lab.Yahoo, lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down", Close: true})})
	behave(lab.GMX, lab.Behaviour{Answer: lab.At(lab.PhaseData, lab.Answer{Delay: time.Hour})})
	to := []string{"a@refusing.test", "a@silent.test", "accept-1@yahoo.test", "accept-1@gmx.test"}
	both := []string{"b@refusing.test", "accept-2@yahoo.test"} // of one message
	accepted := make(map[string]time.Time)
	expire := fmt.Sprintf("X-Relais-Expire: %ds\r\n", int(life.Seconds()))
	for i, rcpt := range to {
		accepted[rcpt] = submitOne(t, f, rcpt, fmt.Sprint("old-", i), expire)
	}
	accepted[both[0]] = submitOne(t, f, strings.Join(both, " "), "old-both", expire)
	accepted[both[1]] = accepted[both[0]]

	checkEnds(t, f, accepted, 6)
	if err := f.WaitEmpty(within(t, time.Minute), nil); err != nil {
		t.Fatal(err)
	}
	checkReports(t, f, to)

	silent()
	behave(lab.Yahoo, lab.Behaviour{})
	behave(lab.GMX, lab.Behaviour{})
	up := []*mailHost{newMailHost(t, f.PeerAddr(0).String()), newMailHost(t, f.PeerAddr(1).String())}
	for i, rcpt := range to {
		submitOne(t, f, rcpt, fmt.Sprint("fresh-", i), "")
	}
	if err := f.WaitEmpty(within(t, 80*time.Second), nil); err != nil {
		t.Fatal(err)
	}
	ledger := f.NewLedger()
	if err := ledger.Read(t.Context(), nil); err != nil || ledger.Final["delivered"] != 4 || ledger.Final["expired"] != 6 {
		t.Errorf("ends %v, %v; want 6 expired and only the 4 fresh ones delivered", ledger.Final, err)
	}
	for i, host := range up {
		if got := host.subjects(); len(got) != 1 || got[0] != fmt.Sprint("fresh-", i) {
			t.Errorf("the MX of %s got %q", to[i], got)
		}
	}
	for i, rcpt := range append(to, both...) {
		if n := f.Lab.Deliveries(fmt.Sprintf("<old-%d@%s>", i, fleet.Domain), rcpt) + f.Lab.Deliveries("<old-both@"+fleet.Domain+">", rcpt); n > 0 {
			t.Errorf("mail to %s was delivered after its end", rcpt)
		}
	}
}

// submitOne submits a message to recipients that are separated by spaces and
// returns when it was accepted.
func submitOne(t *testing.T, f *fleet.Fleet, rcpts, name, fields string) time.Time {
	t.Helper()
	r := f.Relays[0]
	c := dial(t, r.Submission())
	c.startTLS(f.ClientTLS(r))
	c.cmd("EHLO client.test", "250")
	c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
	c.cmd("MAIL FROM:<news@"+fleet.Domain+"> RET=FULL ENVID=id+2B"+name, "250")
	for rcpt := range strings.FieldsSeq(rcpts) {
		c.cmd("RCPT TO:<"+rcpt+"> NOTIFY=FAILURE ORCPT=rfc822;first+2B"+rcpt, "250")
	}
	c.cmd("DATA", "354")
	c.send("From: news@" + fleet.Domain + "\r\nMessage-ID: <" + name + "@" + fleet.Domain + ">\r\nSubject: " + name + "\r\n" + fields + "\r\nYour code is 4711.\r\n.\r\n")
	c.expect("250 2.0.0")
	at := time.Now()
	c.cmd("QUIT", "221")
	return at
}

// checkEnds waits until n recipients have expired, and compares when.
func checkEnds(t *testing.T, f *fleet.Fleet, accepted map[string]time.Time, n int) {
	t.Helper()
	ledger, ctx := f.NewLedger(), within(t, *life+time.Minute)
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for ledger.Final["expired"] < n {
		if err := ledger.Read(ctx, func(_ *fleet.Relay, e *fleet.Event) {
			if !e.Final() || strings.HasSuffix(e.Address, "@"+fleet.Domain) {
				return
			}
			after := e.At.Sub(accepted[e.Address])
			if t.Logf("%s %s after %v: %s", e.Address, e.Type, after.Round(time.Millisecond), e.Reply); e.Type != "expired" || (after-*life).Abs() > lifeError {
				t.Errorf("%s ended as %s after %v, want expired after %v ± %v", e.Address, e.Type, after, *life, lifeError)
			}
		}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			t.Fatalf("%d of %d recipients expired", ledger.Final["expired"], n)
		}
	}
}

// checkReports reads the notifications that arrived: one for each message, that
// of two recipients included.
func checkReports(t *testing.T, f *fleet.Fleet, to []string) {
	t.Helper()
	found := make(map[string]int) // by envelope id, recipients told of
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				t.Fatal(err)
			}
			_, content, err := f.Lab.Mail(p.Name, m.ID)
			if err != nil {
				t.Fatal(err)
			}
			if m.From != "" {
				t.Errorf("a mail arrived that should have expired:\n%s", content)
				continue
			}
			checkNotification(t, content)
			_, id, _ := strings.Cut(string(content), "\r\nOriginal-Envelope-Id: ")
			id, _, _ = strings.Cut(id, "\r\n")
			recipients := bytes.Count(content, []byte("\r\nFinal-Recipient: rfc822; "))
			found[id] += recipients
			if bytes.Count(content, []byte("\r\nStatus: 4.4.7\r\n")) != recipients || bytes.Count(content, []byte("\r\nOriginal-Recipient: rfc822; first+")) != recipients ||
				!bytes.Contains(content, []byte("\r\nContent-Type: message/rfc822\r\n")) || !bytes.Contains(content, []byte("Your code is 4711.")) {
				t.Errorf("a report without status, original recipient or the message:\n%s", content)
			}
		}
	}
	want := map[string]int{"id+old-both": 2}
	for i := range to {
		want[fmt.Sprint("id+old-", i)] = 1
	}
	if fmt.Sprint(found) != fmt.Sprint(want) {
		t.Errorf("reports of %v, want %v", found, want)
	}
}

// silence listens and never says anything; what it returns ends that.
func silence(t *testing.T, addr string) (stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	}()
	stop = sync.OnceFunc(func() {
		_ = l.Close()
		<-done
		for _, c := range conns {
			_ = c.Close()
		}
	})
	t.Cleanup(stop)
	return stop
}

// mailHost is an MX that takes everything.
type mailHost struct {
	mu  sync.Mutex
	got []string // subjects
}

func newMailHost(t *testing.T, addr string) *mailHost {
	t.Helper()
	h := &mailHost{}
	s := smtp.NewServer(h)
	s.Addr, s.Domain = addr, "mx.test"
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // until it is closed
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return h
}

func (h *mailHost) subjects() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.got...)
}

// NewSession implements smtp.Backend; a mailHost has no state in a session.
func (h *mailHost) NewSession(*smtp.Conn) (smtp.Session, error) { return h, nil }
func (h *mailHost) Reset()                                      {}
func (h *mailHost) Logout() error                               { return nil }
func (h *mailHost) Mail(string, *smtp.MailOptions) error        { return nil }
func (h *mailHost) Rcpt(string, *smtp.RcptOptions) error        { return nil }

// Data implements smtp.Session.
func (h *mailHost) Data(r io.Reader) error {
	m, err := mail.ReadMessage(r)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, m.Body); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.got = append(h.got, m.Header.Get("Subject"))
	return nil
}
