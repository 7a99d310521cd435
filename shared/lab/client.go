package lab

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxClientConnections = 1000
	maxClientMessages    = 10_000_000
	maxClientSize        = 64 << 20
	maxReplyBytes        = 64 << 10
	clientReplyTimeout   = 2 * time.Minute
	clientDialTimeout    = 10 * time.Second
	maxBarrenSessions    = 120 // in a row, on one worker, while no message anywhere is decided
	firstRedial          = 20 * time.Millisecond
	slowestRedial        = time.Second
	dateFormat           = "Mon, 02 Jan 2006 15:04:05 -0700" // RFC 5322 section 3.3
)

// Load is a stream of mail for Send to submit. Addr, Messages, From and To are
// needed.
type Load struct {
	Addr        string      // host:port of a submission service
	ImplicitTLS bool        // TLS from the first byte (RFC 8314), else STARTTLS when TLS is set
	TLS         *tls.Config // nil: no TLS, no AUTH
	Hello       string      // EHLO name; default "client.lab.test"
	Username    string      // AUTH PLAIN when not empty
	Password    string

	Messages      int // 1 to 10,000,000
	Connections   int // at once, 1 to 1000; default 1
	PerConnection int // messages on one connection before the next is opened; 0 is no limit
	Size          int // bytes of a message, about; default 1024, at most 64 MiB
	// Overlap sends the next envelope together with the final dot, which
	// PIPELINING allows: one round trip for a message instead of two.
	Overlap bool

	Tag     string                 // makes Message-IDs unique among loads; default the time
	From    func(i int) string     // envelope sender and From of the i-th message
	To      func(i int) string     // its recipient
	Headers string                 // further header fields of every message, each ending in CRLF
	Done    func(i int, r *Result) // called as each message is decided, from several goroutines; may be nil
}

// State is what became of one message of a Load.
type State uint8

// The states.
const (
	StateUnsent   State = iota // never offered, or offered on a connection that broke before the final dot
	StateAccepted              // 2xx after the final dot
	StateRefused               // 4xx or 5xx
	StateInDoubt               // the connection broke between the final dot and its reply
)

// Result is what became of one message.
type Result struct {
	State State
	Code  int           // of the reply that decided, 0 without one
	Reply string        // its text when it refused
	Begun time.Duration // since the start of Send, when MAIL was sent
	Ended time.Duration // when the deciding reply came
}

// Sent is what became of a Load.
type Sent struct {
	Results  []Result // by message number
	Started  time.Time
	Took     time.Duration
	Accepted int
	Refused  int
	InDoubt  int
	Unsent   int
	Redials  int // connections that broke or were refused, and were opened again
}

func (s *Sent) String() string {
	return fmt.Sprintf("%d accepted, %d refused, %d in doubt, %d unsent, %d redials in %s",
		s.Accepted, s.Refused, s.InDoubt, s.Unsent, s.Redials, s.Took)
}

// MessageID returns the Message-ID of the i-th message, with angle brackets.
func (ld *Load) MessageID(i int) string {
	return "<" + ld.Tag + "." + strconv.Itoa(i) + "@load.lab.test>"
}

func (ld *Load) complete() error {
	switch {
	case ld.Addr == "":
		return errors.New("lab: load: Addr is needed")
	case ld.From == nil || ld.To == nil:
		return errors.New("lab: load: From and To are needed")
	case ld.Messages < 1 || ld.Messages > maxClientMessages:
		return fmt.Errorf("lab: load: Messages is %d: want 1 to %d", ld.Messages, maxClientMessages)
	case ld.Connections < 0 || ld.Connections > maxClientConnections:
		return fmt.Errorf("lab: load: Connections is %d: want 1 to %d", ld.Connections, maxClientConnections)
	case ld.Size < 0 || ld.Size > maxClientSize:
		return fmt.Errorf("lab: load: Size is %d: want at most %d bytes", ld.Size, maxClientSize)
	case ld.Username != "" && ld.TLS == nil:
		return errors.New("lab: load: a password is only sent over TLS, set TLS")
	case ld.ImplicitTLS && ld.TLS == nil:
		return errors.New("lab: load: ImplicitTLS needs TLS")
	}
	ld.Connections = min(max(ld.Connections, 1), ld.Messages)
	if ld.Size == 0 {
		ld.Size = 1024
	}
	if ld.Hello == "" {
		ld.Hello = "client.lab.test"
	}
	if ld.Tag == "" {
		ld.Tag = strconv.FormatInt(time.Now().UnixNano(), 36)
	}
	return nil
}

// load is a Load being sent.
type load struct {
	*Load
	body    string
	redials atomic.Int64
	decided atomic.Int64
	start   time.Time
	results []Result

	mu    sync.Mutex
	next  int   // first message nobody took yet
	again []int // messages to be taken again
}

