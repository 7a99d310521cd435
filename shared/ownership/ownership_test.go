package ownership

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

func node(n byte) (id ids.Node) {
	id[15] = n
	return id
}

func tenant(n byte) (id ids.Tenant) {
	id[15] = n
	return id
}

func fieldOf(err error) string {
	var e *fault.Error
	if !errors.As(err, &e) {
		return "no refusal"
	}
	return e.Field
}

// row makes an address in one line of a table.
func row(s State, owner byte, epoch uint64) Address {
	return Address{State: s, Owner: node(owner), Epoch: epoch, Pinned: true}
}

func aside(a Address) Address {
	a.Aside = true
	return a
}

func floating(a Address) Address {
	a.Pinned = false
	return a
}

// TestSteps is the whole of what may become of an address.
func TestSteps(t *testing.T) {
	type step func(Address) (Address, error)
	assign := func(to byte, epoch uint64, off bool) step {
		return func(a Address) (Address, error) { return a.Assign(node(to), epoch, off) }
	}
	release := func(aside bool) step { return func(a Address) (Address, error) { return a.Release(aside) } }
	ack := func(by byte, epoch uint64) step {
		return func(a Address) (Address, error) { return a.Acknowledge(node(by), epoch), nil }
	}
	quarantine := func(a Address) (Address, error) { return a.Quarantine(), nil }
	unquarantine := func(off bool) step { return func(a Address) (Address, error) { return a.Unquarantine(off) } }
	reclaim := func(epoch uint64) step { return func(a Address) (Address, error) { return a.Reclaim(epoch) } }

	free, mine := row(Free, 0, 5), row(Assigned, 1, 5)
	leaving, kept, empty := row(Releasing, 1, 5), row(Quarantined, 1, 5), row(Quarantined, 0, 5)
	for _, tc := range []struct {
		name string
		from Address
		do   step
		to   Address
		bad  string // field and words of the refusal
	}{
		{"a free address is assigned", free, assign(2, 6, false), row(Assigned, 2, 6), ""},
		{"epochs grow (A2)", free, assign(2, 5, true), free, " epoch 5 is not above 5"},
		{"to nobody", free, assign(0, 6, true), free, "node is missing"},
		{"again to its owner", mine, assign(1, 6, false), mine, ""},
		{"an address has an owner already (A1)", mine, assign(2, 6, false), mine, "node may still send"},
		{"its machine is off", mine, assign(2, 6, true), row(Assigned, 2, 6), ""},
		{"a releasing one is not free yet (A1)", leaving, assign(2, 6, false), leaving, "node may still send"},
		{"a releasing one goes back", leaving, assign(1, 6, false), row(Assigned, 1, 6), ""},
		{"a releasing one, its machine off", aside(leaving), assign(2, 6, true), row(Assigned, 2, 6), ""},
		{"quarantine ends first", empty, assign(2, 6, true), empty, "state in quarantine"},
		{"quarantine with an owner (A1)", kept, assign(2, 6, false), kept, "node may still send"},
		{"quarantine with that owner", kept, assign(1, 6, false), kept, "node may still send"},
		{"quarantine, its machine off", kept, assign(2, 6, true), row(Assigned, 2, 6), ""},

		{"release", mine, release(false), leaving, ""},
		{"release twice", leaving, release(false), leaving, ""},
		{"release aside", mine, release(true), aside(leaving), ""},
		{"aside stays aside", aside(leaving), release(false), aside(leaving), ""},
		{"release of a free one", free, release(false), free, ""},
		{"release of a free one aside", free, release(true), empty, ""},
		{"release of a quarantined one", kept, release(false), kept, "state in quarantine"},
		{"release of a quarantined one aside", kept, release(true), kept, ""},

		{"the owner stopped", leaving, ack(1, 5), free, ""},
		{"the owner stopped, aside", aside(leaving), ack(1, 5), empty, ""},
		{"the owner of a quarantined one stopped", kept, ack(1, 5), empty, ""},
		{"another's word", leaving, ack(2, 5), leaving, ""},
		{"nobody's word", empty, ack(0, 5), empty, ""},
		{"a word of a former epoch", leaving, ack(1, 4), leaving, ""},
		{"nobody asked", mine, ack(1, 5), mine, ""},

		{"quarantine", mine, quarantine, kept, ""},
		{"quarantine while releasing", aside(leaving), quarantine, kept, ""},
		{"quarantine of a free one", free, quarantine, empty, ""},
		{"the end of quarantine", empty, unquarantine(false), free, ""},
		{"twice", free, unquarantine(false), free, ""},
		{"with an owner (A1)", kept, unquarantine(false), kept, "node may still send"},
		{"with an owner whose machine is off", kept, unquarantine(true), free, ""},
		{"it is none", mine, unquarantine(true), mine, "state assigned, not in quarantine"},

		{"pinned addresses do not end", mine, reclaim(5), mine, "pinned does not end by itself"},
		{"a floating one does", floating(mine), reclaim(5), floating(free), ""},
		{"that is releasing", floating(aside(leaving)), reclaim(5), floating(empty), ""},
		{"that is in quarantine", floating(kept), reclaim(5), floating(empty), ""},
		{"that changed hands meanwhile", floating(mine), reclaim(4), floating(mine), ""},
		{"that is free", floating(free), reclaim(5), floating(free), ""},
	} {
		got, err := tc.do(tc.from)
		if got != tc.to {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.to)
		}
		if (err != nil) != (tc.bad != "") {
			t.Errorf("%s: %v", tc.name, err)
		} else if err != nil {
			field, words, _ := strings.Cut(tc.bad, " ")
			if fieldOf(err) != field || !strings.Contains(fault.Public(err), words) {
				t.Errorf("%s: refused with %v", tc.name, err)
			}
		}
		if got.Epoch < tc.from.Epoch {
			t.Errorf("%s: epoch %d after %d", tc.name, got.Epoch, tc.from.Epoch)
		}
	}
}

