// Package egress owns the addresses that mail leaves from. It knows which of
// the cluster's sources are assigned to this relay and present on this
// machine, opens connections from exactly the source it is told, and opens
// none from any other address: a mail from an address that nobody named would
// carry the wrong reputation, and nobody would see it.
package egress

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// DefaultRefresh is how often presence is asked again when Config names no
// other interval.
const DefaultRefresh = 10 * time.Second

// Config says what a Manager works with.
type Config struct {
	Node       ids.Node // this relay: only its sources are used
	Refresh    time.Duration
	Leases     *Leases // of floating addresses; nil: none is used
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// State says why a source can or cannot be used here.
type State uint8

// The states of a source.
const (
	NotAssigned State = iota // unknown, or owned by another relay
	NotPresent               // assigned here, but not a local address of this machine
	NotLeased                // assigned here and present, but floating and without a lease now
	Usable                   // assigned here, present, and leased if it floats
)

// String returns the word that health and the link report use.
func (s State) String() string {
	switch s {
	case NotPresent:
		return "not present"
	case NotLeased:
		return "not leased"
	case Usable:
		return "usable"
	}
	return "not assigned"
}

// Present reports whether the address is assigned here and on this machine.
func (s State) Present() bool { return s >= NotLeased }

// Status is a source of this relay with its state.
type Status struct {
	Source policy.Source
	State  State
}

// sources is an immutable set: readers load one pointer.
type sources map[ids.Source]Status

// Manager knows the sources of this relay. It is safe for concurrent use.
type Manager struct {
	node    ids.Node
	refresh time.Duration
	leases  *Leases
	log     *slog.Logger

	writing sync.Mutex // serialises SetSources and Refresh
	current atomic.Pointer[sources]

	states  *prometheus.GaugeVec
	results *prometheus.CounterVec
}

// New returns a manager without sources.
func New(cfg Config) (*Manager, error) {
	const op = "egress.New"
	if cfg.Node.IsZero() || cfg.Log == nil || cfg.Registerer == nil {
		return nil, fault.New(fault.Internal, op, "node, logger and metrics registry are needed")
	}
	m := &Manager{node: cfg.Node, refresh: cfg.Refresh, leases: cfg.Leases, log: cfg.Log,
		states: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "relais_relay_sources", Help: "Source addresses assigned to this relay, by state.",
		}, []string{"state"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_connects_total", Help: "Outgoing connections, by result.",
		}, []string{"result"}),
	}
	if m.refresh <= 0 {
		m.refresh = DefaultRefresh
	}
	for _, c := range []prometheus.Collector{m.states, m.results} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, op, "metrics could not be registered")
		}
	}
	m.current.Store(&sources{})
	return m, nil
}

// SetSources takes the sources of a new policy view, of all relays, and asks
// the kernel at once about those of this one.
func (m *Manager) SetSources(all []policy.Source) {
	m.writing.Lock()
	defer m.writing.Unlock()
	mine := make([]policy.Source, 0, len(all))
	for _, s := range all {
		if s.Owner == m.node {
			mine = append(mine, s)
		}
	}
	m.check(mine)
}

// Refresh asks the kernel again about every source.
func (m *Manager) Refresh() {
	m.writing.Lock()
	defer m.writing.Unlock()
	now := *m.current.Load()
	mine := make([]policy.Source, 0, len(now))
	for _, s := range now {
		mine = append(mine, s.Source)
	}
	m.check(mine)
}

// Run refreshes until ctx ends.
func (m *Manager) Run(ctx context.Context) {
	ticker := time.NewTicker(m.refresh)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			m.Refresh()
		}
	}
}

