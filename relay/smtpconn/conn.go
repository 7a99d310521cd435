package smtpconn

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/throttle"
)

// Bounds of one connection.
const (
	inputBytes       = 16 << 10 // read buffer; holds the longest command line
	maxCommandBytes  = 2048     // RFC 5321 section 4.5.3.1.4 wants 512, extensions add to it
	maxAuthBytes     = 12288    // RFC 4954 section 4.3
	maxHeldBytes     = 4 << 10  // replies gathered for one write
	handshakeTimeout = 30 * time.Second
	writeTimeout     = time.Minute
	lingerTimeout    = 3 * time.Second // for a refused client to read our reply before the connection ends
	maxLingerBytes   = 32 << 20
)

// mode says what the next octets of the client are.
type mode uint8

const (
	modeCommand mode = iota // a command line
	modeAuth                // a line of a SASL exchange
	modeData                // the message
	modeDataEnd             // the message is read, go-smtp has not been told
)

// Conn is a client's connection as go-smtp sees it: a net.Conn that yields
// checked command lines and swallows what go-smtp need not say. One goroutine,
// go-smtp's, reads and writes it; Close may come from another.
type Conn struct {
	server   *Server
	security Security
	remote   netip.Addr
	limits   Limits
	refusal  string     // why it only gets a 421; empty for a session
	proxied  bool       // begins with a PROXY header
	client   netip.Addr // what it is counted by; guarded by server.mu; invalid: not counted
	network  *network   // whose commands are counted with this one's; nil: not told yet

	mu     sync.Mutex // guards raw's deadline together with idle, and nc's replacement
	raw    net.Conn
	nc     net.Conn // raw, or TLS over it
	idle   bool     // waits for a command outside of a transaction
	closed bool

	tls   *tls.ConnectionState
	suite string // name of TLS's cipher suite
	begun bool
	dead  bool // nothing more is read from or told to the client

	in         []byte // in[r:w] has been read and not used
	r, w       int
	pending    []byte // what go-smtp reads next
	pendingBuf []byte
	line       []byte // a reply of go-smtp that is not whole yet
	out        []byte // replies not sent yet

	mode       mode
	verb       string // the command go-smtp is working on
	arg        string
	swallow    bool   // the reply to it is for us alone
	instead    string // said in place of go-smtp's reply to a broken SASL exchange
	helo       string
	esmtp      bool
	authed     bool
	inMail     bool // MAIL was accepted
	mailParams MailParams
	rcptParams RcptParams
	recipients int
	commands   int
	errors     int
	messages   int
	putOff     bool   // MAIL or RCPT got a 4xx, so that what was sent behind it is no error of the client's
	errorRate  string // the rate that the client's errors broke; empty: none
	data       dataState
	trace      trace.Session

	commandBucket throttle.Bucket
}

func newConn(s *Server, raw net.Conn, security Security, ip netip.Addr, limits Limits) *Conn {
	return &Conn{server: s, security: security, remote: ip, limits: limits, raw: raw, nc: raw, trace: s.cfg.Trace.Session(trace.Party{Kind: s.cfg.Kind, Remote: ip})}
}

// Remote is the client's address.
func (c *Conn) Remote() netip.Addr { return c.remote }

// TLS returns the state of TLS, nil in clear text.
func (c *Conn) TLS() *tls.ConnectionState { return c.tls }

// Trace is the dialogue for those who watch.
func (c *Conn) Trace() *trace.Session { return &c.trace }

// Argument is what followed the verb in the command that is being handled.
func (c *Conn) Argument() string { return c.arg }

// Limits returns the limits of this session.
func (c *Conn) Limits() Limits { return c.limits }

// Read implements net.Conn for go-smtp: one command line, or one line of a
// SASL exchange, or, once the session has taken the message, its end.
func (c *Conn) Read(p []byte) (int, error) {
	for len(c.pending) == 0 {
		if c.dead {
			return 0, io.EOF
		}
		var err error
		switch c.mode {
		case modeCommand:
			err = c.nextCommand()
		case modeAuth:
			err = c.nextAuthLine()
		case modeData:
			err = c.drain()
		case modeDataEnd:
			c.pending, c.mode = endOfData, modeCommand
		}
		if err != nil {
			return 0, io.EOF
		}
	}
	n := copy(p, c.pending)
	c.pending = c.pending[n:]
	return n, nil
}

var endOfData = []byte(".\r\n")

// Write implements net.Conn for go-smtp, which writes reply lines.
func (c *Conn) Write(p []byte) (int, error) {
	if !c.begun {
		c.begun = true
		c.begin()
	}
	c.line = append(c.line, p...)
	for {
		i := bytes.IndexByte(c.line, '\n')
		if i < 0 {
			return len(p), nil
		}
		if !c.dead {
			c.serverLine(c.line[:i+1])
		}
		c.line = c.line[:copy(c.line, c.line[i+1:])]
	}
}

// begin does what comes before the greeting.
func (c *Conn) begin() {
	if c.proxied && c.readProxy() != nil {
		return
	}
	if c.trace.On() {
		c.trace.Note("%s connects to %s", c.remote, c.raw.LocalAddr())
	}
	c.in = make([]byte, inputBytes)
	if c.security == ImplicitTLS && c.handshake() != nil {
		return
	}
	switch c.refusal {
	case "":
	case "draining":
		c.fail(c.refusal, "421 4.3.2 "+c.server.cfg.Hostname+" is shutting down, try again later")
	case "connections_per_ip":
		c.fail(c.refusal, "421 4.7.0 Too many connections from your address, close some and try again")
	case "connection_rate_per_ip":
		c.fail(c.refusal, "421 4.7.0 Too many new connections from your address, try again in a minute")
	case "connection_rate":
		c.fail(c.refusal, "421 4.3.2 Too many new connections, try again in a minute")
	case "memory":
		c.fail(c.refusal, "421 4.3.2 "+c.server.cfg.Hostname+" is short of memory, try again later")
	case "command_rate", "command_rate_network", "error_rate_network":
		c.fail(c.refusal, "421 "+rateTexts[c.refusal]+", try again in a minute")
	default:
		c.fail(c.refusal, "421 4.3.2 Too many connections, try again later")
	}
}

