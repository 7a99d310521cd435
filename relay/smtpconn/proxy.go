package smtpconn

import (
	"encoding/binary"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// A balancer hides who connects, and limits, lock-outs, ranges of credentials
// and trace fields all need to know. So balancers that the operator names tell
// it by the PROXY protocol (version 1 or 2), before TLS and anything else. From
// a named balancer the header must come; from anybody else it is an unknown
// command, because whoever may say it can be anybody.

// Bounds of the header.
const (
	proxyTimeout        = 10 * time.Second
	maxProxyLineBytes   = 107  // of version 1, its line end included
	maxProxyHeaderBytes = 4096 // of version 2 behind its first 16 octets
)

var proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// fromProxy reports whether connections from ip begin with a PROXY header.
func (s *Server) fromProxy(ip netip.Addr) bool {
	for _, p := range s.cfg.Proxies {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

// readProxy reads the PROXY header of a connection, octet for octet what it is:
// TLS begins behind it.
func (c *Conn) readProxy() error {
	_ = c.raw.SetReadDeadline(time.Now().Add(proxyTimeout)) // a failure shows in the read
	client, err := parseProxy(c.raw)
	if err != nil {
		c.server.Refused("proxy_header")
		c.server.cfg.Logger.Info("connection without a good PROXY header closed", "listener", c.server.cfg.Name, "proxy", c.remote, "error", err)
		c.dead = true
		return err
	}
	_ = c.raw.SetReadDeadline(time.Time{})
	c.server.identify(c, client)
	return nil
}

// identify counts a connection by its client, whom the proxy told; an invalid
// address stands for the proxy itself, which looks whether we are there.
func (s *Server) identify(c *Conn, client netip.Addr) {
	if client.IsValid() {
		c.remote = client
		c.trace.From(client)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.refusal != "" {
		return
	}
	if c.refusal = s.overloaded(c, time.Now()); c.refusal == "" {
		s.count(c)
		return
	}
	delete(s.conns, c)
	s.metrics.open.Dec()
	s.refusing[c] = struct{}{}
	s.tellIfEmpty()
}

// parseProxy returns the client's address, or an invalid one if the proxy speaks
// for itself (LOCAL, UNKNOWN).
func parseProxy(r io.Reader) (netip.Addr, error) {
	const op = "smtpconn.parseProxy"
	var buf [16 + maxProxyHeaderBytes]byte
	if _, err := io.ReadFull(r, buf[:len(proxySignature)]); err != nil {
		return netip.Addr{}, fault.Wrap(err, fault.Invalid, op, "no PROXY header came")
	}
	if string(buf[:len(proxySignature)]) == proxySignature {
		return parseProxy2(r, buf[:])
	}
	n := len(proxySignature)
	for buf[n-1] != '\n' {
		if n == maxProxyLineBytes || !strings.HasPrefix(string(buf[:n]), "PROXY ") {
			return netip.Addr{}, fault.New(fault.Invalid, op, "the connection does not begin with a PROXY header")
		}
		if _, err := io.ReadFull(r, buf[n:n+1]); err != nil {
			return netip.Addr{}, fault.Wrap(err, fault.Invalid, op, "the PROXY header is cut off")
		}
		n++
	}
	return parseProxy1(string(buf[:n]))
}

// parseProxy1 reads "PROXY TCP4 source destination port port" and CRLF.
func parseProxy1(line string) (netip.Addr, error) {
	bad := fault.New(fault.Invalid, "smtpconn.parseProxy1", "the PROXY header cannot be read")
	text, ok := strings.CutSuffix(line, "\r\n")
	if !ok {
		return netip.Addr{}, bad
	}
	words := strings.Split(text, " ")
	if words[0] != "PROXY" || len(words) < 2 {
		return netip.Addr{}, bad
	}
	if words[1] == "UNKNOWN" {
		return netip.Addr{}, nil
	}
	if len(words) != 6 || words[1] != "TCP4" && words[1] != "TCP6" {
		return netip.Addr{}, bad
	}
	source, err := netip.ParseAddr(words[2])
	dest, destErr := netip.ParseAddr(words[3])
	if err != nil || destErr != nil || source.Zone() != "" || source.Is4() != (words[1] == "TCP4") || dest.Is4() != source.Is4() {
		return netip.Addr{}, bad
	}
	for _, port := range words[4:] {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
			return netip.Addr{}, bad
		}
	}
	return usableClient(source)
}

// parseProxy2 reads what is behind the signature of version 2, which stands in
// buf.
func parseProxy2(r io.Reader, buf []byte) (netip.Addr, error) {
	const op = "smtpconn.parseProxy2"
	if _, err := io.ReadFull(r, buf[12:16]); err != nil {
		return netip.Addr{}, fault.Wrap(err, fault.Invalid, op, "the PROXY header is cut off")
	}
	command, family, size := buf[12], buf[13], int(binary.BigEndian.Uint16(buf[14:]))
	if command != 0x20 && command != 0x21 || size > maxProxyHeaderBytes {
		return netip.Addr{}, fault.New(fault.Invalid, op, "the PROXY header has another version or command, or more than %d octets", maxProxyHeaderBytes)
	}
	body := buf[16 : 16+size]
	if _, err := io.ReadFull(r, body); err != nil {
		return netip.Addr{}, fault.Wrap(err, fault.Invalid, op, "the PROXY header is cut off")
	}
	switch {
	case command == 0x20 || family == 0x00: // LOCAL, or of no known family
		return netip.Addr{}, nil
	case family == 0x11 && size >= 12: // TCP over IPv4
		return usableClient(netip.AddrFrom4([4]byte(body[:4])))
	case family == 0x21 && size >= 36: // TCP over IPv6
		return usableClient(netip.AddrFrom16([16]byte(body[:16])))
	}
	return netip.Addr{}, fault.New(fault.Invalid, op, "the PROXY header is not about TCP over IPv4 or IPv6")
}

func usableClient(a netip.Addr) (netip.Addr, error) {
	if a = a.Unmap(); a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fault.New(fault.Invalid, "smtpconn.parseProxy", "the PROXY header names %v, which is no client", a)
	}
	return a, nil
}
