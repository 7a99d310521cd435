package delivery

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// Peer names both ends of a session, as an attempt records them.
type Peer struct {
	MX       string
	RemoteIP netip.Addr
	Source   ids.Source
	SourceIP netip.Addr
	Epoch    uint64
	TLS      string // "" for clear text, else "TLS1.3" and the like
}

// Extensions are the service extensions that the host offers and we use.
type Extensions struct {
	Pipelining bool  // RFC 2920
	EightBit   bool  // RFC 6152
	StartTLS   bool  // RFC 3207
	Size       bool  // RFC 1870
	MaxBytes   int64 // with Size: largest message taken; 0: not told
	UTF8       bool  // RFC 6531
	Chunking   bool  // RFC 3030
	Binary     bool  // RFC 3030: BINARYMIME
}

// quitWait is how long the answer to QUIT is waited for.
const quitWait = time.Second

// fallbackTimeout stands in for a timeout that the policy leaves at zero,
// because no wait may be without an end.
const fallbackTimeout = 5 * time.Minute

// Session is an open SMTP session. Only Abort may be called by another
// goroutine than the one that uses it.
type Session struct {
	conn   net.Conn // tls.Conn once STARTTLS is done
	raw    net.Conn // below TLS
	policy func() *policy.Delivery
	peer   Peer
	ext    Extensions
	in     replyReader
	out    []byte // commands not yet written, reused

	done            int  // messages accepted
	started         int  // transactions begun
	needReset       bool // the last transaction was broken off
	startTLSRefused bool // STARTTLS was offered and then refused politely
	dead            bool
	aborted         atomic.Bool

	peek    func(fd uintptr) bool // reads one byte without taking it
	peekErr error
	run     transfer // of the current transaction, reused
	trace   trace.Session
}

func newSession(conn net.Conn, p func() *policy.Delivery, peer Peer) *Session {
	s := &Session{conn: conn, raw: conn, policy: p, peer: peer}
	s.in.conn, s.in.trace = conn, &s.trace
	s.peek = func(fd uintptr) bool {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err != nil:
			s.peekErr = err
		case n == 0:
			s.peekErr = io.EOF
		default:
			s.peekErr = errOutOfTurn
		}
		return true
	}
	return s
}

// Peer returns who talks to whom.
func (s *Session) Peer() Peer { return s.peer }

// Extensions returns what the host offers.
func (s *Session) Extensions() Extensions { return s.ext }

// Delivered returns how many messages the host accepted in this session.
func (s *Session) Delivered() int { return s.done }

// Transactions returns how many transactions were begun in this session; the
// provider's messages_per_connection counts these.
func (s *Session) Transactions() int { return s.started }

// Dead reports whether the session can carry no further transaction.
func (s *Session) Dead() bool { return s.dead || s.aborted.Load() }

// Alive reports whether an idle session can be used again: the host has
// neither closed the connection nor said anything in the meantime (a 421, as a
// rule). It does not block.
func (s *Session) Alive() bool {
	if s.Dead() || s.in.buffered() > 0 {
		s.dead = true
		return false
	}
	sc, ok := s.raw.(syscall.Conn)
	if !ok {
		return true
	}
	rc, err := sc.SyscallConn()
	if err == nil {
		s.peekErr = nil
		// A read deadline in the past would hide the state of the socket.
		_ = s.raw.SetReadDeadline(time.Time{})
		err = rc.Read(s.peek)
	}
	if err != nil || !errors.Is(s.peekErr, unix.EAGAIN) {
		s.dead = true
	}
	return !s.dead
}

// Abort closes the connection at once. A running transaction ends with the
// outcomes that fit its phase.
func (s *Session) Abort() {
	if !s.aborted.Swap(true) {
		_ = s.raw.Close() // nothing is left to do about an error
	}
}

// Quit says goodbye and closes the connection. It waits at most a second.
func (s *Session) Quit() {
	if !s.Dead() {
		deadline := time.Now().Add(quitWait)
		if s.conn.SetDeadline(deadline) == nil {
			s.out = append(s.out[:0], "QUIT\r\n"...)
			s.trace.Sent(s.out)
			if _, err := s.conn.Write(s.out); err == nil {
				_, _ = s.in.read(quitWait) // RFC 5321 section 4.1.1.10: whatever it is
			}
		}
	}
	if s.trace.On() {
		s.trace.Note("the session is over")
	}
	s.dead = true
	s.Abort()
}

