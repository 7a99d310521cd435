package main

import (
	"net/netip"
	"testing"
)

func TestAddressTowards(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ local, remote, want string }{
		{"127.0.0.7:4711", "127.0.0.9:7443", "127.0.0.7"},
		{"[::ffff:127.0.0.7]:4711", "127.0.0.9:7443", "127.0.0.7"},
		{"[::]:4711", "127.0.0.9:7443", "127.0.0.1"}, // a QUIC socket
		{"0.0.0.0:4711", "127.0.0.9:7443", "127.0.0.1"},
	} {
		got, ok := addressTowards(t.Context(), netip.MustParseAddrPort(tc.local), netip.MustParseAddrPort(tc.remote))
		if !ok || got.String() != tc.want {
			t.Errorf("from %s to %s: %v, %v; want %s", tc.local, tc.remote, got, ok, tc.want)
		}
	}
	if got, ok := addressTowards(t.Context(), netip.AddrPort{}, netip.AddrPort{}); ok {
		t.Errorf("towards nowhere: %v", got)
	}
}
