package monitor

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/ids"
)

// zone answers from records in zone-file syntax; the broken name gets SERVFAIL.
type zone struct {
	mu      sync.Mutex
	records []dns.RR
	broken  string
}

func (z *zone) set(t testing.TB, records ...string) {
	t.Helper()
	z.mu.Lock()
	defer z.mu.Unlock()
	z.records = nil
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		z.records = append(z.records, rr)
	}
}

// breakName answers SERVFAIL for one name, and no other.
func (z *zone) breakName(name string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.broken = name
}

// ServeDNS implements dns.Handler.
func (z *zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	z.mu.Lock()
	defer z.mu.Unlock()
	a := new(dns.Msg)
	a.SetReply(q)
	name := strings.ToLower(q.Question[0].Name)
	found := false
	for _, rr := range z.records {
		if rr.Header().Name == name {
			found = true
			if rr.Header().Rrtype == q.Question[0].Qtype {
				a.Answer = append(a.Answer, rr)
			}
		}
	}
	if !found {
		a.Rcode = dns.RcodeNameError
	}
	if name == z.broken {
		a.Answer, a.Rcode = nil, dns.RcodeServerFailure
	}
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		a.Truncate(512)
	}
	_ = w.WriteMsg(a) // a client that is gone hears nothing
}

func newZone(t testing.TB) (*zone, *Resolver) {
	t.Helper()
	z := &zone{}
	var pc net.PacketConn
	var l net.Listener
	for range 20 { // UDP and TCP on one port
		var err error
		if pc, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if l, err = net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			break
		}
		_ = pc.Close()
	}
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: z}, {Listener: l, Handler: z}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { _ = s.ActivateAndServe() }() // ends with Shutdown
		<-started
		t.Cleanup(func() { _ = s.Shutdown() })
	}
	return z, NewResolver([]netip.AddrPort{netip.MustParseAddrPort(pc.LocalAddr().String())})
}

const (
	ptr4 = "7.100.51.198.in-addr.arpa. 60 IN PTR mta1.example.net."
	a4   = "mta1.example.net. 60 IN A 198.51.100.7"
)

func TestReverse(t *testing.T) {
	z, r := newZone(t)
	v4, v6 := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")
	ptr6, err := dns.ReverseAddr(v6.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		addr    netip.Addr
		records []string
		want    control.ReverseVerdict
		detail  string
	}{
		{"confirmed", v4, []string{ptr4, a4}, control.ReverseConfirmed, ""},
		{"confirmed among others", v4, []string{"7.100.51.198.in-addr.arpa. 60 IN PTR other.example.net.", ptr4, "mta1.example.net. 60 IN A 198.51.100.8", a4}, control.ReverseConfirmed, ""},
		{"case", v4, []string{"7.100.51.198.in-addr.arpa. 60 IN PTR MTA1.Example.NET.", a4}, control.ReverseConfirmed, ""},
		{"IPv6", v6, []string{ptr6 + " 60 IN PTR mta1.example.net.", "mta1.example.net. 60 IN AAAA 2001:db8::7"}, control.ReverseConfirmed, ""},
		{"IPv6 with an A record only", v6, []string{ptr6 + " 60 IN PTR mta1.example.net.", a4}, control.ReverseFailed, "no address"},
		{"no PTR", v4, []string{a4}, control.ReverseFailed, "no PTR record"},
		{"another name", v4, []string{"7.100.51.198.in-addr.arpa. 60 IN PTR host7.isp.example.", a4}, control.ReverseFailed, "gives host7.isp.example, not mta1"},
		{"name does not exist", v4, []string{ptr4}, control.ReverseFailed, "no address"},
		{"name leads elsewhere", v4, []string{ptr4, "mta1.example.net. 60 IN A 198.51.100.8"}, control.ReverseFailed, "198.51.100.8"},
	} {
		z.set(t, tc.records...)
		got, detail, err := r.Reverse(t.Context(), tc.addr, "MTA1.example.net")
		if err != nil || got != tc.want || !strings.Contains(detail, tc.detail) {
			t.Errorf("%s: got %q, %q, %v", tc.name, got, detail, err)
		}
	}
	z.set(t, ptr4, a4)
	for _, name := range []string{"mta1.example.net.", "7.100.51.198.in-addr.arpa."} {
		z.breakName(name)
		if got, _, err := r.Reverse(t.Context(), v4, "mta1.example.net"); err == nil || got != control.ReverseUnchecked {
			t.Errorf("SERVFAIL for %s: got %q, %v; nothing is known", name, got, err)
		}
	}
}

