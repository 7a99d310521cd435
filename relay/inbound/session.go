package inbound

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/smtpconn"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// defaults hold until the first policy view, when every recipient gets 451.
var defaults = policy.Inbound{
	MaxConnections:      100,
	MaxConnectionsPerIP: 10,
	MaxMessageBytes:     1 << 20,
	MaxRecipients:       1,
	CommandTimeout:      policy.Duration(time.Minute),
}

// acceptTimeout bounds the wait for a place in the queue's next commit.
const acceptTimeout = time.Minute

// minAdmitBytes is asked for when the client does not tell the size.
const minAdmitBytes = 64 << 10

// session is one server's session with us.
type session struct {
	server *Server
	conn   *smtpconn.Conn

	dir    *policy.Directory // one policy for the whole transaction
	sender mailaddr.Address
	mails  []*queue.Inbound // one for each return path
}

// Reset implements smtp.Session.
func (s *session) Reset() { s.dir, s.sender, s.mails = nil, mailaddr.Address{}, nil }

// Logout implements smtp.Session.
func (s *session) Logout() error { return nil }

// Mail implements smtp.Session. Any sender will do: bounces have none.
func (s *session) Mail(string, *smtp.MailOptions) error {
	s.Reset()
	if closed := s.server.opt.Closed; closed != nil {
		if why := closed(); why != "" {
			return s.conn.Refuse("closed", 451, smtp.EnhancedCode{4, 3, 2}, "%s", why)
		}
	}
	if s.dir = s.server.opt.Policy(); s.dir == nil {
		return s.conn.Refuse("no_policy", 451, smtp.EnhancedCode{4, 3, 2}, "There is no policy on this relay, try again later")
	}
	sender, err := s.conn.Path()
	if err != nil {
		return s.conn.Refuse("sender_syntax", 501, smtp.EnhancedCode{5, 1, 7}, "MAIL: %s", fault.Public(err))
	}
	size := s.conn.MailParams().Size
	if limit := s.conn.Limits().MaxMessageBytes; size > limit {
		return s.conn.Refuse("too_large", 552, smtp.EnhancedCode{5, 3, 4}, "The message is larger than %d octets", limit)
	}
	if err := s.server.opt.Spool.Admit(max(size, minAdmitBytes)); err != nil {
		return s.refuseStore(err)
	}
	s.sender = sender
	return nil
}

// Rcpt implements smtp.Session. This is the only door: an address is either a
// return path that we signed, or refused.
func (s *session) Rcpt(string, *smtp.RcptOptions) error {
	to, err := s.conn.Path()
	if err != nil || to.IsNull() {
		return s.conn.Refuse("recipient_syntax", 501, smtp.EnhancedCode{5, 1, 3}, "RCPT: this is not an address")
	}
	domain, ok := s.dir.ReturnPathDomain(to.Domain)
	if !ok {
		return s.conn.Refuse("relaying", 550, smtp.EnhancedCode{5, 7, 1}, "Relaying denied: this server takes mail for its own return paths only")
	}
	if strings.EqualFold(to.Local, "postmaster") {
		// RFC 5321 section 4.5.1 wants a postmaster where a domain receives mail;
		// this one receives bounces only, and the address of people is elsewhere.
		return s.conn.Refuse("postmaster", 550, smtp.EnhancedCode{5, 7, 1}, "This domain takes bounces only, write to postmaster@%s", domain.Name)
	}
	path, err := sign.VerifyReturnPath(s.dir.ReturnPathKeys(), to.Local, time.Now())
	if err != nil {
		return s.conn.Refuse("return_path", 550, smtp.EnhancedCode{5, 7, 1}, "%s", fault.Public(err))
	}
	if limit := s.conn.Limits().MaxRecipients; len(s.mails) >= limit {
		return s.conn.Refuse("recipients", 452, smtp.EnhancedCode{4, 5, 3}, "A message has at most %d recipients here, send the others in another", limit)
	}
	for _, m := range s.mails {
		if strings.EqualFold(m.To.Local, to.Local) {
			return nil // once is enough
		}
	}
	s.conn.Trace().About(trace.Subject{Tenant: domain.Tenant, Message: path.Message, Domain: to.Domain})
	m := &queue.Inbound{Tenant: domain.Tenant, Original: path.Message, To: to, Sender: s.sender, RemoteIP: s.conn.Remote()}
	if path.Recipient != sign.NoRecipient {
		m.Index, m.PerRecipient = uint16(path.Recipient), true
	}
	s.mails = append(s.mails, m)
	return nil
}

