package lab

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func address(t testing.TB, l *Lab, provider string, i int, o Outcome) string {
	t.Helper()
	a, err := l.Recipient(provider, i, o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// replies sends to one recipient until it is accepted or refused for good, or
// tries run out, each time on a fresh connection; "" is a closed connection.
func replies(t *testing.T, l *Lab, provider, rcpt, id string, tries int) []string {
	t.Helper()
	var out []string
	for range tries {
		c := dial(t, l.mxAddr(t, provider), "127.0.0.7").hello()
		r := c.mail("sender@sender.test", rcpt, message(id))
		out = append(out, r[:min(len(r), 3)])
		if r != "" && (r[0] == '2' || r[0] == '5') {
			break
		}
	}
	return out
}

func TestOutcomes(t *testing.T) {
	l := startLab(t, nil)
	tests := []struct {
		o      Outcome
		want   []string
		stored int
	}{
		{Accept, []string{"250"}, 1},
		{Bounce, []string{"550"}, 0},
		{Nobody, []string{"550"}, 0},
		{Disabled, []string{"550"}, 0},
		{Full, []string{"552"}, 0},
		{FullTemp, []string{"452", "452", "452", "452"}, 0},
		{Block, []string{"550"}, 0},
		{Spam, []string{"550"}, 0},
		{Slow, []string{"250"}, 1},
		{Throttle, []string{"421", "250"}, 1},
		{Drop, []string{"", "", "250"}, 1},
		{Late, []string{"", "250"}, 2},
	}
	for _, tt := range tests {
		t.Run(string(tt.o), func(t *testing.T) {
			rcpt := address(t, l, Orange, 3, tt.o)
			got := replies(t, l, Orange, rcpt, string(tt.o)+"@x", 4)
			if fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("replies %q, want %q", got, tt.want)
			}
			if n := l.Deliveries("<"+string(tt.o)+"@x>", rcpt); n != tt.stored {
				t.Errorf("stored %d times, want %d", n, tt.stored)
			}
			if tt.o.Permanent() != (tt.want[len(tt.want)-1][0] == '5') {
				t.Errorf("Permanent() = %v", tt.o.Permanent())
			}
		})
	}
	r := l.Report()
	if r.Duplicated != 1 || r.DuplicatedExcused != 1 {
		t.Errorf("late: duplicated %d, excused %d; want 1 and 1", r.Duplicated, r.DuplicatedExcused)
	}
	if r.LimitBreaches != 0 || len(r.ProtocolFaults) != 0 {
		t.Errorf("breaches %v, faults %v", r.Breaches, r.ProtocolFaults)
	}
}

func TestDeferOnceOrTwice(t *testing.T) {
	l := startLab(t, nil)
	seen := map[int]int{}
	for i := range 20 {
		got := replies(t, l, GMX, address(t, l, GMX, i, Defer), fmt.Sprintf("d%d@x", i), 4)
		if got[len(got)-1] != "250" {
			t.Fatalf("recipient %d: %q", i, got)
		}
		seen[len(got)-1]++
	}
	if seen[1] == 0 || seen[2] == 0 || seen[1]+seen[2] != 20 {
		t.Errorf("deferrals before acceptance: %v, want some once and some twice", seen)
	}
}

func TestGreylist(t *testing.T) {
	l := startLab(t, tuned(Free, func(p *Profile) { p.GreylistDelay = 150 * time.Millisecond }))
	rcpt := address(t, l, Free, 0, Grey)
	addr := l.mxAddr(t, Free)
	c := dial(t, addr, "127.0.0.7").hello()
	first := time.Now()
	if r := c.mail("one@sender.test", rcpt, message("g@x")); !strings.HasPrefix(r, "451 4.7.1") {
		t.Fatalf("first contact: %q", r)
	}
	if r := dial(t, addr, "127.0.0.8").hello().mail("one@sender.test", rcpt, message("g@x")); !strings.HasPrefix(r, "451") {
		t.Fatalf("another source: %q", r)
	}
	for {
		r := c.mail("another@sender.test", rcpt, message("g@x"))
		if strings.HasPrefix(r, "250") {
			break
		}
		if !strings.HasPrefix(r, "451") || time.Since(first) > testPatience {
			t.Fatalf("retry: %q", r)
		}
	}
	if waited := time.Since(first); waited < 150*time.Millisecond {
		t.Errorf("accepted after %s, sooner than the greylisting delay", waited)
	}
}

func TestWordingOfBlocks(t *testing.T) {
	l := startLab(t, nil)
	for provider, token := range map[string]string{
		Google: "very low reputation", MicrosoftConsumer: "(S3150)", ExchangeOnline: "5.7.606", Yahoo: "[BL21]",
		Apple: "ipcheck.proofpoint.com", Orange: "OFR_102", LaPoste: "_510", SFR: "SFR_IN_101", Free: "spams from your IP",
		GMX: "IP address is block listed", "mx:boutique-00.test": "blocked",
	} {
		c := dial(t, l.mxAddr(t, provider), "127.0.0.7").hello()
		r := c.mail("a@sender.test", address(t, l, provider, 0, Block), "")
		if !strings.Contains(r, token) || r[0] != '5' {
			t.Errorf("%s: %q lacks %q", provider, r, token)
		}
		if strings.Contains(r, "{") {
			t.Errorf("%s: %q has an unfilled place", provider, r)
		}
	}
}

func TestEveryWordingIsComplete(t *testing.T) {
	for _, p := range DefaultProfiles(1) {
		w := p.Wording
		for name, reply := range map[string]string{
			"OverConns": w.OverConns, "OverPerConn": w.OverPerConn, "OverRate": w.OverRate, "OverRecipients": w.OverRecipients,
			"NeedTLS": w.NeedTLS, "NeedPTR": w.NeedPTR, "Unknown": w.Unknown, "Disabled": w.Disabled, "Full": w.Full,
			"FullTemp": w.FullTemp, "Greylisted": w.Greylisted, "Deferred": w.Deferred, "Throttled": w.Throttled,
			"Blocked": w.Blocked, "Spam": w.Spam, "TooLarge": w.TooLarge, "NoRelay": w.NoRelay,
		} {
			if len(reply) < 10 || reply[0] != '4' && reply[0] != '5' || reply[3] != ' ' && reply[3] != '-' {
				t.Errorf("%s: %s is %q", p.Name, name, reply)
			}
			permanent := map[string]bool{"Unknown": true, "Disabled": true, "Full": true, "Blocked": true, "Spam": true, "TooLarge": true, "NoRelay": true}
			temporary := map[string]bool{"OverConns": true, "OverPerConn": true, "OverRate": true, "OverRecipients": true, "FullTemp": true, "Greylisted": true, "Deferred": true, "Throttled": true}
			if permanent[name] && reply[0] != '5' || temporary[name] && reply[0] != '4' {
				t.Errorf("%s: %s has the wrong class: %q", p.Name, name, reply)
			}
		}
	}
}

func TestDecisionsDoNotDependOnOrder(t *testing.T) {
	p := DefaultProfiles(1)[3]
	a, b, other := newDice(7, p.Name), newDice(7, p.Name), newDice(8, p.Name)
	p.DeferShare, p.GreylistShare = 0.3, 0.3
	forward := map[string]fate{}
	key := func(i, try int) string { return fmt.Sprintf("user%d@yahoo.test/%d", i, try) }
	for i := range 500 {
		for try := 1; try <= 2; try++ {
			forward[key(i, try)] = a.decide(&p, fmt.Sprintf("user%d@yahoo.test", i), Accept, try, false)
		}
	}
	differ, deferred := 0, 0
	for i := 499; i >= 0; i-- {
		for try := 2; try >= 1; try-- {
			rcpt := fmt.Sprintf("user%d@yahoo.test", i)
			if got := b.decide(&p, rcpt, Accept, try, false); got != forward[key(i, try)] {
				t.Fatalf("%s: %d, was %d", key(i, try), got, forward[key(i, try)])
			}
			if other.decide(&p, rcpt, Accept, try, false) != forward[key(i, try)] {
				differ++
			}
			if forward[key(i, try)] == fateDefer {
				deferred++
			}
		}
	}
	if differ == 0 {
		t.Error("another seed decides the same")
	}
	if deferred < 200 || deferred > 400 {
		t.Errorf("%d of 1000 tries deferred, want about 300", deferred)
	}
}

func TestGenerationsForget(t *testing.T) {
	g := newGenerations[int](10)
	for i := range 35 {
		g.put(fmt.Sprint(i), i)
	}
	if v, ok := g.get("34"); !ok || v != 34 {
		t.Error("the newest key is gone")
	}
	if _, ok := g.get("3"); ok {
		t.Error("an old key is still there")
	}
	if n := len(g.young) + len(g.old); n > 20 {
		t.Errorf("%d keys kept, want at most 20", n)
	}
}

func TestRandomDeferralsAndGreylistingEnd(t *testing.T) {
	l := startLab(t, func(c *Config) {
		c.Mode = Realistic
		c.Tune = func(p *Profile) {
			p.DeferShare, p.GreylistShare, p.GreylistDelay = 0.3, 0.5, time.Millisecond
		}
	})
	const n = 30
	c := dial(t, l.mxAddr(t, "mx:boutique-01.test"), "127.0.0.7").hello()
	for i := range n {
		rcpt := address(t, l, "mx:boutique-01.test", i, Accept)
		deadline := time.Now().Add(testPatience)
		for r := ""; !strings.HasPrefix(r, "250"); {
			if r = c.mail("a@sender.test", rcpt, message(fmt.Sprintf("r%d@x", i))); strings.HasPrefix(r, "5") || time.Now().After(deadline) {
				t.Fatalf("%s: %q", rcpt, r)
			}
		}
	}
	if r := l.Report(); r.Deferred < n/4 || r.Accepted != n {
		t.Errorf("accepted %d, deferred %d; want %d and a good share", r.Accepted, r.Deferred, n)
	}
}
