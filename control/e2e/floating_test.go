package e2e

import (
	"encoding/json"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
)

// floater is a fleet whose pool has one address, which floats.
type floater struct {
	*fleet.Fleet
	t       *testing.T
	address netip.Addr

	mu     sync.Mutex
	events []floatEvent
	slow   time.Duration // an EHLO from the address is answered after that
}

// floatEvent is a command that a mail host had from the address, or a connection.
type floatEvent struct {
	at       time.Time
	provider string
	phase    lab.Phase
}

type floatRow struct {
	State      string    `json:"state"`
	Node       string    `json:"node"`
	Epoch      uint64    `json:"epoch"`
	Leased     bool      `json:"leased"`
	LeaseHeard bool      `json:"lease_heard"`
	LeaseUntil time.Time `json:"lease_until"`
	FreeAt     time.Time `json:"free_at"`
}

// startFloating gives the first of some relays a floating address, and takes all
// pinned ones away.
func startFloating(t *testing.T, relays int) *floater {
	f := &floater{Fleet: start(t, fleet.Config{Relays: relays, Open: true, NoDKIM: true, NoHandover: true}), t: t}
	f.address = f.Relays[0].Sources[0].Next()
	if err := f.Lab.AddPTR(f.address, "float.relais.test"); err != nil {
		t.Fatal(err)
	}
	ctl(t, f.Fleet, "ip", "add", f.address.String(), "--ehlo", "float.relais.test", "--pool", "default", "--node", f.Relays[0].Node, "--floating")
	ctl(t, f.Fleet, "ip", "check", f.address.String())
	f.uses(f.Relays[0], 2) // both: with one it might be the other
	for _, r := range f.Relays {
		ctl(t, f.Fleet, "ip", "release", r.Sources[0].String(), "--reason", "one address is enough")
	}
	f.uses(f.Relays[0], 1)
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, lab.Behaviour{Answer: f.answer}); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// answer notes what comes from the address.
func (f *floater) answer(e lab.Event) (a lab.Answer) {
	if e.Source != f.address {
		return a
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, floatEvent{time.Now(), e.Provider, e.Phase})
	if e.Phase == lab.PhaseEhlo && e.Provider == lab.Google {
		a.Delay = f.slow
	}
	return a
}

// seen returns what a provider had from the address since a time.
func (f *floater) seen(provider string, since time.Time) (out []floatEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.events {
		if e.provider == provider && e.at.After(since) {
			out = append(out, e)
		}
	}
	return out
}

func (f *floater) show() (row floatRow) {
	f.t.Helper()
	if err := json.Unmarshal([]byte(ctl(f.t, f.Fleet, "ip", "show", f.address.String(), "--json")), &row); err != nil {
		f.t.Fatal(err)
	}
	return row
}

// uses waits until a relay uses so many addresses. It is asked for a lease within
// seconds; on a busy machine that takes longer.
func (f *floater) uses(r *fleet.Relay, addresses float64) {
	f.t.Helper()
	eventually(f.t, time.Minute, r.Name+" to use what it may", func() bool {
		return metricOf(f.t, r, `relais_relay_sources{state="usable"}`) == addresses && metricOf(f.t, r, `relais_relay_sources{state="not_leased"}`) <= 1
	})
}

// submit gives a relay mail for a provider.
func (f *floater) submit(r *fleet.Relay, provider, tag string, n int) []fleet.Submitted {
	f.t.Helper()
	var to []string
	for i := range n {
		address, err := f.Lab.Recipient(provider, i, lab.Accept)
		if err != nil {
			f.t.Fatal(err)
		}
		to = append(to, address)
	}
	out, err := f.Submit(within(f.t, time.Minute), fleet.Stream{Recipients: to, Size: 1000, Connections: 2, Tag: tag, Only: r})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, s := range out {
		if s.Result.State != lab.StateAccepted {
			f.t.Fatalf("not accepted: %+v", s)
		}
	}
	return out
}

func (f *floater) arrive(mails []fleet.Submitted) {
	f.t.Helper()
	eventually(f.t, 2*time.Minute, "the mail to arrive", func() bool {
		for _, m := range mails {
			if f.Lab.Deliveries(m.MessageID, m.Recipient) == 0 {
				return false
			}
		}
		return true
	})
}

// why returns what queue why says of the first mail of a relay.
func (f *floater) why(r *fleet.Relay) string {
	f.t.Helper()
	for _, word := range strings.Fields(string(relayCommand(f.t, r, "queue", "list"))) {
		if strings.HasPrefix(word, "msg_") {
			return string(queueWhy(f.t, r, word))
		}
	}
	return ""
}

