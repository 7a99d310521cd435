package egress

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func sourceID(n byte) ids.Source {
	var id ids.Source
	id[15] = n
	return id
}

func nodeID(n byte) ids.Node {
	var id ids.Node
	id[15] = n
	return id
}

func newManager(t *testing.T) *Manager {
	t.Helper()
	m, err := New(Config{Node: nodeID(1), Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// elsewhere is an address of a documentation block (RFC 5737): no machine has it.
const elsewhere = "198.51.100.77"

func testSources() []policy.Source {
	return []policy.Source{
		{ID: sourceID(1), Owner: nodeID(1), Bind: netip.MustParseAddr("127.0.0.41"), EHLO: "a.example"},
		{ID: sourceID(2), Owner: nodeID(1), Bind: netip.MustParseAddr(elsewhere)},
		{ID: sourceID(3), Owner: nodeID(2), Bind: netip.MustParseAddr("127.0.0.43")},
		{ID: sourceID(4), Owner: nodeID(1), Bind: netip.MustParseAddr("127.0.0.44")},
	}
}

func TestUsable(t *testing.T) {
	m := newManager(t)
	m.SetSources(testSources())
	for n, want := range map[byte]State{1: Usable, 2: NotPresent, 3: NotAssigned, 4: Usable, 5: NotAssigned} {
		if got := m.State(sourceID(n)); got != want || m.Usable(sourceID(n)) != (want == Usable) {
			t.Errorf("source %d is %s, want %s", n, got, want)
		}
	}
	if got := len(m.Sources()); got != 3 {
		t.Errorf("%d sources are ours, want 3", got)
	}
	m.Refresh()
	if !m.Usable(sourceID(1)) || m.Usable(sourceID(2)) {
		t.Error("a refresh changed what did not change")
	}
	m.SetSources(testSources()[1:])
	if m.Usable(sourceID(1)) {
		t.Error("a source that was taken away is still usable")
	}
}

func TestRunEndsWithContext(t *testing.T) {
	m := newManager(t)
	m.refresh = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		m.Run(ctx)
		close(done)
	}()
	m.SetSources(testSources())
	cancel()
	<-done
	if !m.Usable(sourceID(1)) {
		t.Error("the sources are gone")
	}
}

func listen(t *testing.T, addr string) (net.Listener, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

func TestDialBindsTheSource(t *testing.T) {
	m := newManager(t)
	m.SetSources(testSources())
	l, remote := listen(t, "127.0.0.50")
	for _, n := range []byte{1, 4} {
		c, err := m.Dial(t.Context(), sourceID(n), remote, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		want := (*m.current.Load())[sourceID(n)].Source.Bind
		if got := peer.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != want {
			t.Errorf("the host sees %s, want %s", got, want)
		}
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var late, free int
		if err := raw.Control(func(fd uintptr) {
			late, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT)
			free, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND)
		}); err != nil {
			t.Fatal(err)
		}
		if late != 1 || free != 0 {
			t.Errorf("IP_BIND_ADDRESS_NO_PORT is %d, IP_FREEBIND %d", late, free)
		}
		c.Close()
		peer.Close()
	}
}

func TestDialErrors(t *testing.T) {
	m := newManager(t)
	m.SetSources(testSources())
	l, remote := listen(t, "127.0.0.50")
	closed, refusing := listen(t, "127.0.0.51")
	closed.Close()
	_ = l
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name   string
		ctx    context.Context
		source byte
		remote netip.AddrPort
		want   Cause
	}{
		{"refused", t.Context(), 1, refusing, Refused},
		{"not present", t.Context(), 2, remote, Unusable},
		{"another relay's", t.Context(), 3, remote, Unusable},
		{"unknown", t.Context(), 9, remote, Unusable},
		{"another family", t.Context(), 1, netip.MustParseAddrPort("[::1]:25"), Unusable},
		{"canceled", canceled, 1, remote, Canceled},
	} {
		c, err := m.Dial(tc.ctx, sourceID(tc.source), tc.remote, time.Second)
		var de *DialError
		if !errors.As(err, &de) || c != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if de.Cause != tc.want || de.Error() == "" {
			t.Errorf("%s: %v, want %v", tc.name, de, tc.want)
		}
	}
}

func TestClassify(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want Cause
	}{
		{unix.ECONNREFUSED, Refused},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.ETIMEDOUT)}, TimedOut},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, TimedOut},
		{context.DeadlineExceeded, TimedOut},
		{unix.EHOSTUNREACH, Unreachable},
		{unix.ENETUNREACH, Unreachable},
		{unix.EADDRNOTAVAIL, NoPorts},
		{unix.EMFILE, NoFiles},
		{context.Canceled, Canceled},
		{io.ErrUnexpectedEOF, Other},
	} {
		if got := classify(tc.err); got != tc.want {
			t.Errorf("%v is %v, want %v", tc.err, got, tc.want)
		}
	}
	for c := Other; c <= Canceled; c++ {
		if c.String() == "?" || c.Local() != slices.Contains([]Cause{NoPorts, NoFiles, Unusable, Canceled}, c) {
			t.Errorf("cause %d: %q, local %v", c, c, c.Local())
		}
	}
}

func TestAddressThatLeftIsUnusable(t *testing.T) {
	m := newManager(t)
	// The kernel says "cannot assign requested address" both for an address
	// that is gone and for want of ports.
	err := &net.OpError{Op: "dial", Err: os.NewSyscallError("bind", unix.EADDRNOTAVAIL)}
	if got := m.cause(err, netip.MustParseAddr(elsewhere)); got != Unusable {
		t.Errorf("address elsewhere: %v", got)
	}
	if got := m.cause(err, netip.MustParseAddr("127.0.0.41")); got != NoPorts {
		t.Errorf("local address: %v", got)
	}
}

func TestLocalPrefixes(t *testing.T) {
	got, err := LocalPrefixes()
	if err != nil {
		t.Fatal(err)
	}
	loopback := netip.MustParseAddr("127.1.2.3")
	if !slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Contains(loopback) }) {
		t.Errorf("127/8 is not among %v", got)
	}
	if slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(elsewhere)) }) {
		t.Errorf("%s is among %v", elsewhere, got)
	}
}

func TestNewNeedsItsParts(t *testing.T) {
	if _, err := New(Config{}); !fault.Is(err, fault.Internal) {
		t.Errorf("%v", err)
	}
}