// Send submits a load and returns when every message is decided or ctx ends.
// A message is sent once: one whose reply was lost is in doubt, not repeated.
// Connections that break are opened again. The error is about the load or
// about a service that refuses every session; refused messages are results.
func Send(ctx context.Context, ld *Load) (*Sent, error) {
	if err := ld.complete(); err != nil {
		return nil, err
	}
	w := &load{Load: ld, start: time.Now(), results: make([]Result, ld.Messages)}
	w.body = strings.Repeat(loadLine, ld.Size/len(loadLine)+1)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range ld.Connections {
		wg.Go(func() {
			if err := w.worker(ctx); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	s := &Sent{Results: w.results, Started: w.start, Took: time.Since(w.start), Redials: int(w.redials.Load())}
	for i := range s.Results {
		switch s.Results[i].State {
		case StateAccepted:
			s.Accepted++
		case StateRefused:
			s.Refused++
		case StateInDoubt:
			s.InDoubt++
		default:
			s.Unsent++
		}
	}
	if err := context.Cause(ctx); err != nil {
		return s, fmt.Errorf("lab: load: %w", err)
	}
	return s, nil
}

// loadLine is what bodies are made of. Whole lines only: a line may start
// anywhere but with a dot.
const loadLine = "The quick relay changes horses and goes on to the next post.\r\n"

// take returns the next message to send, -1 when there is none.
func (w *load) take() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.again); n > 0 {
		i := w.again[n-1]
		w.again = w.again[:n-1]
		return i
	}
	if w.next >= w.Messages {
		return -1
	}
	w.next++
	return w.next - 1
}

// putBack makes a message that was never offered in full available again.
func (w *load) putBack(i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.again = append(w.again, i)
}

func (w *load) more() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next < w.Messages || len(w.again) > 0
}

// refusedSession is a reply that refused a session for good: no other
// connection would fare better.
type refusedSession struct{ reply string }

func (e *refusedSession) Error() string { return "session refused: " + e.reply }

// worker sends messages over one connection after the other.
func (w *load) worker(ctx context.Context) error {
	wait, barren := firstRedial, 0
	for w.more() {
		before := w.decided.Load()
		err := w.session(ctx)
		if err == nil {
			wait, barren = firstRedial, 0
			continue
		}
		if ctx.Err() != nil {
			return nil // Send tells why
		}
		var refused *refusedSession
		if errors.As(err, &refused) {
			return err
		}
		w.redials.Add(1)
		if w.decided.Load() != before {
			wait, barren = firstRedial, 0
		}
		if barren++; barren >= maxBarrenSessions {
			return fmt.Errorf("%d sessions in a row got nowhere, the last: %w", barren, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		wait = min(2*wait, slowestRedial)
	}
	return nil
}

// session opens a connection and sends messages over it.
func (w *load) session(ctx context.Context) error {
	c, err := w.open(ctx)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.Close() }) // ends a read that waits
	defer stop()
	err = c.messages(w)
	if err == nil {
		err = c.expect("QUIT\r\n")
	}
	if cerr := c.conn.Close(); err == nil && ctx.Err() == nil {
		err = cerr
	}
	return err
}

func (w *load) open(ctx context.Context) (*clientConn, error) {
	d := net.Dialer{Timeout: clientDialTimeout}
	conn, err := d.DialContext(ctx, "tcp", w.Addr)
	if err != nil {
		return nil, err
	}
	c := &clientConn{conn: conn, in: make([]byte, 4096)}
	if err := c.prepare(ctx, w); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

// prepare brings a connection to where MAIL may be sent.
func (c *clientConn) prepare(ctx context.Context, w *load) error {
	if w.ImplicitTLS {
		if err := c.secure(ctx, w); err != nil {
			return err
		}
	}
	if err := c.expect(""); err != nil {
		return err
	}
	if err := c.expect("EHLO " + w.Hello + "\r\n"); err != nil {
		return err
	}
	if w.TLS != nil && !w.ImplicitTLS {
		if err := c.expect("STARTTLS\r\n"); err != nil {
			return err
		}
		if err := c.secure(ctx, w); err != nil {
			return err
		}
		if err := c.expect("EHLO " + w.Hello + "\r\n"); err != nil {
			return err
		}
	}
	if w.Username == "" {
		return nil
	}
	secret := base64.StdEncoding.EncodeToString([]byte("\x00" + w.Username + "\x00" + w.Password)) // RFC 4616
	return c.expect("AUTH PLAIN " + secret + "\r\n")
}

func (c *clientConn) secure(ctx context.Context, w *load) error {
	cfg := w.TLS
	if cfg.ServerName == "" {
		host, _, err := net.SplitHostPort(w.Addr)
		if err != nil {
			return fmt.Errorf("lab: load: Addr: %w", err)
		}
		cfg = cfg.Clone()
		cfg.ServerName = host
	}
	conn := tls.Client(c.conn, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	c.conn = conn
	return nil
}
