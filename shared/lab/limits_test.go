package lab

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func breachesOf(r Report, limit LimitName) []Breach {
	var out []Breach
	for _, b := range r.Breaches {
		if b.Limit == limit {
			out = append(out, b)
		}
	}
	return out
}

func TestConnectionLimit(t *testing.T) {
	l := startLab(t, tuned(Orange, func(p *Profile) { p.Limits = Limits{Connections: 2} }))
	addr := l.mxAddr(t, Orange)
	first := dial(t, addr, "127.0.0.7").hello()
	dial(t, addr, "127.0.0.7").hello()
	dial(t, addr, "127.0.0.8").hello() // another source has its own count
	if r := l.Report(); r.LimitBreaches != 0 {
		t.Fatalf("within the limit: %v", r.Breaches)
	}
	third := dial(t, addr, "127.0.0.7")
	third.want("421 4.7.0 smtp-in.orange.fr (127.0.0.7)")
	third.wantClosed()
	r := l.Report()
	b := breachesOf(r, LimitConnections)
	if r.LimitBreaches != 1 || len(b) != 1 || b[0].Allowed != 2 || b[0].Seen != 3 || b[0].Provider != Orange || b[0].Source.String() != "127.0.0.7" {
		t.Fatalf("breaches %v", r.Breaches)
	}
	if r.Lanes[0].MaxConnections != 3 || r.Lanes[0].Breaches != 1 || r.Lanes[1].MaxConnections != 1 {
		t.Errorf("lanes %+v", r.Lanes)
	}
	// One that closes makes room for another, however close in time.
	for range 20 {
		first.send("QUIT\r\n")
		if err := first.conn.Close(); err != nil {
			t.Fatal(err)
		}
		first = dial(t, addr, "127.0.0.7").hello()
	}
	if n := l.Report().LimitBreaches; n != 1 {
		t.Errorf("reconnecting at the limit: %d breaches, want still 1", n)
	}
}

func TestMessagesPerConnectionLimit(t *testing.T) {
	l := startLab(t, tuned(Yahoo, func(p *Profile) { p.Limits = Limits{MessagesPerConnection: 2} }))
	c := dial(t, l.mxAddr(t, Yahoo), "127.0.0.7").hello()
	for i := range 2 {
		if r := c.mail("a@sender.test", "accept-1@yahoo.test", message(fmt.Sprintf("%d@x", i))); !strings.HasPrefix(r, "250") {
			t.Fatal(r)
		}
	}
	if n := l.Report().LimitBreaches; n != 0 {
		t.Fatalf("%d breaches within the limit", n)
	}
	c.do("MAIL FROM:<a@sender.test>", "421 Max message per connection")
	c.wantClosed()
	r := l.Report()
	b := breachesOf(r, LimitPerConn)
	if len(b) != 1 || b[0].Allowed != 2 || b[0].Seen != 3 || r.Lanes[0].MaxPerConnection != 2 {
		t.Errorf("breaches %v, lanes %+v", r.Breaches, r.Lanes)
	}
}

func TestRateLimit(t *testing.T) {
	l := startLab(t, tuned(SFR, func(p *Profile) { p.Limits = Limits{Messages: 5, RateWindow: time.Hour} }))
	c := dial(t, l.mxAddr(t, SFR), "127.0.0.7").hello()
	for i := range 5 {
		if r := c.mail("a@sender.test", "accept-1@sfr.test", message(fmt.Sprintf("%d@x", i))); !strings.HasPrefix(r, "250") {
			t.Fatal(r)
		}
	}
	c.do("MAIL FROM:<a@sender.test>", "450 4.7.1 smtp-in.sfr.fr 127.0.0.7 blocked for its volume")
	b := breachesOf(l.Report(), LimitRate)
	if len(b) != 1 || b[0].Allowed != 5 || b[0].Seen != 6 || b[0].Window != "1h0m0s" {
		t.Fatalf("breaches %v", b)
	}
	if err := l.SetLimits(SFR, Limits{Messages: 7, RateWindow: time.Hour}); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if r := c.mail("a@sender.test", "accept-1@sfr.test", message(fmt.Sprintf("more%d@x", i))); !strings.HasPrefix(r, "250") {
			t.Fatal(r)
		}
	}
	c.do("MAIL FROM:<a@sender.test>", "450 ")
}

