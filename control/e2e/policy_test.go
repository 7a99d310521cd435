package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// ctl runs a command that must succeed and returns its standard output.
func ctl(t *testing.T, f *fleet.Fleet, args ...string) string {
	t.Helper()
	out, err := f.Ctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// refusedCtl runs a command that must fail and say why.
func refusedCtl(t *testing.T, f *fleet.Fleet, want string, args ...string) {
	t.Helper()
	out, err := f.Ctl(t.Context(), args...)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v: got %v, want it to say %q\n%s", args, err, want, out)
	}
}

// TestPolicyIsAppliedAndRolledBack changes the policy of two relays and goes
// back, by the documented commands.
func TestPolicyIsAppliedAndRolledBack(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2})
	var versions []struct {
		Revision uint64 `json:"revision"`
	}
	if err := json.Unmarshal([]byte(ctl(t, f, "policy", "history", "--json")), &versions); err != nil || len(versions) == 0 {
		t.Fatalf("got %v, %v", versions, err)
	}
	before := ctl(t, f, "policy", "get", "providers")
	path := filepath.Join(t.TempDir(), "providers.toml")
	// What is in force stays, or the preview would be about that.
	inForce := strings.SplitN(before, "\n", 2)[1]
	if err := os.WriteFile(path, []byte(inForce+"\n[[limit]]\nprovider = \"orange\"\nkind = \"connections\"\nscope = \"source\"\nmax = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := ctl(t, f, "policy", "put", "--dry-run", path); !strings.Contains(out, "orange on 2 sources") || !strings.Contains(out, `+ providers.limit["orange/connections/source"].max = 1`) {
		t.Errorf("the preview is\n%s", out)
	}
	if out := ctl(t, f, "policy", "put", path); !strings.Contains(out, "applied by 2 of 2 relays") {
		t.Errorf("put said\n%s", out)
	}
	if out := ctl(t, f, "policy", "rollback", "--reason", "drill", uintText(versions[0].Revision)); !strings.Contains(out, "applied by 2 of 2 relays") {
		t.Errorf("rollback said\n%s", out)
	}
	if after := ctl(t, f, "policy", "get", "providers"); strings.SplitN(after, "\n", 2)[1] != strings.SplitN(before, "\n", 2)[1] {
		t.Errorf("the rollback left\n%s", after)
	}
	// The leader may have done much by itself since: begun a day of warm-up, found
	// what DNS says of domain, keys and addresses.
	if out := ctl(t, f, "audit", "--limit", "200"); !strings.Contains(out, "drill") {
		t.Errorf("the audit tail says\n%s", out)
	}
}

func uintText(n uint64) string {
	b, _ := json.Marshal(n) // a number always has a form
	return string(b)
}

// TestDNSDecides takes DNS records away: the domain is not ready any more, and
// a new address is used only when an operator says so.
func TestDNSDecides(t *testing.T) {
	f := start(t, fleet.Config{})
	ctl(t, f, "domain", "check", fleet.Domain)
	f.Lab.RemoveRecords("_relais."+fleet.Domain, dns.TypeTXT)
	refusedCtl(t, f, "not ready", "domain", "check", fleet.Domain)
	node := f.Relays[0].Node
	ctl(t, f, "ip", "add", "127.30.0.1", "--ehlo", "mta9.relais.test", "--pool", "default", "--node", node)
	usable := func() bool {
		var ips []struct {
			Bind   string `json:"bind"`
			Usable bool   `json:"usable"`
		}
		if err := json.Unmarshal([]byte(ctl(t, f, "ip", "list", "--json")), &ips); err != nil {
			t.Fatal(err)
		}
		for _, ip := range ips {
			if ip.Bind == "127.30.0.1" {
				return ip.Usable
			}
		}
		t.Fatal("the address is not listed")
		return false
	}
	if out := ctl(t, f, "ip", "check", "127.30.0.1"); !strings.Contains(out, "no PTR record") || usable() {
		t.Errorf("the check said\n%s", out)
	}
	ctl(t, f, "ip", "override", "127.30.0.1", "--reason", "ticket 4711")
	if !usable() {
		t.Error("the override has no effect")
	}
	ctl(t, f, "node", "drain", node, "--wait", "30s")
	if out := ctl(t, f, "node", "show", node); !strings.Contains(out, "drain") {
		t.Errorf("the node is shown as\n%s", out)
	}
	if ready := get(t, f.Relays[0].Metrics()+"/readyz"); !strings.Contains(ready, "not ready: the relay drains") {
		t.Errorf("readyz says %q", ready)
	}
	ctl(t, f, "node", "undrain", node)
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
}
