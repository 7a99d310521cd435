package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"

	"github.com/miekg/dns"
)

// absolute returns a name in the form the zone data uses.
func absolute(name string) string { return dns.CanonicalName(name) }

func reverseName(addr netip.Addr) (string, error) {
	arpa, err := dns.ReverseAddr(addr.String())
	if err != nil {
		return "", fmt.Errorf("lab: PTR for %s: %w", addr, err)
	}
	return arpa, nil
}

// mx returns the MX set of one of a profile's domains.
func (p *Profile) mx(domain string) []MXHost {
	if own, ok := p.MXOf[domain]; ok {
		return own
	}
	return p.MX
}

func mxRecords(domain string, hosts []MXHost) []string {
	var out []string
	for _, h := range hosts {
		out = append(out, fmt.Sprintf("%s IN MX %d %s", absolute(domain), h.Preference, absolute(h.Name)))
	}
	return out
}

// build makes the providers, their addresses and their records.
func (l *Lab) build(profiles []Profile) (map[net.Listener]*provider, error) {
	for i := range profiles {
		p := &profiles[i]
		if l.farm.open {
			p.Limits, p.DeferShare, p.GreylistShare, p.RequireTLS, p.RequirePTR = Limits{}, 0, 0, false, false
		}
		if l.cfg.Tune != nil {
			l.cfg.Tune(p)
		}
		if err := p.complete(); err != nil {
			return nil, err
		}
		if l.farm.providers[p.Name] != nil {
			return nil, fmt.Errorf("lab: profile %s exists twice", p.Name)
		}
		store, err := openStore(l.cfg.Dir, p.Name)
		if err != nil {
			return nil, err
		}
		v := newProvider(*p, l.cfg.Seed, store)
		l.farm.providers[p.Name] = v
		l.farm.order = append(l.farm.order, v)
	}
	plan, err := l.plan()
	if err != nil {
		return nil, err
	}
	if err := l.zones.add("", worldRecords(l.farm.order, plan)); err != nil {
		return nil, err
	}
	owner, err := l.bind(plan)
	if err != nil {
		return nil, err
	}
	for _, p := range l.farm.order {
		if err := l.equip(p); err != nil {
			return nil, err
		}
	}
	return owner, nil
}

// site is one address of one MX host.
type site struct {
	p    *provider
	host string
	addr netip.Addr
	dead bool
}

// plan gives every MX host its addresses.
func (l *Lab) plan() ([]site, error) {
	var plan []site
	var dead netip.Addr // all hosts that do not listen share one address
	next := 0
	take := func() (netip.Addr, error) {
		a := l.cfg.FarmAddrs(next)
		next++
		if next > maxFarmHosts || !a.IsValid() {
			return a, fmt.Errorf("lab: the farm needs more addresses than the %d it was given", next-1)
		}
		if !a.IsLoopback() {
			return a, fmt.Errorf("lab: farm address %s is not on loopback", a)
		}
		return a, nil
	}
	for _, p := range l.farm.order {
		for _, h := range p.profile.hosts() {
			for range max(h.Addresses, 1) {
				if h.Dead && dead.IsValid() {
					plan = append(plan, site{p, h.Name, dead, true})
					continue
				}
				a, err := take()
				if err != nil {
					return nil, err
				}
				if h.Dead {
					dead = a
				}
				plan = append(plan, site{p, h.Name, a, h.Dead})
			}
		}
	}
	return plan, nil
}

// hosts returns all MX hosts of a profile, each once. A domain without an MX
// is its own host (RFC 5321 section 5.1).
func (p *Profile) hosts() []MXHost {
	var out []MXHost
	for _, d := range p.Domains {
		set := p.mx(d)
		if len(set) == 0 {
			set = []MXHost{{Name: d}}
		}
		for _, h := range set {
			if !slices.ContainsFunc(out, func(o MXHost) bool { return o.Name == h.Name }) {
				out = append(out, h)
			}
		}
	}
	return out
}

// worldRecords is what the lab publishes by itself.
func worldRecords(providers []*provider, plan []site) []string {
	out := []string{
		fmt.Sprintf("%s IN MX 0 .", absolute(DomainNullMX)),
		fmt.Sprintf("%s IN TXT \"v=spf1 -all\"", absolute(DomainNoAddress)),
		fmt.Sprintf("%s IN MX 10 nowhere.%s", absolute(DomainDanglingMX), absolute(DomainDanglingMX)),
	}
	for _, p := range providers {
		for _, d := range p.profile.Domains {
			out = append(out, mxRecords(d, p.profile.mx(d))...)
		}
	}
	for _, s := range plan {
		out = append(out, fmt.Sprintf("%s IN A %s", absolute(s.host), s.addr))
	}
	return out
}

// bind listens on every address of the plan, all on one port.
func (l *Lab) bind(plan []site) (map[net.Listener]*provider, error) {
	var last error
	for range maxListenAttempts {
		port := l.cfg.SMTPPort
		owner := make(map[net.Listener]*provider)
		last = nil
		for _, s := range plan {
			if s.dead {
				continue
			}
			at, err := l.farm.listen(s.p, netip.AddrPortFrom(s.addr, port), s.host)
			if err != nil {
				last = err
				break
			}
			port = at.Port()
			owner[l.farm.listeners[len(l.farm.listeners)-1]] = s.p
		}
		if last == nil {
			l.smtpPort = port
			return owner, nil
		}
		for _, ln := range l.farm.listeners {
			last = errors.Join(last, ln.Close())
		}
		l.farm.listeners = nil
		if l.cfg.SMTPPort != 0 || !errors.Is(last, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, last
}

// equip gives a provider its certificates.
func (l *Lab) equip(p *provider) error {
	var names []string
	var addrs []netip.Addr
	for a, h := range p.hosts {
		addrs = append(addrs, a)
		if !slices.Contains(names, h) {
			names = append(names, strings.TrimSuffix(h, "."))
		}
	}
	var err error
	if p.tls, err = l.farm.certs.leaf(names, addrs); err != nil {
		return err
	}
	p.wrongTLS, err = l.farm.certs.leaf([]string{"someone-else.lab.test"}, nil)
	return err
}
