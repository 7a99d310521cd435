package submission

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"time"
	"unicode/utf8"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/relay/smtpconn"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// acceptTimeout bounds the wait for a place in the queue's next commit.
const acceptTimeout = time.Minute

// Data implements smtp.Session. It reads the message from the connection and
// not from go-smtp's reader, whose end of data is not ours (see smtpconn).
func (s *session) Data(io.Reader) error {
	if err := s.refuseClosed(); err != nil {
		return s.conn.Drain(err)
	}
	now := time.Now()
	env := &relay.Envelope{
		ID: ids.NewMessage(now), Tenant: s.cred.Tenant, Project: s.cred.Project, Credential: s.credential,
		Sender: s.sender, Recipients: s.recipients, ClientIP: s.conn.Remote(),
		EnvID: s.params.EnvID, RetFull: s.params.RetFull, AcceptedAt: now, Revision: s.dir.View().Revision,
	}
	subject := s.conn.Trace().Subject()
	subject.Message = env.ID
	s.conn.Trace().About(subject)
	rest, err := s.readHeader()
	if err != nil {
		return err
	}
	s.conn.Trace().Header(trace.Received, s.header)
	if s.params.Body == smtpconn.BodyBinary && !isText(s.header, s.conn.Limits().MaxLineBytes) {
		// RFC 3030 section 3: a header section is text whatever the body is.
		return s.conn.Drain(s.conn.Refuse("message_rule", 554, smtp.EnhancedCode{5, 6, 0}, "The header section holds NUL, CR or LF alone, or a line longer than %d octets", s.conn.Limits().MaxLineBytes))
	}
	h, err := s.applyRules(env, now)
	if err != nil {
		return s.conn.Drain(err)
	}
	if wait, ok := s.server.rates.allow(s.credential, s.cred.Scope.MessagesPerHour, now, true); !ok {
		return s.conn.Drain(s.refuseRate(s.cred.Scope.MessagesPerHour, wait))
	}
	accepted := false
	if s.cred.Scope.MessagesPerHour > 0 {
		defer func() {
			if !accepted {
				s.server.rates.giveBack(s.credential)
			}
		}()
	}
	body := s.server.opt.Spool.NewBody()
	defer body.Discard() // does nothing once the message is accepted
	size, err := s.store(env, &h, body, rest)
	if err != nil {
		return err
	}
	if err := s.enqueue(env, body); err != nil {
		return err
	}
	accepted = true
	return s.accepted(env, &h, size)
}

