package smtpconn

import (
	"net"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/fault"
)

// maxRefusing bounds the connections that are kept only to be told 421; more
// are closed without a word.
const maxRefusing = 64

// ClientOf returns what connections and failures are counted by: an IPv4 address
// itself, or the /64 of an IPv6 address, because one host owns at least that.
func ClientOf(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return ip
}

// admit counts a new connection. It returns nil if the socket was closed.
func (s *Server) admit(raw net.Conn, security Security) *Conn {
	c := newConn(s, raw, security, remoteIP(raw), s.cfg.Limits())
	c.proxied = s.fromProxy(c.remote)
	now := time.Now()
	short := s.cfg.MemoryOver != nil && c.limits.MaxMemoryPercent > 0 && s.cfg.MemoryOver(c.limits.MaxMemoryPercent, now)
	s.mu.Lock()
	switch {
	case s.draining.Load():
		c.refusal = "draining"
	case short:
		c.refusal = "memory"
	case len(s.conns) >= c.limits.MaxConnections:
		c.refusal = "connections"
	case !c.proxied:
		c.refusal = s.overloaded(c, now)
	}
	if c.refusal != "" && len(s.refusing) >= maxRefusing {
		if c.network != nil {
			s.networks.leave(c.network)
		}
		s.mu.Unlock()
		s.Refused(c.refusal)
		_ = raw.Close()
		return nil
	}
	if c.refusal == "" {
		s.conns[c] = struct{}{}
		s.metrics.open.Inc()
		if !c.proxied {
			s.count(c)
		}
	} else {
		s.refusing[c] = struct{}{}
	}
	s.mu.Unlock()
	s.metrics.connections.Inc()
	return c
}

// overloaded says which bound a further connection of a client breaks, "" if
// none. s.mu is held.
func (s *Server) overloaded(c *Conn, now time.Time) string {
	if s.clients[ClientOf(c.remote)] >= c.limits.MaxConnectionsPerIP {
		return "connections_per_ip"
	}
	if reason := s.minute.take(ClientOf(c.remote), c.limits, now); reason != "" {
		return reason
	}
	return s.enter(c, now)
}

// maxMinuteClients bounds the memory of a minute's clients, about 100 octets
// each.
const maxMinuteClients = 1 << 16

// minute counts the connections that were admitted in the minute that runs. The
// zero value is ready.
type minute struct {
	number  int64
	total   int
	clients map[netip.Addr]int
}

// take counts a connection, or returns the bound that it breaks.
func (m *minute) take(client netip.Addr, limits Limits, now time.Time) string {
	if number := now.Unix() / 60; number != m.number || m.clients == nil {
		*m = minute{number: number, clients: make(map[netip.Addr]int)}
	}
	n, known := m.clients[client]
	switch {
	case limits.ConnectionsPerMinute > 0 && m.total >= limits.ConnectionsPerMinute, !known && len(m.clients) >= maxMinuteClients:
		return "connection_rate"
	case limits.ConnectionsPerMinutePerIP > 0 && n >= limits.ConnectionsPerMinutePerIP:
		return "connection_rate_per_ip"
	}
	m.clients[client] = n + 1
	m.total++
	return ""
}

// count notes a connection of a client. s.mu is held.
func (s *Server) count(c *Conn) {
	c.client = ClientOf(c.remote)
	s.clients[c.client]++
}

// release forgets a connection that has ended.
func (s *Server) release(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.network != nil {
		s.networks.leave(c.network)
	}
	if _, ok := s.refusing[c]; ok {
		delete(s.refusing, c)
		return
	}
	delete(s.conns, c)
	s.metrics.open.Dec()
	if c.client.IsValid() {
		if s.clients[c.client]--; s.clients[c.client] <= 0 {
			delete(s.clients, c.client)
		}
	}
	s.tellIfEmpty()
}

func remoteIP(raw net.Conn) netip.Addr {
	if a, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// metrics counts what happens on the listeners of one server.
type metrics struct {
	open        prometheus.Gauge
	connections prometheus.Counter
	handshakes  *prometheus.CounterVec
	refusals    *prometheus.CounterVec
}

func newMetrics(name string, r prometheus.Registerer) (*metrics, error) {
	prefix := "relais_relay_" + name + "_"
	m := &metrics{
		open:        prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + "connections", Help: "Connections open now."}),
		connections: prometheus.NewCounter(prometheus.CounterOpts{Name: prefix + "connections_total", Help: "Connections accepted, those answered with 421 included."}),
		handshakes:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "tls_handshakes_total", Help: "TLS handshakes by result."}, []string{"result"}),
		refusals:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "refusals_total", Help: "Connections, commands and messages refused, by reason."}, []string{"reason"}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.open, m.connections, m.handshakes, m.refusals} {
		if err := r.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "smtpconn.NewServer", "the metrics of %s cannot be registered", name)
		}
	}
	return m, nil
}

// Refused counts a refusal. The reasons are few and fixed.
func (s *Server) Refused(reason string) { s.metrics.refusals.WithLabelValues(reason).Inc() }
