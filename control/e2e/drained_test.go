package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestRelayDrains drains a relay with mail in its queue: it takes no more, what
// it has goes out, and without an address it is shown as drained. Let back, it
// takes mail again.
func TestRelayDrains(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true, NoHandover: true})
	r, other := f.Relays[0], f.Relays[1]
	behave := func(b lab.Behaviour) {
		t.Helper()
		for _, p := range f.Lab.Providers() {
			if err := f.Lab.SetBehaviour(p.Name, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	behave(lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down"})})
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 20), Size: 2000, Connections: 4, Tag: "draining"})
	if err != nil {
		t.Fatal(err)
	}
	state := func() string {
		var n nodeRow
		showNode(t, f, r.Node, &n)
		return n.State
	}
	if out := ctl(t, f, "node", "drain", r.Node, "--reason", "new disk"); !strings.Contains(out, "drains") {
		t.Errorf("drain said\n%s", out)
	}
	eventually(t, 30*time.Second, "the relay says what it has left", func() bool {
		return strings.Contains(ctl(t, f, "node", "drain", r.Node), "left are 10 recipients waiting")
	})
	eventually(t, 20*time.Second, "the relay takes no mail", func() bool {
		return strings.Contains(get(t, r.Metrics()+"/readyz"), "not ready: the relay drains")
	})
	c := dial(t, r.Submission())
	c.startTLS(f.ClientTLS(r))
	c.cmd("EHLO client.test", "250")
	c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
	c.cmd("MAIL FROM:<news@"+fleet.Domain+">", "250")
	c.cmd("RCPT TO:<"+submitted[0].Recipient+">", "451 4.3.5")
	if now := state(); now != "draining" {
		t.Errorf("with mail in its queue it is %s", now)
	}

	behave(lab.Behaviour{})
	// It looks once a second, and may find the relay drained already.
	out, err := f.Ctl(within(t, 90*time.Second), "node", "drain", r.Node, "--wait", "1m")
	if err != nil || !strings.Contains(string(out), "its queue is empty") && !strings.Contains(string(out), "drained") {
		t.Errorf("drain --wait said %v\n%s", err, out)
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
	// Its addresses are released by themselves.
	eventually(t, 45*time.Second, "it is shown as drained", func() bool { return state() == "drained" })
	if out := ctl(t, f, "node", "list"); !strings.Contains(out, "drained") {
		t.Errorf("node list says\n%s", out)
	}
	if out := ctl(t, f, "audit", "--object", r.Node); !strings.Contains(out, "its queue is empty and it has no address") {
		t.Errorf("the audit of the relay says\n%s", out)
	}
	for _, source := range r.Sources {
		ctl(t, f, "ip", "assign", source.String(), "--node", other.Node)
	}

	if out := ctl(t, f, "node", "undrain", r.Node); !strings.Contains(out, "takes mail again") {
		t.Errorf("undrain said\n%s", out)
	}
	eventually(t, 20*time.Second, "it takes mail again", func() bool { return get(t, r.Metrics()+"/readyz") == "ready\n" })
	if now := state(); now != "active" {
		t.Errorf("let back it is %s", now)
	}
}
