package main

import (
	"context"
	"net"
	"net/netip"
)

// addressTowards returns the address of this machine that a session to remote
// has at this end. A QUIC socket is bound to no address, so its own answer may
// be the unspecified one: then the kernel is asked which it would send from.
func addressTowards(ctx context.Context, local, remote netip.AddrPort) (netip.Addr, bool) {
	if a := local.Addr().Unmap(); a.IsValid() && !a.IsUnspecified() {
		return a, true
	}
	var d net.Dialer
	// Connecting a UDP socket chooses its address and sends nothing, udp(7).
	conn, err := d.DialContext(ctx, "udp", remote.String())
	if err != nil {
		return netip.Addr{}, false
	}
	defer conn.Close()
	at, err := netip.ParseAddrPort(conn.LocalAddr().String())
	a := at.Addr().Unmap().WithZone("")
	return a, err == nil && !a.IsUnspecified()
}
