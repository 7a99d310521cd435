package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/mailaddr"
)

const failedStatus = relay.Failed

func failed(enhanced, text string) *Failure {
	return &Failure{Status: relay.Failed, Reply: relay.Reply{Enhanced: enhanced, Text: text}}
}

func deferred(enhanced, text string) *Failure {
	return &Failure{Status: relay.Deferred, Reply: relay.Reply{Enhanced: enhanced, Text: text}}
}

// find asks DNS for the route of a domain.
func (r *Resolver) find(ctx context.Context, domain mailaddr.Domain, families Families) *Route {
	route := &Route{Domain: domain, Families: families}
	ttl := r.fill(ctx, route)
	for i := range route.Hosts {
		route.Names = append(route.Names, route.Hosts[i].Name)
	}
	route.Resolved = time.Now()
	route.Expires = route.Resolved.Add(ttl)
	return route
}

// fill sets hosts or failure and returns how long they hold.
func (r *Resolver) fill(ctx context.Context, route *Route) time.Duration {
	if addr, ok := literal(route.Domain); ok {
		return r.fillLiteral(route, addr)
	}
	domain := string(route.Domain)
	mx, err := r.lookup(ctx, domain, dns.TypeMX)
	route.Authentic = err == nil && mx.authentic
	switch {
	case err != nil:
		route.Failure = deferred("4.4.3", "DNS look-up of "+domain+" failed: "+err.Error())
		return temporaryTTL
	case mx.kind == nxDomain:
		// RFC 5321 section 5.1: a name that does not exist is an error for
		// good. RFC 3463 section 3.2: X.1.2.
		route.Failure = failed("5.1.2", "the domain "+domain+" does not exist")
		return r.bounded(min(mx.ttl, maxNegativeTTL))
	case mx.kind == noData:
		return r.fillImplicit(ctx, route, mx.ttl)
	}
	if isNullMX(mx.records) {
		// RFC 7505 sections 3 and 4.2.
		route.Failure = failed("5.1.10", "the domain "+domain+" does not accept mail (null MX)")
		return r.bounded(mx.ttl)
	}
	route.Hosts = hostsOf(mx.records)
	return r.fillAddrs(ctx, route, mx.ttl)
}

func literal(d mailaddr.Domain) (netip.Addr, bool) {
	inner, ok := strings.CutPrefix(string(d), "[")
	if !ok {
		return netip.Addr{}, false
	}
	inner = strings.TrimSuffix(inner, "]")
	if v6, ok := strings.CutPrefix(inner, "IPv6:"); ok {
		inner = v6
	}
	addr, err := netip.ParseAddr(inner)
	return addr, err == nil
}

// fillLiteral makes the route of an address literal (RFC 5321 section 4.1.3).
func (r *Resolver) fillLiteral(route *Route, addr netip.Addr) time.Duration {
	route.Hosts = []Host{{Name: string(route.Domain), Addrs: []netip.Addr{addr}}}
	r.refuse(route)
	if route.Failure == nil && !wanted(addr, route.Families) {
		route.Hosts[0].Addrs = nil
		route.Failure = deferred("4.4.4", "no source address of the family of "+string(route.Domain))
	}
	return r.bounded(maxAnswerTTL)
}

func wanted(addr netip.Addr, families Families) bool {
	if addr.Is4() {
		return families&IPv4 != 0
	}
	return families&IPv6 != 0
}

// isNullMX implements RFC 7505 section 3: a single record with the root as
// host. Beside other records the root means nothing.
func isNullMX(records []dns.RR) bool {
	if len(records) != 1 {
		return false
	}
	mx, ok := records[0].(*dns.MX)
	return ok && mx.Mx == "."
}

// hostsOf returns the hosts of MX records, best preference first, each name
// once with its best preference, at most maxHosts.
func hostsOf(records []dns.RR) []Host {
	hosts := make([]Host, 0, len(records))
	at := make(map[string]int, len(records))
	for _, rr := range records {
		mx, ok := rr.(*dns.MX)
		// A record may come without data, which leaves its fields empty.
		if !ok || mx.Mx == "." || mx.Mx == "" {
			continue
		}
		name := hostName(mx.Mx)
		if i, known := at[name]; known {
			hosts[i].Pref = min(hosts[i].Pref, mx.Preference)
			continue
		}
		at[name] = len(hosts)
		hosts = append(hosts, Host{Name: name, Pref: mx.Preference})
	}
	slices.SortFunc(hosts, func(a, b Host) int {
		if a.Pref != b.Pref {
			return int(a.Pref) - int(b.Pref)
		}
		return strings.Compare(a.Name, b.Name)
	})
	// A copy, so that the rest of thousands of records is not kept.
	return slices.Clone(hosts[:min(len(hosts), maxHosts)])
}

// fillImplicit uses the domain's own address as its only host, because it has
// no MX record (RFC 5321 section 5.1, "implicit MX").
func (r *Resolver) fillImplicit(ctx context.Context, route *Route, ttl time.Duration) time.Duration {
	route.Implicit = true
	route.Hosts = []Host{{Name: string(route.Domain)}}
	ttl = r.fillAddrs(ctx, route, ttl)
	if route.Failure == nil || route.Failure.Reply.Enhanced != noAddress {
		return ttl
	}
	// No address of the families that we can use. Only if there is none of the
	// other family either does the domain take no mail at all.
	if other := (IPv4 | IPv6) &^ route.Families; other != 0 {
		a := r.host(ctx, string(route.Domain), qtypeOf(other))
		if a.err != nil || a.kind == found {
			return ttl
		}
	}
	route.Hosts = nil
	route.Failure = failed("5.1.2", "the domain "+string(route.Domain)+" has neither a mail host (MX) nor an address")
	return r.bounded(min(ttl, maxNegativeTTL))
}