func TestDomain(t *testing.T) {
	z, r := newZone(t)
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	p := base64.StdEncoding.EncodeToString(public)
	facts := service.DomainFacts{Name: "mail.example.com", ReturnPath: "rp.example.com", OwnershipToken: "tok", Keys: []service.KeyFacts{{Selector: "r1", Kind: "rsa", Public: public, Signs: true}},
		Inbound: []string{"mta1.example.net"}, Sources: []service.SourceFacts{{Public: netip.MustParseAddr("198.51.100.7"), EHLO: "mta1.example.net", PTRName: "mta1.example.net"}}}
	good := map[string]string{
		"ownership":   `_relais.mail.example.com. 60 IN TXT "relais-verify=tok"`,
		"dkim":        `r1._domainkey.mail.example.com. 60 IN TXT "v=DKIM1; k=rsa; p=` + p[:100] + `" "` + p[100:] + `"`,
		"spf":         `rp.example.com. 60 IN TXT "v=spf1 ip4:198.51.100.0/28 -all"`,
		"return-path": `rp.example.com. 60 IN MX 10 MTA1.example.net.`,
		"dmarc":       `_dmarc.example.com. 60 IN TXT "v=DMARC1; p=none"`, // of the organisational domain
		"reverse":     ptr4,
	}
	for _, tc := range []struct{ check, record, detail string }{
		{"", "", ""},
		{"ownership", "", "relais-verify=tok"},
		{"ownership", `_relais.mail.example.com. 60 IN TXT "relais-verify=other"`, "not found"},
		{"dkim", "", "domain show mail.example.com"},
		{"dkim", `r1._domainkey.mail.example.com. 60 IN TXT "v=DKIM1; p="`, "revoked"},
		{"dkim", `r1._domainkey.mail.example.com. 60 IN TXT "v=DKIM1; k=ed25519; p=AAAA"`, "ed25519"},
		{"dkim", `r1._domainkey.mail.example.com. 60 IN TXT "v=DKIM1; k=rsa; p=AAAA"`, "not ours"},
		{"dkim", `r1._domainkey.mail.example.com. 60 IN TXT "v=DKIM1; k=rsa; p=***"`, "base64"},
		{"spf", "", "none"},
		{"spf", `rp.example.com. 60 IN TXT "v=spf1 ip4:192.0.2.1 -all"`, "fail for 198.51.100.7"},
		{"spf", `rp.example.com. 60 IN TXT "v=spf1 ip4:nonsense -all"`, "permerror"},
		{"return-path", "", "no MX record"},
		{"return-path", `rp.example.com. 60 IN MX 10 mx.elsewhere.example.`, "mx.elsewhere.example is none of ours"},
		{"dmarc", "", "no DMARC record"},
		{"dmarc", `_dmarc.mail.example.com. 60 IN TXT "v=DMARC1; p=maybe"`, "p=maybe"},
		{"reverse", "", "no PTR"},
	} {
		records := []string{a4}
		for check, record := range good {
			if check == tc.check {
				record = tc.record
			}
			if record != "" {
				records = append(records, record)
			}
		}
		z.set(t, records...)
		found := false
		for _, f := range r.Domain(t.Context(), facts) {
			switch {
			case f.Check != tc.check:
				if f.Status != service.FindingOK {
					t.Errorf("%s %q: %+v", tc.check, tc.record, f)
				}
			default:
				found = true
				if f.Status != service.FindingWrong || !strings.Contains(f.Detail, tc.detail) || f.Required == (f.Check == "dmarc") {
					t.Errorf("%s %q: got %+v, want %q", tc.check, tc.record, f, tc.detail)
				}
			}
		}
		if !found && tc.check != "" {
			t.Errorf("nothing was found about %s", tc.check)
		}
	}
	z.breakName("rp.example.com.")
	for _, f := range r.Domain(t.Context(), facts) {
		if (f.Check == "spf" || f.Check == "return-path") && f.Status != service.FindingUnknown {
			t.Errorf("SERVFAIL: %+v", f)
		}
		if f.Status == service.FindingUnknown && (!strings.HasPrefix(f.Detail, "DNS gives no answer for rp.example.com ") || !strings.HasSuffix(f.Detail, "SERVFAIL")) {
			t.Errorf("%s does not say in our words what failed: %q", f.Check, f.Detail)
		}
	}
}

