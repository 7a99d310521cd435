package delivery

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Words a scripted peer understands in place of a reply.
const (
	closeNow = "CLOSE" // close the connection
	hang     = "HANG"  // say nothing until the client gives up
)

// peer is an SMTP server that answers by script. Empty fields answer as a
// friendly server with PIPELINING would.
type peer struct {
	greeting   string
	ehlo       string // whole reply; "" offers extensions
	extensions []string
	helo       string
	mail       string
	rcpt       func(n int) string // n-th RCPT of the transaction
	data       string
	final      string
	rset       string
	starttls   string          // what STARTTLS gets; no TLS follows
	afterDot   string          // sent right behind the final reply
	beforeDot  string          // sent when the data begins, without waiting for its end
	stalled    <-chan struct{} // the data is not read before this is closed

	port uint16
	stop func() // listening
	seen *record
}

// record is what a peer saw.
type record struct {
	mu       sync.Mutex
	commands []string // as received, all connections
	messages [][]byte // data as received, still dot-stuffed, without the final dot
}

func (p *peer) got() (commands []string, messages [][]byte) {
	p.seen.mu.Lock()
	defer p.seen.mu.Unlock()
	return slices.Clone(p.seen.commands), slices.Clone(p.seen.messages)
}

// start listens on 127.0.0.1.
func (p *peer) start(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.on(t, l)
}

// startPair listens on 127.0.0.1 and 127.0.0.2 with one port, as all hosts of
// a dialer have the same.
func startPair(t testing.TB, one, two *peer) {
	t.Helper()
	var err error
	for range 50 {
		var first, second net.Listener
		if first, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(first.Addr().String())
		if second, err = net.Listen("tcp", "127.0.0.2:"+port); err == nil {
			one.on(t, first)
			two.on(t, second)
			return
		}
		first.Close()
	}
	t.Fatal(err)
}

func (p *peer) on(t testing.TB, l net.Listener) {
	t.Helper()
	p.seen = &record{}
	p.stop = func() { l.Close() }
	p.port = l.Addr().(*net.TCPAddr).AddrPort().Port()
	var wg sync.WaitGroup
	open := make(map[net.Conn]bool)
	var mu sync.Mutex
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

// say sends a reply; it returns false when the connection is done.
func say(c net.Conn, s string) bool {
	switch s {
	case closeNow:
		c.Close()
		return false
	case hang:
		_, _ = io.Copy(io.Discard, c)
		return false
	}
	if !strings.HasSuffix(s, "\n") {
		s += "\r\n"
	}
	_, err := io.WriteString(c, s)
	return err == nil
}

func (p *peer) serve(c net.Conn) {
	defer c.Close()
	if !say(c, or(p.greeting, "220 peer ready")) {
		return
	}
	r := bufio.NewReader(c)
	rcpts := 0
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\r\n")
		p.seen.mu.Lock()
		p.seen.commands = append(p.seen.commands, line)
		p.seen.mu.Unlock()
		verb, _, _ := strings.Cut(line, " ")
		reply := "500 what?"
		switch verb {
		case "EHLO":
			reply = or(p.ehlo, p.offers())
		case "HELO":
			reply = or(p.helo, "250 peer")
		case "MAIL":
			rcpts = 0
			reply = or(p.mail, "250 2.1.0 ok")
		case "RCPT":
			reply = "250 2.1.5 ok"
			if p.rcpt != nil {
				reply = p.rcpt(rcpts)
			}
			rcpts++
		case "STARTTLS":
			reply = or(p.starttls, "502 5.5.1 not here")
		case "RSET":
			reply = or(p.rset, "250 2.0.0 ok")
		case "QUIT":
			say(c, "221 2.0.0 bye")
			return
		case "DATA":
			reply = or(p.data, "354 go on")
			if strings.HasPrefix(reply, "354") {
				if !say(c, reply) || !p.takeData(c, r) {
					return
				}
				continue
			}
		}
		if !say(c, reply) {
			return
		}
	}
}

func (p *peer) offers() string {
	ext := p.extensions
	if ext == nil {
		ext = []string{"PIPELINING", "SIZE 10000000", "8BITMIME", "ENHANCEDSTATUSCODES"}
	}
	lines := append([]string{"peer greets you"}, ext...)
	var b strings.Builder
	for i, l := range lines {
		sep := "-"
		if i == len(lines)-1 {
			sep = " "
		}
		b.WriteString("250" + sep + l + "\r\n")
	}
	return b.String()
}

