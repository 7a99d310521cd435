package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

func TestParse(t *testing.T) {
	c, err := Parse([]byte("[listen]\nhttps = \"127.0.0.1:1\"\n[log]\nlevel = \"debug\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen.HTTPS.String() != "127.0.0.1:1" || c.Log.Level != "debug" || c.Listen.Link.Port() != 7443 {
		t.Errorf("got %+v", c)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ text, field, public string }{
		"unknown key":           {"[listen]\nhttp = \"127.0.0.1:1\"\n", "listen.http", "line 2"},
		"unknown section":       {"[lissten]\nhttps = \"127.0.0.1:1\"\n", "lissten", "line 1"},
		"bad address":           {"[listen]\nhttps = \"here\"\n", "listen.https", "line 2"},
		"half a certificate":    {"[tls]\ncert = \"a.pem\"\n", "tls", "both or none"},
		"level":                 {"[log]\nlevel = \"loud\"\n", "log.level", "debug, info"},
		"open metrics":          {"[listen]\nmetrics = \"0.0.0.0:9091\"\n", "listen.metrics", "loopback"},
		"two on one port":       {"[listen]\nhttps = \"127.0.0.1:7\"\nraft = \"127.0.0.1:7\"\n", "listen.raft", "listen.https"},
		"not TOML":              {"[[[", "", "line 1"},
		"value of a wrong kind": {"[log]\nlevel = 3\n", "log.level", "line 2"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(tc.text))
			if !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), tc.public) {
				t.Fatalf("got %v, want an error with %q", err, tc.public)
			}
			if !strings.Contains(fault.Public(err), tc.field) {
				t.Errorf("got %v, want it to name %q", err, tc.field)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if c, err := Load("", dir); err != nil || !reflect.DeepEqual(c, Default()) {
		t.Fatalf("without a file: %+v, %v", c, err)
	}
	if _, err := Load(filepath.Join(dir, "none.toml"), dir); !strings.Contains(fault.Public(err), "none.toml") {
		t.Errorf("a named file that is missing: %v", err)
	}
	path := filepath.Join(dir, "control.toml")
	if err := os.WriteFile(path, []byte("[log]\nlevel = \"warn\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := Load("", dir); err != nil || c.Log.Level != "warn" {
		t.Errorf("with a file: %+v, %v", c, err)
	}
	if err := os.WriteFile(path, []byte("[log]\nlevle = \"warn\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load("", dir); !strings.Contains(fault.Public(err), path) || !strings.Contains(fault.Public(err), "log.levle") {
		t.Errorf("an unknown key: %v", err)
	}
}
