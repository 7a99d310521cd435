package lab

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emersion/go-msgauth/dkim"
)

// signingKey publishes a new key as s1 of sender.test.
func signingKey(t testing.TB, l *Lab) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	encoded := base64.StdEncoding.EncodeToString(pub)
	if err := l.AddRecords(fmt.Sprintf("s1._domainkey.sender.test. IN TXT \"v=DKIM1; k=rsa; p=\" %q %q", encoded[:200], encoded[200:])); err != nil {
		t.Fatal(err)
	}
	return key
}

// signedMessage returns a message whose signature verifies in l.
func signedMessage(t testing.TB, l *Lab, id, body string) string {
	t.Helper()
	var signed bytes.Buffer
	options := &dkim.SignOptions{Domain: "sender.test", Selector: "s1", Signer: signingKey(t, l)}
	if err := dkim.Sign(&signed, strings.NewReader(message(id)+body), options); err != nil {
		t.Fatal(err)
	}
	return signed.String()
}

func TestDKIMVerdicts(t *testing.T) {
	l := startLab(t, nil)
	signed := signedMessage(t, l, "signed@x", "")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	var keyless bytes.Buffer
	err = dkim.Sign(&keyless, strings.NewReader(message("keyless@x")), &dkim.SignOptions{Domain: "sender.test", Selector: "unknown", Signer: key})
	if err != nil {
		t.Fatal(err)
	}
	mails := []struct {
		content string
		want    Verdict
	}{
		{signed, VerdictPass},
		{strings.Replace(signed, "Body.", "Changed.", 1), VerdictFail},
		{strings.Replace(signed, "Subject: hello", "Subject: other", 1), VerdictFail},
		{keyless.String(), VerdictFail},
		{message("unsigned@x"), VerdictNone},
	}
	c := dial(t, l.mxAddr(t, Google), "127.0.0.7").hello()
	for _, m := range mails {
		if r := c.mail("a@sender.test", "accept-1@gmail.test", m.content); !strings.HasPrefix(r, "250") {
			t.Fatal(r)
		}
	}
	r := await(t, l, "verdicts", func(r Report) bool { return r.DKIM.Complete })
	if r.DKIM.Pass != 1 || r.DKIM.Fail != 3 || r.DKIM.None != 1 {
		t.Errorf("%+v", r.DKIM)
	}
	i := 0
	for m, err := range l.Mails(Google) {
		if err != nil {
			t.Fatal(err)
		}
		if m.DKIM != mails[i].want || m.DKIM != VerdictNone && m.DKIMDomain != "sender.test" {
			t.Errorf("mail %d: %s by %q, want %s", i, m.DKIM, m.DKIMDomain, mails[i].want)
		}
		i++
	}
	if i != len(mails) {
		t.Errorf("%d mails, want %d", i, len(mails))
	}
	lines, err := os.ReadFile(filepath.Join(l.cfg.Dir, "dkim.jsonl"))
	if err != nil || bytes.Count(lines, []byte("\n")) != len(mails) {
		t.Errorf("dkim.jsonl: %v\n%s", err, lines)
	}
}

func TestReportOverHTTP(t *testing.T) {
	l := startLab(t, func(c *Config) { c.HTTPAddr = "127.0.0.1:0" })
	c := dial(t, l.mxAddr(t, Orange), "127.0.0.7").hello()
	for range 3 {
		c.mail("", "accept-1@orange.test", message("same@x"))
	}
	c.mail("a@sender.test", "accept-1@orange.test", "no header\r\n")
	fetch := func(path string, into any) string {
		t.Helper()
		resp, err := http.Get("http://" + l.HTTPAddr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }() // nothing is lost by it
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if into != nil {
			if err := json.Unmarshal(body, into); err != nil {
				t.Fatalf("%s: %v\n%s", path, err, body)
			}
		}
		return resp.Status + "\n" + string(body)
	}
	var r Report
	fetch("/report", &r)
	if r.Accepted != 4 || r.Duplicated != 2 || r.DuplicatedExcused != 0 || r.NullSender != 3 || r.WithoutMessageID != 1 || len(r.Lanes) != 1 {
		t.Errorf("%+v", r)
	}
	lane := r.Lanes[0]
	if lane.Source.String() != "127.0.0.7" || lane.Provider != Orange || lane.MaxPerConnection != 4 || lane.Hello[0] != "out.sender.test" {
		t.Errorf("%+v", lane)
	}
	var a []Arrivals
	fetch("/arrivals", &a)
	sum, peak := uint32(0), uint32(0)
	for _, n := range a[0].PerSecond {
		sum += n
		peak = max(peak, n)
	}
	if sum != 4 || peak != lane.PeakPerSecond {
		t.Errorf("arrivals %+v, peak %d", a, lane.PeakPerSecond)
	}
	var p []ProviderInfo
	fetch("/providers", &p)
	if len(p) < 10 || p[0].Name != Google {
		t.Errorf("providers %+v", p)
	}
	var m Mail
	if err := json.Unmarshal([]byte(strings.Split(fetch("/mails?provider=orange&from=2", nil), "\n")[1]), &m); err != nil || m.ID != 2 || m.MessageID != "<same@x>" {
		t.Errorf("mail %+v: %v", m, err)
	}
	if got := fetch("/mail?provider=orange&id=2", nil); !strings.HasSuffix(got, message("same@x")) {
		t.Errorf("message %q", got)
	}
	for _, bad := range []string{"/mail?provider=orange&id=9", "/mail?provider=x&id=0", "/mails?provider=x"} {
		if got := fetch(bad, nil); !strings.HasPrefix(got, "404") {
			t.Errorf("%s: %s", bad, got)
		}
	}
}

func TestHostDomain(t *testing.T) {
	l := startLab(t, nil)
	if err := l.HostDomain("mx:boutique-00.test", "Client.Example"); err != nil {
		t.Fatal(err)
	}
	c := dial(t, l.mxAddr(t, "mx:boutique-00.test"), "127.0.0.7").hello()
	if r := c.mail("", "someone@client.example", message("dsn@x")); !strings.HasPrefix(r, "250") {
		t.Fatal(r)
	}
	if l.Report().NullSender != 1 {
		t.Error("the null sender was not counted")
	}
}

func TestStartRefusesBadConfig(t *testing.T) {
	good := startLab(t, nil)
	for name, change := range map[string]func(*Config){
		"Dir":     func(c *Config) { c.Dir = "" },
		"earlier": func(c *Config) { c.Dir = good.cfg.Dir },
		"Mode":    func(c *Config) { c.Mode = "fast" },
		"Small":   func(c *Config) { c.Small = 1000 },
		"TTL":     func(c *Config) { c.TTL = 1 },
		"Logger":  func(c *Config) { c.Logger = nil },
		"address": func(c *Config) {
			c.FarmPrefix = good.cfg.FarmPrefix.Masked()
			c.FarmAddrs = nil
			c.SMTPPort = good.SMTPPort()
		},
		"records":    func(c *Config) { c.Zones = []Zone{{Records: []string{"x IN A y"}}} },
		"negative":   tuned(Google, func(p *Profile) { p.Limits.Connections = -1 }),
		"deferral":   tuned(Google, func(p *Profile) { p.DeferShare = 2 }),
		"no domains": tuned(Google, func(p *Profile) { p.Domains = nil }),
	} {
		cfg := good.cfg
		cfg.Dir = t.TempDir()
		change(&cfg)
		if l, err := Start(t.Context(), cfg); err == nil {
			t.Errorf("%s: started", name)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		} else if !strings.HasPrefix(err.Error(), "lab: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
