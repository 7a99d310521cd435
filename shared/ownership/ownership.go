// Package ownership says who may send from an address, so that at no instant two
// relays do: a host that hears us from one address cannot tell them apart, and
// what it believes of the address would be about both.
//
// It has three parts, all of them pure. Address holds the replicated rules: how an
// address passes from hand to hand, under epochs that only grow. Keeper runs on the
// leader and says when a silent relay's lease of floating addresses is over. Use
// runs on a relay and says what may be done from one address now. What they promise
// and why it holds is in DESIGN.md.
package ownership

import (
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

const op = "ownership"

// State is where an address stands.
type State string

// The states of an address.
const (
	Free        State = "free"        // nobody's
	Assigned    State = "assigned"    // its owner sends from it
	Releasing   State = "releasing"   // its owner finishes what it began
	Quarantined State = "quarantined" // nobody is to send from it; its owner, if it has one, may not know yet
)

// Address is what the cluster has agreed on about one address. Its methods return
// the address as it is after a step, or refuse the step; they change nothing.
type Address struct {
	State  State
	Owner  ids.Node // who may still send from it; zero: nobody
	Epoch  uint64   // of the last assignment: it only grows (A2)
	Pinned bool     // routed to one machine: it never ends by itself
	Aside  bool     // of one that is releasing: it goes to quarantine, not to who wants it

	Placed bool       // it is in a pool
	Tenant ids.Tenant // whose mail alone it carries; zero: everybody's
}

// Assign gives the address to a relay under a new epoch, which must be above any
// before: the index of the log entry is. An address that another machine may be
// using changes hands only on an operator's word that it is off (A1). A relay that
// has not let go of it yet may have it again.
func (a Address) Assign(to ids.Node, epoch uint64, ownerIsOff bool) (Address, error) {
	switch {
	case to.IsZero():
		return a, fault.Field(op, "node", "is missing: name the relay that gets the address")
	case a.State == Assigned && a.Owner == to:
		return a, nil // repeated
	case epoch <= a.Epoch:
		return a, fault.New(fault.Internal, op, "epoch %d is not above %d", epoch, a.Epoch)
	case a.Owner.IsZero() && a.State == Quarantined:
		return a, conflict("state", "it is in quarantine: release it from there first")
	case !a.Owner.IsZero() && !ownerIsOff && (a.Owner != to || a.State == Quarantined):
		return a, conflict("node", "its owner may still send from it: release it there, or switch that machine off and say so")
	}
	a.State, a.Owner, a.Epoch, a.Aside = Assigned, to, epoch, false
	return a, nil
}

// Release asks the owner to stop: it opens no more, finishes what it has begun, and
// says when it has. With aside the address goes to quarantine then.
func (a Address) Release(aside bool) (Address, error) {
	switch a.State {
	case Free:
		if aside {
			return a.Quarantine(), nil
		}
		return a, nil
	case Quarantined:
		if aside {
			return a, nil
		}
		return a, conflict("state", "it is in quarantine: end that instead")
	}
	a.State, a.Aside = Releasing, a.Aside || aside
	return a, nil
}

// Acknowledge takes an owner's word that it does not send from the address any
// more and never will under that epoch. The word of a former owner changes nothing.
func (a Address) Acknowledge(by ids.Node, epoch uint64) Address {
	if by.IsZero() || by != a.Owner || epoch != a.Epoch {
		return a
	}
	return a.leave()
}

// leave takes it that the owner is gone.
func (a Address) leave() Address {
	switch a.State {
	case Releasing:
		a.State = Free
		if a.Aside {
			a.State = Quarantined
		}
	case Quarantined:
	default:
		return a
	}
	a.Owner, a.Aside = ids.Node{}, false
	return a
}

// Quarantine has nobody send from the address. Its owner, if there is one, stays
// named, for it may send until it hears of it.
func (a Address) Quarantine() Address {
	a.State, a.Aside = Quarantined, false
	return a
}

// Unquarantine makes the address free. If its owner never said that it stopped,
// that needs an operator's word that the machine is off.
func (a Address) Unquarantine(ownerIsOff bool) (Address, error) {
	switch {
	case a.State == Free:
		return a, nil // repeated
	case a.State != Quarantined:
		return a, conflict("state", "it is %s, not in quarantine", a.State)
	case !a.Owner.IsZero() && !ownerIsOff:
		return a, conflict("node", "its owner may still send from it: switch that machine off and say so")
	}
	a.State, a.Owner = Free, ids.Node{}
	return a, nil
}

// Reclaim takes a floating address back from an owner whose lease is over. The
// epoch is the one that the leader decided about; an address that changed hands
// meanwhile stays where it is.
func (a Address) Reclaim(epoch uint64) (Address, error) {
	switch {
	case a.Pinned:
		return a, conflict("pinned", "it is pinned to its machine and does not end by itself")
	case epoch != a.Epoch || a.Owner.IsZero():
		return a, nil
	case a.State == Assigned:
		a.State = Releasing
	}
	return a.leave(), nil
}

// Place puts the address into a pool for a tenant, or for everybody. A3: to another
// tenant's mail it passes only through quarantine, when nobody sends from it.
func (a Address) Place(tenant ids.Tenant) (Address, error) {
	if a.Placed && a.Tenant != tenant && (a.State != Quarantined || !a.Owner.IsZero()) {
		return a, conflict("pool", "it carries another tenant's mail: release it into quarantine first, so that what was sent from it is forgotten")
	}
	a.Placed, a.Tenant = true, tenant
	return a, nil
}

// Carries reports whether mail of a tenant may leave from the address.
func (a Address) Carries(tenant ids.Tenant) bool {
	return a.Placed && (a.Tenant.IsZero() || a.Tenant == tenant)
}

func conflict(field, format string, args ...any) error {
	e := fault.New(fault.Conflict, op, format, args...)
	e.Field = field
	return e
}