func qtypeOf(f Families) uint16 {
	if f == IPv6 {
		return dns.TypeAAAA
	}
	return dns.TypeA
}

// maxParallelHosts bounds the questions open at once for one domain.
const maxParallelHosts = 4

// noAddress is the enhanced code of a route whose hosts have no address.
const noAddress = "4.4.4"

// fillAddrs finds the addresses of the route's hosts and applies the rules
// about them. One usable host is enough for a route.
func (r *Resolver) fillAddrs(ctx context.Context, route *Route, ttl time.Duration) time.Duration {
	type result struct {
		addrs     []netip.Addr
		authentic bool
		ttl       time.Duration
		err       error
	}
	results := make([]result, len(route.Hosts))
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxParallelHosts)
	for i := range route.Hosts {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			res := &results[i]
			res.addrs, res.authentic, res.ttl, res.err = r.addrs(ctx, route.Hosts[i].Name, route.Families)
		})
	}
	wg.Wait()
	ttl = r.bounded(ttl)
	var temporary error
	any := false
	for i, res := range results {
		route.Hosts[i].Addrs, route.Hosts[i].Authentic = res.addrs, res.authentic
		any = any || len(res.addrs) > 0
		ttl = min(ttl, res.ttl)
		if res.err != nil {
			temporary = errors.Join(temporary, res.err)
		}
	}
	switch {
	case any:
		r.refuse(route)
	case temporary != nil:
		route.Failure = deferred("4.4.3", firstLine(fmt.Sprintf("DNS look-up of the mail hosts of %s failed: %v", route.Domain, temporary)))
		return temporaryTTL
	default:
		// Not for good: this is a mistake in the domain's own zone, and such
		// mistakes get mended within a retry schedule.
		text := fmt.Sprintf("no mail host of %s has an address (%s)", route.Domain, familyNames(route.Families))
		for i := range route.Hosts {
			if name := route.Hosts[i].Name; isAddress(name) {
				text = fmt.Sprintf("the MX record of %s gives %s, which is an address and not the name of a host", route.Domain, name)
			}
		}
		route.Failure = deferred(noAddress, text)
	}
	return ttl
}

// isAddress reports whether the name of a mail host is an address, a common
// mistake in zones: RFC 1035 section 3.3.9 wants a name there.
func isAddress(name string) bool {
	_, err := netip.ParseAddr(name)
	return err == nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func familyNames(f Families) string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	}
	return "IPv4 or IPv6"
}

// addrs returns a host's addresses in the families, IPv4 first (RFC 3974 section
// 3: a host has all of them in DNS). The error says
// that a family is unknown for now; the other one's addresses are still good.
func (r *Resolver) addrs(ctx context.Context, name string, families Families) (out []netip.Addr, authentic bool, ttl time.Duration, failure error) {
	ttl, authentic = maxAnswerTTL, true
	for _, f := range []Families{IPv4, IPv6} {
		if families&f == 0 {
			continue
		}
		e := r.hostEntry(ctx, name, qtypeOf(f))
		out = append(out, e.value.addrs...)
		authentic = authentic && e.value.authentic
		ttl = min(ttl, max(0, time.Until(e.expires)))
		if e.value.err != nil {
			failure = e.value.err
		}
	}
	return out, authentic && failure == nil, max(ttl, time.Second), failure
}

func (r *Resolver) host(ctx context.Context, name string, qtype uint16) hostAnswer {
	return r.hostEntry(ctx, name, qtype).value
}

// hostEntry answers for one host and family from the cache or from DNS. Hosts
// are cached apart from domains, because thousands of domains share the hosts
// of one provider.
func (r *Resolver) hostEntry(ctx context.Context, name string, qtype uint16) entry[hostAnswer] {
	key := hostKey{name, qtype}
	if e, ok := r.hosts.get(key); ok && time.Now().Before(e.expires) {
		return e
	}
	v, _, _ := r.hostCalls.Do(name+"/"+dns.TypeToString[qtype], func() (any, error) {
		// Others may wait for this answer whose time is not yet up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resolveTimeout)
		defer cancel()
		a, err := r.lookup(ctx, name, qtype)
		now := time.Now()
		e := entry[hostAnswer]{value: hostAnswer{kind: a.kind, authentic: a.authentic, err: err}}
		switch {
		case err != nil:
			e.expires = now.Add(temporaryTTL)
		case a.kind == found:
			e.value.addrs = addrsOf(a.records)
			e.expires = now.Add(r.bounded(a.ttl))
		default:
			e.expires = now.Add(r.bounded(min(a.ttl, maxNegativeTTL)))
		}
		e.drop = e.expires
		r.hosts.put(key, e, now)
		return e, nil
	})
	return v.(entry[hostAnswer])
}

func addrsOf(records []dns.RR) []netip.Addr {
	var out []netip.Addr
	for _, rr := range records {
		var raw []byte
		switch rr := rr.(type) {
		case *dns.A:
			raw = rr.A.To4()
		case *dns.AAAA: // RFC 3596 section 2.1
			raw = rr.AAAA
		}
		if addr, ok := netip.AddrFromSlice(raw); ok && len(out) < maxAddrsPerHost {
			out = append(out, addr.Unmap())
		}
	}
	return out
}