func orFallback(d policy.Duration) time.Duration {
	if d <= 0 {
		return fallbackTimeout
	}
	return d.D()
}

// begin reads the greeting and negotiates up to where a transaction can start.
func (s *Session) begin(ehlo string, decision tlspolicy.Decision, base *tls.Config) *Failure {
	p := s.policy()
	r, err := s.in.read(orFallback(p.GreetingTimeout))
	if err != nil {
		return s.lost(relay.PhaseConnect, err)
	}
	if !r.positive() {
		// RFC 5321 section 3.1 and RFC 7504: 554 or 521 instead of a greeting.
		return s.refused(relay.PhaseConnect, &r)
	}
	if f := s.hello(ehlo, p); f != nil {
		return f
	}
	if decision == tlspolicy.Clear {
		return nil
	}
	if !s.ext.StartTLS {
		if decision == tlspolicy.Require {
			return s.noTLS("the host does not offer STARTTLS, which the policy requires", nil)
		}
		return nil
	}
	return s.startTLS(ehlo, decision, base, p)
}

// hello says EHLO and, to a host that does not know it, HELO (RFC 5321
// section 3.2).
func (s *Session) hello(name string, p *policy.Delivery) *Failure {
	s.ext = Extensions{}
	timeout := orFallback(p.EHLOTimeout)
	r, err := s.command(timeout, "EHLO ", name)
	if err == nil && (r.code == 500 || r.code == 501 || r.code == 502 || r.code == 504) {
		r, err = s.command(timeout, "HELO ", name)
		if err == nil && r.positive() {
			return nil
		}
	}
	if err != nil {
		return s.lost(relay.PhaseEHLO, err)
	}
	if !r.positive() {
		return s.refused(relay.PhaseEHLO, &r)
	}
	return nil
}

// command sends one command of the opening dialogue and reads its reply. The
// lines of an EHLO reply are taken as extensions.
func (s *Session) command(timeout time.Duration, verb, argument string) (reply, error) {
	s.out = append(append(append(s.out[:0], verb...), argument...), '\r', '\n')
	if s.in.buffered() > 0 {
		return reply{}, errOutOfTurn
	}
	if err := s.flush(timeout); err != nil {
		return reply{}, err
	}
	if verb == "EHLO " {
		s.in.onLine = s.offer
		defer func() { s.in.onLine = nil }()
	}
	return s.in.read(timeout)
}

func (s *Session) flush(timeout time.Duration) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if s.trace.On() {
		s.trace.Sent(s.out)
	}
	_, err := s.conn.Write(s.out)
	s.out = s.out[:0]
	return err
}

// offer notes one line of an EHLO reply (RFC 5321 section 4.1.1.1). Keywords
// are compared without case; unknown ones and nonsense are left aside.
func (s *Session) offer(line []byte) {
	keyword, parameter, _ := bytes.Cut(bytes.TrimSpace(line), []byte{' '})
	switch {
	case bytes.EqualFold(keyword, []byte("PIPELINING")):
		s.ext.Pipelining = true
	case bytes.EqualFold(keyword, []byte("8BITMIME")):
		s.ext.EightBit = true
	case bytes.EqualFold(keyword, []byte("SMTPUTF8")):
		s.ext.UTF8 = true
	case bytes.EqualFold(keyword, []byte("CHUNKING")):
		s.ext.Chunking = true
	case bytes.EqualFold(keyword, []byte("BINARYMIME")):
		s.ext.Binary = true
	case bytes.EqualFold(keyword, []byte("STARTTLS")):
		s.ext.StartTLS = true
	case bytes.EqualFold(keyword, []byte("SIZE")):
		s.ext.Size = true
		// RFC 1870 section 4: no parameter or zero means no fixed limit.
		if n, err := strconv.ParseInt(string(bytes.TrimSpace(parameter)), 10, 64); err == nil && n > 0 {
			s.ext.MaxBytes = n
		}
	}
}