// readHeader gathers the header section in s.header and returns the octets of
// the body that came with its end. Its error is for the client.
func (s *session) readHeader() ([]byte, error) {
	s.header = s.header[:0]
	limit := s.maxHeaderBytes()
	for searched := 0; ; {
		chunk, err := s.conn.Chunk()
		if errors.Is(err, io.EOF) {
			// RFC 5322 section 2.1: a message without a body has no empty line.
			s.header = append(s.header, "\r\n"...)
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		s.header = append(s.header, chunk...)
		end := headerEnd(s.header, searched)
		if end == 0 && len(s.header) <= limit {
			searched = max(0, len(s.header)-3)
			continue
		}
		if end == 0 || end > limit {
			return nil, s.conn.Drain(s.conn.Refuse("header_too_large", 552, smtp.EnhancedCode{5, 3, 4}, "The header section is larger than %d octets", limit))
		}
		rest := chunk[len(chunk)-(len(s.header)-end):]
		s.header = s.header[:end]
		return rest, nil
	}
}

func (s *session) maxHeaderBytes() int { return s.dir.Document().Submission.MaxHeaderBytes }

// applyRules judges the header section and fills the envelope from it. Its
// error is for the client.
func (s *session) applyRules(env *relay.Envelope, now time.Time) (header, error) {
	var err error
	if s.fields, err = splitHeader(s.fields[:0], s.header); err != nil {
		return header{}, s.refuseFault(err)
	}
	if s.params.UTF8 && !utf8.Valid(s.header) {
		return header{}, s.conn.Refuse("message_rule", 550, smtp.EnhancedCode{5, 6, 0}, "The header section is not UTF-8, which SMTPUTF8 wants it to be") // RFC 6532 section 3.2
	}
	h, err := inspect(s.header, s.fields, now)
	if err != nil {
		return h, s.refuseFault(err)
	}
	if err := h.options.hold(s.params.Hold); err != nil {
		return h, s.refuseFault(err)
	}
	if err := h.options.check(now); err != nil {
		return h, s.refuseFault(err)
	}
	if h.received > s.dir.Document().Submission.MaxReceivedFields {
		// RFC 5321 section 6.3
		return h, s.conn.Refuse("loop", 554, smtp.EnhancedCode{5, 4, 6}, "The message has %d Received fields, it is looping", h.received)
	}
	for _, domain := range h.domains {
		if d, ok := s.dir.DomainFor(domain); !ok || d.Tenant != s.cred.Tenant {
			return h, s.conn.Refuse("from_domain", 550, smtp.EnhancedCode{5, 7, 1}, "%s is not a verified sending domain of your account", domain)
		}
		if !s.cred.Scope.AllowsDomain(domain) {
			return h, s.conn.Refuse("from_domain", 550, smtp.EnhancedCode{5, 7, 1}, "%s is not among the domains that this credential may send from", domain)
		}
	}
	stream, err := s.chooseStream(h.options.stream)
	if err != nil {
		return h, err
	}
	if !stream.AllowsPriority(h.options.priority) {
		return h, s.refuseFault(badOption("X-Relais-Priority", "is from %d to %d in mail of stream %s", stream.MinPriority, stream.MaxPriority, stream.Name))
	}
	env.Stream, env.Kind, env.Pool, env.Priority = stream.Name, stream.Kind, stream.Pool, h.options.priority
	env.From = h.from
	env.ClientDKIM = h.clientDKIM
	env.Tag = h.options.tag
	env.NotBefore = h.options.sendAt
	if !env.NotBefore.After(now) {
		env.NotBefore = time.Time{}
	}
	env.ExpiresAt = h.options.expires(now, stream.Expire.D())
	return h, nil
}

// chooseStream returns the stream that the message names, or the credential's.
func (s *session) chooseStream(name string) (*policy.ResolvedStream, error) {
	stream := s.stream
	if name != "" || stream == nil {
		if name == "" {
			name = s.cred.Stream
		}
		if name == "" {
			name = defaultStream
		}
		var err error
		if stream, err = s.dir.Stream(s.cred.Tenant, s.cred.Project, name); err != nil {
			return nil, s.refuseFault(err)
		}
	}
	if !stream.HasLocalSource && !stream.Elsewhere {
		return nil, s.refuseNoSource(stream)
	}
	return stream, nil
}

// store writes the message as it will go on: our trace field, the fields that
// stay, those that were missing, and the body. It returns its size. Its error
// is for the client.
func (s *session) store(env *relay.Envelope, h *header, body Body, rest []byte) (int64, error) {
	headerBytes, err := s.storeHeader(env, h, body)
	if err != nil {
		return 0, s.conn.Drain(s.refuseStore(err))
	}
	env.EightBit = hasEightBit(s.header)
	// RFC 6531 section 3.4: the parameter alone says that the client can, not
	// that the message must.
	env.SMTPUTF8 = s.params.UTF8 && env.EightBit
	scan := s.params.UTF8 && !env.EightBit
	if scan {
		s.parts.begin(s.header)
	}
	if s.hasher == nil {
		s.hasher = sign.NewBodyHasher()
	}
	s.hasher.Reset()
	size := headerBytes
	for chunk := rest; ; {
		if len(chunk) > 0 {
			_, _ = s.hasher.Write(chunk) // never returns an error
			env.EightBit = env.EightBit || hasEightBit(chunk)
			if scan {
				s.parts.write(chunk)
			}
			if _, err := body.Write(chunk); err != nil {
				return 0, s.conn.Drain(s.refuseStore(err))
			}
			size += int64(len(chunk))
		}
		if chunk, err = s.conn.Chunk(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
	}
	env.SMTPUTF8 = env.SMTPUTF8 || scan && s.parts.finish()
	env.BinaryMIME = s.conn.Binary()
	if err := body.Seal(headerBytes, s.hasher.Sum()); err != nil {
		return 0, s.refuseStore(err)
	}
	return size, nil
}

// storeHeader writes the header section and returns its size.
func (s *session) storeHeader(env *relay.Envelope, h *header, body Body) (int64, error) {
	forPath := ""
	if len(env.Recipients) == 1 && env.Recipients[0].Address.IsASCII() { // the field must not be what makes a header need SMTPUTF8
		forPath = env.Recipients[0].Address.String()
	}
	id := env.ID.String()
	top := s.conn.AppendReceived(s.trace[:0], id, forPath, env.AcceptedAt)
	size := int64(0)
	write := func(p []byte) error {
		n, err := body.Write(p)
		size += int64(n)
		return err
	}
	if err := write(top); err != nil {
		return 0, err
	}
	start := 0
	for i := range s.fields {
		if f := &s.fields[i]; f.drop {
			if f.start > start {
				if err := write(s.header[start:f.start]); err != nil {
					return 0, err
				}
			}
			start = f.end
		}
	}
	tail := len(s.header) - 2 // the empty line
	if tail > start {
		if err := write(s.header[start:tail]); err != nil {
			return 0, err
		}
	}
	end := top[:0]
	if !h.date { // RFC 6409 section 8.1
		end = append(end, "Date: "...)
		end = env.AcceptedAt.UTC().AppendFormat(end, time.RFC1123Z)
		end = append(end, "\r\n"...)
	}
	if !h.messageID { // RFC 6409 section 8.3
		end = append(end, "Message-ID: <"...)
		end = append(end, id...)
		end = append(end, '@')
		end = append(end, h.from...)
		end = append(end, ">\r\n"...)
	}
	end = append(end, "\r\n"...)
	s.trace = end
	err := write(end)
	return size, err
}

// isText reports whether p holds lines that end in CRLF, without CR, LF or NUL
// elsewhere, of at most maxLine octets.
func isText(p []byte, maxLine int) bool {
	for len(p) > 0 {
		line, rest, ok := bytes.Cut(p, []byte("\r\n"))
		if !ok || len(line) > maxLine || bytes.ContainsAny(line, "\r\n\x00") {
			return false
		}
		p = rest
	}
	return true
}

// hasEightBit reports whether p holds octets above 127.
func hasEightBit(p []byte) bool {
	for ; len(p) >= 8; p = p[8:] {
		if binary.LittleEndian.Uint64(p)&0x8080808080808080 != 0 {
			return true
		}
	}
	for _, b := range p {
		if b > 127 {
			return true
		}
	}
	return false
}

// enqueue hands the message to the queue. Its error is for the client.
func (s *session) enqueue(env *relay.Envelope, body Body) error {
	ctx, cancel := context.WithTimeout(context.Background(), acceptTimeout)
	defer cancel()
	began := time.Now()
	if err := s.server.opt.Spool.Accept(ctx, env, body); err != nil {
		return s.refuseStore(err)
	}
	s.server.metrics.accept.Observe(time.Since(began).Seconds())
	return nil
}

// accepted counts, logs and answers for a message that is on stable storage.
func (s *session) accepted(env *relay.Envelope, h *header, size int64) error {
	m := s.server.metrics
	m.messages.Inc()
	m.recipients.Add(float64(len(env.Recipients)))
	m.bytes.Add(float64(size))
	id := env.ID.String()
	version := ""
	if state := s.conn.TLS(); state != nil {
		version = tls.VersionName(state.Version)
	}
	s.server.opt.Logger.LogAttrs(context.Background(), slog.LevelInfo, "message accepted",
		slog.String("message", id), slog.String("credential", s.credentialText), slog.String("stream", env.Stream),
		slog.Int("recipients", len(env.Recipients)), slog.Int64("bytes", size), slog.String("client_ip", s.clientText),
		slog.String("tls", version), slog.String("tag", h.options.tag))
	return smtpconn.Reply(250, smtp.EnhancedCode{2, 0, 0}, "OK queued as %s", id)
}
