package link

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	resolveTimeout     = 5 * time.Second
	maxAddressesByName = 4               // of one host name that are tried
	raceDelay          = 2 * time.Second // the first transport's start over the second
	tcpMemory          = time.Hour       // QUIC is tried second for so long after it failed
	// hurriedRaceDelay is the first transport's start over the second for
	// silenceMemory after a session died without a word: it is enough for a
	// transport that works to win (RFC 8305 section 5 has the same), and little
	// time lost on one that does not.
	hurriedRaceDelay = 250 * time.Millisecond
	silenceMemory    = time.Minute
	maxRemembered    = 256         // targets
	closeLinger      = time.Second // a closed QUIC connection answers stragglers
)

// DialerConfig configures a Dialer.
type DialerConfig struct {
	Local    netip.Addr    // address to connect from; zero: the kernel chooses
	ResetKey [32]byte      // from the node's key (RFC 9000 section 10.3)
	Timeout  time.Duration // for one address and transport; 0: DefaultDialTimeout
}

// Dialer opens sessions to servers: over QUIC or, where UDP does not get
// through, over TCP. It remembers what worked. It is safe for concurrent use.
type Dialer struct {
	config DialerConfig

	mu       sync.Mutex
	byTCP    map[netip.AddrPort]time.Time // when TCP had to be used
	sessions map[Session]struct{}         // that have not ended
	silence  time.Time                    // when a session died without a word; zero: never
}

// NewDialer returns a dialer.
func NewDialer(config DialerConfig) *Dialer {
	if config.Timeout == 0 {
		config.Timeout = DefaultDialTimeout
	}
	return &Dialer{config: config, byTCP: make(map[netip.AddrPort]time.Time), sessions: make(map[Session]struct{})}
}

// Dial opens a session to address, "host:port". When it returns, the server has
// passed the checks of the TLS configuration; whether the server accepts our
// certificate shows with the first exchange (RFC 8446 section 4.4.2.4).
func (d *Dialer) Dial(ctx context.Context, address string, config *tls.Config) (Session, error) {
	targets, err := resolve(ctx, address)
	if err != nil {
		return nil, err
	}
	for _, target := range targets {
		var session Session
		if session, err = d.race(ctx, address, target, config); err == nil {
			d.keep(session)
			return session, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// keep remembers a session until it ends.
func (d *Dialer) keep(session Session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for old := range d.sessions {
		if old.Err() != nil {
			delete(d.sessions, old)
		}
	}
	d.sessions[session] = struct{}{}
}

// attempt is the result of one transport.
type attempt struct {
	over    int // overQUIC or overTCP
	session Session
	err     error
}

const (
	overQUIC = 0
	overTCP  = 1
)

// race tries the better transport first and the other when the first has failed
// or kept us waiting. What a server says about identity is final: it would say
// the same over the other transport.
func (d *Dialer) race(ctx context.Context, name string, target netip.AddrPort, config *tls.Config) (Session, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan attempt, 2)
	start := func(over int) {
		dial := d.dialQUIC
		if over == overTCP {
			dial = d.dialTCP
		}
		session, err := dial(ctx, name, target, config)
		results <- attempt{over, session, err}
	}
	first := overQUIC
	if d.prefersTCP(target) {
		first = overTCP
	}
	go start(first)
	pending, both := 1, false
	delay := time.NewTimer(d.headStart())
	defer delay.Stop()
	var failures [2]error
	for {
		select {
		case <-delay.C:
		case result := <-results:
			pending--
			if result.err == nil {
				d.won(target, result.session)
				go closeLosers(results, pending)
				return result.session, nil
			}
			failures[result.over] = result.err
			if ctx.Err() != nil || fault.Is(result.err, fault.Denied) {
				go closeLosers(results, pending)
				return nil, result.err
			}
		}
		if !both {
			both = true
			pending++
			go start(1 - first)
		}
		if pending == 0 {
			return nil, fault.Wrap(errors.Join(failures[:]...), fault.KindOf(failures[overQUIC]), "link.Dial", "%s; %s", fault.Public(failures[overQUIC]), fault.Public(failures[overTCP]))
		}
	}
}

// closeLosers ends sessions that came second.
func closeLosers(results <-chan attempt, n int) {
	for range n {
		if late := <-results; late.err == nil {
			late.session.Close(CodeDone, "another transport was faster")
		}
	}
}

// NoteSilence tells that a session died without a word. Its path may carry
// nothing any more of the transport it used, to whatever server.
func (d *Dialer) NoteSilence() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.silence = time.Now()
}

// headStart is that of the first transport over the second.
func (d *Dialer) headStart() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.silence.IsZero() && time.Since(d.silence) < silenceMemory {
		return min(hurriedRaceDelay, d.config.Timeout/2)
	}
	return min(raceDelay, d.config.Timeout/2)
}

