package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/mail"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestMailMoves sends the sample stream through two relays to providers that
// throttle, greylist, defer and bounce, and accounts for every mail.
func TestMailMoves(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Sources: 4, Seed: 3})
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 200), Size: 3000, Connections: 20, Tag: "moves"})
	if err != nil {
		t.Fatal(err)
	}
	a := settle(t, f, submitted)
	if a.accepted != 200 {
		t.Fatalf("%d of 200 messages accepted", a.accepted)
	}
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.DKIM.Complete }); err != nil {
		t.Fatal(err)
	}
	rep := f.Lab.Report()
	if rep.Duplicated != 0 || rep.LimitBreaches != 0 || len(rep.ProtocolFaults) != 0 {
		t.Errorf("duplicated %d, breaches %+v, protocol faults %+v", rep.Duplicated, rep.Breaches, rep.ProtocolFaults)
	}
	if rep.DKIM.Pass != rep.Accepted || rep.DKIM.Pass == 0 {
		t.Errorf("%d of %d mails have a valid signature", rep.DKIM.Pass, rep.Accepted)
	}
	ledger := f.NewLedger()
	if err := ledger.Read(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if rep.NullSender == 0 || int64(ledger.Notes) != rep.NullSender {
		t.Errorf("%d notifications queued, %d arrived", ledger.Notes, rep.NullSender)
	}
	checkMails(t, f)
}

// checkMails reads the mails as they arrived: source, EHLO name, return path,
// header fields.
func checkMails(t *testing.T, f *fleet.Fleet) {
	t.Helper()
	sources := make(map[string]bool)
	for _, r := range f.Relays {
		for _, s := range r.Sources {
			sources[s.String()] = true
		}
	}
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				t.Fatal(err)
			}
			if !sources[m.Source.String()] {
				t.Fatalf("a mail left from %v, which is no source of ours", m.Source)
			}
			if !strings.HasPrefix(m.Hello, "mta") || !strings.HasSuffix(m.Hello, ".relais.test") {
				t.Errorf("EHLO name %q is not the source's own", m.Hello)
			}
			_, content, err := f.Lab.Mail(p.Name, m.ID)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := mail.ReadMessage(bytes.NewReader(content))
			if err != nil {
				t.Fatalf("a mail does not parse: %v\n%.400s", err, content)
			}
			if m.From == "" {
				checkNotification(t, content)
				continue
			}
			if !strings.HasSuffix(m.From, "@rp."+fleet.Domain) {
				t.Errorf("return path %q is not a signed one", m.From)
			}
			for name := range parsed.Header {
				if strings.HasPrefix(strings.ToLower(name), "x-relais-") {
					t.Errorf("the field %s left the relay", name)
				}
			}
			if parsed.Header.Get("Received") == "" || parsed.Header.Get("Date") == "" {
				t.Errorf("a mail without Received or Date:\n%.600s", content)
			}
		}
	}
}

func checkNotification(t *testing.T, content []byte) {
	t.Helper()
	for _, want := range []string{"multipart/report", "message/delivery-status", "Action: failed", "Final-Recipient: rfc822;", "Reporting-MTA: dns;", "Auto-Submitted: auto-replied"} {
		if !bytes.Contains(content, []byte(want)) {
			t.Errorf("a notification lacks %q:\n%s", want, content)
		}
	}
}

// TestRelayWorksWithoutControl stops control, restarts the relay, and expects
// it to deliver what it held and to accept known credentials.
func TestRelayWorksWithoutControl(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	to := recipients(t, f, 40)
	// The providers are away, so the mail has to wait in the queue.
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down"})}); err != nil {
			t.Fatal(err)
		}
	}
	held, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 4, Tag: "held"})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.InQueue(t.Context()); err != nil || n != 40 {
		t.Fatalf("%d in the queue, %v; want all 40 to wait", n, err)
	}
	if err := f.Control.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, lab.Behaviour{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	fresh, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 4, Tag: "fresh"})
	if err != nil {
		t.Fatalf("known credentials without control: %v", err)
	}
	if a := settle(t, f, append(held, fresh...)); a.delivered != 80 {
		t.Errorf("%+v: want 80 delivered", a)
	}
	c := dial(t, r.Submission())
	c.startTLS(f.ClientTLS(r))
	c.cmd("EHLO client.test", "250")
	c.cmd("AUTH PLAIN "+plain("crd_01kampxh00041061050r3gg28a", f.Secret), "454 4.7.0")
	c.cmd("AUTH PLAIN "+plain(f.User, f.Secret+"x"), "535 5.7.8")
	if err := f.RestartControl(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
}

