package lab

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func ask(t *testing.T, l *Lab, network, name string, qtype uint16, edns uint16) (*dns.Msg, error) {
	t.Helper()
	return askFor(t, l, testPatience, network, name, qtype, edns)
}

// dropped is how long a test waits for an answer that must not come.
const dropped = 300 * time.Millisecond

func askFor(t *testing.T, l *Lab, patience time.Duration, network, name string, qtype uint16, edns uint16) (*dns.Msg, error) {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	if edns > 0 {
		m.SetEdns0(edns, false)
	}
	c := &dns.Client{Net: network, Timeout: patience}
	resp, _, err := c.Exchange(m, l.DNSAddr().String())
	return resp, err
}

func TestDNSAnswers(t *testing.T) {
	l := startLab(t, func(c *Config) {
		c.Zones = []Zone{{Origin: "client.example", Records: []string{
			"@ 300 IN TXT \"v=spf1 ip4:127.16.0.9 -all\"",
			"r1._domainkey IN TXT \"v=DKIM1; p=\" \"abc\"",
			"*.wild IN A 127.0.0.9",
			"alias IN CNAME r1._domainkey",
		}}}
	})
	if err := l.AddPTR(netip.MustParseAddr("127.16.3.9"), "mta1.client.example"); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		qtype uint16
		rcode int
		want  []string // data of answers, sorted
	}{
		{"gmail.test", dns.TypeMX, dns.RcodeSuccess, []string{"10 alt1.gmail-smtp-in.l.google.com.", "20 alt2.gmail-smtp-in.l.google.com.", "5 gmail-smtp-in.l.google.com."}},
		{"GoogleMail.test", dns.TypeMX, dns.RcodeSuccess, []string{"10 alt1.gmail-smtp-in.l.google.com.", "20 alt2.gmail-smtp-in.l.google.com.", "5 gmail-smtp-in.l.google.com."}},
		{"outlook.test", dns.TypeMX, dns.RcodeSuccess, []string{"2 mx1.hotmail.olc.protection.outlook.com."}},
		{"maison.test", dns.TypeMX, dns.RcodeSuccess, []string{"0 maison-test.mail.protection.outlook.com."}},
		{DomainImplicitMX, dns.TypeMX, dns.RcodeSuccess, nil},
		{DomainNullMX, dns.TypeMX, dns.RcodeSuccess, []string{"0 ."}},
		{DomainNoAddress, dns.TypeA, dns.RcodeSuccess, nil},
		{"nowhere." + DomainDanglingMX, dns.TypeA, dns.RcodeNameError, nil},
		{DomainAbsent, dns.TypeMX, dns.RcodeNameError, nil},
		{DomainServfail, dns.TypeMX, dns.RcodeServerFailure, nil},
		{"mail." + DomainServfail, dns.TypeA, dns.RcodeServerFailure, nil},
		{"not-ours.example", dns.TypeA, dns.RcodeRefused, nil},
		{"client.example", dns.TypeTXT, dns.RcodeSuccess, []string{`"v=spf1 ip4:127.16.0.9 -all"`}},
		{"r1._domainkey.client.example", dns.TypeTXT, dns.RcodeSuccess, []string{`"v=DKIM1; p=" "abc"`}},
		{"_domainkey.client.example", dns.TypeTXT, dns.RcodeSuccess, nil}, // empty non-terminal, RFC 8020
		{"alias.client.example", dns.TypeTXT, dns.RcodeSuccess, []string{`"v=DKIM1; p=" "abc"`, "r1._domainkey.client.example."}},
		{"any.wild.client.example", dns.TypeA, dns.RcodeSuccess, []string{"127.0.0.9"}},
		{"nothing.client.example", dns.TypeA, dns.RcodeNameError, nil},
		{"9.3.16.127.in-addr.arpa", dns.TypePTR, dns.RcodeSuccess, []string{"mta1.client.example."}},
		{"mta1.client.example", dns.TypeA, dns.RcodeSuccess, []string{"127.16.3.9"}},
	}
	for _, tt := range tests {
		resp, err := ask(t, l, "tcp", tt.name, tt.qtype, 1232)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		var got []string
		for _, rr := range resp.Answer {
			got = append(got, strings.TrimPrefix(rr.String(), rr.Header().String()))
		}
		slices.Sort(got)
		if resp.Rcode != tt.rcode || !slices.Equal(got, tt.want) {
			t.Errorf("%s %s: %s %q, want %s %q", tt.name, dns.TypeToString[tt.qtype],
				dns.RcodeToString[resp.Rcode], got, dns.RcodeToString[tt.rcode], tt.want)
		}
		if tt.rcode == dns.RcodeNameError && (len(resp.Ns) != 1 || resp.Ns[0].Header().Rrtype != dns.TypeSOA) {
			t.Errorf("%s: NXDOMAIN without SOA (RFC 2308): %v", tt.name, resp.Ns)
		}
	}
	if n := l.DNSQueries("gmail.test", dns.TypeMX); n != 1 {
		t.Errorf("DNSQueries = %d, want 1", n)
	}
	if !l.zones.confirmed(netip.MustParseAddr("127.16.3.9")) || l.zones.confirmed(netip.MustParseAddr("127.16.3.8")) {
		t.Error("reverse DNS of a source is confirmed exactly when AddPTR was called")
	}
}

