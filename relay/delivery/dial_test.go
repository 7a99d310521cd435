package delivery

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func TestNextHost(t *testing.T) {
	for _, tc := range []struct {
		name  string
		first peer
	}{
		{"554 greeting", peer{greeting: "554 5.7.1 go away"}},
		{"421 greeting", peer{greeting: "421 4.7.0 too many connections"}},
		{"no greeting", peer{greeting: closeNow}},
		{"nonsense greeting", peer{greeting: "SSH-2.0-x"}},
		{"550 at EHLO", peer{ehlo: "550 5.7.1 bad name"}},
		{"421 at EHLO", peer{ehlo: "421 4.3.2 bye"}},
		{"closed at EHLO", peer{ehlo: closeNow}},
		{"HELO refused as well", peer{ehlo: "502 what", helo: "550 no"}},
		{"421 at STARTTLS", peer{extensions: []string{"STARTTLS"}, starttls: "421 4.7.0 bye"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bad, good := tc.first, &peer{}
			startPair(t, &bad, good)
			f := newFixture(t, bad.port)
			s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1", "127.0.0.2")...))
			if failure != nil {
				t.Fatalf("%+v", failure)
			}
			defer s.Quit()
			if s.Peer().MX != "mx2.example" || s.Peer().RemoteIP != netip.MustParseAddr("127.0.0.2") || s.Peer().TLS != "" {
				t.Errorf("session with %+v", s.Peer())
			}
		})
	}
}

func TestAllHostsRefuse(t *testing.T) {
	silent, loud := &peer{greeting: closeNow}, &peer{greeting: "554 5.7.1 your address is not welcome"}
	startPair(t, silent, loud)
	f := newFixture(t, silent.port)
	_, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1", "127.0.0.2", "127.0.0.3")...))
	if failure == nil {
		t.Fatal("a session came about")
	}
	o := failure.Outcome(7)
	if got := brief([]relay.Outcome{o}); got != "deferred/connect/554/5.7.1" || o.Index != 7 || failure.MX != "mx2.example" {
		t.Errorf("%s at %s, want the words of the host that spoke", got, failure.MX)
	}
}