func TestRecipientLimit(t *testing.T) {
	l := startLab(t, tuned(Google, func(p *Profile) { p.Limits = Limits{RecipientsPerTransaction: 2} }))
	c := dial(t, l.mxAddr(t, Google), "127.0.0.7").hello()
	c.do("MAIL FROM:<a@sender.test>", "250")
	c.do("RCPT TO:<accept-1@gmail.test>", "250")
	c.do("RCPT TO:<accept-2@gmail.test>", "250")
	c.do("RCPT TO:<accept-3@gmail.test>", "452 4.5.3")
	c.do("DATA", "354")
	c.send(message("m@x") + ".\r\n")
	c.want("250")
	r := l.Report()
	b := breachesOf(r, LimitRecipients)
	if len(b) != 1 || b[0].Allowed != 2 || b[0].Seen != 3 || r.Accepted != 1 || r.Recipients != 2 || r.Deferred != 1 {
		t.Errorf("breaches %v, %+v", b, r.Lanes)
	}
}

// TestRateWindowSlides checks the window against a count by hand, for every
// moment of a made-up series.
func TestRateWindowSlides(t *testing.T) {
	start := time.Unix(1000, 0)
	d := newDice(3, "rate")
	for limit := 1; limit <= 8; limit++ {
		ln := &lane{start: start}
		lim := Limits{Messages: limit, RateWindow: time.Second}
		var taken []time.Time
		now := start
		for i := range 2000 {
			now = now.Add(time.Duration(d.draw("gap", "x", i) * 400 * float64(time.Millisecond)))
			within := 0
			for _, at := range taken {
				if now.Sub(at) < lim.RateWindow {
					within++
				}
			}
			_, over := ln.begin(now, lim, 1)
			if (over == LimitRate) != (within >= limit) {
				t.Fatalf("limit %d, step %d: over %q with %d in the window", limit, i, over, within)
			}
			if over == "" {
				taken = append(taken, now)
			}
		}
	}
}

func TestTimeRingKeepsTheNewest(t *testing.T) {
	var r timeRing
	for i := 1; i <= 10; i++ {
		r.add(time.Duration(i), 4)
	}
	r.add(11, 2) // shrink
	for n, want := range map[int]time.Duration{1: 11, 2: 10} {
		if got, ok := r.last(n); !ok || got != want {
			t.Errorf("last(%d) = %d, %v; want %d", n, got, ok, want)
		}
	}
	if _, ok := r.last(3); ok {
		t.Error("a ring of two has a third")
	}
	r.add(12, 5) // grow
	for n, want := range map[int]time.Duration{1: 12, 2: 11, 3: 10} {
		if got, ok := r.last(n); !ok || got != want {
			t.Errorf("grown: last(%d) = %d, %v; want %d", n, got, ok, want)
		}
	}
	if _, ok := r.last(4); ok {
		t.Error("growing invented an entry")
	}
}

func TestDefaultLimitsAreTheNamesakes(t *testing.T) {
	want := map[string][2]int{ // connections, messages per connection
		Google: {5, 50}, MicrosoftConsumer: {5, 50}, ExchangeOnline: {5, 50}, Yahoo: {0, 20}, Apple: {10, 5},
		Orange: {2, 100}, LaPoste: {2, 100}, SFR: {2, 0}, Free: {2, 0}, GMX: {4, 20}, "mx:boutique-00.test": {10, 100},
	}
	l := startLab(t, func(c *Config) { c.Mode = Realistic })
	for _, p := range l.Providers() {
		if w, named := want[p.Name]; named && (p.Limits.Connections != w[0] || p.Limits.MessagesPerConnection != w[1]) {
			t.Errorf("%s: %+v, want %v", p.Name, p.Limits, w)
		}
		delete(want, p.Name)
		if len(p.Domains) == 0 || len(p.Hosts) == 0 || len(p.Addrs) == 0 {
			t.Errorf("%s is incomplete: %+v", p.Name, p)
		}
	}
	if len(want) != 0 {
		t.Errorf("missing %v", want)
	}
	if err := l.SetLimits(Google, Limits{Messages: 5}); err == nil {
		t.Error("a rate without a window was taken")
	}
}

func TestProvidersInsistOnTLSAndReverseDNS(t *testing.T) {
	l := startLab(t, func(c *Config) { c.Mode, c.CheckPTR = Realistic, true })
	addr := l.mxAddr(t, Google)
	c := dial(t, addr, "127.0.0.7").hello()
	c.do("MAIL FROM:<a@sender.test>", "421 4.7.29")
	c.wantClosed()
	c = dial(t, addr, "127.0.0.7").hello().startTLS(l, "gmail-smtp-in.l.google.com")
	c.do("MAIL FROM:<a@sender.test>", "550-5.7.25")
	if err := l.AddPTR(netip.MustParseAddr("127.0.0.7"), "out.sender.test"); err != nil {
		t.Fatal(err)
	}
	c.do("MAIL FROM:<a@sender.test>", "250")
}