// TestTenants (A3): from one tenant's mail to another's only through quarantine,
// when nobody sends.
func TestTenants(t *testing.T) {
	for _, tc := range []struct {
		name       string
		from       Address
		now, whose byte
		placed     bool
		ok         bool
	}{
		{"first pool", row(Assigned, 1, 5), 0, 3, false, true},
		{"another pool of that tenant", row(Assigned, 1, 5), 3, 3, true, true},
		{"another tenant", row(Assigned, 1, 5), 3, 4, true, false},
		{"from shared to a tenant", row(Free, 0, 5), 0, 3, true, false},
		{"from a tenant to shared", row(Releasing, 1, 5), 3, 0, true, false},
		{"in quarantine, still held", row(Quarantined, 1, 5), 0, 3, true, false},
		{"in quarantine", row(Quarantined, 0, 5), 0, 3, true, true},
	} {
		a := tc.from
		a.Placed, a.Tenant = tc.placed, tenant(tc.now)
		got, err := a.Place(tenant(tc.whose))
		if (err == nil) != tc.ok || got.Carries(tenant(tc.whose)) != tc.ok && tc.now != 0 {
			t.Errorf("%s: %+v, %v", tc.name, got, err)
		}
	}
	shared, dedicated := Address{Placed: true}, Address{Placed: true, Tenant: tenant(3)}
	if !shared.Carries(tenant(3)) || !dedicated.Carries(tenant(3)) || dedicated.Carries(tenant(4)) || (Address{}).Carries(tenant(3)) {
		t.Error("an address carries what it should not, or not what it should")
	}
}

func TestConfig(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	for field, spoil := range map[string]func(*Config){
		"ttl":      func(c *Config) { c.TTL = time.Second },
		"guard":    func(c *Config) { c.Guard = c.TTL },
		"takeover": func(c *Config) { c.Takeover = 0 },
	} {
		c := DefaultConfig()
		spoil(&c)
		if fieldOf(c.Validate()) != field {
			t.Errorf("%s: %v", field, c.Validate())
		}
	}
}