func TestRefusingHostIsLeftAlone(t *testing.T) {
	// The first host resets every connection: nothing listens there.
	gone, good := &peer{}, &peer{}
	startPair(t, gone, good)
	gone.stop()
	f := newFixture(t, good.port)
	hosts := hostsAt("127.0.0.1", "127.0.0.2")
	dials := &countingEgress{}
	f.dialer.egress = dials
	for range 3 {
		s, failure := f.dialer.Dial(t.Context(), target("", hosts...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		s.Quit()
	}
	if dials.n != 4 {
		t.Errorf("%d connections were tried, want 4: the dead host once", dials.n)
	}
	_, failure := f.dialer.Dial(t.Context(), target("", hosts[0]))
	if failure == nil || failure.Status != relay.NotTried || time.Until(failure.RetryAt) <= 0 {
		t.Errorf("%+v, want not tried, with a time", failure)
	}
	// Another source may have more luck.
	other := target("", hosts[0])
	other.Source.Bind = netip.MustParseAddr("127.0.0.9")
	if _, failure = f.dialer.Dial(t.Context(), other); failure == nil || failure.Status != relay.Deferred {
		t.Errorf("%+v, want a new attempt", failure)
	}
}

func TestMaxHostsPerAttempt(t *testing.T) {
	f := newFixture(t, 1)
	dials := &countingEgress{}
	f.dialer.egress = dials
	f.policy.MaxHostsPerAttempt = 2
	if _, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1", "127.0.0.2", "127.0.0.3")...)); failure == nil {
		t.Fatal("a session came about")
	}
	if dials.n != 2 {
		t.Errorf("%d hosts were tried, the bound is 2", dials.n)
	}
}

type countingEgress struct {
	plainEgress
	n int
}

func (e *countingEgress) Dial(ctx context.Context, id ids.Source, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	e.n++
	return e.plainEgress.Dial(ctx, id, remote, timeout)
}

type failingEgress struct{ err error }

func (e failingEgress) Dial(context.Context, ids.Source, netip.AddrPort, time.Duration) (net.Conn, error) {
	return nil, e.err
}

func TestLocalTroubleCostsNoAttempt(t *testing.T) {
	for cause, want := range map[egress.Cause]string{
		egress.Refused: "deferred/connect/4.4.1", egress.TimedOut: "deferred/connect/4.4.1", egress.Unreachable: "deferred/connect/4.4.1",
		egress.NoPorts: "not-tried/local/4.3.2", egress.NoFiles: "not-tried/local/4.3.2", egress.Unusable: "not-tried/local/4.3.5",
		egress.Canceled: "not-tried/local/4.3.2",
	} {
		f := newFixture(t, 1)
		f.dialer.egress = failingEgress{&egress.DialError{Cause: cause, Err: errors.New("x")}}
		_, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
		if failure == nil {
			t.Fatal("a session came about")
		}
		if got := brief([]relay.Outcome{failure.Outcome(0)}); got != want {
			t.Errorf("%s: %s, want %s", cause, got, want)
		}
	}
}

func TestOtherFamily(t *testing.T) {
	f := newFixture(t, 1)
	tgt := target("", resolve.Host{Name: "mx", Addrs: []netip.Addr{netip.MustParseAddr("2001:db8::1")}})
	_, failure := f.dialer.Dial(t.Context(), tgt)
	if failure == nil || failure.Reply.Enhanced != "4.4.4" || failure.Status != relay.Deferred {
		t.Errorf("%+v", failure)
	}
}

func TestHELO(t *testing.T) {
	p := &peer{ehlo: "502 5.5.1 what?"}
	_, s := dialPeer(t, p)
	if s.Extensions() != (Extensions{}) {
		t.Errorf("extensions %+v without EHLO", s.Extensions())
	}
	if got := brief(s.Send(transaction(2))); got != "delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0" {
		t.Error(got)
	}
	if commands, _ := p.got(); commands[2] != "MAIL FROM:<b+1@bounce.sender.example>" {
		t.Errorf("commands %q", commands)
	}
}

func TestExtensions(t *testing.T) {
	for _, tc := range []struct {
		lines []string
		want  Extensions
	}{
		{[]string{"pipelining", "Size 100", "8bitmime"}, Extensions{Pipelining: true, Size: true, MaxBytes: 100, EightBit: true}},
		{[]string{"SIZE"}, Extensions{Size: true}},
		{[]string{"SIZE 0"}, Extensions{Size: true}},
		{[]string{"SIZE 99999999999999999999"}, Extensions{Size: true}},
		{[]string{"SIZE -5"}, Extensions{Size: true}},
		{[]string{"XPIPELINING", "8BITMIMEX", "\x00\xff", ""}, Extensions{}},
	} {
		p := &peer{extensions: tc.lines}
		_, s := dialPeer(t, p)
		if s.Extensions() != tc.want {
			t.Errorf("%q: %+v, want %+v", tc.lines, s.Extensions(), tc.want)
		}
	}
}

func TestDialEndsWithContext(t *testing.T) {
	p := &peer{greeting: hang}
	p.start(t)
	f := newFixture(t, p.port)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, failure := f.dialer.Dial(ctx, target("", hostsAt("127.0.0.1", "127.0.0.2")...))
	if failure == nil || failure.Phase != relay.PhaseConnect || failure.Status == relay.Failed {
		t.Errorf("%+v", failure)
	}
}

func TestOpeningTimeouts(t *testing.T) {
	for name, p := range map[string]*peer{"greeting": {greeting: hang}, "EHLO": {ehlo: hang}} {
		p.start(t)
		f := newFixture(t, p.port)
		f.policy.GreetingTimeout, f.policy.EHLOTimeout = short, short
		_, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
		if failure == nil || failure.Reply.Enhanced != "4.4.2" {
			t.Errorf("%s: %+v", name, failure)
		}
	}
}

func TestRequiredTLSIsNeverClear(t *testing.T) {
	for name, p := range map[string]*peer{
		"not offered":  {},
		"refused":      {extensions: []string{"STARTTLS"}, starttls: "454 4.7.0 not now"},
		"broken":       {extensions: []string{"STARTTLS"}, starttls: "220 go\r\n"},
		"extra bytes":  {extensions: []string{"STARTTLS"}, starttls: "220 go\r\n250 injected"},
		"closed":       {extensions: []string{"STARTTLS"}, starttls: closeNow},
		"HELO only":    {ehlo: "502 what"},
		"no handshake": {extensions: []string{"STARTTLS"}, starttls: "220 go\r\nthis is not TLS at all, sorry"},
	} {
		t.Run(name, func(t *testing.T) {
			p.start(t)
			f := newFixture(t, p.port)
			s, failure := f.dialer.Dial(t.Context(), target(policy.TLSRequired, hostsAt("127.0.0.1")...))
			if failure == nil {
				s.Quit()
				t.Fatal("a session in clear text came about")
			}
			if failure.Phase != relay.PhaseSTARTTLS || failure.Status != relay.Deferred {
				t.Errorf("%+v", failure)
			}
			if f.broken.Broken("mx1.example", time.Now()) {
				t.Error("a host with required TLS is remembered for clear text")
			}
		})
	}
}

func TestBrokenTLSFallsBackOnce(t *testing.T) {
	for name, reply := range map[string]string{
		"refused politely": "454 4.7.0 not now",
		"no TLS behind it": "220 go\r\nnot TLS, not TLS, not TLS",
		"closed":           closeNow,
		"extra bytes":      "220 go\r\n250-injected",
	} {
		t.Run(name, func(t *testing.T) {
			p := &peer{extensions: []string{"PIPELINING", "STARTTLS"}, starttls: reply}
			p.start(t)
			f := newFixture(t, p.port)
			for range 2 {
				s, failure := f.dialer.Dial(t.Context(), target(policy.TLSOpportunistic, hostsAt("127.0.0.1")...))
				if failure != nil {
					t.Fatalf("%+v", failure)
				}
				if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
					t.Error(got)
				}
				s.Quit()
			}
			tried := 0
			commands, _ := p.got()
			for _, c := range commands {
				if c == "STARTTLS" {
					tried++
				}
			}
			if tried != 1 {
				t.Errorf("STARTTLS was tried %d times, want once: %q", tried, commands)
			}
		})
	}
}

