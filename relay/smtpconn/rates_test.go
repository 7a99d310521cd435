package smtpconn

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/throttle"
)

// from connects from an address of the loopback network.
func from(t testing.TB, ip, addr string) *peer {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}, Timeout: 10 * time.Second}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return newPeer(t, conn)
}

// noops says NOOP until it is answered otherwise, and returns that.
func (p *peer) noops(limit int) (said int, last string) {
	p.t.Helper()
	for said = range limit {
		p.send("NOOP\r\n")
		if last = p.reply(); !strings.HasPrefix(last, "250") {
			return said, last
		}
	}
	return limit, ""
}

func TestCommandRateOfASession(t *testing.T) {
	s, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) {
		l.CommandsPerSecondPerSession, l.MaxCommandsPerSession = 1, 1000
	})
	p := dial(t, addr)
	p.send("EHLO c\r\n")
	p.expect("250")
	said, last := p.noops(100)
	if said < burstSeconds-1 || !strings.HasPrefix(last, "421 4.7.0 Too many commands in a short time") {
		t.Errorf("%d commands, then %q", said, last)
	}
	if testutil.ToFloat64(s.metrics.refusals.WithLabelValues("command_rate_session")) != 1 {
		t.Error("the refusal was not counted")
	}
	if said, _ := dial(t, addr).noops(3); said != 3 {
		t.Errorf("another session of the client said %d commands", said)
	}
}

// A network over its rate is put off, whatever its addresses and sessions, and
// nobody else is.
func TestCommandRateOfANetwork(t *testing.T) {
	_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) {
		l.CommandsPerSecondPerNetwork, l.NetworkBitsIPv4, l.MaxCommandsPerSession = 2, 24, 1000
	})
	open := make([]*peer, 4)
	for i := range open {
		open[i] = greeted(t, fmt.Sprintf("127.20.1.%d", i+1), addr)
	}
	other := greeted(t, "127.20.2.1", addr)
	replies := 0
	for i, p := range open[:3] {
		said, last := p.noops(100)
		if replies += said; !strings.HasPrefix(last, "421 4.7.0 Too many commands from your network") {
			t.Errorf("session %d of the network: %q", i, last)
		}
	}
	if replies < 2*burstSeconds {
		t.Errorf("%d commands were taken before the rate, want %d at least", replies, 2*burstSeconds)
	}
	// Between this and the last refusal a token may have come, not five.
	refused := ""
	for range 5 {
		p := from(t, "127.20.1.9", addr)
		if line := p.reply(); strings.HasPrefix(line, "421") {
			refused = line
			break
		}
		if said, last := p.noops(100); !strings.HasPrefix(last, "421") {
			t.Fatalf("%d commands, then %q", said, last)
		}
	}
	if !strings.HasPrefix(refused, "421 4.7.0 Too many commands from your network") {
		t.Errorf("a new connection of the network was answered %q", refused)
	}
	if said, last := other.noops(5); said != 5 {
		t.Errorf("another network was answered %q", last)
	}
}

// Mail over the rate is put off and the session goes on; what a client had sent
// behind it counts as no error.
func TestMailIsPutOff(t *testing.T) {
	const most = 3
	_, backend, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) {
		l.CommandsPerSecondPerSession, l.MaxErrorsPerSession, l.MaxCommandsPerSession, l.MaxMessagesPerSession = 20, most, 1_000_000, 1000
	})
	p := dial(t, addr)
	p.send("EHLO c\r\n")
	p.expect("250")
	const wait = "450 4.7.0 Too many commands in a short time, try again in 1 s"
	taken, inMail := 0, false
	for putOff := 0; putOff < 3*most || taken < 2; {
		mail := "250"
		if !inMail {
			p.send("MAIL FROM:<a@a.example>\r\n")
		}
		p.send("RCPT TO:<b@b.example>\r\nDATA\r\n")
		if !inMail {
			mail = p.reply()
		}
		rcpt, data := p.reply(), p.reply()
		switch {
		case strings.HasPrefix(mail, "250") && strings.HasPrefix(rcpt, "250") && strings.HasPrefix(data, "354"):
			p.send("x: y\r\n\r\nz\r\n.\r\n")
			p.expect("250")
			taken++
			inMail = false
		case strings.HasPrefix(mail, "250") && strings.HasPrefix(rcpt, wait) && strings.HasPrefix(data, "554 5.5.1"):
			putOff++
			inMail = true
		case strings.HasPrefix(mail, wait) && (strings.HasPrefix(rcpt, wait) || strings.HasPrefix(rcpt, "503 5.5.1")) && strings.HasPrefix(data, "503 5.5.1"):
			putOff++
		default:
			t.Fatalf("after %d messages and %d put off: %q, %q, %q", taken, putOff, mail, rcpt, data)
		}
	}
	if len(backend.got()) != taken {
		t.Errorf("%d messages were answered 250 and %d taken", taken, len(backend.got()))
	}
}