// check swaps in a new set. The caller holds m.writing.
func (m *Manager) check(mine []policy.Source) {
	before := *m.current.Load()
	next := make(sources, len(mine))
	counts := [4]int{}
	for _, s := range mine {
		state := NotPresent
		here, err := present(s.Bind)
		switch {
		case err != nil:
			// Not knowing is no reason to stop: the last answer stands.
			state = max(before[s.ID].State, NotPresent)
			m.log.Warn("source presence unknown", "source", s.ID.String(), "address", s.Bind.String(), "error", err)
		case here:
			state = Usable
		}
		if state >= NotLeased && s.Leased {
			if state = NotLeased; m.leases.usable(s.ID) {
				state = Usable
			}
		}
		if old, known := before[s.ID]; !known || old.State != state || old.Source.Bind != s.Bind {
			m.log.Info("source state", "source", s.ID.String(), "address", s.Bind.String(), "state", state.String())
		}
		next[s.ID] = Status{Source: s, State: state}
		counts[state]++
	}
	m.current.Store(&next)
	m.states.WithLabelValues("usable").Set(float64(counts[Usable]))
	m.states.WithLabelValues("not_leased").Set(float64(counts[NotLeased]))
	m.states.WithLabelValues("not_present").Set(float64(counts[NotPresent]))
}

// State returns the state of a source.
func (m *Manager) State(id ids.Source) State { return (*m.current.Load())[id].State }

// Why says why a floating address that is assigned here is not used; "" if it is used,
// or does not float.
func (m *Manager) Why(id ids.Source) string { return m.leases.Why(id) }

// Usable reports whether mail may leave from the source: it is assigned to
// this relay and present on this machine, and has a lease if it floats.
func (m *Manager) Usable(id ids.Source) bool { return m.State(id) == Usable }

// Sources returns the sources assigned to this relay, in no order.
func (m *Manager) Sources() []Status {
	now := *m.current.Load()
	out := make([]Status, 0, len(now))
	for _, s := range now {
		out = append(out, s)
	}
	return out
}

// Dial opens a TCP connection from the source to the remote address. The
// source's local address is bound without a port, so that the kernel picks
// one per destination: otherwise one source could hold no more connections in
// all than there are local ports. Every error is a *DialError.
func (m *Manager) Dial(ctx context.Context, id ids.Source, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	status := (*m.current.Load())[id]
	if status.State != Usable || status.Source.Bind.Is4() != remote.Addr().Unmap().Is4() {
		return nil, m.failed(&status, remote, Unusable, nil)
	}
	if status.Source.Leased {
		return m.dialLeased(ctx, &status, remote, timeout)
	}
	conn, err := m.connect(ctx, &status, remote, timeout)
	if err != nil {
		return nil, m.failed(&status, remote, m.cause(err, status.Source.Bind), err)
	}
	return conn, nil
}

// failed counts a connection that did not come about, and returns why.
func (m *Manager) failed(status *Status, remote netip.AddrPort, cause Cause, err error) error {
	m.results.WithLabelValues(cause.String()).Inc()
	return &DialError{Cause: cause, Source: status.Source.Bind, Remote: remote, Err: err}
}

// connect opens a connection from a source.
func (m *Manager) connect(ctx context.Context, status *Status, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	dialer := net.Dialer{
		Timeout:   timeout,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(status.Source.Bind, 0)),
		Control:   bindAddressNoPort,
		// Dead peers are found by the deadlines of the SMTP dialogue.
		KeepAliveConfig: net.KeepAliveConfig{Enable: false},
		KeepAlive:       -1,
	}
	conn, err := dialer.DialContext(ctx, "tcp", remote.String())
	if err == nil {
		m.results.WithLabelValues("connected").Inc()
	}
	return conn, err
}

// cause classifies a dial error. "Cannot assign requested address" has two
// causes that only a look at the address tells apart.
func (m *Manager) cause(err error, bind netip.Addr) Cause {
	cause := classify(err)
	if cause != NoPorts {
		return cause
	}
	if here, perr := present(bind); perr == nil && !here {
		return Unusable
	}
	return cause
}

// bindAddressNoPort sets IP_BIND_ADDRESS_NO_PORT, which also covers IPv6
// sockets. IP_FREEBIND is never set: a connection from an address that is not
// here cannot work.
func bindAddressNoPort(_, _ string, c syscall.RawConn) error {
	var sockErr error
	err := c.Control(func(fd uintptr) {
		sockErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
	if err != nil {
		return err
	}
	return sockErr
}