func TestTLSOff(t *testing.T) {
	p := &peer{extensions: []string{"STARTTLS"}}
	p.start(t)
	f := newFixture(t, p.port)
	s, failure := f.dialer.Dial(t.Context(), target(policy.TLSOff, hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	s.Quit()
	if commands, _ := p.got(); len(commands) != 2 {
		t.Errorf("commands %q", commands)
	}
}

func TestBackoffIsBounded(t *testing.T) {
	b := newBackoff()
	now := time.Unix(1_800_000_000, 0)
	source := netip.MustParseAddr("192.0.2.1")
	addr := netip.MustParseAddr("10.0.0.0")
	for range maxBackoffs + 10 {
		addr = addr.Next()
		b.add(source, addr, now.Add(time.Minute), now)
	}
	if len(b.pairs) != maxBackoffs {
		t.Errorf("%d pairs, the bound is %d", len(b.pairs), maxBackoffs)
	}
	b.add(source, addr, now.Add(time.Hour), now.Add(time.Minute))
	if len(b.pairs) != 1 {
		t.Errorf("%d pairs are left after their time", len(b.pairs))
	}
	if _, off := b.until(source, addr, now.Add(time.Hour)); off || len(b.pairs) != 0 {
		t.Error("a pair outlives its time")
	}
}

// TestMuteHostIsLeftAlone: a host that takes connections and holds the line, or
// talks something else, is not waited for again by every session to its domain.
func TestMuteHostIsLeftAlone(t *testing.T) {
	for name, first := range map[string]peer{
		"silent": {greeting: hang}, "closed": {greeting: closeNow}, "no SMTP": {greeting: "SSH-2.0-x"}, "silent at EHLO": {ehlo: hang},
	} {
		t.Run(name, func(t *testing.T) {
			bad, good := first, &peer{}
			startPair(t, &bad, good)
			f := newFixture(t, bad.port)
			// It passes once, and must be enough for the good host on a busy machine.
			f.policy.GreetingTimeout, f.policy.EHLOTimeout = policy.Duration(time.Second), policy.Duration(time.Second)
			dials := &countingEgress{}
			f.dialer.egress = dials
			for range 3 {
				s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1", "127.0.0.2")...))
				if failure != nil {
					t.Fatalf("%+v", failure)
				}
				s.Quit()
			}
			if dials.n != 4 {
				t.Errorf("%d connections, want 4: the mute host once", dials.n)
			}
		})
	}
	// One that refuses us in SMTP may think better of it at any time.
	loud, good := &peer{greeting: "421 4.3.2 busy"}, &peer{}
	startPair(t, loud, good)
	f := newFixture(t, loud.port)
	dials := &countingEgress{}
	f.dialer.egress = dials
	for range 2 {
		s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1", "127.0.0.2")...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		s.Quit()
	}
	if dials.n != 4 {
		t.Errorf("%d connections, want 4", dials.n)
	}
}