func (p *peer) takeData(c net.Conn, r *bufio.Reader) bool {
	if p.stalled != nil {
		<-p.stalled
		return false
	}
	if p.beforeDot != "" && !say(c, p.beforeDot) {
		return false
	}
	var data []byte
	for {
		line, err := r.ReadSlice('\n')
		if err != nil && err != bufio.ErrBufferFull {
			return false
		}
		if string(line) == ".\r\n" && (len(data) == 0 || data[len(data)-1] == '\n') {
			break
		}
		data = append(data, line...)
	}
	p.seen.mu.Lock()
	p.seen.messages = append(p.seen.messages, data)
	p.seen.mu.Unlock()
	if p.final == closeNow {
		return say(c, closeNow)
	}
	return say(c, or(p.final, "250 2.0.0 queued as 1")+"\r\n"+p.afterDot)
}

// plainEgress dials without binding: what egress does is tested there.
type plainEgress struct{}

func (plainEgress) Dial(ctx context.Context, _ ids.Source, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	c, err := d.DialContext(ctx, "tcp", remote.String())
	if err != nil {
		return nil, &egress.DialError{Cause: egress.Refused, Remote: remote, Err: err}
	}
	return c, nil
}

// testPolicy has room for a slow machine, and short waits for tests that need
// a timeout.
func testPolicy() *policy.Delivery {
	long := policy.Duration(10 * time.Second)
	return &policy.Delivery{ConnectTimeout: long, GreetingTimeout: long, EHLOTimeout: long, MailTimeout: long, RcptTimeout: long,
		DataTimeout: long, BlockTimeout: long, FinalDotTimeout: long, MaxHostsPerAttempt: 5, BrokenTLSMemory: policy.Duration(time.Hour),
		HostBackoff: policy.Duration(time.Minute)}
}

const short = policy.Duration(30 * time.Millisecond)

type fixture struct {
	dialer *Dialer
	broken *tlspolicy.Memory
	policy *policy.Delivery
	reg    *prometheus.Registry
}

func newFixture(t testing.TB, port uint16) *fixture {
	t.Helper()
	f := &fixture{broken: tlspolicy.NewMemory(), policy: testPolicy(), reg: prometheus.NewRegistry()}
	d, err := New(Config{Egress: plainEgress{}, Broken: f.broken, Port: port, Policy: func() *policy.Delivery { return f.policy },
		Log: slog.New(slog.DiscardHandler), Registerer: f.reg})
	if err != nil {
		t.Fatal(err)
	}
	f.dialer = d
	return f
}

func hostsAt(addrs ...string) []resolve.Host {
	var out []resolve.Host
	for i, a := range addrs {
		out = append(out, resolve.Host{Name: fmt.Sprintf("mx%d.example", i+1), Pref: uint16(i), Addrs: []netip.Addr{netip.MustParseAddr(a)}})
	}
	return out
}

func target(mode policy.TLSMode, hosts ...resolve.Host) *Target {
	return &Target{Hosts: hosts, TLS: mode, Source: policy.Source{Bind: netip.MustParseAddr("127.0.0.1"), EHLO: "out.sender.example"}}
}

func dialPeer(t testing.TB, p *peer) (*fixture, *Session) {
	t.Helper()
	p.start(t)
	f := newFixture(t, p.port)
	s, failure := f.dialer.Dial(t.Context(), target(policy.TLSOpportunistic, hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("dial: %+v", failure)
	}
	t.Cleanup(s.Abort)
	return f, s
}

func address(s string) mailaddr.Address {
	a, err := mailaddr.Parse(s)
	if err != nil {
		panic(err)
	}
	return a
}

const testMessage = "From: a@sender.example\r\nSubject: x\r\n\r\nhello\r\n.dot\r\nbye\r\n"

// transaction returns one for n recipients.
func transaction(n int) *Transaction {
	tx := &Transaction{Sender: address("b+1@bounce.sender.example"), Content: Content{Bytes: []byte(testMessage)}}
	for i := range n {
		tx.Recipients = append(tx.Recipients, Recipient{Index: uint16(10 + i), Address: address(fmt.Sprintf("r%d@example.com", i))})
	}
	return tx
}

// brief writes outcomes as "status phase code esc", one word per recipient.
func brief(outcomes []relay.Outcome) string {
	names := map[relay.Status]string{relay.Delivered: "delivered", relay.Deferred: "deferred", relay.Failed: "failed", relay.InDoubt: "doubt", relay.NotTried: "not-tried"}
	var out []string
	for _, o := range outcomes {
		s := names[o.Status] + "/" + o.Phase.String()
		if o.Reply.Code != 0 {
			s += fmt.Sprintf("/%d", o.Reply.Code)
		}
		if o.Reply.Enhanced != "" {
			s += "/" + o.Reply.Enhanced
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func unstuff(data []byte) []byte {
	var out []byte
	for line := range strings.SplitAfterSeq(string(data), "\r\n") {
		out = append(out, strings.TrimPrefix(line, ".")...)
	}
	return out
}