// Refused commands have a rate of their own, over all sessions of a network.
func TestErrorRate(t *testing.T) {
	const perMinute = 6
	s, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) {
		l.ErrorsPerMinutePerNetwork, l.ErrorsPerMinute = perMinute, 3*perMinute
		l.MaxConnections, l.MaxConnectionsPerIP = 100, 100
	})
	// errOnce makes a session err once and returns what it is told then.
	errOnce := func(ip string) string {
		p := from(t, ip, addr)
		if line := p.reply(); strings.HasPrefix(line, "421") {
			return line
		}
		p.send("FROB\r\n")
		p.expect("500")
		p.send("NOOP\r\n")
		return p.reply()
	}
	for i := range perMinute {
		if last := errOnce("127.20.3.1"); !strings.HasPrefix(last, "250") {
			t.Fatalf("after error %d: %q", i+1, last)
		}
	}
	told := ""
	for i := 0; i < perMinute && told == ""; i++ { // one in 10 s has room again
		if last := errOnce("127.20.3.1"); strings.HasPrefix(last, "421 4.7.0 Too many refused commands from your network") {
			told = last
		}
	}
	if told == "" {
		t.Error("the network errs on")
	}
	// Others may err until all together have too often; who makes no errors is
	// not turned away then.
	told = ""
	for i := 0; i < 4*perMinute && told == ""; i++ {
		if last := errOnce(fmt.Sprintf("127.20.4.%d", i+1)); strings.HasPrefix(last, "421 4.3.2 Too many refused commands from all clients") {
			told = last
		}
	}
	if told == "" {
		t.Error("all together err on")
	}
	if said, last := greeted(t, "127.20.5.1", addr).noops(5); said != 5 {
		t.Errorf("a client without errors was answered %q", last)
	}
	if n := testutil.ToFloat64(s.metrics.refusals.WithLabelValues("error_rate")); n != 1 {
		t.Errorf("%v sessions ended by the rate of all, want 1", n)
	}
}

// greeted is from with the greeting read.
func greeted(t testing.TB, ip, addr string) *peer {
	t.Helper()
	p := from(t, ip, addr)
	p.expect("220")
	return p
}

// While memory is short, new connections are answered before they cost more, and
// those that are there go on.
func TestMemoryIsShort(t *testing.T) {
	var held atomic.Int64
	asked := 0
	_, _, addr := start(t, OfferSTARTTLS, func(cfg *Config, l *Limits) {
		l.MaxMemoryPercent = 80
		cfg.MemoryOver = func(percent int, _ time.Time) bool { asked = percent; return held.Load() > int64(percent) }
	})
	early := dial(t, addr)
	held.Store(81)
	for range 3 {
		p := connect(t, addr)
		if line := p.reply(); !strings.HasPrefix(line, "421 4.3.2 mx.example is short of memory") {
			t.Errorf("a new connection was answered %q", line)
		}
	}
	if said, last := early.noops(3); said != 3 {
		t.Errorf("the open session was answered %q", last)
	}
	held.Store(80)
	dial(t, addr)
	if asked != 80 {
		t.Errorf("the part asked about was %d %%", asked)
	}
}

// The table of networks is bounded, keeps those that have connections, and
// forgets the one that was left first.
func TestNetworksAreBounded(t *testing.T) {
	n := networks{most: 10}
	var limits Limits
	at := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	var open []*network
	for i := range 50 {
		open = append(open, n.join(at(i), &limits))
	}
	if len(n.known) != 50 || n.idle.Len() != 0 {
		t.Fatalf("%d networks, %d of them idle", len(n.known), n.idle.Len())
	}
	again := n.join(at(49), &limits)
	if again != open[49] || again.open != 2 {
		t.Fatal("the second connection of a network is counted elsewhere")
	}
	for _, o := range open {
		n.leave(o)
	}
	if len(n.known) != 11 || n.idle.Len() != 10 {
		t.Errorf("%d networks, %d of them idle, want 11 and 10", len(n.known), n.idle.Len())
	}
	if back := n.join(at(48), &limits); back != open[48] || back.idle != nil || n.idle.Len() != 9 {
		t.Error("a network that was left last was forgotten")
	}
	for _, tt := range []struct {
		ip, key string
		limits  Limits
	}{
		{"192.0.2.77", "192.0.2.77/32", Limits{}},
		{"192.0.2.77", "192.0.2.0/24", Limits{NetworkBitsIPv4: 24, NetworkBitsIPv6: 48}},
		{"2001:db8:1:2:3::4", "2001:db8:1::/48", Limits{NetworkBitsIPv4: 24, NetworkBitsIPv6: 48}},
		{"2001:db8:1:2:3::4", "2001:db8:1:2::/64", Limits{NetworkBitsIPv6: 64}},
	} {
		if got := n.join(netip.MustParseAddr(tt.ip), &tt.limits).key; got != netip.MustParsePrefix(tt.key) {
			t.Errorf("%s belongs to %v, want %s", tt.ip, got, tt.key)
		}
	}
}

// What policy allows can be counted.
func TestRatesOfPolicyFit(t *testing.T) {
	doc, err := policy.Parse(map[string]string{"submission": "max_commands_per_second = 200000\nmax_commands_per_second_per_network = 200000\n" +
		"max_commands_per_second_per_session = 200000\nmax_errors_per_minute = 1000000\nmax_errors_per_minute_per_network = 1000000\n"})
	if err != nil {
		t.Fatal(err)
	}
	var limits Limits
	limits.SetRates(&doc.Submission.ClientRates)
	for i, r := range []throttle.Rate{limits.rates().total, limits.rates().network, limits.rates().session, limits.rates().totalErrors, limits.rates().networkErrs} {
		if !r.Limited() {
			t.Errorf("rate %d of the policy has no bound", i)
		}
	}
	if (&Limits{}).rates() != (rates{}) {
		t.Error("limits without rates have some")
	}
}

func BenchmarkOverRate(b *testing.B) {
	var limits Limits
	limits.CommandsPerSecond, limits.CommandsPerSecondPerNetwork, limits.CommandsPerSecondPerSession = 200_000, 200_000, 200_000
	c := &Conn{server: &Server{}, remote: netip.MustParseAddr("192.0.2.1"), limits: limits}
	now := time.Now()
	c.server.enter(c, now)
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Millisecond)
		if reason, _ := c.overRate(now); reason != "" {
			b.Fatal(reason)
		}
	}
}
