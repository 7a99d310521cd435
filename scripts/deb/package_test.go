package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	controlconfig "github.com/relais-mta/relais/control/config"
	relayconfig "github.com/relais-mta/relais/relay/config"
)

func TestDebianVersion(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, tc := range []struct{ described, want string }{
		{"v1.2.3", "1.2.3"},
		{"v1.2.3-rc.1", "1.2.3~rc.1"},
		{"v1.2.3-rc.1-4-gabcdef0", "1.2.3~rc.1+4.gabcdef0"},
		{"v1.2.3-14-gabcdef0", "1.2.3+14.gabcdef0"},
		{"v1.2.3-14-gabcdef0-dirty", "1.2.3+14.gabcdef0+dirty20260301120000"},
		{"abcdef0", "0.0.0~20260301120000.gabcdef0"},
		{"abcdef0-dirty", "0.0.0~20260301120000.gabcdef0+dirty"},
	} {
		if got, err := debianVersion(tc.described, at); err != nil || got != tc.want {
			t.Errorf("debianVersion(%q) = %q, %v; want %q", tc.described, got, err, tc.want)
		}
	}
	for _, bad := range []string{"", "1.2.3", "v1.2", "release", "v1.2.3 ; rm"} {
		if v, err := debianVersion(bad, at); err == nil {
			t.Errorf("debianVersion(%q) = %q, want an error", bad, v)
		}
	}
}

// A line of a configuration file that is switched off.
var off = regexp.MustCompile(`(?m)^# (\[[a-z]+\]|[a-z_]+ = .*)$`)

// The shipped files change nothing as they are, and every line that can be
// switched on is one that the program understands, at its default.
func TestConfigurationFiles(t *testing.T) {
	for _, tc := range []struct {
		file  string
		parse func([]byte) (any, error)
		want  any
	}{
		{"relay.toml", func(text []byte) (any, error) { return relayconfig.Parse(text) }, relayconfig.Default()},
		{"control.toml", func(text []byte) (any, error) { return controlconfig.Parse(text) }, controlconfig.Default()},
	} {
		text, err := os.ReadFile(filepath.Join("files", tc.file))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := tc.parse(text); err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s as shipped is not the default: %+v, %v", tc.file, got, err)
		}
		on := off.ReplaceAll(text, []byte("$1"))
		got, err := tc.parse(on)
		if err != nil {
			t.Errorf("%s with every line switched on: %v", tc.file, err)
			continue
		}
		for _, key := range keys(reflect.TypeOf(got)) {
			if !regexp.MustCompile(`(?m)^(# )?`+regexp.QuoteMeta(key)+` = `).Match(text) && !strings.Contains(string(text), "["+key+"]") {
				t.Errorf("scripts/deb/files/%s does not mention %s: add it with its default", tc.file, key)
			}
		}
	}
}

// keys are the names of the fields of a configuration, those of its sections included.
func keys(t reflect.Type) []string {
	var out []string
	for i := range t.NumField() {
		f := t.Field(i)
		key, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		if key == "" {
			continue
		}
		out = append(out, key)
		if f.Type.Kind() == reflect.Struct {
			out = append(out, keys(f.Type)...)
		}
	}
	return out
}

// The unit, the scripts and the program must mean the same files.
func TestUnitsFitThePackages(t *testing.T) {
	for i := range products {
		p := &products[i]
		text, err := os.ReadFile(filepath.Join("..", "systemd", p.unit()))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"ExecStart=/usr/bin/" + p.name + " serve --data " + p.state() + " --config /etc/relais/" + p.side + ".toml\n",
			"StateDirectory=relais/" + p.side + "\n",
			"ConditionPathExists=" + p.state() + "/",
			"ExecStartPre=+/usr/bin/chown -R -h --from=root relais:relais " + p.state() + "\n",
			"\nUser=relais\n", "\nType=notify\n", "\nWatchdogSec=",
		} {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s has no %q", p.unit(), want)
			}
		}
		for _, script := range append([]string{"postinst", "prerm", "postrm"}, p.scripts...) {
			text, err := os.ReadFile(filepath.Join("files", script))
			if err != nil {
				t.Fatal(err)
			}
			if filled := p.fill(string(text)); strings.Contains(filled, "@") || !strings.Contains(filled, p.unit()) && !strings.Contains(filled, p.state()) {
				t.Errorf("%s of %s is not filled in:\n%s", script, p.name, filled)
			}
		}
	}
}
