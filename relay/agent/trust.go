package agent

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
)

const (
	// renewSpread is the time over which relays renew when the issuing key
	// changes, so that they do not all come at once.
	renewSpread = 10 * time.Second
	// minRenewPause lies between two renewals for the same reason, if it is not
	// the leaf's age.
	minRenewPause = 10 * time.Second
)

// readTrust reads whom a view says to believe; nil if it says nothing, as from a
// cluster that has not changed its issuing key in its life. A view comes from a
// server that we believe, and still it cannot replace the root.
func (a *Agent) readTrust(in *policy.Trust) (*pki.Trust, error) {
	const op = "agent.readTrust"
	if len(in.CAs) == 0 {
		return nil, nil
	}
	bundle, err := pki.ParseChain(in.CAs)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the view's CA bundle is damaged")
	}
	root := pki.Root(bundle)
	if root == nil || root != bundle[len(bundle)-1] {
		return nil, fault.New(fault.Invalid, op, "the view's CA bundle does not end with a root")
	}
	if ours := pki.Root(a.holder.Bundle()); ours == nil || pki.PinOf(ours) != pki.PinOf(root) {
		return nil, fault.New(fault.Denied, op, "the view names another root (%s) than the one this relay joined: join again with a new token", pki.PinOf(root))
	}
	out := &pki.Trust{Bundle: bundle, Refused: in.RefusedCAs}
	for _, r := range in.RevokedServers {
		out.Revoked = append(out.Revoked, pki.RevokedServer{Server: r.Server, Serials: r.Serials})
	}
	return out, nil
}

// saveTrust writes the bundle of a view that is about to be used.
func (a *Agent) saveTrust(t *pki.Trust) error {
	if t == nil || pki.BundleSum(t.Bundle) == pki.BundleSum(a.holder.Bundle()) {
		return nil
	}
	return pki.WriteFile(filepath.Join(a.options.Dir, identityDir, caFile), pki.EncodeCertificates(t.Bundle), 0o644)
}

// useTrust believes what a view says.
func (a *Agent) useTrust(t *pki.Trust) {
	if t == nil {
		return
	}
	a.holder.SetTrust(*t)
	a.planRenewal()
}

// outdated reports whether another issuing CA signs than the one that signed
// our certificate.
func (a *Agent) outdated() bool {
	if held := a.current.Load(); held == nil || held.trust == nil {
		return false
	}
	signer := a.signs()
	return signer != "" && pki.IssuerKeyID(a.holder.Leaf()) != signer
}

// planRenewal decides whether the certificate is to be renewed before its time,
// and wakes whoever waits for a change of what is believed or presented.
func (a *Agent) planRenewal() {
	outdated := a.outdated()
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !outdated:
		a.renewBy = time.Time{}
	case a.renewBy.IsZero():
		a.renewBy = time.Now().Add(rand.N(a.spread))
		if signer := a.signs(); a.renewedFor == signer {
			a.renewBy = laterOf(a.renewBy, a.renewedAt.Add(minRenewPause))
		}
	}
	close(a.trustChanged)
	a.trustChanged = make(chan struct{})
}

// renewRefused has the certificate renewed because a server did not like it in
// a handshake: while this relay was away the issuing key may have changed. The
// renewal endpoint knows it by its key.
func (a *Agent) renewRefused(err error) {
	if !link.HandshakeRefused(err) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if by := laterOf(time.Now(), a.renewedAt.Add(minRenewPause)); a.renewBy.IsZero() || by.Before(a.renewBy) {
		a.renewBy = by
	}
	close(a.trustChanged)
	a.trustChanged = make(chan struct{})
}

// renewAt returns when the certificate is to be renewed.
func (a *Agent) renewAt(spread float64) time.Time {
	due := pki.RenewAt(a.holder.Leaf(), spread)
	a.mu.Lock()
	defer a.mu.Unlock()
	if by := a.renewBy; !by.IsZero() && by.Before(due) {
		return by
	}
	return due
}

// signs returns the key id of the issuing CA that signs.
func (a *Agent) signs() string {
	t := a.holder.Trust()
	if signer := t.Signer(); signer != nil {
		return pki.KeyID(signer)
	}
	return ""
}

// noteRenewed forgets why the certificate had to be renewed early. What is
// outdated even now waits a while, so that no two servers of different opinions
// make us go round in circles.
func (a *Agent) noteRenewed() {
	a.mu.Lock()
	a.renewedAt, a.renewedFor, a.renewBy = time.Now(), a.signs(), time.Time{}
	a.mu.Unlock()
	a.planRenewal()
}

// trustChange returns a channel that is closed at the next change of what is
// believed or presented.
func (a *Agent) trustChange() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.trustChanged
}

// watchTrust ends a session with a server that was removed from the cluster.
func (s *session) watchTrust(ctx context.Context) error {
	for {
		changed := s.agent.trustChange()
		if err := s.agent.holder.Revoked(s.link.PeerCertificate()); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// believed returns the bundle to keep when a certificate was granted. A view is
// newer or tells soon; the answer of a server that lags behind may be older.
func (a *Agent) believed(g grant) grant {
	if held := a.current.Load(); held != nil && held.trust != nil {
		g.bundle = slices.Clone(a.holder.Bundle())
	}
	return g
}

func laterOf(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
