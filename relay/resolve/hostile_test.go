package resolve

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/mailaddr"
)

func mustRR(t testing.TB, text string) dns.RR {
	t.Helper()
	rr, err := dns.NewRR(text)
	if err != nil {
		t.Fatal(err)
	}
	return rr
}

// As many MX records as a message of 64 KiB holds: the best are used, only
// their addresses are asked for, and the rest is not kept.
func TestThousandsOfMX(t *testing.T) {
	z := newZone(t)
	z.fault("many.example", func(q *dns.Msg, overUDP bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Compress = true
		if m.Truncated = overUDP; overUDP {
			return m
		}
		for i := range 3000 {
			m.Answer = append(m.Answer, &dns.MX{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeMX, Class: dns.ClassINET, Ttl: 300},
				Preference: uint16(3000 - i), Mx: fmt.Sprintf("m%d.many.example.", i)})
		}
		return m
	})
	for i := range 3000 {
		z.fault(fmt.Sprintf("m%d.many.example", i), func(q *dns.Msg, _ bool) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Answer = []dns.RR{mustRR(t, q.Question[0].Name+" 300 IN A 192.0.2.1")}
			return m
		})
	}
	r := newResolver(t, nil, z)
	route := r.Route(t.Context(), "many.example", IPv4)
	if len(route.Hosts) != maxHosts || cap(route.Hosts) != maxHosts || route.Hosts[0].Name != "m2999.many.example" || len(route.Hosts[0].Addrs) != 1 {
		t.Errorf("%d hosts of room for %d: %s", len(route.Hosts), cap(route.Hosts), show(route))
	}
	if n := r.hosts.len(); n != maxHosts {
		t.Errorf("the addresses of %d hosts were asked for, want %d", n, maxHosts)
	}
}

// Zones with mistakes get a reason that names the mistake.
func TestReasonsOfMistakenZones(t *testing.T) {
	z := newZone(t,
		"literal.example. 300 IN MX 10 192.0.2.1.",
		"literal6.example. 300 IN MX 10 2001:db8::1.",
		"half.example. 300 IN MX 10 192.0.2.1.", "half.example. 300 IN MX 20 mx.example.", "mx.example. 300 IN A 192.0.2.3",
		"nulls.example. 300 IN MX 0 .", "nulls.example. 300 IN MX 5 .",
		"circle.example. 300 IN MX 10 c1.example.", "c1.example. 300 IN CNAME c2.example.", "c2.example. 300 IN CNAME c1.example.",
	)
	r := newResolver(t, nil, z)
	for domain, want := range map[mailaddr.Domain]string{
		"literal.example":  "4.4.4 the MX record of literal.example gives 192.0.2.1, which is an address",
		"literal6.example": "4.4.4 the MX record of literal6.example gives 2001:db8::1, which is an address",
		"half.example":     "",
		"nulls.example":    "4.4.4 no mail host of nulls.example has an address",
		"circle.example":   "4.4.3 DNS look-up of the mail hosts of circle.example failed: more than 8 aliases",
	} {
		f := r.Route(t.Context(), domain, IPv4).Failure
		switch {
		case want == "" && f != nil, want != "" && f == nil:
			t.Errorf("%s: %+v, want %q", domain, f, want)
		case f != nil && (f.Status != relay.Deferred || !strings.HasPrefix(f.Reply.Enhanced+" "+f.Reply.Text, want)):
			t.Errorf("%s: %v %s %s, want %q", domain, f.Status, f.Reply.Enhanced, f.Reply.Text, want)
		}
	}
}

// What is no definite answer never makes a domain fail for good.
func TestNeverTakenForNo(t *testing.T) {
	ns := mustRR(t, "example. 300 IN NS ns.example.")
	for name, f := range map[string]func(q *dns.Msg, overUDP bool) *dns.Msg{
		"a referral": func(q *dns.Msg, _ bool) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Ns = []dns.RR{ns}
			return m
		},
		"cut over TCP too": func(q *dns.Msg, _ bool) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Truncated = true
			return m
		},
		"bogus":     rcode(dns.RcodeServerFailure),
		"not ours":  rcode(dns.RcodeRefused),
		"not known": rcode(dns.RcodeNotImplemented),
		"no format": rcode(dns.RcodeFormatError),
		"too many aliases": func(q *dns.Msg, _ bool) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			m.Answer = []dns.RR{mustRR(t, q.Question[0].Name+" 300 IN CNAME x"+q.Question[0].Name)}
			return m
		},
	} {
		z := newZone(t)
		for _, n := range []string{"a.example", "xa.example", "xxa.example", "xxxa.example", "xxxxa.example", "xxxxxa.example", "xxxxxxa.example", "xxxxxxxa.example"} {
			z.fault(n, f)
		}
		r := newResolver(t, func(c *Config) { c.QueryTimeout = 100 * time.Millisecond }, z)
		if got := show(r.Route(t.Context(), "a.example", IPv4)); got != "deferred 4.4.3" {
			t.Errorf("%s: %s", name, got)
		}
	}
	// Records without data, as the library reads them.
	empty := newZone(t)
	empty.fault("a.example", func(q *dns.Msg, _ bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.RFC3597{Hdr: dns.RR_Header{Name: "a.example.", Rrtype: q.Question[0].Qtype, Class: dns.ClassINET, Ttl: 300}}}
		return m
	})
	if route := newResolver(t, nil, empty).Route(t.Context(), "a.example", IPv4); show(route) != "deferred 4.4.4" || len(route.Hosts) != 0 {
		t.Errorf("an MX record without data: %s, hosts %v", show(route), route.Hosts)
	}
	// An authoritative server that lists itself beside an empty answer has none.
	z := newZone(t)
	z.fault("a.example", func(q *dns.Msg, _ bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Authoritative, m.Ns = true, []dns.RR{ns}
		return m
	})
	if got := show(newResolver(t, nil, z).Route(t.Context(), "a.example", IPv4)); got != "failed 5.1.2" {
		t.Errorf("an authoritative nothing: %s", got)
	}
}

