// Package monitor looks at what the world sees of a cluster in DNS: whether the
// addresses that mail leaves from have names that lead back to them, and
// whether the records of sending domains are published as they should be. It
// exists because receivers judge mail by these records before they read it,
// and an operator sees a mistake in them last.
package monitor

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	questionTimeout = 3 * time.Second // for one question to one server
	maxUDPBytes     = 1232
	maxRecords      = 64 // of one answer
	resolvConf      = "/etc/resolv.conf"
)

// Resolver asks recursive name servers. Unlike the system's resolver it tells
// a name that is not there from a server that does not answer.
type Resolver struct {
	servers []string
	udp     dns.Client
	tcp     dns.Client
}

// NewResolver returns a resolver that asks the given servers in turn, or those
// of /etc/resolv.conf if there are none. If that names none either, every
// question fails and says so.
func NewResolver(servers []netip.AddrPort) *Resolver {
	r := &Resolver{udp: dns.Client{Net: "udp", Timeout: questionTimeout, UDPSize: maxUDPBytes}, tcp: dns.Client{Net: "tcp", Timeout: questionTimeout}}
	for _, s := range servers {
		r.servers = append(r.servers, s.String())
	}
	if len(r.servers) > 0 {
		return r
	}
	if conf, err := dns.ClientConfigFromFile(resolvConf); err == nil {
		for _, s := range conf.Servers {
			r.servers = append(r.servers, net.JoinHostPort(s, conf.Port))
		}
	}
	return r
}

// ask returns the records of one type at a name. No record is no error; an
// error says that nothing is known.
func (r *Resolver) ask(ctx context.Context, name string, qtype uint16) ([]dns.RR, error) {
	if len(r.servers) == 0 {
		return nil, fault.New(fault.Unavailable, "monitor.ask", "dns.resolvers in control.toml is empty and %s names no server: write the addresses of your resolvers", resolvConf)
	}
	q := question(name, qtype)
	var last error
	for _, server := range r.servers {
		out, err := r.askServer(ctx, q, server)
		if err == nil {
			return out, nil
		}
		last = err
	}
	return nil, noAnswer(last, name, qtype)
}

func question(name string, qtype uint16) *dns.Msg {
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), qtype)
	q.SetEdns0(maxUDPBytes, false)
	return q
}

func noAnswer(last error, name string, qtype uint16) error {
	return fault.Wrap(last, fault.Unavailable, "monitor.ask", "DNS gives no answer for %s %s: %v", name, dns.TypeToString[qtype], last)
}

// askServer asks one server.
func (r *Resolver) askServer(ctx context.Context, q *dns.Msg, server string) ([]dns.RR, error) {
	in, _, err := r.udp.ExchangeContext(ctx, q, server)
	if err == nil && in.Truncated {
		in, _, err = r.tcp.ExchangeContext(ctx, q, server)
	}
	if err != nil {
		return nil, err
	}
	if in.Rcode != dns.RcodeSuccess && in.Rcode != dns.RcodeNameError { // RFC 2308 section 2
		return nil, fmt.Errorf("%s answers %s", server, dns.RcodeToString[in.Rcode])
	}
	var out []dns.RR
	for _, rr := range in.Answer {
		if rr.Header().Rrtype == q.Question[0].Qtype && len(out) < maxRecords {
			out = append(out, rr)
		}
	}
	return out, nil
}

// textsEverywhere asks every server for the TXT records at a name and returns
// what each of those that answered says.
func (r *Resolver) textsEverywhere(ctx context.Context, name string) (out [][]string, err error) {
	last := error(fault.New(fault.Unavailable, "monitor.ask", "no resolver is known"))
	for _, server := range r.servers {
		rrs, err := r.askServer(ctx, question(name, dns.TypeTXT), server)
		if err != nil {
			last = err
			continue
		}
		out = append(out, textsOf(rrs))
	}
	if len(out) == 0 {
		return nil, noAnswer(last, name, dns.TypeTXT)
	}
	return out, nil
}

