package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lab/peers"
)

// outgoing is a mail that a test submits, byte by byte as it says.
type outgoing struct {
	name string // in the field X-Case, by which it is found again
	body string // the parameter BODY of MAIL, "" for none
	utf8 bool   // with the parameter SMTPUTF8
	bdat int    // sent by BDAT in chunks of this size, 0 for DATA
	to   []string
	text []byte // header section and body
}

// letter makes a mail with what every mail needs. header is further fields,
// each ended by CRLF.
func letter(name, header, body string) outgoing {
	text := "From: News <news@" + fleet.Domain + ">\r\nTo: undisclosed-recipients:;\r\nSubject: " + name + "\r\nDate: Sun, 22 Nov 2026 10:00:00 +0000\r\nMessage-ID: <" +
		strings.ReplaceAll(name, " ", "-") + "@" + fleet.Domain + ">\r\nX-Case: " + name + "\r\n" + header + "\r\n" + body
	return outgoing{name: name, text: []byte(text)}
}

// content is what stands behind the header section.
func (m *outgoing) content() []byte {
	_, body, _ := bytes.Cut(m.text, []byte("\r\n\r\n"))
	return body
}

// startSigning brings up a fleet whose relays sign with keys of both kinds, and
// put fields for feedback in front, which the signatures cover.
func startSigning(t *testing.T) *fleet.Fleet {
	t.Helper()
	f := start(t, fleet.Config{Open: true, Policy: map[string]string{"delivery": `connect_timeout = "3s"
greeting_timeout = "10s"
host_backoff = "1s"
min_dns_ttl = "1s"
idle_session = "3s"
sign_dkim = true
dkim_publish_hold = "0s"
`, "feedback": `[[rule]]
domain = "*"
stream = "*"
feedback_id = "{tag}:{stream}:{tenant}:examplecorp"
cfbl = "return-path"
`}})
	eventually(t, keyLooked, "both kinds of keys sign", func() bool {
		var domain struct {
			Keys []struct {
				Algorithm string `json:"algorithm"`
				State     string `json:"state"`
			} `json:"keys"`
		}
		out, err := f.Ctl(t.Context(), "domain", "show", fleet.Domain, "--json")
		if err != nil || json.Unmarshal(out, &domain) != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		kinds := make(map[string]bool)
		for _, k := range domain.Keys {
			kinds[k.Algorithm] = kinds[k.Algorithm] || k.State == "signing"
		}
		return kinds["rsa-sha256"] && kinds["ed25519-sha256"]
	})
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
	return f
}

// submitter opens an authenticated session.
func submitter(t *testing.T, f *fleet.Fleet) *client {
	t.Helper()
	c := dial(t, f.Relays[0].Submission())
	c.startTLS(f.ClientTLS(f.Relays[0]))
	c.cmd("EHLO client.test", "250")
	c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
	return c
}

// offer submits a mail and returns the reply that decided.
func (c *client) offer(m *outgoing) string {
	c.t.Helper()
	mail := "MAIL FROM:<news@" + fleet.Domain + ">"
	if m.body != "" {
		mail += " BODY=" + m.body
	}
	if m.utf8 {
		mail += " SMTPUTF8"
	}
	c.cmd(mail, "250")
	for _, to := range m.to {
		c.cmd("RCPT TO:<"+to+">", "250")
	}
	if m.bdat > 0 {
		return c.offerChunks(m)
	}
	c.cmd("DATA", "354")
	text := bytes.ReplaceAll(m.text, []byte("\r\n."), []byte("\r\n.."))
	if bytes.HasPrefix(text, []byte(".")) {
		text = append([]byte("."), text...)
	}
	if !bytes.HasSuffix(text, []byte("\r\n")) {
		text = append(text, "\r\n"...)
	}
	c.send(string(text) + ".\r\n")
	return c.reply()
}

func (c *client) offerChunks(m *outgoing) string {
	c.t.Helper()
	for rest := m.text; ; {
		n := min(m.bdat, len(rest))
		last := ""
		if n == len(rest) {
			last = " LAST"
		}
		c.send(fmt.Sprintf("BDAT %d%s\r\n%s", n, last, rest[:n]))
		reply := c.reply()
		if last != "" || !strings.HasPrefix(reply, "250") {
			return reply
		}
		rest = rest[n:]
	}
}

// signatures is what independent verifiers said of the mails of a test.
type signatures struct {
	t     *testing.T
	dir   string
	files []string
}

func newSignatures(t *testing.T) *signatures { return &signatures{t: t, dir: t.TempDir()} }

// add keeps a mail as it arrived, to be verified.
func (s *signatures) add(m *peers.Mail) {
	s.t.Helper()
	path := filepath.Join(s.dir, fmt.Sprintf("%03d.eml", len(s.files)))
	if err := os.WriteFile(path, m.Content, 0o644); err != nil {
		s.t.Fatal(err)
	}
	s.files = append(s.files, path)
}

