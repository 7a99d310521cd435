package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

func TestParse(t *testing.T) {
	c, err := Parse([]byte("[listen]\nsubmission = [\"127.0.0.1:1587\"]\n[lab]\nsmtp_port = 2525\nallow_private = true\nclear_submission = true\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen.Submission[0].Port() != 1587 || c.Lab.SMTPPort != 2525 || !c.Lab.AllowPrivate || !c.Lab.ClearSubmission {
		t.Errorf("got %+v", c)
	}
	if len(c.Listen.Inbound) != 1 || c.Listen.Inbound[0].Port() != 25 {
		t.Error("a listener that the file does not name lost its default")
	}
}

// No server is trusted to validate DNSSEC when the file says so; without a word
// in the file, the resolver decides.
func TestValidatingResolvers(t *testing.T) {
	for text, want := range map[string]string{
		"":                       "[] true",
		"[dns]\nvalidating = []": "[] false",
		"[dns]\nresolvers = [\"192.0.2.53:53\"]\nvalidating = [\"192.0.2.53:53\"]": "[192.0.2.53:53] false",
	} {
		c, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(c.DNS.Validating, c.DNS.Validating == nil); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

func TestParseNamesTheKeyAndTheLine(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"[listen]\nsubmision = []\n", "listen.submision"},
		{"[listen]\nsubmision = []\n", "line 2"},
		{"x = 1", "x"},
		{"[listen]\nmetrics = \"0.0.0.0:9090\"", "listen.metrics"},
		{"[listen]\nsubmission = [\"nonsense\"]", "line 2"},
		{"[tls]\ncert = \"a.pem\"", "both"},
		{"[log]\nlevel = \"loud\"", "log.level"},
		{"[listen]\nsubmission = [\"127.0.0.1:25\"]\ninbound = [\"127.0.0.1:25\"]", "listen.inbound"},
		{"[[[", "line 1"},
		{"[listen]\nproxies = [\"10.0.0.0/24\", \"0.0.0.0/0\"]", "listen.proxies[1]"},
		{"[listen]\nproxies = [\"10.0.0.1/24\"]", "listen.proxies[0]"},
		{"[listen]\nsubmission = [\"127.0.0.1:7445\"]\nhandover = [\"127.0.0.1:7445\"]", "listen.handover"},
		{"[listen]\nhandover_advertise = \"edge-1\"", "listen.handover_advertise"},
		{"[listen]\nhandover_advertise = \":7445\"", "listen.handover_advertise"},
		{"[listen]\nhandover_advertise = \"edge-1:0\"", "listen.handover_advertise"},
	} {
		_, err := Parse([]byte(tc.text))
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Parse(%q) = %v, want a fault naming %q", tc.text, err, tc.want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load("", dir); err != nil {
		t.Errorf("no file: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "gone.toml"), dir); err == nil {
		t.Error("a named file that is missing must be an error")
	}
	path := filepath.Join(dir, "relay.toml")
	if err := os.WriteFile(path, []byte("y = 2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load("", dir); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("the error does not name the file: %v", err)
	}
}
