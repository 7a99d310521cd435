package submission

import (
	"crypto/x509"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/smtpconn"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// defaultStream is used when neither the message nor the credential names one.
const defaultStream = "transactional"

// minAdmitBytes is asked for when the client does not tell the size.
const minAdmitBytes = 64 << 10

// maxKeptHeaderBytes bounds the header buffer that a session keeps between
// messages.
const maxKeptHeaderBytes = 32 << 10

// session is one client's session. go-smtp calls it from one goroutine.
type session struct {
	server     *Server
	conn       *smtpconn.Conn
	credential ids.Credential // zero: not authenticated
	secretHash [32]byte       // of the secret that the client logged in with
	loginKeys  []lockKey      // what failures of the login in progress count for

	issuer      *x509.Certificate // the CA that the client's certificate was found to be of
	issuerUntil time.Time

	// What the log says of every message; made once.
	credentialText, clientText string

	// The transaction.
	dir        *policy.Directory // one policy for the whole transaction
	cred       *policy.Credential
	stream     *policy.ResolvedStream // the credential's own; nil if it does not exist
	sender     mailaddr.Address
	params     smtpconn.MailParams
	recipients []relay.Recipient
	seen       map[mailaddr.Address]struct{}

	// Kept between messages.
	header []byte
	fields []field
	trace  []byte
	hasher *sign.BodyHasher
	parts  partScan
}

// Reset implements smtp.Session.
func (s *session) Reset() {
	s.dir, s.cred, s.stream = nil, nil, nil
	s.sender, s.params = mailaddr.Address{}, smtpconn.MailParams{}
	s.recipients, s.seen = nil, nil
	if cap(s.header) > maxKeptHeaderBytes {
		s.header, s.fields = nil, nil
	}
}

// Logout implements smtp.Session.
func (s *session) Logout() error { return nil }

// Mail implements smtp.Session.
func (s *session) Mail(string, *smtp.MailOptions) error {
	if s.credential.IsZero() {
		return s.conn.Refuse("auth_required", 530, smtp.EnhancedCode{5, 7, 0}, "Authentication required") // RFC 4954 section 6
	}
	s.Reset()
	if err := s.authorize(); err != nil {
		return err
	}
	sender, err := s.conn.Path()
	if err != nil {
		return s.conn.Refuse("sender_syntax", 501, smtp.EnhancedCode{5, 1, 7}, "MAIL: %s", fault.Public(err))
	}
	params := s.conn.MailParams()
	if limit := s.conn.Limits().MaxMessageBytes; params.Size > limit {
		// RFC 1870 section 6.1
		return s.conn.Refuse("too_large", 552, smtp.EnhancedCode{5, 3, 4}, "The message is larger than %d octets", limit)
	}
	if err := s.server.opt.Spool.Admit(max(params.Size, minAdmitBytes)); err != nil {
		return s.refuseStore(err)
	}
	s.sender, s.params = sender, params
	s.conn.Trace().About(trace.Subject{Tenant: s.cred.Tenant})
	return nil
}

// authorize looks the credential up again, because it may have been revoked
// since the login.
func (s *session) authorize() error {
	if err := s.refuseClosed(); err != nil {
		return err
	}
	dir := s.server.opt.Policy()
	if dir == nil {
		return s.conn.Refuse("no_policy", 451, smtp.EnhancedCode{4, 3, 2}, "There is no policy on this relay, try again later")
	}
	cred, ok := dir.Credential(s.credential)
	now := time.Now()
	if !ok || !cred.NotAfter.IsZero() && !now.Before(cred.NotAfter) || !holds(cred, s.secretHash, now) {
		return s.conn.Refuse("auth_required", 530, smtp.EnhancedCode{5, 7, 0}, "Your credential was revoked, has expired or has a new secret, authenticate again")
	}
	if tenant, ok := dir.Tenant(cred.Tenant); !ok || tenant.Suspended {
		return s.conn.Refuse("suspended", 550, smtp.EnhancedCode{5, 7, 1}, "This account is suspended")
	}
	if why := s.outOfScope(cred); why != "" {
		return s.conn.Refuse("scope", 550, smtp.EnhancedCode{5, 7, 1}, "%s", why) // the scope was changed since the login
	}
	if wait, ok := s.server.rates.allow(cred.ID, cred.Scope.MessagesPerHour, now, false); !ok {
		return s.refuseRate(cred.Scope.MessagesPerHour, wait)
	}
	s.dir, s.cred = dir, cred
	name := cred.Stream
	if name == "" {
		name = defaultStream
	}
	if stream, err := dir.Stream(cred.Tenant, cred.Project, name); err == nil {
		s.stream = stream // otherwise the message may name one that exists
	}
	return nil
}

// refuseClosed refuses while the relay takes no mail at all.
func (s *session) refuseClosed() error {
	if closed := s.server.opt.Closed; closed != nil {
		if why := closed(); why != "" {
			return s.conn.Refuse("closed", 451, smtp.EnhancedCode{4, 3, 2}, "%s", why)
		}
	}
	return nil
}

// Rcpt implements smtp.Session.
func (s *session) Rcpt(string, *smtp.RcptOptions) error {
	address, err := s.conn.Path()
	if err != nil {
		return s.conn.Refuse("recipient_syntax", 501, smtp.EnhancedCode{5, 1, 3}, "RCPT: %s", fault.Public(err))
	}
	if subject := s.conn.Trace().Subject(); subject.Domain != address.Domain {
		subject.Domain = address.Domain
		s.conn.Trace().About(subject)
	}
	if address.IsNull() {
		return s.conn.Refuse("recipient_syntax", 501, smtp.EnhancedCode{5, 1, 3}, "RCPT: a recipient has an address")
	}
	if s.dir.View().Draining {
		return s.conn.Refuse("draining", 451, smtp.EnhancedCode{4, 3, 5}, "This relay is draining, use another")
	}
	if s.stream != nil && !s.stream.HasLocalSource && !s.stream.Elsewhere {
		return s.refuseNoSource(s.stream)
	}
	if limit := s.conn.Limits().MaxRecipients; len(s.recipients) >= limit {
		// RFC 5321 section 4.5.3.1.10
		return s.conn.Refuse("recipients", 452, smtp.EnhancedCode{4, 5, 3}, "A message has at most %d recipients here, send the others in another", limit)
	}
	if s.seen == nil {
		s.seen = make(map[mailaddr.Address]struct{}, 1)
	}
	if _, again := s.seen[address]; again {
		return nil // one copy is enough
	}
	s.seen[address] = struct{}{}
	params := s.conn.RcptParams()
	s.recipients = append(s.recipients, relay.Recipient{Address: address, Notify: params.Notify, ORCPT: params.ORCPT})
	return nil
}

// refuseNoSource answers for a pool that has no source here nor at another relay
// that mail could be handed over to.
func (s *session) refuseNoSource(stream *policy.ResolvedStream) error {
	return s.conn.Refuse("no_source", 451, smtp.EnhancedCode{4, 3, 5}, "Pool %s of stream %s has no source address on this relay, nor on another that takes its mail", stream.PoolName, stream.Name)
}

// refuseStore answers for a store that cannot take the message.
func (s *session) refuseStore(err error) error {
	if fault.Is(err, fault.NoSpace) {
		return s.conn.Refuse("no_space", 452, smtp.EnhancedCode{4, 3, 1}, "There is no space for more mail now, try again later")
	}
	if fault.Is(err, fault.TooLarge) {
		// More recipients than one transaction of the store holds: to try again does not
		// help, RFC 5321 section 4.5.3.1.10 has the client send several messages.
		return s.conn.Refuse("too_large", 552, smtp.EnhancedCode{5, 3, 4}, "The message and its recipients are too large to be stored at once: send it to fewer recipients at a time")
	}
	s.server.opt.Logger.Error("message not stored", "error", err, "client_ip", s.conn.Remote())
	return s.conn.Refuse("store", 451, smtp.EnhancedCode{4, 3, 0}, "The message could not be stored, try again later")
}

// refuseFault answers for a message that breaks a rule.
func (s *session) refuseFault(err error) error {
	switch fault.KindOf(err) {
	case fault.Denied:
		return s.conn.Refuse("not_allowed", 550, smtp.EnhancedCode{5, 7, 1}, "%s", fault.Public(err))
	case fault.Invalid, fault.NotFound:
		return s.conn.Refuse("message_rule", 550, smtp.EnhancedCode{5, 6, 0}, "%s", fault.Public(err))
	}
	return s.refuseStore(err)
}