// verifyScript checks every signature with dkimpy, and PyNaCl for Ed25519.
const verifyScript = `
import dkim, json, re, sys
records = json.load(open(sys.argv[1]))
def dnsfunc(name, timeout=5):
    return records.get(name.decode() if isinstance(name, bytes) else name, "").encode() or None
for path in open(sys.argv[2]).read().split():
    message = open(path, "rb").read()
    d = dkim.DKIM(message)
    found = [v for k, v in d.headers if k.lower() == b"dkim-signature"]
    result = []
    for i, v in enumerate(found):
        algorithm = re.search(rb"a=([a-z0-9-]+)", v).group(1).decode()
        try:
            ok = dkim.DKIM(message).verify(idx=i, dnsfunc=dnsfunc)
        except Exception as e:
            ok = str(e)
        result.append("%s=%s" % (algorithm, ok))
    print(path, " ".join(result))
`

// check lets opendkim and dkimpy verify all kept mails. Both read the keys that
// the domain's owner was told to publish.
func (s *signatures) check(f *fleet.Fleet) {
	s.t.Helper()
	keys := s.keys(f)
	encoded, err := json.Marshal(keys)
	if err != nil {
		s.t.Fatal(err)
	}
	table := ""
	for name, text := range keys {
		table += strings.TrimSuffix(name, ".") + " " + text + "\n"
	}
	for name, text := range map[string]string{
		"keys.json": string(encoded), "keys.txt": table, "verify.py": verifyScript, "list": strings.Join(s.files, "\n"),
		"opendkim.conf": "Mode v\nTestDNSData file:" + filepath.Join(s.dir, "keys.txt") + "\nMinimumKeyBits 1024\n",
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	s.checkPython()
	s.checkOpenDKIM()
}

// keys returns the TXT records of the domain's keys by absolute name.
func (s *signatures) keys(f *fleet.Fleet) map[string]string {
	s.t.Helper()
	out, err := f.Ctl(s.t.Context(), "domain", "show", fleet.Domain, "--json")
	if err != nil {
		s.t.Fatal(err)
	}
	var domain struct {
		Records []struct {
			Zone string `json:"zone"`
		} `json:"records"`
	}
	if err := json.Unmarshal(out, &domain); err != nil {
		s.t.Fatal(err)
	}
	keys := make(map[string]string)
	for _, r := range domain.Records {
		rr, err := dns.NewRR(r.Zone)
		if err != nil {
			s.t.Fatal(err)
		}
		if txt, ok := rr.(*dns.TXT); ok && strings.Contains(rr.Header().Name, "._domainkey.") {
			keys[rr.Header().Name] = strings.Join(txt.Txt, "")
		}
	}
	if len(keys) == 0 {
		s.t.Fatalf("no key is published: %s", out)
	}
	return keys
}

func (s *signatures) checkPython() {
	s.t.Helper()
	// Debian's own interpreter has Debian's modules.
	out, err := command(s.t, "/usr/bin/python3", filepath.Join(s.dir, "verify.py"), filepath.Join(s.dir, "keys.json"), filepath.Join(s.dir, "list"))
	if err != nil {
		s.t.Fatalf("dkimpy: %v\n%s", err, out)
	}
	good := 0
	for line := range strings.Lines(out) {
		results := strings.Fields(line)[1:]
		if slices.Sort(results); slices.Equal(results, []string{"ed25519-sha256=True", "rsa-sha256=True"}) {
			good++
		} else {
			s.t.Logf("dkimpy: %s", line)
		}
	}
	if good != len(s.files) {
		s.t.Errorf("dkimpy: %d of %d mails have a good signature of each kind", good, len(s.files))
	}
	s.t.Logf("dkimpy: %d mails with a good signature of each kind", good)
}

// checkOpenDKIM lets opendkim verify. It knows RSA only, and passes over the
// other signature.
func (s *signatures) checkOpenDKIM() {
	s.t.Helper()
	good := s.openDKIM(s.files)
	if good != len(s.files) {
		s.t.Errorf("opendkim: %d of %d mails have a good RSA signature", good, len(s.files))
	}
	// What it says must depend on the mail.
	text, err := os.ReadFile(s.files[0])
	if err != nil {
		s.t.Fatal(err)
	}
	forged := filepath.Join(s.dir, "forged.eml")
	if err := os.WriteFile(forged, append(text, "more\r\n"...), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if s.openDKIM([]string{forged}) != 0 {
		s.t.Error("opendkim finds the signature of a mail good to which a line was added")
	}
}

// openDKIM counts the mails whose signature it finds good.
func (s *signatures) openDKIM(files []string) (good int) {
	s.t.Helper()
	program := need(s.t, "opendkim")
	const batch = 20
	for files := range slices.Chunk(files, batch) {
		// Its exit code says only how the last one was.
		out, _ := exec.CommandContext(within(s.t, time.Minute), program, "-x", filepath.Join(s.dir, "opendkim.conf"), "-v", "-t", strings.Join(files, ",")).CombinedOutput()
		n := 0
		for _, file := range files {
			for line := range strings.Lines(string(out)) {
				if strings.Contains(line, file+": verification (s=") && strings.Contains(line, ") succeeded") {
					n++
				}
			}
		}
		if good += n; n != len(files) {
			s.t.Logf("opendkim: %.2000s", out)
		}
	}
	return good
}
