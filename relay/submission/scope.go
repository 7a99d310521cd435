package submission

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// clientTLS makes the listeners ask for a client's certificate while a
// credential needs one. TLS proves that the client holds its key; whether the
// certificate is one that the credential names, or was issued by one, is found
// out at login.
func clientTLS(base *tls.Config, dir func() *policy.Directory) *tls.Config {
	plain := base.Clone()
	plain.MinVersion = max(plain.MinVersion, tls.VersionTLS12)
	asking := plain.Clone()
	asking.ClientAuth = tls.RequestClientCert
	// A resumed session has the certificate of its first handshake, which need
	// not have been asked for one.
	asking.SessionTicketsDisabled = true
	plain.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		if d := dir(); d != nil && d.WantsCertificates() {
			return asking, nil
		}
		return nil, nil // as it is
	}
	return plain
}

// outOfScope says, for the client, why the credential is not good in this
// session; empty: it is.
func (s *session) outOfScope(c *policy.Credential) string {
	scope := &c.Scope
	if !scope.AllowsClient(s.conn.Remote()) {
		return "This credential is not good from your address " + s.conn.Remote().String()
	}
	if len(scope.Certificates) == 0 {
		return ""
	}
	state := s.conn.TLS()
	if state == nil || len(state.PeerCertificates) == 0 {
		return "This credential needs a client certificate in TLS and none was shown"
	}
	shown := state.PeerCertificates
	if slices.Contains(scope.Certificates, sha256.Sum256(shown[0].Raw)) {
		return ""
	}
	for _, c := range shown[1:min(len(shown), maxChain)] {
		if slices.Contains(scope.Certificates, sha256.Sum256(c.Raw)) {
			return s.notIssuedBy(c, shown)
		}
	}
	return "This credential needs another client certificate than the one that was shown"
}

// maxChain bounds the certificates of a client that are looked at, its own
// included.
const maxChain = 8

// notIssuedBy says why the client's certificate, shown with those that lead to
// the CA, is not one of the CA's now; empty: it is. A session finds it out once
// for as long as both are valid.
func (s *session) notIssuedBy(ca *x509.Certificate, shown []*x509.Certificate) string {
	now := time.Now()
	if s.issuer == ca && now.Before(s.issuerUntil) {
		return ""
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(ca)
	for _, c := range shown[1:min(len(shown), maxChain)] {
		between.AddCert(c)
	}
	chains, err := shown[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "The client certificate that was shown, or its CA, has expired or is not valid yet"
	case err != nil:
		return "The client certificate that was shown was not issued for clients by the CA that this credential needs"
	}
	s.issuer, s.issuerUntil = ca, chains[0][0].NotAfter
	for _, c := range chains[0] {
		if c.NotAfter.Before(s.issuerUntil) {
			s.issuerUntil = c.NotAfter
		}
	}
	return ""
}

// refuseRate answers for a credential that has sent what it may.
func (s *session) refuseRate(limit uint32, wait time.Duration) error {
	return s.conn.Refuse("credential_rate", 450, smtp.EnhancedCode{4, 7, 1}, "This credential sends at most %d messages an hour through this relay, try again in %d s", limit, int64((wait+time.Second-1)/time.Second))
}

// Credentials' rates: each hour is a ring of slots, so that what was taken in
// any 60 minutes and a slot is at most the limit.
const (
	rateSlots       = 60
	rateSlot        = time.Minute
	maxRatedEntries = 1 << 14 // credentials with a rate that sent within the hour
)

// rates counts messages by credential. The zero value is ready.
type rates struct {
	mu      sync.Mutex
	entries map[ids.Credential]*rate
}

type rate struct {
	slots [rateSlots]uint32
	last  int64 // number of the slot that was written last
	total uint32
}

// roll forgets the slots that have passed by now.
func (r *rate) roll(slot int64) {
	for steps := min(slot-r.last, rateSlots); steps > 0; steps-- {
		i := (slot - steps + 1) % rateSlots
		r.total -= r.slots[i]
		r.slots[i] = 0
	}
	r.last = max(r.last, slot) // a clock that goes back forgets nothing
}

// wait is how long it takes until a slot that counts has passed.
func (r *rate) wait(now time.Time) time.Duration {
	for i := int64(rateSlots - 1); i >= 0; i-- {
		if slot := r.last - i; r.slots[(slot%rateSlots+rateSlots)%rateSlots] > 0 {
			return time.Unix((slot+rateSlots)*int64(rateSlot/time.Second), 0).Sub(now)
		}
	}
	return 0
}

// allow reports whether a credential may send another message; take counts it
// if so. When not, wait says when it may again.
func (t *rates) allow(id ids.Credential, limit uint32, now time.Time, take bool) (wait time.Duration, ok bool) {
	if limit == 0 {
		return 0, true
	}
	slot := now.Unix() / int64(rateSlot/time.Second)
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.entries[id]
	if r == nil {
		if !take {
			return 0, true
		}
		if t.entries == nil {
			t.entries = make(map[ids.Credential]*rate)
		}
		if len(t.entries) >= maxRatedEntries && !t.makeRoom(slot) {
			return rateSlot, false
		}
		r = &rate{last: slot}
		t.entries[id] = r
	}
	r.roll(slot)
	if r.total >= limit {
		return max(time.Second, r.wait(now)), false
	}
	if take {
		r.slots[r.last%rateSlots]++
		r.total++
	}
	return 0, true
}

// giveBack takes back a message that was counted last and then not accepted.
func (t *rates) giveBack(id ids.Credential) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.entries[id]; r != nil && r.slots[r.last%rateSlots] > 0 {
		r.slots[r.last%rateSlots]--
		r.total--
	}
}

// makeRoom drops the credentials that sent nothing within the hour.
func (t *rates) makeRoom(slot int64) bool {
	for id, r := range t.entries {
		if r.roll(slot); r.total == 0 {
			delete(t.entries, id)
		}
	}
	return len(t.entries) < maxRatedEntries
}
