package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

const shopDomain = "shop.example"

// addShop adds a second domain of the tenant and publishes its records, but for
// those of its RSA key another one, and returns what heals that.
func addShop(t *testing.T, f *fleet.Fleet) (selector string, heal func()) {
	t.Helper()
	var d signingDomain
	if err := json.Unmarshal([]byte(ctl(t, f, "domain", "add", shopDomain, "--tenant", fleet.Tenant, "--json")), &d); err != nil {
		t.Fatal(err)
	}
	add := func(zone string) {
		if err := f.Lab.AddRecords(zone); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range d.Keys {
		if k.Algorithm == "rsa-sha256" {
			selector = k.Selector
		}
	}
	name := selector + "._domainkey." + shopDomain
	right := ""
	for _, r := range d.Records {
		if strings.TrimSuffix(r.Name, ".") == name {
			right = r.Zone
		} else {
			add(r.Zone)
		}
	}
	if selector == "" || right == "" {
		t.Fatalf("no record of an RSA key in %+v", d)
	}
	add(name + `. 1 IN TXT "v=DKIM1; k=rsa; p="`)
	return selector, func() {
		f.Lab.RemoveRecords(name, dns.TypeTXT)
		add(right)
	}
}

// sendFrom submits n mails of a domain to a provider that takes all.
func sendFrom(t *testing.T, f *fleet.Fleet, domain, tag string, n int) {
	t.Helper()
	load := &lab.Load{
		Addr: f.Relays[0].Submissions(), ImplicitTLS: true, TLS: f.ClientTLS(f.Relays[0]), Username: f.User, Password: f.Secret,
		Messages: n, Connections: 1, Size: 700, Overlap: true, Tag: tag,
		From: func(int) string { return "news@" + domain }, To: func(i int) string { return fmt.Sprintf("accept-%d@boutique-01.test", i) },
	}
	sent, err := lab.Send(within(t, time.Minute), load)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sent.Results {
		if sent.Results[i].State != lab.StateAccepted {
			t.Fatalf("%s: mail %d was answered %+v", tag, i, sent.Results[i])
		}
	}
}

// arrivals counts the mails with a tag that arrived, and how many of them have a
// good signature.
func arrivals(t *testing.T, f *fleet.Fleet, tag string) (all, good int) {
	t.Helper()
	for _, p := range f.Lab.Providers() {
		for m, err := range f.Lab.Mails(p.Name) {
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(m.MessageID, tag) {
				all++
				if m.DKIM == lab.VerdictPass {
					good++
				}
			}
		}
	}
	return all, good
}

// alerts counts the events about the self-check of a domain.
func alerts(t *testing.T, f *fleet.Fleet, kind string) (n int) {
	t.Helper()
	if err := f.NewLedger().Read(t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Type == kind && e.Class == "T08" {
			n++
		}
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSelfCheckHoldsOneDomain: the key of one of two domains of a tenant is
// revoked in DNS. Its mail is held, through a crash of the relay, until DNS is
// right; that of the other domain goes on, although DNS does not answer for it.
func TestSelfCheckHoldsOneDomain(t *testing.T) {
	f := start(t, fleet.Config{Open: true, Policy: map[string]string{"delivery": `connect_timeout = "3s"
host_backoff = "1s"
min_dns_ttl = "1s"
idle_session = "3s"
dkim_check_every = "1s"
`}})
	var own signingDomain
	if err := json.Unmarshal([]byte(ctl(t, f, "domain", "show", fleet.Domain, "--json")), &own); err != nil {
		t.Fatal(err)
	}
	for _, k := range own.Keys {
		f.Lab.SetDNSFault(k.Selector+"._domainkey."+fleet.Domain, lab.FaultServfail)
	}
	selector, heal := addShop(t, f)
	if err := f.WaitApplied(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	sendFrom(t, f, shopDomain, "firstofshop", 1)
	begun := time.Now()
	eventually(t, 2*time.Minute, "the alert", func() bool { return alerts(t, f, "alert") == 1 })
	t.Logf("held %v after the first mail", time.Since(begun).Round(time.Second))

	const n = 10
	sendFrom(t, f, shopDomain, "heldofshop", n)
	sendFrom(t, f, fleet.Domain, "ofother", n)
	r := f.Relays[0]
	eventually(t, time.Minute, "the other domain's mail", func() bool { all, _ := arrivals(t, f, "ofother"); return all == n })
	held := func() (list []struct {
		ID string `json:"id"`
	}) {
		if err := json.Unmarshal(relayCommand(t, r, "queue", "list", "--state", "held", "--json"), &list); err != nil {
			t.Fatal(err)
		}
		return list
	}
	list := held()
	if len(list) != n {
		t.Fatalf("%d messages are held, want %d", len(list), n)
	}
	why := string(relayCommand(t, r, "queue", "why", list[0].ID))
	for _, part := range []string{"holds it", "T08", selector, "revoked", "checked next at "} {
		if !strings.Contains(why, part) {
			t.Errorf("queue why lacks %q: %s", part, why)
		}
	}
	eventually(t, time.Minute, "control to see it", func() bool {
		return strings.Contains(ctl(t, f, "node", "show", r.Node, "--json"), "mail of "+shopDomain+" is held (T08)")
	})

	r.Kill()
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	if got := held(); len(got) != n {
		t.Fatalf("%d messages are held after a crash, want %d", len(got), n)
	}
	if all, _ := arrivals(t, f, "heldofshop"); all != 0 {
		t.Fatalf("%d mails of the domain arrived", all)
	}
	heal()
	// It is looked at once a minute at least, and the first look may have been
	// answered from before.
	eventually(t, 4*time.Minute, "the held mail, verified", func() bool { all, good := arrivals(t, f, "heldofshop"); return all == n && good == n })
	eventually(t, time.Minute, "the end of the alert", func() bool { return alerts(t, f, "alert-over") == 1 })
	if n := alerts(t, f, "alert"); n != 1 {
		t.Errorf("%d alerts", n)
	}
	if err := f.WaitEmpty(within(t, time.Minute), nil); err != nil {
		t.Error(err)
	}
}
