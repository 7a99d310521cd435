package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestRelayThatCannotApply takes away the place where a relay keeps its policy:
// it refuses the next one, because it could not keep it through a restart, works
// on with the last good one, and is named. Given the place back it applies the
// next.
func TestRelayThatCannotApply(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	r := f.Relays[1]
	view := filepath.Join(r.Dir, "view")
	mount := func(args ...string) {
		t.Helper()
		out, err := "", error(nil)
		defer func() {
			if err != nil {
				t.Logf("%v: %v\n%s", args, err, out)
			}
		}()
		// The relay may be writing there: the place is busy until that is on disk.
		eventually(t, time.Minute, args[0], func() bool {
			out, err = command(t, need(t, args[0]), args[1:]...)
			return err == nil
		})
	}
	mount("mount", "--bind", view, view)
	mounted := true
	unmount := func() {
		if mounted {
			mount("umount", view)
			mounted = false
		}
	}
	defer unmount()
	mount("mount", "-o", "remount,ro,bind", view)
	before := nodeRevision(t, f, r.Node)
	path := writePolicy(t, "queue", "retry_jitter_percent = 11\n")
	out, err := f.Ctl(t.Context(), "policy", "put", path)
	if err == nil || !strings.Contains(string(out), "applied by 1 of 2 relays") || !strings.Contains(err.Error(), "keeps its last good one") {
		t.Errorf("put said %v\n%s", err, out)
	}
	text, err := f.Ctl(t.Context(), "policy", "status")
	if err == nil || !strings.Contains(string(text), "applied by 1 of 2 relays") || !strings.Contains(string(text), "refuses it and keeps its last good one: ") {
		t.Errorf("status says %v\n%s", err, text)
	}
	t.Logf("policy status:\n%s", text)
	var row struct {
		nodeRow
		Refused uint64 `json:"refused_revision"`
		Why     string `json:"refused_why"`
	}
	showNode(t, f, r.Node, &row)
	if !row.Connected || row.Refused <= before || row.Why == "" || nodeRevision(t, f, r.Node) != before {
		t.Errorf("the relay is shown as %+v, it worked with %d", row, before)
	}
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 40), Size: 2000, Connections: 4, Tag: "refused"})
	if err != nil {
		t.Fatal(err)
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
	unmount()
	if out := ctl(t, f, "policy", "put", writePolicy(t, "queue", "retry_jitter_percent = 12\n")); !strings.Contains(out, "applied by 2 of 2 relays") {
		t.Errorf("with the place back, put said\n%s", out)
	}
	if out := ctl(t, f, "policy", "status"); !strings.Contains(out, "applied by 2 of 2 relays") {
		t.Errorf("status says\n%s", out)
	}
}

// nodeRevision is what a relay works with.
func nodeRevision(t *testing.T, f *fleet.Fleet, node string) uint64 {
	t.Helper()
	var row struct {
		Acked uint64 `json:"acked_revision"`
	}
	out := ctl(t, f, "node", "show", node, "--json")
	if err := json.Unmarshal([]byte(out), &row); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return row.Acked
}

// writePolicy writes one section where policy put reads it.
func writePolicy(t *testing.T, section, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), section+".toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