// startTLS upgrades the connection (RFC 3207) and says EHLO again, because
// nothing learnt in clear text may be trusted (section 4.2).
func (s *Session) startTLS(ehlo string, decision tlspolicy.Decision, base *tls.Config, p *policy.Delivery) *Failure {
	timeout := orFallback(p.EHLOTimeout)
	r, err := s.command(timeout, "STARTTLS", "")
	switch {
	case err != nil:
		return s.noTLS("the connection broke at STARTTLS: "+describe(err), err)
	case !r.positive() && decision == tlspolicy.Require:
		return s.refused(relay.PhaseSTARTTLS, &r)
	case !r.positive() && r.code == 421:
		return s.refused(relay.PhaseSTARTTLS, &r)
	case r.code != 220:
		// RFC 3207 section 4: only a 220 starts the handshake. After any other
		// reply the host still speaks clear text.
		if decision == tlspolicy.Require {
			return s.noTLS("the host did not answer STARTTLS with 220", errUnexpected)
		}
		s.startTLSRefused = true
		return nil
	case s.in.buffered() > 0:
		// Bytes behind the 220 would be taken as said under TLS.
		return s.noTLS("the host sent more than a reply to STARTTLS", errOutOfTurn)
	}
	conn := tls.Client(s.raw, tlspolicy.ForHost(base, s.peer.MX))
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return s.noTLS("TLS handshake failed: "+describe(err), err)
	}
	s.conn, s.in.conn = conn, conn
	s.peer.TLS = tlspolicy.VersionName(conn.ConnectionState().Version)
	if s.trace.On() {
		s.trace.Note("%s, %s", s.peer.TLS, tls.CipherSuiteName(conn.ConnectionState().CipherSuite))
	}
	if f := s.hello(ehlo, p); f != nil {
		if f.Reply.Code == 0 {
			f.Phase = relay.PhaseSTARTTLS // broken right after the handshake
		}
		return f
	}
	return nil
}

func (s *Session) noTLS(text string, cause error) *Failure {
	if s.trace.On() {
		s.trace.Note("%s", text)
	}
	if cause != nil {
		s.dead = true
	}
	// RFC 3463 section 3.8: X.7.10, encryption needed (registered by RFC 5248).
	return &Failure{Status: relay.Deferred, Phase: relay.PhaseSTARTTLS, Reply: relay.Reply{Enhanced: "4.7.10", Text: text}, Cause: cause}
}

func (s *Session) refused(phase relay.Phase, r *reply) *Failure {
	return &Failure{Status: relay.Deferred, Phase: phase, Reply: r.keep()}
}

// lost is the failure of a connection that broke or made no sense.
func (s *Session) lost(phase relay.Phase, err error) *Failure {
	s.traceBreak(err)
	s.dead = true
	return &Failure{Status: relay.Deferred, Phase: phase, Reply: brokenReply(err), Cause: err}
}

// brokenReply is our own words for a connection that broke: RFC 3463 section
// 3.5 X.4.2 (bad connection), section 3.6 X.5.0 for a peer that does not speak
// SMTP.
func brokenReply(err error) relay.Reply {
	if isProtocol(err) {
		return relay.Reply{Enhanced: "4.5.0", Text: describe(err)}
	}
	return relay.Reply{Enhanced: "4.4.2", Text: describe(err)}
}

// describe puts an error of a connection into words without addresses or
// library names.
func describe(err error) string {
	switch {
	case err == nil:
		return "connection closed"
	case isProtocol(err):
		return "protocol error: " + err.Error()
	case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded):
		return "timed out waiting for the host"
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return "the host closed the connection"
	case errors.Is(err, net.ErrClosed) || errors.Is(err, context.Canceled):
		return "the connection was closed here"
	case errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE):
		return "the host reset the connection"
	}
	var te *tls.RecordHeaderError
	var alert tls.AlertError
	if errors.As(err, &te) || errors.As(err, &alert) {
		return "TLS error: " + err.Error()
	}
	return "connection error"
}