func plainName(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// names returns the PTR names of an address, in lower case without final dot.
func (r *Resolver) names(ctx context.Context, addr netip.Addr) ([]string, error) {
	arpa, err := dns.ReverseAddr(addr.Unmap().String())
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "monitor.names", "%s has no reverse name", addr)
	}
	rrs, err := r.ask(ctx, arpa, dns.TypePTR)
	var out []string
	for _, rr := range rrs {
		if ptr, ok := rr.(*dns.PTR); ok {
			out = append(out, plainName(ptr.Ptr))
		}
	}
	slices.Sort(out)
	return out, err
}

// addrs returns the addresses of a name in one family.
func (r *Resolver) addrs(ctx context.Context, name string, ipv6 bool) ([]netip.Addr, error) {
	qtype := dns.TypeA
	if ipv6 {
		qtype = dns.TypeAAAA
	}
	rrs, err := r.ask(ctx, name, qtype)
	var out []netip.Addr
	for _, rr := range rrs {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		}
		if addr, ok := netip.AddrFromSlice(ip); ok {
			out = append(out, addr.Unmap())
		}
	}
	return out, err
}

// texts returns the TXT records at a name, the strings of each put together.
func (r *Resolver) texts(ctx context.Context, name string) ([]string, error) {
	rrs, err := r.ask(ctx, name, dns.TypeTXT)
	return textsOf(rrs), err
}

func textsOf(rrs []dns.RR) (out []string) {
	for _, rr := range rrs {
		if txt, ok := rr.(*dns.TXT); ok {
			out = append(out, strings.Join(txt.Txt, "")) // RFC 7208 section 3.3, RFC 6376 section 3.6.2.2
		}
	}
	return out
}

// mx returns the MX hosts of a name.
func (r *Resolver) mx(ctx context.Context, name string) ([]*net.MX, error) {
	rrs, err := r.ask(ctx, name, dns.TypeMX)
	var out []*net.MX
	for _, rr := range rrs {
		if mx, ok := rr.(*dns.MX); ok {
			out = append(out, &net.MX{Host: plainName(mx.Mx), Pref: mx.Preference})
		}
	}
	return out, err
}

// spfResolver lets the SPF library ask through a Resolver.
type spfResolver struct{ *Resolver }

// notFound is what the library takes for "no record" (RFC 7208 section 4.3).
func notFound[T any](name string, out []T, err error) ([]T, error) {
	switch {
	case err != nil:
		return nil, &net.DNSError{Err: fault.Public(err), Name: name, IsTemporary: true}
	case len(out) == 0:
		return nil, &net.DNSError{Err: "no record", Name: name, IsNotFound: true}
	}
	return out, nil
}

// LookupTXT implements spf.DNSResolver.
func (r spfResolver) LookupTXT(ctx context.Context, name string) ([]string, error) {
	out, err := r.texts(ctx, name)
	return notFound(name, out, err)
}

// LookupMX implements spf.DNSResolver.
func (r spfResolver) LookupMX(ctx context.Context, name string) ([]*net.MX, error) {
	out, err := r.mx(ctx, name)
	return notFound(name, out, err)
}

// LookupIPAddr implements spf.DNSResolver.
func (r spfResolver) LookupIPAddr(ctx context.Context, host string) ([]net.IPAddr, error) {
	var out []net.IPAddr
	for _, ipv6 := range []bool{false, true} {
		found, err := r.addrs(ctx, host, ipv6)
		if err != nil {
			return notFound(host, out, err)
		}
		for _, a := range found {
			out = append(out, net.IPAddr{IP: a.AsSlice()})
		}
	}
	return notFound(host, out, nil)
}

// LookupAddr implements spf.DNSResolver.
func (r spfResolver) LookupAddr(ctx context.Context, addr string) ([]string, error) {
	ip, err := netip.ParseAddr(addr)
	if err != nil {
		return nil, err
	}
	out, err := r.names(ctx, ip)
	return notFound(addr, out, err)
}
