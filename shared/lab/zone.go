package lab

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/dns"
	"golang.org/x/net/publicsuffix"
)

const (
	maxRecords     = 1 << 20
	maxCNAMEHops   = 8
	labNameServer  = "ns.lab.test."
	labHostmaster  = "hostmaster.lab.test."
	loopbackArpa   = "127.in-addr.arpa."
	testTopLevel   = "test."
	defaultTTLSecs = 60
	negativeTTL    = 5 // seconds a resolver may keep a "no"
)

// Zone is a set of records added at start: an apex the name server becomes
// authoritative for, and records in zone-file syntax relative to it.
type Zone struct {
	Origin  string   // e.g. "example.test"; empty: each record's registrable domain
	Records []string // e.g. "@ 300 IN TXT \"v=spf1 -all\""
}

// zoneData is everything the lab's DNS knows.
type zoneData struct {
	ttl uint32

	mu    sync.RWMutex
	apex  map[string]struct{}
	nodes map[string]map[uint16][]dns.RR
	below map[string]int // records at or below a name: tells NODATA from NXDOMAIN (RFC 8020)
	count int
}

func newZoneData(ttl uint32) *zoneData {
	z := &zoneData{
		ttl:   ttl,
		apex:  map[string]struct{}{testTopLevel: {}, loopbackArpa: {}},
		nodes: make(map[string]map[uint16][]dns.RR),
		below: make(map[string]int),
	}
	return z
}

// add parses zone-file text and adds its records. Either all are added or
// none. A record that exists already is not added twice.
func (z *zoneData) add(origin string, records []string) error {
	if origin == "" {
		origin = "."
	}
	origin = dns.CanonicalName(origin)
	zp := dns.NewZoneParser(strings.NewReader(strings.Join(records, "\n")+"\n"), origin, "")
	zp.SetDefaultTTL(z.ttl)
	var rrs []dns.RR
	for rr, ok := zp.Next(); ok; rr, ok = zp.Next() {
		if rr.Header().Class != dns.ClassINET {
			return fmt.Errorf("lab: record %q: class must be IN", rr.String())
		}
		rrs = append(rrs, rr)
	}
	if err := zp.Err(); err != nil {
		return fmt.Errorf("lab: records: %w", err)
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.count+len(rrs) > maxRecords {
		return fmt.Errorf("lab: records: at most %d are kept", maxRecords)
	}
	if origin != "." {
		z.apex[origin] = struct{}{}
	}
	for _, rr := range rrs {
		z.insert(rr)
	}
	return nil
}

func (z *zoneData) insert(rr dns.RR) {
	h := rr.Header()
	name := dns.CanonicalName(h.Name)
	h.Name = name
	if z.apexOf(name) == "" {
		z.apex[registrable(name)] = struct{}{}
	}
	node := z.nodes[name]
	if node == nil {
		node = make(map[uint16][]dns.RR)
		z.nodes[name] = node
	}
	if slices.ContainsFunc(node[h.Rrtype], func(o dns.RR) bool { return dns.IsDuplicate(o, rr) }) {
		return
	}
	node[h.Rrtype] = append(node[h.Rrtype], rr)
	z.account(name, 1)
}

// account adds n records to a name and to every name above it.
func (z *zoneData) account(name string, n int) {
	z.count += n
	for at := name; ; {
		z.below[at] += n
		if z.below[at] == 0 {
			delete(z.below, at)
		}
		i, end := dns.NextLabel(at, 0)
		if end {
			return
		}
		at = at[i:]
	}
}

// remove forgets the records of one type at a name, all types for TypeANY.
func (z *zoneData) remove(name string, rrtype uint16) {
	name = dns.CanonicalName(name)
	z.mu.Lock()
	defer z.mu.Unlock()
	for t, set := range z.nodes[name] {
		if t == rrtype || rrtype == dns.TypeANY {
			z.account(name, -len(set))
			delete(z.nodes[name], t)
		}
	}
}

// registrable returns the name a zone for an unknown owner name starts at.
func registrable(name string) string {
	d, err := publicsuffix.EffectiveTLDPlusOne(strings.TrimSuffix(name, "."))
	if err != nil {
		return name // a public suffix or a single label is its own zone here
	}
	return d + "."
}

// apexOf returns the deepest zone a name lies in, "" for none.
func (z *zoneData) apexOf(name string) string {
	for at := name; ; {
		if _, ok := z.apex[at]; ok {
			return at
		}
		i, end := dns.NextLabel(at, 0)
		if end {
			return ""
		}
		at = at[i:]
	}
}

func (z *zoneData) soa(name string) dns.RR {
	z.mu.RLock()
	defer z.mu.RUnlock()
	return z.soaLocked(name)
}

func (z *zoneData) soaLocked(name string) dns.RR {
	apex := z.apexOf(name)
	if apex == "" {
		apex = "."
	}
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: apex, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: negativeTTL},
		Ns:  labNameServer, Mbox: labHostmaster,
		Serial: 1, Refresh: 60, Retry: 60, Expire: 3600, Minttl: negativeTTL, // RFC 2308 section 5
	}
}

