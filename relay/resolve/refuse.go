package resolve

import (
	"net/netip"

	"github.com/relais-mta/relais/relay"
)

// Address blocks that are not on the public internet and that netip.Addr has
// no method for (RFC 6890).
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"),
}

func public(addr netip.Addr) bool {
	if !addr.IsGlobalUnicast() || addr.IsPrivate() {
		return false
	}
	for _, p := range notPublic {
		if p.Contains(addr) {
			return false
		}
	}
	return true
}

// refuse removes the addresses to which mail must not go. Mail to ourselves
// would loop; mail to a private address would let a stranger's zone aim us at
// the inside of our own network.
func (r *Resolver) refuse(route *Route) {
	if r.allowPrivate {
		return
	}
	loops := r.dropOwn(route)
	inside := false
	usable := false
	for i := range route.Hosts {
		h := &route.Hosts[i]
		kept := make([]netip.Addr, 0, len(h.Addrs))
		for _, a := range h.Addrs {
			switch {
			case a.IsLoopback() || a.IsUnspecified():
				loops = true
			case !public(a):
				inside = true
			default:
				kept = append(kept, a)
			}
		}
		h.Addrs = kept
		usable = usable || len(kept) > 0
	}
	if usable {
		return
	}
	domain := string(route.Domain)
	switch {
	case loops:
		// RFC 3463 section 3.5: X.4.6, routing loop detected.
		route.Failure = &Failure{Status: relay.Failed, Reply: relay.Reply{Enhanced: "5.4.6", Text: "mail for " + domain + " loops back to myself"}}
	case inside:
		route.Failure = &Failure{Status: relay.Failed, Reply: relay.Reply{Enhanced: "5.4.4", Text: "the mail hosts of " + domain + " have only addresses that are not on the public internet"}}
	default:
		route.Failure = deferred(noAddress, "no mail host of "+domain+" can be used now")
	}
}

// dropOwn removes our own host and every host of the same or a worse
// preference (RFC 5321 section 5.1: otherwise mail loops between equals).
func (r *Resolver) dropOwn(route *Route) bool {
	if r.own == nil {
		return false
	}
	for i := range route.Hosts {
		for _, a := range route.Hosts[i].Addrs {
			if !r.own(a) {
				continue
			}
			pref := route.Hosts[i].Pref
			for j := range route.Hosts {
				if route.Hosts[j].Pref >= pref {
					route.Hosts[j].Addrs = nil
				}
			}
			return true
		}
	}
	return false
}
