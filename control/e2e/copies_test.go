package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// get returns what a URL answers, empty if it does not.
func get(t *testing.T, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return ""
	}
	return string(text)
}

// TestCopiesAtEveryServer starts a copy of a relay's identity at each of three
// servers, one of which the original is linked to: all are refused, every server
// shows it in node list, node show and health, and the original works on. When
// it stops, a copy gets its place after half a minute and not before.
func TestCopiesAtEveryServer(t *testing.T) {
	f := startTrio(t, fleet.Config{Open: true})
	r := f.Relays[0]
	var copies []*fleet.Relay
	for _, s := range f.servers {
		dir := t.TempDir()
		if err := os.CopyFS(filepath.Join(dir, "identity"), os.DirFS(filepath.Join(r.Dir, "identity"))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, "identity", "node.key"), 0o600); err != nil {
			t.Fatal(err)
		}
		beside(t, f.Fleet, dir, s.Link())
		copies = append(copies, &fleet.Relay{Dir: dir})
	}
	for i, c := range copies {
		eventually(t, 30*time.Second, "the copy at "+f.servers[i].Name+" says that it is one", func() bool {
			s, err := statusOf(c)
			return err == nil && !s.Connected && strings.Contains(s.Problem, "copy")
		})
	}
	type row struct {
		nodeRow
		Clone *struct {
			Times int `json:"times"`
		} `json:"clone"`
	}
	for _, s := range f.servers {
		var n row
		eventually(t, 10*time.Second, s.Name+" shows the copies", func() bool {
			out, err := f.CtlAt(t.Context(), s, "node", "show", r.Node, "--json")
			n = row{}
			return err == nil && json.Unmarshal(out, &n) == nil && n.Clone != nil && n.Clone.Times > 0
		})
		if !n.Connected || n.State != "active" {
			t.Errorf("%s shows the original as %+v", s.Name, n)
		}
		if out, err := f.CtlAt(t.Context(), s, "node", "list"); err != nil || !strings.Contains(string(out), "active,copied") {
			t.Errorf("node list at %s: %v\n%s", s.Name, err, out)
		}
		eventually(t, 10*time.Second, s.Name+" warns in health", func() bool {
			return strings.Contains(get(t, s.Metrics()+"/health"), "two machines claim to be relay relay1")
		})
	}
	if s, err := statusOf(r); err != nil || !s.Connected {
		t.Errorf("the original lost its link: %+v, %v", s, err)
	}
	r.Kill()
	var last struct {
		Contact time.Time `json:"last_contact"`
	}
	if showNode(t, f.Fleet, r.Node, &last); last.Contact.IsZero() {
		t.Fatal("nobody says when the original was heard last")
	}
	// Half a minute of silence, and then up to 45 s until a copy that was refused several
	// times asks again (maxBackoff and jitter of relay/agent).
	eventually(t, 2*time.Minute, "a copy has the place", func() bool {
		for _, c := range copies {
			if s, err := statusOf(c); err == nil && s.Connected {
				return true
			}
		}
		return false
	})
	// The life of a lease counts from what the original said last (cloneSilence of
	// control/dispatch); its probes count too, and are not shown.
	if took := time.Since(last.Contact); took < 30*time.Second {
		t.Errorf("a copy had the place %v after the original's last word, while a lease could live", took)
	}
	// A server that gets no word of the leader in time lets a relay in, and the leader
	// ends one of two sessions when the servers have told it of them, every 2 s (admit
	// and presencePeriod of control/dispatch).
	eventually(t, time.Minute, "one copy alone is linked", func() bool {
		linked := 0
		for _, c := range copies {
			if s, err := statusOf(c); err == nil && s.Connected {
				linked++
			}
		}
		return linked == 1
	})
}