// TestKeeper: a takeover waits for the lease by the slowest clock and ten seconds
// more, from the last report or the barrier.
func TestKeeper(t *testing.T) {
	cfg := DefaultConfig()
	k := NewKeeper(cfg, 1000)
	wait := lease.Outlast(cfg.TTL) + cfg.Takeover
	if k.Over(lease.Instant(1000).Add(wait), node(1)) || !k.Over(lease.Instant(1001).Add(wait), node(1)) {
		t.Error("a relay that was never heard is over at another time than after the barrier")
	}
	k.Heard(5000, node(1))
	k.Heard(4000, node(1))
	if k.Over(lease.Instant(5000).Add(wait), node(1)) || !k.Over(lease.Instant(5001).Add(wait), node(1)) || k.Over(5000, node(2)) {
		t.Error("a report does not count from when it came")
	}
}

const second = lease.Instant(time.Second)

func news(revision uint64, a Address) News {
	a.Placed = true
	return News{Revision: revision, Address: a}
}

// TestUsePinned: a pinned address is used without end, until it is released; that
// is acknowledged when nothing is open and the disk knows.
func TestUsePinned(t *testing.T) {
	u := NewUse(DefaultConfig(), node(1), news(9, row(Assigned, 1, 5)))
	if u.Standing(1e18) != Usable || u.Epoch() != 5 || u.CloseBy() != 0 || !u.MayOpen(0, tenant(7)) {
		t.Error("after a start it is not used")
	}
	u.Opened()
	if u.Hear(news(9, row(Releasing, 1, 5))) || !u.Hear(news(10, row(Releasing, 1, 5))) || u.Hear(news(8, row(Assigned, 1, 5))) {
		t.Error("news are told apart wrongly")
	}
	if u.Standing(0) != Finishing || u.MayOpen(0, tenant(7)) {
		t.Error("a releasing address is used on")
	}
	if _, ok := u.Acknowledge(); ok {
		t.Error("acknowledged with an open session")
	}
	u.Closed()
	if _, ok := u.Acknowledge(); ok {
		t.Error("acknowledged although a restart would use it on")
	}
	u.Saved(10)
	if epoch, ok := u.Acknowledge(); !ok || epoch != 5 {
		t.Error("not acknowledged")
	}
	u.Hear(news(11, row(Free, 0, 5)))
	if _, ok := u.Acknowledge(); ok || u.Standing(0) != Gone {
		t.Error("what is nobody's is acknowledged or used")
	}
	u.Hear(news(12, row(Assigned, 2, 12)))
	if u.Standing(0) != Gone || u.MayOpen(0, tenant(7)) {
		t.Error("another relay's address is used")
	}
	var none Use
	if none.Standing(0) != Gone {
		t.Error("nobody's address is used by nobody")
	}
}

// TestUseFloating: no session in the last five seconds, none open at the end.
func TestUseFloating(t *testing.T) {
	a := floating(row(Assigned, 1, 5))
	u := NewUse(DefaultConfig(), node(1), news(9, a))
	if u.Standing(0) != Gone {
		t.Error("a start goes on under the former process's lease")
	}
	u.Renew(10*second, 4)
	if u.Standing(10*second) != Gone {
		t.Error("an answer about a former assignment counts")
	}
	u.Renew(10*second, 5)
	u.Renew(8*second, 5)
	u.Opened()
	for at, want := range map[lease.Instant]Standing{10 * second: Usable, 125*second - 1: Usable, 125 * second: Finishing, 130*second - 1: Finishing, 130 * second: Gone} {
		if got := u.Standing(at); got != want {
			t.Errorf("at %d s: %d, want %d", at/second, got, want)
		}
	}
	if u.CloseBy() != 130*second {
		t.Errorf("sessions are closed at %d s", u.CloseBy()/second)
	}
	u.Hear(news(10, floating(row(Assigned, 1, 10))))
	if u.Standing(11*second) != Gone {
		t.Error("the lease outlives its assignment")
	}
}