func TestDNSTruncatesOverUDP(t *testing.T) {
	l := startLab(t, nil)
	small, err := ask(t, l, "udp", DomainManyMX, dns.TypeMX, 0)
	if err != nil {
		t.Fatal(err)
	}
	small.Compress = true // as it came
	if !small.Truncated || small.Len() > minUDPAnswerBytes {
		t.Fatalf("without EDNS: TC %v, %d bytes", small.Truncated, small.Len())
	}
	full, err := ask(t, l, "tcp", DomainManyMX, dns.TypeMX, 0)
	if err != nil || full.Truncated || len(full.Answer) != 40 {
		t.Fatalf("over TCP: err %v, TC %v, %d answers", err, full.Truncated, len(full.Answer))
	}
	ok, err := ask(t, l, "udp", "gmail.test", dns.TypeMX, 4096)
	if err != nil || ok.Truncated || len(ok.Answer) != 3 || ok.IsEdns0() == nil {
		t.Fatalf("small answer: err %v, %v", err, ok)
	}
}

func TestDNSFaults(t *testing.T) {
	l := startLab(t, nil)
	for f, rcode := range map[DNSFault]int{FaultServfail: dns.RcodeServerFailure, FaultNXDOMAIN: dns.RcodeNameError, FaultRefused: dns.RcodeRefused} {
		l.SetDNSFault("gmail.test", f)
		resp, err := ask(t, l, "udp", "gmail.test", dns.TypeMX, 1232)
		if err != nil || resp.Rcode != rcode {
			t.Errorf("fault %d: %v %v", f, resp, err)
		}
	}
	l.SetDNSFault("gmail.test", FaultTruncate)
	resp, err := ask(t, l, "udp", "gmail.test", dns.TypeMX, 1232)
	if err != nil || !resp.Truncated || len(resp.Answer) != 0 {
		t.Errorf("truncate over UDP: %v %v", resp, err)
	}
	if resp, err = ask(t, l, "tcp", "gmail.test", dns.TypeMX, 1232); err != nil || len(resp.Answer) != 3 {
		t.Errorf("truncate over TCP: %v %v", resp, err)
	}
	l.SetDNSFault("gmail.test", FaultDrop)
	if resp, err = askFor(t, l, dropped, "udp", "gmail.test", dns.TypeMX, 1232); err == nil {
		t.Errorf("drop: answered %v", resp)
	}
	l.SetDNSFault("gmail.test", FaultNone)
	if resp, err = ask(t, l, "udp", "gmail.test", dns.TypeMX, 1232); err != nil || len(resp.Answer) != 3 {
		t.Errorf("healed: %v %v", resp, err)
	}
	if resp, err = askFor(t, l, dropped, "udp", DomainTimeout, dns.TypeMX, 1232); err == nil {
		t.Errorf("%s answered %v", DomainTimeout, resp)
	}
}

func TestDNSBadVersion(t *testing.T) {
	l := startLab(t, nil)
	m := new(dns.Msg)
	m.SetQuestion("gmail.test.", dns.TypeMX)
	m.SetEdns0(1232, false)
	m.IsEdns0().SetVersion(1)
	c := &dns.Client{Timeout: testPatience}
	resp, _, err := c.Exchange(m, l.DNSAddr().String())
	if err != nil || resp.Rcode != dns.RcodeBadVers {
		t.Fatalf("EDNS version 1: %v %v", resp, err)
	}
}

func TestRecordsAllOrNone(t *testing.T) {
	l := startLab(t, nil)
	err := l.AddRecords("good.example. 60 IN A 127.0.0.1", "bad.example. 60 IN A not-an-address")
	if err == nil {
		t.Fatal("a malformed record was taken")
	}
	if resp, err := ask(t, l, "tcp", "good.example", dns.TypeA, 0); err != nil || resp.Rcode != dns.RcodeRefused {
		t.Fatalf("half of a bad list was kept: %v %v", resp, err)
	}
	if err := l.AddRecords("k._domainkey.shop.example. IN TXT \"v=DKIM1; p=\""); err != nil {
		t.Fatal(err)
	}
	l.RemoveRecords("k._domainkey.shop.example", dns.TypeTXT)
	if resp, err := ask(t, l, "tcp", "k._domainkey.shop.example", dns.TypeTXT, 0); err != nil || resp.Rcode != dns.RcodeNameError {
		t.Fatalf("removed record: %v %v", resp, err)
	}
}