// A server that sends one octet after the other over TCP, or answers with
// other ids without end over UDP, costs the time of one question and no more.
func TestSlowAndNoisyServers(t *testing.T) {
	const timeout = 150 * time.Millisecond
	pc, l := bothPorts(t)
	done := make(chan struct{}, 2)
	ended := make(chan struct{})
	go func() { // UDP: cut, so that TCP is asked; behind that an endless stream of other ids
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if q.Unpack(buf[:n]) != nil {
				continue
			}
			m := new(dns.Msg).SetReply(q)
			noisy := strings.HasPrefix(q.Question[0].Name, "noisy")
			m.Truncated = !noisy
			wire, _ := m.Pack()
			for i := 0; noisy && i < 200; i++ {
				binary.BigEndian.PutUint16(wire, q.Id+1+uint16(i))
				_, _ = pc.WriteTo(wire, from)
			}
			if !noisy {
				_, _ = pc.WriteTo(wire, from)
			}
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				tick := time.NewTicker(10 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-ended:
						return
					case <-tick.C:
						if _, err := conn.Write([]byte{0x7f}); err != nil {
							return
						}
					}
				}
			}()
		}
	}()
	t.Cleanup(func() {
		close(ended)
		pc.Close()
		l.Close()
		<-done
		<-done
	})
	r := newResolver(t, func(c *Config) {
		c.QueryTimeout = timeout
		c.Servers = []netip.AddrPort{netip.MustParseAddrPort(pc.LocalAddr().String())}
	})
	for _, domain := range []mailaddr.Domain{"slow.example", "noisy.example"} {
		begin := time.Now()
		got := show(r.Route(t.Context(), domain, IPv4))
		// Each question costs timeout over UDP and over TCP, 0.9 s in all. Without a
		// bound of its own it would go on until the look-up's, however fast the machine.
		if took, most := time.Since(begin), resolveTimeout*2/3; got != "deferred 4.4.3" || took > most {
			t.Errorf("%s: %s in %s, want no answer in %s", domain, got, took, most)
		}
	}
}

// What a server says about DNSSEC counts only if it is trusted to know.
func TestAuthenticOnlyFromValidatingServers(t *testing.T) {
	z := newZone(t)
	asked := make(chan bool, 100)
	answer := func(records ...string) func(q *dns.Msg, _ bool) *dns.Msg {
		return func(q *dns.Msg, _ bool) *dns.Msg {
			asked <- q.AuthenticatedData
			m := new(dns.Msg).SetReply(q)
			m.AuthenticatedData = true
			for _, text := range records {
				m.Answer = append(m.Answer, mustRR(t, text))
			}
			return m
		}
	}
	z.fault("a.example", answer("a.example. 300 IN MX 10 mx.example."))
	z.fault("mx.example", answer("mx.example. 300 IN A 192.0.2.1"))
	z.fault("half.example", answer("half.example. 300 IN MX 10 plain.example."))
	z.add(t, "plain.example. 300 IN A 192.0.2.2", "unsigned.example. 300 IN MX 10 mx.example.")
	for name, tc := range map[string]struct {
		validating []netip.AddrPort
		want       bool
	}{
		"on loopback":     {nil, true},
		"named":           {[]netip.AddrPort{z.addr}, true},
		"none is trusted": {[]netip.AddrPort{}, false},
	} {
		r := newResolver(t, func(c *Config) { c.Validating = tc.validating }, z)
		route := r.Route(t.Context(), "a.example", IPv4)
		if route.Failure != nil || route.Authentic != tc.want || route.Hosts[0].Authentic != tc.want || route.authentic() != tc.want {
			t.Errorf("%s: %s, authentic %v, host %v, want %v", name, show(route), route.Authentic, route.Hosts[0].Authentic, tc.want)
		}
		if half := r.Route(t.Context(), "half.example", IPv4); half.authentic() || half.Authentic != tc.want {
			t.Errorf("%s: a host without proof gives authentic %v", name, half.authentic())
		}
		if r.Route(t.Context(), "unsigned.example", IPv4).Authentic {
			t.Errorf("%s: records without proof are authentic", name)
		}
		for len(asked) > 0 {
			if got := <-asked; got != tc.want {
				t.Errorf("%s: AD in the question is %v", name, got)
			}
		}
	}
	if _, err := validatingOf([]netip.AddrPort{z.addr}, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53")}); err == nil || !strings.Contains(err.Error(), "192.0.2.53:53") {
		t.Errorf("a validating server that is none of the resolvers: %v", err)
	}
	if got, err := validatingOf([]netip.AddrPort{netip.MustParseAddrPort("192.0.2.53:53")}, nil); err != nil || len(got) != 0 {
		t.Errorf("a remote server is trusted without being named: %v, %v", got, err)
	}
}

