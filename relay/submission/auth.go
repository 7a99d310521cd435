package submission

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"log/slog"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// AuthMechanisms implements smtp.AuthSession.
func (s *session) AuthMechanisms() []string { return []string{"PLAIN", "LOGIN"} }

// Auth implements smtp.AuthSession: the mechanisms of RFC 4422 section 3.
func (s *session) Auth(mechanism string) (sasl.Server, error) {
	switch mechanism {
	case "PLAIN":
		return &plainServer{s}, nil
	case "LOGIN":
		return &loginServer{session: s}, nil
	}
	return nil, s.conn.Refuse("auth_mechanism", 504, smtp.EnhancedCode{5, 5, 4}, "The mechanism is not offered here, use PLAIN or LOGIN") // RFC 4954 section 4
}

// plainServer is PLAIN (RFC 4616).
type plainServer struct{ session *session }

// Next implements sasl.Server.
func (p *plainServer) Next(response []byte) (challenge []byte, done bool, err error) {
	if response == nil {
		return nil, false, nil // RFC 4954 section 4: an empty challenge asks for the response
	}
	parts := bytes.Split(response, []byte{0})
	if len(parts) != 3 {
		return nil, false, p.session.conn.Refuse("auth_syntax", 501, smtp.EnhancedCode{5, 5, 2}, "A PLAIN response holds three fields with NUL between them")
	}
	// RFC 4616 section 2: an authorization identity may be given; ours can only
	// be the user itself.
	if len(parts[0]) > 0 && !bytes.Equal(parts[0], parts[1]) {
		return nil, false, p.session.loginFailed("bad", "Acting for another user is not possible")
	}
	return nil, true, p.session.login(string(parts[1]), parts[2])
}

// loginServer is LOGIN, which has no RFC but many clients.
type loginServer struct {
	session *session
	user    string
	asked   int
}

// Next implements sasl.Server.
func (l *loginServer) Next(response []byte) (challenge []byte, done bool, err error) {
	switch {
	case l.asked == 0 && response == nil:
		l.asked = 1
		return []byte("Username:"), false, nil
	case l.asked <= 1:
		l.asked = 2
		l.user = string(response)
		return []byte("Password:"), false, nil
	}
	return nil, true, l.session.login(l.user, response)
}

// login checks a credential and makes it the session's. Every answer is for the
// client as it is.
func (s *session) login(user string, secret []byte) error {
	now := time.Now()
	dir := s.server.opt.Policy()
	if dir == nil {
		return s.tryLater("There is no policy on this relay yet, try again later")
	}
	var id ids.Credential
	idErr := id.UnmarshalText([]byte(user))
	s.loginKeys = lockKeys(s.conn.Remote(), id)
	if wait, scope := s.server.logins.locked(s.loginKeys, now); wait > 0 {
		s.server.metrics.auth.WithLabelValues("locked").Inc()
		return s.conn.Refuse("auth_locked", 454, smtp.EnhancedCode{4, 7, 0}, "Too many failed logins %s, wait %d s", lockTexts[scope], int64((wait+time.Second-1)/time.Second))
	}
	if idErr != nil || id.IsZero() {
		return s.loginFailed("bad", "The user name is not a credential id, which looks like crd_…")
	}
	credential, known := dir.Credential(id)
	if !known {
		if !s.server.opt.Connected() {
			// It may have been made while control was out of reach.
			return s.tryLater("This credential is not known here yet, try again later")
		}
		credential = &policy.Credential{} // spend the same time as for a known one
	}
	hash, ok := secretMatches(&dir.View().CredentialKey, credential, secret, now)
	if !ok || !known {
		return s.loginFailed("bad", "The user name or the secret is wrong")
	}
	if !credential.NotAfter.IsZero() && !now.Before(credential.NotAfter) {
		return s.loginFailed("expired", "This credential expired at %s, make a new one", credential.NotAfter.UTC().Format(time.RFC3339))
	}
	if tenant, ok := dir.Tenant(credential.Tenant); !ok || tenant.Suspended {
		s.server.metrics.auth.WithLabelValues("suspended").Inc()
		return s.conn.Refuse("suspended", 535, smtp.EnhancedCode{5, 7, 1}, "This account is suspended")
	}
	if why := s.outOfScope(credential); why != "" {
		return s.loginFailed("scope", "%s", why)
	}
	s.server.metrics.auth.WithLabelValues("ok").Inc()
	s.server.logins.succeeded(s.loginKeys)
	s.credential, s.secretHash = id, hash
	s.credentialText, s.clientText = id.String(), s.conn.Remote().String()
	s.conn.Trace().About(trace.Subject{Tenant: credential.Tenant})
	return nil
}

