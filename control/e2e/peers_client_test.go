package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lab/peers"
)

// clientBench is a relay whose mail goes to an Exim, and what its clients need
// to know.
type clientBench struct {
	t                   *testing.T
	fleet               *fleet.Fleet
	exim                *peers.Server
	host, starttls, tls string
	to                  string
	sent                int
	textFile            string
	text                []byte // of textFile, as it must arrive
	user, secret, ca    string
}

// TestPeersSubmit lets clients that others wrote submit, and reads what Exim
// got.
func TestPeersSubmit(t *testing.T) {
	f := startSigning(t)
	const domain, host = "clients.test", "mx.clients.test"
	exim, err := peers.Exim(t.Context(), peers.Config{Dir: filepath.Join(t.TempDir(), "exim"), Addr: f.PeerAddr(0), Host: host, Domain: domain})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(exim.Close)
	if err := f.PublishMX(0, domain, host); err != nil {
		t.Fatal(err)
	}
	b := &clientBench{t: t, fleet: f, exim: exim, to: "box@" + domain, user: f.User, secret: f.Secret, ca: f.CAFile}
	b.host, b.starttls, _ = net.SplitHostPort(f.Relays[0].Submission())
	_, b.tls, _ = net.SplitHostPort(f.Relays[0].Submissions())
	m := letter("text", plainUTF8, "Grüße\r\n.\r\n..\r\n.x\r\n\r\n"+strings.Repeat("ő", 400)+"\r\n\r\n")
	b.text, b.textFile = m.text, filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(b.textFile, m.text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("curl", b.curl)
	t.Run("swaks", b.swaks)
	t.Run("python", b.python)
	t.Run("nodemailer", b.nodemailer)
	t.Run("postfix", b.postfix)
	arrived, err := exim.Wait(within(t, 3*time.Minute), b.sent)
	if err != nil {
		t.Fatal(err)
	}
	signed := newSignatures(t)
	for i := range arrived {
		signed.add(&arrived[i])
	}
	signed.check(f)
}

// arrives waits for n more mails and returns them, which others may not be.
func (b *clientBench) arrives(t *testing.T, n int, client string) []peers.Mail {
	t.Helper()
	b.sent += n
	all, err := b.exim.Wait(within(t, 3*time.Minute), b.sent)
	if err != nil {
		t.Fatal(err)
	}
	mails := slices.DeleteFunc(all, func(m peers.Mail) bool { return !strings.HasPrefix(m.Field("X-Case"), client) })
	if len(mails) != n {
		t.Fatalf("%d mails of %s arrived, want %d", len(mails), client, n)
	}
	return mails
}

// same expects mails to have the body of the bench's text.
func (b *clientBench) same(t *testing.T, mails []peers.Mail) {
	t.Helper()
	_, want, _ := bytes.Cut(b.text, []byte("\r\n\r\n"))
	for i := range mails {
		if got := mails[i].Body; !bytes.Equal(got, want) {
			t.Errorf("the body was %q and is %q", want, got)
		}
	}
}

// file writes the bench's text with the name of the case in it.
func (b *clientBench) file(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "mail")
	text := bytes.Replace(b.text, []byte("X-Case: text"), []byte("X-Case: "+name), 1)
	text = bytes.Replace(text, []byte("<text@"), []byte("<"+strings.ReplaceAll(name, " ", "-")+"@"), 1)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (b *clientBench) curl(t *testing.T) {
	curl := need(t, "curl")
	for name, args := range map[string][]string{
		"curl STARTTLS PLAIN": {"--ssl-reqd", "--login-options", "AUTH=PLAIN", "smtp://" + net.JoinHostPort(b.host, b.starttls)},
		"curl STARTTLS LOGIN": {"--ssl-reqd", "--login-options", "AUTH=LOGIN", "smtp://" + net.JoinHostPort(b.host, b.starttls)},
		"curl TLS":            {"smtps://" + net.JoinHostPort(b.host, b.tls)},
	} {
		out, err := command(t, curl, append([]string{"-sS", "--cacert", b.ca, "--user", b.user + ":" + b.secret, "--mail-from", "news@" + fleet.Domain,
			"--mail-rcpt", b.to, "--upload-file", b.file(t, name)}, args...)...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	if out, err := command(t, curl, "-sS", "--cacert", b.ca, "--user", b.user+":wrong", "--mail-from", "news@"+fleet.Domain, "--mail-rcpt", b.to,
		"--upload-file", b.textFile, "smtps://"+net.JoinHostPort(b.host, b.tls)); err == nil || !strings.Contains(out, "535") && !strings.Contains(out, "denied") {
		t.Errorf("a wrong password: %v\n%s", err, out)
	}
	b.same(t, b.arrives(t, 3, "curl"))
}

func (b *clientBench) swaks(t *testing.T) {
	swaks := need(t, "swaks")
	for name, args := range map[string][]string{
		"swaks STARTTLS":  {"--tls", "--port", b.starttls, "--auth", "LOGIN"},
		"swaks TLS":       {"--tls-on-connect", "--port", b.tls, "--auth", "PLAIN"},
		"swaks pipelined": {"--tls", "--port", b.starttls, "--auth", "PLAIN", "--pipeline"},
	} {
		out, err := command(t, swaks, append([]string{"--server", b.host, "--from", "news@" + fleet.Domain, "--to", b.to, "--tls-ca-path", b.ca, "--tls-verify",
			"--auth-user", b.user, "--auth-password", b.secret, "--data", "@" + b.file(t, name)}, args...)...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	b.same(t, withoutLastLine(t, b.arrives(t, 3, "swaks")))
}

// withoutLastLine takes away the empty line that swaks adds to its data.
func withoutLastLine(t *testing.T, mails []peers.Mail) []peers.Mail {
	t.Helper()
	for i := range mails {
		body, added := bytes.CutSuffix(mails[i].Body, []byte("\r\n\r\n"))
		if !added {
			t.Errorf("no empty line ends %q", mails[i].Body)
		}
		mails[i].Body = append(bytes.Clone(body), "\r\n"...)
	}
	return mails
}

// python sends the text as it is, and one that smtplib writes with SMTPUTF8.
func (b *clientBench) python(t *testing.T) {
	script := `
import smtplib, ssl, sys
ca, host, starttls, tls, user, secret, sender, to, path = sys.argv[1:]
ctx = ssl.create_default_context(cafile=ca)
with smtplib.SMTP(host, int(starttls)) as s:
    s.starttls(context=ctx)
    s.login(user, secret)
    print(s.sendmail(sender, [to], open(path, "rb").read(), mail_options=["BODY=8BITMIME"], rcpt_options=["NOTIFY=FAILURE"]))
with smtplib.SMTP_SSL(host, int(tls), context=ctx) as s:
    s.login(user, secret)
    print(s.sendmail(sender, [to.replace("box", "bøx")], open(path, "rb").read(), mail_options=["SMTPUTF8", "BODY=8BITMIME"]))
`
	out, err := command(t, need(t, "python3"), "-c", script, b.ca, b.host, b.starttls, b.tls, b.user, b.secret, "news@"+fleet.Domain, b.to, b.file(t, "python"))
	if err != nil || out != "{}\n{}\n" {
		t.Fatalf("%v\n%s", err, out)
	}
	b.same(t, b.arrives(t, 2, "python"))
}

func (b *clientBench) nodemailer(t *testing.T) {
	out, err := command(t, need(t, "node"), filepath.Join("testdata", "nodemailer", "submit.js"), filepath.Join(peers.Folder(), "nodemailer", "node_modules"),
		b.ca, b.host, b.starttls, b.tls, b.user, b.secret, "news@"+fleet.Domain, b.to)
	if err != nil || strings.Count(out, "250 2.0.0") != 2 || strings.Count(out, "refused 550") != 2 {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, m := range b.arrives(t, 2, "nodemailer") {
		parts := leaves(t, m.Content)
		if len(parts) != 3 || !strings.HasSuffix(parts[0], ": Liebe Grüße\r\n.\r\n..\r\nfin\r\n") || !strings.HasSuffix(parts[1], ": <p>été</p>") || !strings.HasSuffix(parts[2], ": \x00\x01\r\n.\xff") {
			t.Errorf("it arrived as %q", parts)
		}
	}
}

// postfix lets a Postfix relay to us, as a customer's own server does.
func (b *clientBench) postfix(t *testing.T) {
	host := "mail." + fleet.Domain
	server, err := peers.PostfixClient(t.Context(), peers.Config{Dir: filepath.Join(t.TempDir(), "postfix"), Addr: b.fleet.PeerAddr(1), Host: host},
		peers.Relay{Addr: fmt.Sprintf("[%s]:%s", b.host, b.starttls), User: b.user, Password: b.secret})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	for i := range 3 {
		out, err := command(t, need(t, "swaks"), "--server", b.fleet.PeerAddr(1).String(), "--from", "news@"+fleet.Domain, "--to", b.to, "--ehlo", "app."+fleet.Domain,
			"--data", "@"+b.file(t, fmt.Sprintf("postfix %d", i)))
		if err != nil {
			t.Fatalf("%v\n%s\n%s", err, out, server.Log())
		}
	}
	b.same(t, withoutLastLine(t, b.arrives(t, 3, "postfix")))
}
