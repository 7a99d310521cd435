package sign

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// peerMessages are what the other verifiers are asked about.
var peerMessages = map[string]string{
	"plain":      plainMessage,
	"empty body": "From: a@example.com\r\n\r\n",
	"folded":     "From: a@example.com\r\nTo: b@example.net,\r\n c@example.net\r\nTo: d@example.net\r\nSubject:\r\n\tlater\r\nCFBL-Address: fbl@example.com; report=arf\r\n\r\nx  \r\n\r\n\t y\r\n\r\n",
	"8-bit":      "From: a@example.com\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\nSubject: x\r\n\r\ncaf\xc3\xa9 \r\n..\r\n",
	"long":       "From: a@example.com\r\nSubject: x\r\n\r\n" + strings.Repeat(strings.Repeat("0123456789", 90)+"\r\n", 200),
}

// opendkim must find the RSA signature good, and bad once the body is touched.
func TestOpenDKIMVerifies(t *testing.T) {
	s, records := twoKeys(t)
	dir := t.TempDir()
	var data strings.Builder
	for name, text := range records {
		fmt.Fprintf(&data, "%s %s\n", name, text)
	}
	keys, conf := filepath.Join(dir, "dns"), filepath.Join(dir, "opendkim.conf")
	write(t, keys, data.String())
	write(t, conf, "TestDNSData file:"+keys+"\nMode v\n")
	ask := func(t *testing.T, message []byte) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "mail")
		write(t, path, string(message))
		out, _ := exec.CommandContext(t.Context(), "opendkim", "-x", conf, "-t", path, "-vv").CombinedOutput() // the verdict is in the text
		return string(out)
	}
	for name, message := range peerMessages {
		t.Run(name, func(t *testing.T) {
			signed := signMessage(t, s, []byte(message))
			if out := ask(t, signed); !strings.Contains(out, "verification (s=r1") || !strings.Contains(out, "succeeded") {
				t.Errorf("opendkim says %s", out)
			}
			if out := ask(t, append(signed, "more\r\n"...)); strings.Contains(out, "succeeded") {
				t.Errorf("opendkim takes a longer body: %s", out)
			}
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// verifyScript prints which of the first two signatures of a message verify.
const verifyScript = `
import sys, dkim
records = dict(line.split(' ', 1) for line in open(sys.argv[1]).read().splitlines())
def lookup(name, timeout=5):
    return records.get(name.decode().rstrip('.'), '').encode() or None
for path in sys.argv[2:]:
    d = dkim.DKIM(open(path, 'rb').read(), minkey=1024)
    for i in range(2):
        try:
            print(d.verify(idx=i, dnsfunc=lookup), d.signature_fields[b'a'].decode())
        except dkim.DKIMException as e:
            print('refused', e)
`

// dkimpy and libsodium must find both signatures good.
func TestDkimpyVerifies(t *testing.T) {
	s, records := twoKeys(t)
	dir := t.TempDir()
	var data strings.Builder
	for name, text := range records {
		fmt.Fprintf(&data, "%s %s\n", name, text)
	}
	args := []string{"-c", verifyScript, filepath.Join(dir, "dns")}
	write(t, args[2], data.String())
	want := ""
	for name, message := range peerMessages {
		message = strings.Replace(message, "content-type :", "Content-Type:", 1) // dkimpy does not read RFC 5322 section 4.5
		signed := signMessage(t, s, []byte(message))
		for suffix, text := range map[string]string{"good": string(signed), "touched": string(signed) + "more\r\n"} {
			path := filepath.Join(dir, name+" "+suffix)
			write(t, path, text)
			args = append(args, path)
			if suffix == "good" {
				want += "True rsa-sha256\nTrue ed25519-sha256\n"
			} else {
				want += "refused\nrefused\n"
			}
		}
	}
	// Debian's interpreter, which has Debian's modules.
	out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := strings.Split(strings.TrimSpace(string(out)), "\n")
	for i, line := range strings.Split(strings.TrimSpace(want), "\n") {
		if i >= len(got) || !strings.HasPrefix(got[i], line) {
			t.Fatalf("line %d is not %q in\n%s", i, line, out)
		}
	}
}
