// Package tlspolicy decides how much TLS one connection to one host gets. It
// exists so that the decision is made in a single place from everything that
// bears on it (the provider's profile, what the host did lately) and the SMTP
// session only carries it out.
//
// Opportunistic TLS (RFC 7435) protects against listeners, not against an
// active attacker, so certificates are not verified and a host whose STARTTLS
// is broken is used in clear text for a while. A required mode never goes
// down to clear text, whatever the host does.
package tlspolicy

import (
	"crypto/tls"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

// Decision is what a session does about TLS.
type Decision uint8

// The decisions.
const (
	Try     Decision = iota // STARTTLS if it is offered, clear text otherwise
	Require                 // no mail without TLS
	Clear                   // STARTTLS is not used even if it is offered
)

// Decide combines a provider's TLS mode with whether the host's STARTTLS
// failed lately. It is the whole rule (RFC 7435 section 3).
func Decide(mode policy.TLSMode, broken bool) Decision {
	switch {
	case mode == policy.TLSRequired:
		return Require
	case mode == policy.TLSOff || broken:
		return Clear
	}
	return Try
}

// maxBrokenHosts bounds the memory of hosts; beyond it a host is forgotten,
// which costs one more failed handshake.
const maxBrokenHosts = 4096

// Memory remembers hosts whose STARTTLS failed. It is safe for concurrent use.
type Memory struct {
	mu     sync.Mutex
	broken map[string]time.Time // host name → forget at
}

// NewMemory returns an empty memory.
func NewMemory() *Memory { return &Memory{broken: make(map[string]time.Time)} }

// Remember notes that STARTTLS with the host failed and is not to be tried
// before now plus keep. A keep of zero or less notes nothing.
func (m *Memory) Remember(host string, now time.Time, keep time.Duration) {
	if keep <= 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, known := m.broken[host]; !known && len(m.broken) >= maxBrokenHosts {
		m.evict(now)
	}
	m.broken[host] = now.Add(keep)
}

// evict makes room for one host: everything past its time goes, and if that is
// nothing, the host that would be forgotten soonest.
func (m *Memory) evict(now time.Time) {
	var soonest string
	var at time.Time
	for host, until := range m.broken {
		if !now.Before(until) {
			delete(m.broken, host)
			continue
		}
		if soonest == "" || until.Before(at) {
			soonest, at = host, until
		}
	}
	if len(m.broken) >= maxBrokenHosts {
		delete(m.broken, soonest)
	}
}

// Broken reports whether STARTTLS with the host failed lately.
func (m *Memory) Broken(host string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	until, known := m.broken[host]
	if !known {
		return false
	}
	if !now.Before(until) {
		delete(m.broken, host)
		return false
	}
	return true
}

// Decide returns the decision for a host at a moment.
func (m *Memory) Decide(mode policy.TLSMode, host string, now time.Time) Decision {
	if mode == policy.TLSRequired || mode == policy.TLSOff {
		return Decide(mode, false)
	}
	return Decide(mode, m.Broken(host, now))
}

// maxResumableHosts bounds the TLS sessions kept for resumption.
const maxResumableHosts = 1024

// Config returns the TLS configuration from which ForHost derives those of
// connections. Sessions are resumed, which saves a public-key operation per
// connection.
func Config() *tls.Config {
	return &tls.Config{
		// RFC 8996, RFC 9325 section 3.1.1: TLS 1.0 and 1.1 must not be used.
		MinVersion: tls.VersionTLS12,
		// RFC 7672 section 1.3: MX names come from unauthenticated DNS, so a
		// verified certificate proves nothing without DANE or MTA-STS.
		InsecureSkipVerify: true,
		ClientSessionCache: tls.NewLRUClientSessionCache(maxResumableHosts),
	}
}

// ForHost returns the configuration for one connection to the named host. The
// name goes out as SNI; an address literal sends none (RFC 6066 section 3).
func ForHost(base *tls.Config, host string) *tls.Config {
	c := base.Clone()
	c.ServerName = host
	return c
}

// VersionName returns the short name of a TLS version, such as "TLS1.3".
func VersionName(version uint16) string {
	switch version {
	case tls.VersionTLS13:
		return "TLS1.3"
	case tls.VersionTLS12:
		return "TLS1.2"
	}
	return "TLS?"
}
