package lab

import (
	"crypto/tls"
	"strings"
	"testing"
	"time"
)

func TestBehaviourAtEveryPhase(t *testing.T) {
	l := startLab(t, nil)
	set := func(b Behaviour) {
		t.Helper()
		if err := l.SetBehaviour(GMX, b); err != nil {
			t.Fatal(err)
		}
	}
	addr := l.mxAddr(t, GMX)
	reply := func(p Phase) Behaviour { return Behaviour{Answer: At(p, Answer{Reply: "451 4.3.0 scripted"})} }

	set(Behaviour{Answer: At(PhaseConnect, Answer{Reply: "554 5.7.1 not you"})})
	c := dial(t, addr, "127.0.0.7")
	c.want("554 5.7.1 not you")
	c.do("QUIT", "221")

	set(reply(PhaseEhlo))
	c = dial(t, addr, "127.0.0.7")
	c.want("220")
	c.do("EHLO x", "451 4.3.0 scripted")
	c.do("HELO x", "451")

	set(reply(PhaseStartTLS))
	c.do("EHLO x", "250")
	c.do("STARTTLS", "451")
	set(reply(PhaseMail))
	c.do("MAIL FROM:<a@sender.test>", "451")
	set(reply(PhaseRcpt))
	c.do("MAIL FROM:<a@sender.test>", "250")
	c.do("RCPT TO:<accept-1@gmx.test>", "451")
	set(reply(PhaseData))
	c.do("RCPT TO:<accept-1@gmx.test>", "250")
	c.do("DATA", "451")
	set(reply(PhaseFinalDot))
	if r := c.mail("a@sender.test", "accept-1@gmx.test", message("f@x")); !strings.HasPrefix(r, "451") {
		t.Fatalf("final dot: %q", r)
	}
	if r := l.Report(); r.Accepted != 0 || r.Deferred != 7 || r.Rejected != 1 {
		t.Errorf("accepted %d, deferred %d, rejected %d", r.Accepted, r.Deferred, r.Rejected)
	}
	set(Behaviour{Answer: At(PhaseFinalDot, Answer{Reply: "451 4.3.0 kept all the same", Keep: true})})
	c.mail("a@sender.test", "accept-1@gmx.test", message("k@x"))
	if n := l.Deliveries("<k@x>", "accept-1@gmx.test"); n != 1 {
		t.Errorf("kept %d times, want 1", n)
	}
	set(Behaviour{Answer: At(PhaseRcpt, Answer{Reply: "421 4.3.2 going away", Close: true})})
	c.do("MAIL FROM:<a@sender.test>", "250")
	c.do("RCPT TO:<accept-1@gmx.test>", "421")
	c.wantClosed()
}

func TestBehaviourDelay(t *testing.T) {
	l := startLab(t, nil)
	const delay = 50 * time.Millisecond
	if err := l.SetBehaviour(GMX, Behaviour{Answer: At(PhaseMail, Answer{Delay: delay})}); err != nil {
		t.Fatal(err)
	}
	c := dial(t, l.mxAddr(t, GMX), "127.0.0.7").hello()
	begun := time.Now()
	c.do("MAIL FROM:<a@sender.test>", "250")
	if took := time.Since(begun); took < delay {
		t.Errorf("answered after %s", took)
	}
	if err := l.SetBehaviour("nobody", Behaviour{}); err == nil {
		t.Error("an unknown provider was taken")
	}
}

func TestTLSModes(t *testing.T) {
	l := startLab(t, nil)
	addr, host := l.mxAddr(t, Apple), "mx01.mail.icloud.com"
	greet := func(mode TLSMode) (*talk, string) {
		t.Helper()
		if err := l.SetBehaviour(Apple, Behaviour{TLS: mode, Without: []string{"8BITMIME"}}); err != nil {
			t.Fatal(err)
		}
		c := dial(t, addr, "127.0.0.7")
		c.want("220")
		ehlo := c.do("EHLO out.sender.test", "250")
		if strings.Contains(ehlo, "8BITMIME") || !strings.Contains(ehlo, "PIPELINING") {
			t.Errorf("EHLO: %q", ehlo)
		}
		return c, ehlo
	}
	c, ehlo := greet(TLSOffered)
	if !strings.Contains(ehlo, "STARTTLS") {
		t.Errorf("EHLO: %q", ehlo)
	}
	c.startTLS(l, host)
	if r := c.mail("a@sender.test", "accept-1@me.test", message("tls@x")); !strings.HasPrefix(r, "250") {
		t.Fatal(r)
	}
	if m, _, err := l.Mail(Apple, 0); err != nil || m.TLS != "TLS 1.3" || l.Report().Lanes[0].OverTLS != 1 {
		t.Errorf("mail %+v: %v", m, err)
	}
	c, ehlo = greet(TLSAbsent)
	if strings.Contains(ehlo, "STARTTLS") {
		t.Errorf("EHLO: %q", ehlo)
	}
	c.do("STARTTLS", "502")
	c, _ = greet(TLSRefused)
	c.do("STARTTLS", "454")
	if r := c.mail("a@sender.test", "accept-1@me.test", message("clear@x")); !strings.HasPrefix(r, "250") {
		t.Fatalf("in clear after 454: %s", r)
	}
	handshake := func(c *talk) error {
		return tls.Client(c.conn, &tls.Config{RootCAs: l.CAPool(), ServerName: host}).Handshake()
	}
	c, _ = greet(TLSBroken)
	c.do("STARTTLS", "220")
	if err := handshake(c); err == nil {
		t.Error("broken TLS: handshake worked")
	}
	c, _ = greet(TLSWrongName)
	c.do("STARTTLS", "220")
	if err := handshake(c); err == nil || !strings.Contains(err.Error(), "someone-else") {
		t.Errorf("wrong name: %v", err)
	}
}
