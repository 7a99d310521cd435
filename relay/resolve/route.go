package resolve

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Families is a set of address families.
type Families uint8

// The address families.
const (
	IPv4 Families = 1 << iota
	IPv6
)

// Host is one mail host of a domain.
type Host struct {
	Name  string       // lower case, no final dot; "[192.0.2.1]" for an address literal
	Pref  uint16       // MX preference, lower is tried first
	Addrs []netip.Addr // IPv4 first, in the order of the answer; empty: cannot be used now
	// Authentic says that a validating resolver found the addresses proved by
	// DNSSEC.
	Authentic bool
}

// Failure says why a domain has no usable route.
type Failure struct {
	Status relay.Status // Deferred or Failed
	Reply  relay.Reply  // Code 0, an enhanced code and our own words
}

// Route is where mail for a domain goes. It is immutable and shared.
type Route struct {
	Domain   mailaddr.Domain
	Families Families
	// Hosts holds every mail host, best preference first and by name within
	// one preference. Order gives the order of one attempt.
	Hosts []Host
	// Names are the names of Hosts in the same order, for finding the
	// provider. They are known even when Failure is set because no host has a
	// usable address.
	Names    []string
	Implicit bool // the domain has no MX and its own address is used
	// Authentic says that a validating resolver found the MX records, or that
	// there are none, proved by DNSSEC.
	Authentic bool
	Stale     bool      // DNS failed and this is what it said last
	Resolved  time.Time // when DNS gave the answer
	Expires   time.Time // not to be used for a new attempt at or after it
	Failure   *Failure  // nil: there is at least one host with an address
}

// authentic reports whether DNSSEC proves the way to at least one host.
func (r *Route) authentic() bool {
	return r.Authentic && slices.ContainsFunc(r.Hosts, func(h Host) bool { return h.Authentic && len(h.Addrs) > 0 })
}

// FirstAddr returns the best host's first address, which names the provider of
// a domain that is an address literal; it is invalid if there is none.
func (r *Route) FirstAddr() netip.Addr {
	for i := range r.Hosts {
		if len(r.Hosts[i].Addrs) > 0 {
			return r.Hosts[i].Addrs[0]
		}
	}
	return netip.Addr{}
}

// Order appends to dst the hosts with an address in the order of one attempt:
// by preference, hosts of equal preference shuffled so that they share the
// load (RFC 5321 section 5.1).
func (r *Route) Order(rng *rand.Rand, dst []Host) []Host {
	for i := 0; i < len(r.Hosts); {
		begin, pref := len(dst), r.Hosts[i].Pref
		for ; i < len(r.Hosts) && r.Hosts[i].Pref == pref; i++ {
			if len(r.Hosts[i].Addrs) > 0 {
				dst = append(dst, r.Hosts[i])
			}
		}
		group := dst[begin:]
		for j := len(group) - 1; j > 0; j-- {
			k := rng.IntN(j + 1)
			group[j], group[k] = group[k], group[j]
		}
	}
	return dst
}