func (d *Dialer) prefersTCP(target netip.AddrPort) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	since, ok := d.byTCP[target]
	return ok && time.Since(since) < tcpMemory
}

// won remembers the transport that worked.
func (d *Dialer) won(target netip.AddrPort, session Session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, known := d.byTCP[target]
	switch {
	case session.Transport() == "quic":
		delete(d.byTCP, target)
	case !known && len(d.byTCP) < maxRemembered:
		d.byTCP[target] = time.Now()
	case known && time.Since(d.byTCP[target]) >= tcpMemory: // QUIC was tried first and failed again
		d.byTCP[target] = time.Now()
	}
}

// dialQUIC opens a session over QUIC, on a UDP socket of its own.
func (d *Dialer) dialQUIC(ctx context.Context, name string, target netip.AddrPort, config *tls.Config) (Session, error) {
	const op = "link.Dial"
	local := &net.UDPAddr{}
	if d.config.Local.IsValid() {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(d.config.Local, 0))
	}
	socket, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "cannot open a UDP socket on %s", local.IP)
	}
	key := quic.StatelessResetKey(d.config.ResetKey)
	transport := &quic.Transport{Conn: socket, StatelessResetKey: &key}
	release := func() {
		_ = transport.Close() // nothing is left to lose
		_ = socket.Close()
	}
	limited, cancel := context.WithTimeout(ctx, d.config.Timeout)
	defer cancel()
	conn, err := transport.Dial(limited, net.UDPAddrFromAddrPort(target), config, quicConfig(d.config.Timeout))
	if err != nil {
		release()
		return nil, explain(err, op, name, d.config.Timeout.String())
	}
	context.AfterFunc(conn.Context(), func() { time.AfterFunc(closeLinger, release) })
	return quicSession{conn}, nil
}

// dialTCP opens a session over TLS on TCP.
func (d *Dialer) dialTCP(ctx context.Context, name string, target netip.AddrPort, config *tls.Config) (Session, error) {
	const op = "link.Dial"
	ctx, cancel := context.WithTimeout(ctx, d.config.Timeout)
	defer cancel()
	dialer := net.Dialer{}
	if d.config.Local.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.config.Local, 0))
	}
	socket, err := dialer.DialContext(ctx, "tcp", target.String())
	if err != nil {
		kind, what := fault.Unavailable, "takes no TCP connections"
		if isTimeout(err) {
			kind, what = fault.Timeout, "does not answer on TCP"
		}
		return nil, fault.Wrap(err, kind, op, "%s %s", name, what)
	}
	conn := tls.Client(socket, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = socket.Close() // the first error is the one worth telling
		return nil, explainHandshake(err, op, name)
	}
	return newMuxSession(conn, true), nil
}

// Close ends every session of the dialer.
func (d *Dialer) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for session := range d.sessions {
		session.Close(CodeDone, "")
	}
	clear(d.sessions)
}

// CheckAddress reports whether address is of the form "host:port".
func CheckAddress(address string) error {
	_, _, err := splitAddress(address)
	return err
}

func splitAddress(address string) (host string, port uint16, err error) {
	const op = "link.splitAddress"
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, &fault.Error{Kind: fault.Invalid, Op: op, Field: "address", Public: strconv.Quote(address) + " is not of the form host:port, such as control1.example.com:7443", Cause: err}
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", 0, fault.Field(op, "address", "%q needs a host and a port from 1 to 65535", address)
	}
	return host, uint16(n), nil
}

func resolve(ctx context.Context, address string) ([]netip.AddrPort, error) {
	host, port, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(ip, port)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "link.resolve", "the host name %s does not resolve: give an address, or mend DNS", host)
	}
	ips = ips[:min(len(ips), maxAddressesByName)]
	targets := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		targets = append(targets, netip.AddrPortFrom(ip.Unmap(), port))
	}
	return targets, nil
}