// answer fills resp for one question.
func (z *zoneData) answer(resp *dns.Msg, name string, q dns.Question) {
	if q.Qclass != dns.ClassINET {
		resp.Rcode = dns.RcodeRefused
		return
	}
	z.mu.RLock()
	defer z.mu.RUnlock()
	for hop := 0; hop <= maxCNAMEHops; hop++ {
		if z.apexOf(name) == "" {
			if hop == 0 {
				resp.Rcode = dns.RcodeRefused
			}
			return // a chain that leaves our zones is the resolver's to follow
		}
		resp.Authoritative = true
		node, exists := z.node(name)
		if !exists {
			resp.Rcode = dns.RcodeNameError
			resp.Ns = append(resp.Ns, z.soaLocked(name))
			return
		}
		if found := pick(node, name, q.Qtype); len(found) > 0 {
			resp.Answer = append(resp.Answer, found...)
			return
		}
		alias := pick(node, name, dns.TypeCNAME)
		if len(alias) == 0 {
			resp.Ns = append(resp.Ns, z.soaLocked(name)) // NODATA
			return
		}
		resp.Answer = append(resp.Answer, alias[0])
		name = dns.CanonicalName(alias[0].(*dns.CNAME).Target)
	}
	resp.Rcode = dns.RcodeServerFailure // a CNAME loop
}

// node returns the records at a name, those of a wildcard above it when the
// name does not exist (RFC 4592 section 3.3.1), and whether the name exists.
func (z *zoneData) node(name string) (map[uint16][]dns.RR, bool) {
	if z.below[name] > 0 {
		return z.nodes[name], true
	}
	for at := name; ; {
		i, end := dns.NextLabel(at, 0)
		if end {
			return nil, false
		}
		at = at[i:]
		if set := z.nodes["*."+at]; len(set) > 0 {
			return set, true
		}
		if z.below[at] > 0 {
			return nil, false // closest encloser without a wildcard
		}
	}
}

// pick copies the records of a type out of a node under the name asked for.
func pick(node map[uint16][]dns.RR, name string, qtype uint16) []dns.RR {
	var out []dns.RR
	add := func(set []dns.RR) {
		for _, rr := range set {
			if rr.Header().Name != name { // a wildcard's record takes the name asked for
				rr = dns.Copy(rr)
				rr.Header().Name = name
			}
			out = append(out, rr)
		}
	}
	if qtype != dns.TypeANY {
		add(node[qtype])
		return out
	}
	for _, set := range node {
		add(set)
	}
	return out
}

// txt returns the TXT strings of a name, each record's parts joined, and
// whether the name exists.
func (z *zoneData) txt(name string) ([]string, bool) {
	z.mu.RLock()
	defer z.mu.RUnlock()
	name = dns.CanonicalName(name)
	for hop := 0; hop <= maxCNAMEHops; hop++ {
		node, exists := z.node(name)
		if !exists {
			return nil, false
		}
		if alias := node[dns.TypeCNAME]; len(alias) > 0 {
			name = dns.CanonicalName(alias[0].(*dns.CNAME).Target)
			continue
		}
		var out []string
		for _, rr := range node[dns.TypeTXT] {
			out = append(out, strings.Join(rr.(*dns.TXT).Txt, ""))
		}
		return out, true
	}
	return nil, false
}

// confirmed reports whether an address has a PTR whose name resolves back to
// it (forward-confirmed reverse DNS).
func (z *zoneData) confirmed(addr netip.Addr) bool {
	arpa, err := dns.ReverseAddr(addr.String())
	if err != nil {
		return false
	}
	z.mu.RLock()
	defer z.mu.RUnlock()
	for _, rr := range z.nodes[dns.CanonicalName(arpa)][dns.TypePTR] {
		host := z.nodes[dns.CanonicalName(rr.(*dns.PTR).Ptr)]
		for _, a := range host[dns.TypeA] {
			if ip, ok := netip.AddrFromSlice(a.(*dns.A).A); ok && ip.Unmap() == addr {
				return true
			}
		}
	}
	return false
}