// secretMatches compares in constant time, with the secret and with the one
// before the last rotation.
func secretMatches(key *[32]byte, c *policy.Credential, secret []byte, now time.Time) (hash [32]byte, ok bool) {
	mac := hmac.New(sha256.New, key[:])
	_, _ = mac.Write(secret) // hash.Hash never returns an error
	mac.Sum(hash[:0])
	return hash, holds(c, hash, now)
}

// holds reports whether the hash is that of a secret of the credential that is
// good now.
func holds(c *policy.Credential, hash [32]byte, now time.Time) bool {
	current := hmac.Equal(hash[:], c.SecretHash[:])
	previous := hmac.Equal(hash[:], c.PreviousHash[:])
	return current || previous && now.Before(c.PreviousUntil)
}

func (s *session) tryLater(text string) error {
	s.server.metrics.auth.WithLabelValues("unavailable").Inc()
	return s.conn.Refuse("auth_unavailable", 454, smtp.EnhancedCode{4, 7, 0}, "%s", text) // RFC 4954 section 6
}

// lockTexts says for the client whose failures a lock is for.
var lockTexts = [lockScopes]string{"from your address", "from your network", "with this user name from your network"}

// locks are the limits for failed logins.
func (s *session) locks() *lockLimits {
	p := &defaults
	if dir := s.server.opt.Policy(); dir != nil {
		p = &dir.Document().Submission
	}
	return &lockLimits{
		failures: [lockScopes]int{lockAddress: p.AuthFailuresPerIP, lockNetwork: p.AuthFailuresPerNetwork, lockAccount: p.AuthFailuresPerAccount},
		window:   p.AuthFailureWindow.D(), longest: max(p.AuthLockMax.D(), p.AuthFailureWindow.D()),
	}
}

// tenantOf returns whose account is locked, zero if it is nobody's.
func (s *session) tenantOf(account ids.Credential) ids.Tenant {
	if dir := s.server.opt.Policy(); dir != nil && !account.IsZero() {
		if c, ok := dir.Credential(account); ok {
			return c.Tenant
		}
	}
	return ids.Tenant{}
}

// loginFailed counts a failure. What the client sent is not logged: users type
// secrets into the wrong field. A lock is, with what it holds.
func (s *session) loginFailed(result, format string, args ...any) error {
	now := time.Now()
	for _, k := range s.server.logins.failed(s.loginKeys, s.locks(), now) {
		s.server.tell.begin(k, s.conn.Remote(), s.tenantOf(k.account), now)
		s.server.metrics.locks.WithLabelValues(lockNames[k.scope]).Inc()
		attrs := []any{slog.String("scope", lockNames[k.scope]), slog.Any("network", k.network), slog.Any("client_ip", s.conn.Remote())}
		if k.scope == lockAccount {
			attrs = append(attrs, slog.String("credential", k.account.String()))
		}
		s.server.opt.Logger.Warn("logins locked", attrs...)
	}
	s.server.metrics.auth.WithLabelValues(result).Inc()
	s.server.opt.Logger.Info("login failed", slog.Any("client_ip", s.conn.Remote()), slog.String("result", result))
	return s.conn.Refuse("auth_failed", 535, smtp.EnhancedCode{5, 7, 8}, format, args...)
}
