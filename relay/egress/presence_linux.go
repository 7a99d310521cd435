package egress

import (
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// maxLocalPrefixes bounds what a node reports of its local addresses.
const maxLocalPrefixes = 4096

// present asks the kernel whether packets for addr are delivered on this
// machine. That is true for addresses of interfaces, for prefixes made local
// by a route ("ip route add local … dev lo") and for 127/8. Trying to bind
// would not do: with ip_nonlocal_bind set every address can be bound, and
// connections from it then fail one by one.
func present(addr netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(net.IP(addr.AsSlice()))
	if err != nil {
		// "Network is unreachable" and the like are the kernel's "no".
		if classify(err) == Unreachable {
			return false, nil
		}
		return false, fault.Wrap(err, fault.Unavailable, "egress.present", "the kernel did not say whether %s is a local address", addr)
	}
	for i := range routes {
		if routes[i].Type == unix.RTN_LOCAL {
			return true, nil
		}
	}
	return false, nil
}

// LocalPrefixes returns what the kernel treats as local: single addresses and
// whole prefixes, sorted. It goes into the HELLO of the relay link.
func LocalPrefixes() ([]netip.Prefix, error) {
	const op = "egress.LocalPrefixes"
	filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
	var out []netip.Prefix
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err != nil {
			return nil, fault.Wrap(err, fault.Unavailable, op, "the kernel did not list its local addresses")
		}
		for i := range routes {
			if routes[i].Dst == nil {
				continue
			}
			addr, ok := netip.AddrFromSlice(routes[i].Dst.IP)
			ones, _ := routes[i].Dst.Mask.Size()
			if ok && len(out) < maxLocalPrefixes {
				out = append(out, netip.PrefixFrom(addr.Unmap(), ones))
			}
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out), nil
}
