package smtpconn

import (
	"net"
	"net/netip"

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
	ip := remoteIP(raw)
	limits := s.cfg.Limits()
	who := ClientOf(ip)
	refusal := ""
	s.mu.Lock()
	switch {
	case s.draining.Load():
		refusal = "draining"
	case len(s.conns) >= limits.MaxConnections:
		refusal = "connections"
	case s.clients[who] >= limits.MaxConnectionsPerIP:
		refusal = "connections_per_ip"
	}
	if refusal != "" && len(s.refusing) >= maxRefusing {
		s.mu.Unlock()
		s.Refused(refusal)
		_ = raw.Close()
		return nil
	}
	c := newConn(s, raw, security, ip, limits)
	c.refusal = refusal
	if refusal == "" {
		s.conns[c] = struct{}{}
		s.clients[who]++
		s.metrics.open.Inc()
	} else {
		s.refusing[c] = struct{}{}
	}
	s.mu.Unlock()
	s.metrics.connections.Inc()
	return c
}

// release forgets a connection that has ended.
func (s *Server) release(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.refusal != "" {
		delete(s.refusing, c)
		return
	}
	delete(s.conns, c)
	s.metrics.open.Dec()
	who := ClientOf(c.remote)
	if s.clients[who]--; s.clients[who] <= 0 {
		delete(s.clients, who)
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