// TestPolicyChangeReachesRelays changes a limit and expects relays to obey it.
func TestPolicyChangeReachesRelays(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true})
	begun := time.Now()
	if err := f.PutPolicy(t.Context(), map[string]string{"submission": "max_recipients = 7\n"}); err != nil {
		t.Fatal(err)
	}
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("command to acknowledged by both relays: %v", time.Since(begun).Round(time.Millisecond))
	for _, r := range f.Relays {
		c := dial(t, r.Submission())
		c.startTLS(f.ClientTLS(r))
		c.cmd("EHLO client.test", "250")
		c.cmd("AUTH PLAIN "+plain(f.User, f.Secret), "235")
		c.cmd("MAIL FROM:<a@"+fleet.Domain+">", "250")
		for i := range 7 {
			c.cmd(fmt.Sprintf("RCPT TO:<accept-%d@gmail.test>", i), "250")
		}
		c.cmd("RCPT TO:<accept-8@gmail.test>", "452 4.5.3")
	}
	if _, err := f.Ctl(t.Context(), "policy", "put", "/dev/null"); err == nil {
		t.Error("a policy from /dev/null was accepted")
	}
}

// TestRestartedRelayDeliversSoon measures the time from the start of a relay
// with an empty queue to its first delivery. The bound is far above what a
// quiet machine needs; the log tells the real number.
func TestRestartedRelayDeliversSoon(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	r := f.Relays[0]
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	ready := time.Since(begun)
	if _, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 1), Size: 1000, Connections: 1, Tag: "soon"}); err != nil {
		t.Fatal(err)
	}
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.Accepted == 1 }); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begun)
	t.Logf("ready after %v, first mail delivered after %v", ready.Round(time.Millisecond), took.Round(time.Millisecond))
	if took > 20*time.Second {
		t.Errorf("the first delivery took %v", took)
	}
}

// TestQueueTellsWhy asks the operator's commands about mail that waits.
func TestQueueTellsWhy(t *testing.T) {
	f := start(t, fleet.Config{Open: true})
	f.Lab.SetDNSFault("boutique-01.test", lab.FaultServfail)
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: []string{"accept-1@boutique-01.test"}, Size: 600, Connections: 1, Tag: "why"})
	if err != nil || submitted[0].Result.State != lab.StateAccepted {
		t.Fatalf("%v %+v", err, submitted)
	}
	var list []struct {
		ID         string `json:"id"`
		Recipients []struct {
			Why *struct {
				Reason string    `json:"reason"`
				Until  time.Time `json:"until"`
			} `json:"why"`
		} `json:"recipients"`
	}
	r := f.Relays[0]
	if err := json.Unmarshal(relayCommand(t, r, "queue", "list", "--json"), &list); err != nil || len(list) != 1 {
		t.Fatalf("queue list: %v, %d messages", err, len(list))
	}
	why := ""
	defer func() {
		if t.Failed() {
			t.Logf("queue why says %q", why)
		}
	}()
	eventually(t, 30*time.Second, "queue why to name DNS or a time", func() bool { // it may be in hand when asked
		why = string(relayCommand(t, r, "queue", "why", list[0].ID))
		return strings.Contains(why, "until") || strings.Contains(why, "looked up")
	})
	f.Lab.SetDNSFault("boutique-01.test", lab.FaultNone)
	settle(t, f, submitted)
}
