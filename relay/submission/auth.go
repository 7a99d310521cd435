package submission

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay/smtpconn"
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
	limits := &dir.Document().Submission
	if s.server.logins.locked(s.client(), limits.AuthFailuresPerIP, limits.AuthFailureWindow.D(), now) {
		s.server.metrics.auth.WithLabelValues("locked").Inc()
		return s.conn.Refuse("auth_locked", 454, smtp.EnhancedCode{4, 7, 0}, "Too many failed logins from your address, wait before you try again")
	}
	var id ids.Credential
	if err := id.UnmarshalText([]byte(user)); err != nil || id.IsZero() {
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
	s.credential, s.secretHash = id, hash
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

// loginFailed counts a failure of the client's address. What the client sent is
// not logged: users type secrets into the wrong field.
func (s *session) loginFailed(result, format string, args ...any) error {
	window := defaults.AuthFailureWindow.D()
	if dir := s.server.opt.Policy(); dir != nil {
		window = dir.Document().Submission.AuthFailureWindow.D()
	}
	s.server.logins.add(s.client(), window, time.Now())
	s.server.metrics.auth.WithLabelValues(result).Inc()
	s.server.opt.Logger.Info("login failed", slog.Any("client_ip", s.conn.Remote()), slog.String("result", result))
	return s.conn.Refuse("auth_failed", 535, smtp.EnhancedCode{5, 7, 8}, format, args...)
}

func (s *session) client() netip.Addr { return smtpconn.ClientOf(s.conn.Remote()) }

// maxTrackedClients bounds the memory of failed logins.
const maxTrackedClients = 1 << 16

// failures counts failed logins by client. The zero value is ready.
type failures struct {
	mu      sync.Mutex
	clients map[netip.Addr]failure
}

type failure struct {
	count int
	until time.Time // the end of the window that its first failure opened
}

// locked reports whether a client failed max times in the window that is open.
func (f *failures) locked(client netip.Addr, max int, window time.Duration, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.clients[client]
	// A window that a policy change made shorter ends with the new length.
	return ok && now.Before(e.until) && !e.until.After(now.Add(window)) && e.count >= max
}

// add counts a failure.
func (f *failures) add(client netip.Addr, window time.Duration, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.clients == nil {
		f.clients = make(map[netip.Addr]failure)
	}
	e, ok := f.clients[client]
	if !ok && len(f.clients) >= maxTrackedClients {
		f.makeRoom(now)
	}
	if !now.Before(e.until) {
		e = failure{until: now.Add(window)}
	}
	e.count++
	f.clients[client] = e
}

// makeRoom drops what has passed, or else any one client: a flood from this
// many addresses is for a firewall.
func (f *failures) makeRoom(now time.Time) {
	for client, e := range f.clients {
		if !now.Before(e.until) {
			delete(f.clients, client)
		}
	}
	if len(f.clients) < maxTrackedClients {
		return
	}
	for client := range f.clients {
		delete(f.clients, client)
		return
	}
}