func TestCacheIsBoundedInBytes(t *testing.T) {
	c := newCache[string](1000, 10_000, func(v string) int { return len(v) })
	now := time.Unix(1_800_000_000, 0)
	for i := range 300 {
		c.put(fmt.Sprint(i%200), entry[string]{value: strings.Repeat("x", 50+i), expires: now.Add(time.Duration(i) * time.Second), drop: now.Add(time.Hour)}, now)
		sum := 0
		for _, e := range c.m {
			sum += len(e.value)
		}
		if c.bytes != sum || sum > 10_000 {
			t.Fatalf("after %d: %d bytes are counted, %d are there, the bound is 10000", i, c.bytes, sum)
		}
	}
	before := c.len()
	c.put("huge", entry[string]{value: strings.Repeat("x", 10_001)}, now)
	if _, ok := c.get("huge"); ok || c.len() != before {
		t.Error("an entry larger than the cache is kept, or drove out others")
	}
}

// FuzzAnswer feeds arbitrary messages in answer to the question for a domain's
// MX records: whatever they say, the route is within bounds, keeps its order,
// and is final only if the message says so.
func FuzzAnswer(f *testing.F) {
	pack := func(records ...string) []byte {
		m := new(dns.Msg).SetQuestion("a.example.", dns.TypeMX)
		m.Response = true
		for _, text := range records {
			m.Answer = append(m.Answer, mustRR(f, text))
		}
		wire, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		return wire
	}
	f.Add(pack("a.example. 300 IN MX 10 mx.example."))
	f.Add(pack("a.example. 300 IN MX 0 ."))
	f.Add(pack("a.example. 300 IN MX 0 .", "a.example. 300 IN MX 1 192.0.2.1."))
	f.Add(pack("a.example. 300 IN CNAME b.example.", "b.example. 300 IN CNAME a.example."))
	f.Add(pack("a.example. 0 IN CNAME b.example.", "b.example. 4294967295 IN MX 65535 mx.example."))
	f.Add(pack("b.example. 300 IN MX 10 mx.example."))
	// A record without data.
	f.Add([]byte("0000\x00\x01000000\x000000\x01A\aeXAmple\x00\x00\x0f\x00\x010000\x00\x00"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		msg := new(dns.Msg)
		if msg.Unpack(wire) != nil {
			return
		}
		target, ttl, ok := follow(msg, "a.example.")
		if !ok {
			return
		}
		a := collect(msg, target, dns.TypeMX, ttl)
		if a.ttl < 0 || a.ttl > maxAnswerTTL || (a.kind == found) != (len(a.records) > 0) {
			t.Fatalf("ttl %s, kind %d, %d records", a.ttl, a.kind, len(a.records))
		}
		if isNullMX(a.records) && len(hostsOf(a.records)) != 0 {
			t.Fatal("a null MX with hosts")
		}
		hosts := hostsOf(a.records)
		seen := make(map[string]bool)
		for i, h := range hosts {
			if h.Name == "" || seen[h.Name] || h.Name != strings.ToLower(h.Name) || i > 0 && h.Pref < hosts[i-1].Pref {
				t.Fatalf("host %d: %+v after %+v", i, h, hosts[:i])
			}
			seen[h.Name] = true
		}
		if len(hosts) > maxHosts || len(addrsOf(msg.Answer)) > maxAddrsPerHost || negativeTTL(msg) < 0 {
			t.Fatalf("%d hosts, %d addresses", len(hosts), len(addrsOf(msg.Answer)))
		}
		if slices.ContainsFunc(a.records, func(rr dns.RR) bool { return !strings.EqualFold(rr.Header().Name, target) }) {
			t.Fatal("records of another owner are believed")
		}
	})
}