// Data implements smtp.Session.
func (s *session) Data(io.Reader) error {
	now := time.Now()
	bodies := make([]Body, 0, len(s.mails))
	defer func() {
		for _, b := range bodies {
			b.Discard() // does nothing once it is accepted
		}
	}()
	for range s.mails {
		bodies = append(bodies, s.server.opt.Spool.NewBody())
	}
	id := ids.NewMessage(now)
	forPath := ""
	if len(s.mails) == 1 {
		forPath = s.mails[0].To.String()
	}
	w := copier{bodies: bodies}
	w.write(s.conn.AppendReceived(nil, id.String(), forPath, now))
	for w.err == nil {
		chunk, err := s.conn.Chunk()
		if errors.Is(err, io.EOF) {
			return s.accept(id, now, &w)
		}
		if err != nil {
			return err
		}
		w.write(chunk)
	}
	return s.conn.Drain(s.refuseStore(w.err))
}

// accept hands the mail to the queue, once for each return path. When only some
// are stored, the client sends all again: a bounce read twice does no harm, one
// that is lost does.
func (s *session) accept(id ids.Message, now time.Time, w *copier) error {
	ctx, cancel := context.WithTimeout(context.Background(), acceptTimeout)
	defer cancel()
	for i, m := range s.mails {
		// Nothing signs this mail, so its body's hash is not computed.
		if err := w.bodies[i].Seal(w.headerBytes(), [32]byte{}); err != nil {
			return s.refuseStore(err)
		}
		m.ID, m.ReceivedAt = id, now
		if i > 0 {
			m.ID = ids.NewMessage(now)
		}
		if err := s.server.opt.Spool.AcceptInbound(ctx, m, w.bodies[i]); err != nil {
			return s.refuseStore(err)
		}
		s.server.messages.Inc()
		s.server.bytes.Add(float64(w.size))
		s.server.opt.Logger.LogAttrs(ctx, slog.LevelInfo, "inbound mail accepted",
			slog.String("inbound", m.ID.String()), slog.String("message", m.Original.String()), slog.Int("index", index(m)),
			slog.Int64("bytes", w.size), slog.Any("client_ip", m.RemoteIP), slog.Bool("tls", s.conn.TLS() != nil))
	}
	return smtpconn.Reply(250, smtp.EnhancedCode{2, 0, 0}, "OK stored as %s", id)
}

// refuseStore answers for a store that cannot take the mail.
func (s *session) refuseStore(err error) error {
	if fault.Is(err, fault.NoSpace) || fault.Is(err, fault.Exhausted) {
		return s.conn.Refuse("no_space", 452, smtp.EnhancedCode{4, 3, 1}, "There is no space for more mail now, try again later")
	}
	s.server.opt.Logger.Error("inbound mail not stored", "error", err, "client_ip", s.conn.Remote())
	return s.conn.Refuse("store", 451, smtp.EnhancedCode{4, 3, 0}, "The mail could not be stored, try again later")
}

// copier writes a mail to the body of each return path, and finds the end of
// its header section on the way.
type copier struct {
	bodies []Body
	size   int64
	header int64   // octets of the header section; 0: its end was not seen
	tail   [3]byte // the last octets of the piece before
	err    error
}

var emptyLine = []byte("\r\n\r\n")

func (w *copier) write(p []byte) {
	for _, b := range w.bodies {
		if _, err := b.Write(p); err != nil {
			w.err = err
			return
		}
	}
	if w.header == 0 {
		joint := append(w.tail[:len(w.tail):len(w.tail)], p[:min(len(p), 3)]...)
		if i := bytes.Index(joint, emptyLine); i >= 0 {
			w.header = w.size - int64(len(w.tail)) + int64(i+len(emptyLine))
		} else if i := bytes.Index(p, emptyLine); i >= 0 {
			w.header = w.size + int64(i+len(emptyLine))
		}
		last := append(w.tail[:len(w.tail):len(w.tail)], p[max(0, len(p)-3):]...)
		copy(w.tail[:], last[len(last)-3:])
	}
	w.size += int64(len(p))
}

// headerBytes is the length of the header section; a mail without an empty line
// is nothing else.
func (w *copier) headerBytes() int64 {
	if w.header == 0 {
		return w.size
	}
	return w.header
}

// index is the recipient's index for the log, sign.NoRecipient if the return
// path names none.
func index(m *queue.Inbound) int {
	if !m.PerRecipient {
		return sign.NoRecipient
	}
	return int(m.Index)
}