// world is what the watch sees and does, without DNS and raft.
type world struct {
	mu      sync.Mutex
	leads   bool
	now     time.Time
	source  control.Source
	domains []service.DomainFacts
	verdict control.ReverseVerdict
	err     error
	asked   int
	owned   []string
}

func (w *world) Leads() bool                    { return w.leads }
func (w *world) WatchRevision() <-chan struct{} { return nil }
func (w *world) Key(context.Context, string, service.KeyFacts) (service.Finding, bool) {
	return service.Finding{}, false
}
func (w *world) UnverifiedDomains() []service.DomainFacts { return w.domains }
func (w *world) SourceRows() []*control.Source {
	row := w.source
	return []*control.Source{&row}
}
func (w *world) RecordReverse(_ context.Context, _ ids.Source, v control.ReverseVerdict, detail string) error {
	w.source.Reverse, w.source.ReverseDetail = v, detail
	return nil
}
func (w *world) RecordOwnership(_ context.Context, domain string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owned = append(w.owned, domain)
	return nil
}
func (w *world) Reverse(context.Context, netip.Addr, string) (control.ReverseVerdict, string, error) {
	w.asked++
	return w.verdict, "", w.err
}
func (w *world) Ownership(_ context.Context, d service.DomainFacts) service.Finding {
	if d.OwnershipToken == "seen" {
		return service.Finding{Status: service.FindingOK}
	}
	return service.Finding{Status: service.FindingWrong}
}
func (w *world) Domain(context.Context, service.DomainFacts) []service.Finding { return nil }

func TestWatch(t *testing.T) {
	w := &world{leads: true, now: time.Unix(1_800_000_000, 0), domains: []service.DomainFacts{{Name: "a.example", OwnershipToken: "seen"}, {Name: "b.example"}}}
	watch := NewWatch(w, w, slog.New(slog.DiscardHandler), func() time.Time { return w.now })
	round := uint64(0)
	step := func(d time.Duration) {
		w.now = w.now.Add(d)
		round++
		watch.Round(t.Context(), round)
	}
	w.err = context.DeadlineExceeded
	step(0)
	if w.source.Reverse != control.ReverseUnchecked {
		t.Fatal("an answer that did not come is a verdict")
	}
	w.err, w.verdict = nil, control.ReverseFailed
	step(time.Second)
	if w.asked != 1 {
		t.Fatal("it asks again at once")
	}
	step(firstRetry)
	if w.source.Reverse != control.ReverseFailed {
		t.Fatal("a new address that fails is not shown")
	}
	w.verdict = control.ReverseConfirmed
	step(lastRetry)
	if w.source.Reverse != control.ReverseConfirmed {
		t.Fatal("an address that was repaired is not confirmed")
	}
	if slices.Contains(w.owned, "b.example") || !slices.Contains(w.owned, "a.example") {
		t.Errorf("recorded as seen: %v", w.owned)
	}
	// A confirmed address that begins to fail stays in use for the grace.
	w.verdict = control.ReverseFailed
	step(confirmedCheck)
	began := w.now
	for w.now.Before(began.Add(failedGrace - firstRetry)) {
		if step(firstRetry); w.source.Reverse != control.ReverseConfirmed {
			t.Fatalf("taken out of use after %s", w.now.Sub(began))
		}
	}
	w.verdict = control.ReverseConfirmed // a good answer between begins the grace anew
	step(firstRetry)
	w.verdict = control.ReverseFailed
	step(confirmedCheck)
	if w.source.Reverse != control.ReverseConfirmed {
		t.Error("a good answer did not begin the grace anew")
	}
	for began = w.now; w.now.Before(began.Add(failedGrace)); {
		step(firstRetry)
	}
	if w.source.Reverse != control.ReverseFailed {
		t.Error("an address that fails for good stays in use")
	}
}