// TestAFloatingAddressIsTakenOver stops a relay that has sessions open from its
// floating address. Nobody else gets the address before the lease is over; then
// another relay sends from it, and the first, when it goes on, does not.
func TestAFloatingAddressIsTakenOver(t *testing.T) {
	t.Parallel()
	f := startFloating(t, 2)
	first, second := f.Relays[0], f.Relays[1]
	before := f.show()
	if before.Node != first.Node || before.State != "assigned" || !before.Leased || !before.LeaseHeard {
		t.Fatalf("the address is %+v", before)
	}
	f.arrive(f.submit(first, lab.Yahoo, "leased", 5))
	// Long enough for the relay to be stopped meanwhile, and over before it goes on.
	f.mu.Lock()
	f.slow = 90 * time.Second
	f.mu.Unlock()
	since := time.Now()
	open := func() (n int) {
		for _, e := range f.seen(lab.Google, since) {
			if e.phase == lab.PhaseEhlo {
				n++
			}
		}
		return n
	}
	mail := f.submit(first, lab.Google, "held", 10)
	eventually(t, time.Minute, "a session to be opened", func() bool { return open() > 0 })
	if err := first.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	held := open()
	f.mu.Lock()
	f.slow = 0
	f.mu.Unlock()
	refusedCtl(t, f.Fleet, "it is free at ", "ip", "assign", f.address.String(), "--node", second.Node)
	told := f.show() // no report comes any more; what the answer took is in the times
	took := time.Since(stopped)
	times := ownership.DefaultConfig()
	if most := stopped.Add(lease.Outlast(times.TTL) + times.Takeover + took); told.FreeAt.After(most) || told.LeaseUntil.After(stopped.Add(times.TTL+took)) {
		t.Errorf("stopped at %v the relay is told to have a lease until %v, and to lose the address at %v", stopped, told.LeaseUntil, told.FreeAt)
	}
	rest(t, time.Until(told.FreeAt)-took, "the lease to be over")
	if now := f.show(); now.State != "assigned" || now.Node != first.Node {
		// It may be taken back while it is looked at, and not before.
		if time.Now().Before(told.FreeAt.Add(-took)) {
			t.Errorf("the address is %+v before its lease is over", now)
		}
	}
	eventually(t, time.Minute, "the address to be free", func() bool { return f.show().State == "free" })
	if out := ctl(t, f.Fleet, "audit", "--object", f.address.String()); !strings.Contains(out, "ip.reclaim") || !strings.Contains(out, "was silent until its lease was over") {
		t.Errorf("the audit of the address says\n%s", out)
	}
	ctl(t, f.Fleet, "ip", "assign", f.address.String(), "--node", second.Node)
	if now := f.show(); now.Node != second.Node || now.Epoch <= before.Epoch {
		t.Errorf("the address was %+v and is %+v", before, now)
	}
	f.uses(second, 1)
	taken := time.Now()
	f.arrive(f.submit(second, lab.Yahoo, "taken", 10))
	if len(f.seen(lab.Yahoo, taken)) == 0 {
		t.Error("nothing came from the address")
	}

	resumed := time.Now() // what it had written before it was stopped has been read by now
	if err := first.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	f.uses(first, 0)
	eventually(t, time.Minute, "it to have closed what it held", func() bool {
		return metricOf(t, first, "relais_relay_lease_closed_connections_total") >= float64(held)
	})
	eventually(t, time.Minute, "it to be linked again", func() bool { s, err := statusOf(first); return err == nil && s.Connected })
	f.arrive(f.submit(second, lab.Yahoo, "both", 10))
	rest(t, 5*time.Second, "the first relay to send if it will") // nothing says that it will not
	if late := f.seen(lab.Google, resumed); len(late) > 0 {
		t.Errorf("a relay that lost its address at %v sent from it: %+v", told.FreeAt, late)
	}
	// The first never has it again by itself; on order it has.
	ctl(t, f.Fleet, "ip", "release", f.address.String(), "--reason", "back")
	eventually(t, time.Minute, "the second relay to let go", func() bool { return f.show().State == "free" })
	ctl(t, f.Fleet, "ip", "assign", f.address.String(), "--node", first.Node)
	f.arrive(mail)
}

// TestACutOffRelayStopsUsingItsFloatingAddress kills the control server: mail goes
// out until the lease is over and waits then, and queue why says for what.
func TestACutOffRelayStopsUsingItsFloatingAddress(t *testing.T) {
	t.Parallel()
	f := startFloating(t, 1)
	r := f.Relays[0]
	f.arrive(f.submit(r, lab.Google, "linked", 5))
	f.Control.Kill()
	cut := time.Now()
	times := ownership.DefaultConfig()
	f.arrive(f.submit(r, lab.Google, "leased", 5)) // the last report was answered a moment ago
	rest(t, time.Until(cut.Add(times.TTL)), "the lease to end")
	f.uses(r, 0)
	mail := f.submit(r, lab.Google, "waiting", 5)
	eventually(t, time.Minute, "queue why to say what the mail waits for", func() bool {
		why := f.why(r)
		return strings.Contains(why, "floating address "+f.address.String()+": its lease ended at ") && strings.Contains(why, "control is not reached")
	})
	if late := f.seen(lab.Google, cut.Add(times.TTL)); len(late) > 0 {
		t.Errorf("cut off at %v, the relay sent from its floating address: %+v", cut, late)
	}
	if err := f.RestartControl(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	f.arrive(mail)
	if now := f.show(); now.Node != r.Node || now.State != "assigned" {
		t.Errorf("the address is %+v", now)
	}
}