// handshake puts TLS over the connection.
func (c *Conn) handshake() error {
	t := tls.Server(c.raw, c.server.cfg.TLS)
	deadline := time.Now().Add(handshakeTimeout)
	_ = c.raw.SetDeadline(deadline) // a failure shows in the handshake
	if err := t.Handshake(); err != nil {
		c.server.metrics.handshakes.WithLabelValues("failed").Inc()
		if c.trace.On() {
			c.trace.Note("the TLS handshake failed: %v", err)
		}
		c.server.cfg.Logger.Info("TLS handshake failed", "listener", c.server.cfg.Name, "client_ip", c.remote, "error", err)
		c.dead = true
		return err
	}
	c.server.metrics.handshakes.WithLabelValues("ok").Inc()
	_ = c.raw.SetDeadline(time.Time{})
	state := t.ConnectionState()
	if c.trace.On() {
		c.trace.Note("%s, %s", tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite))
	}
	c.tls, c.suite = &state, tls.CipherSuiteName(state.CipherSuite)
	c.mu.Lock()
	c.nc = t
	c.mu.Unlock()
	return nil
}

// fill reads more input, after sending what the client may be waiting for. The
// read ends at the deadline; idle says that Shutdown may end it earlier.
func (c *Conn) fill(deadline time.Time, idle bool) error {
	if err := c.flush(); err != nil {
		return err
	}
	if c.r > 0 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	c.mu.Lock()
	if idle && c.server.draining.Load() {
		c.mu.Unlock()
		return os.ErrDeadlineExceeded
	}
	c.idle = idle
	err := c.raw.SetReadDeadline(deadline)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	n, err := c.nc.Read(c.in[c.w:])
	c.mu.Lock()
	c.idle = false
	c.mu.Unlock()
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// wake ends a read that waits for a command.
func (c *Conn) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		_ = c.raw.SetReadDeadline(time.Unix(1, 0)) // a closed socket needs no waking
	}
}

// flush sends the replies gathered so far.
func (c *Conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	if err := c.raw.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := c.nc.Write(c.out)
	c.out = c.out[:0]
	if err != nil {
		c.dead = true
	}
	return err
}

// say queues a reply line of our own.
func (c *Conn) say(reply string) {
	if c.dead {
		return
	}
	if reply[0] == '5' {
		c.erred()
	}
	c.queue(reply)
}

// queue appends a reply line to those that wait to be sent.
func (c *Conn) queue(reply string) {
	if c.trace.On() {
		c.trace.Sent([]byte(reply))
	}
	c.out = append(c.out, reply...)
	c.out = append(c.out, '\r', '\n')
	if len(c.out) > maxHeldBytes {
		_ = c.flush() // a broken connection shows in the next read
	}
}

// refuse counts a refusal and says so; the session goes on.
func (c *Conn) refuse(reason, reply string) {
	c.server.Refused(reason)
	c.say(reply)
}

// refuseSequence refuses a command that stands behind one that was not taken. A
// client that pipelines has sent it before it could know (RFC 2920 section 3.1):
// when the one before was put off, it is no error.
func (c *Conn) refuseSequence(reply string) {
	c.server.Refused("sequence")
	if c.putOff && !c.dead {
		c.queue(reply)
		return
	}
	c.say(reply)
}

// errEnded ends go-smtp's loop.
var errEnded = errors.New("smtpconn: connection ended")

// fail says one last reply and ends the connection, without a look at what the
// client sends next. It waits a little for the client to read the reply: a
// socket closed over unread input would take the reply back.
func (c *Conn) fail(reason, reply string) error {
	if c.dead {
		return errEnded
	}
	c.refuse(reason, reply)
	err := c.flush()
	c.dead = true
	if err != nil {
		return errEnded
	}
	c.server.cfg.Logger.LogAttrs(context.Background(), slog.LevelInfo, "connection ended by us",
		slog.String("listener", c.server.cfg.Name), slog.Any("client_ip", c.remote), slog.String("reason", reason), slog.String("reply", reply))
	if reason == "draining" || reason == "timeout" {
		return errEnded // the client sends nothing
	}
	if half, ok := c.nc.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // the client may be gone already
	}
	_ = c.raw.SetReadDeadline(time.Now().Add(lingerTimeout))
	for read := 0; read < maxLingerBytes; {
		n, err := c.nc.Read(c.in)
		if err != nil {
			break
		}
		read += n
	}
	return errEnded
}

// Close implements net.Conn. go-smtp calls it once its goroutine is done, and
// after QUIT.
func (c *Conn) Close() error {
	c.mu.Lock()
	nc, was := c.nc, c.closed
	c.closed = true
	c.mu.Unlock()
	if was {
		return nil
	}
	if c.trace.On() {
		c.trace.Note("the session is over")
	}
	// First, so that a client that sees the end finds room when it comes back.
	c.server.release(c)
	return nc.Close()
}

// abort breaks the connection under its goroutine.
func (c *Conn) abort() { _ = c.raw.Close() }

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.raw.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.raw.RemoteAddr() }

// SetDeadline implements net.Conn. Deadlines are the Conn's own.
func (c *Conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn like SetDeadline.
func (c *Conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn like SetDeadline.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }
