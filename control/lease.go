package control

import (
	"fmt"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

// Lease is what the cluster agrees on about lending limits out, beside limits,
// relays and holdings.
type Lease struct {
	Epoch     uint64        // log index at which the present leader's lending began
	LastLimit lease.LimitID // the last number given to a limit
	LastNode  lease.Node    // the last number given to a relay
	Changed   uint64        // log index of the last change that a leader must be told of
	Holders   int           // pairs of limit and relay with a holding
	Config    lease.Config  // that relays work by
	Reclaim   lease.Config  // that the leader works by: as long as any that a relay may still work by
	Settling  bool          // a recovery ended: shares of before may be in use until leases have run out
	Revision  uint64
}

// SharedLimit is a limit that relays share. Tenant and Pool are the names of the
// policy.
type SharedLimit struct {
	lease.Limit
	Name     string
	Provider string
	Tenant   string
	Domain   string
	Pool     string
	Revision uint64
}

// Summary renders the row for the audit tail.
func (l *SharedLimit) Summary() string {
	what := fmt.Sprintf("connections=%d", l.Max)
	if l.Kind == lease.Rate {
		what = fmt.Sprintf("messages=%d/%v burst=%d", l.Max/lease.Milli, l.Per, l.Burst)
	}
	return fmt.Sprintf("name=%s id=%d %s", l.Name, l.ID, what)
}

// LeaseNode is a relay as it takes part in sharing.
type LeaseNode struct {
	ID          ids.Node
	Number      lease.Node
	Incarnation uint64 // under which it holds things
	Gone        bool   // evicted: it gets nothing more
	Declared    uint64 // generation in which it said what its disk holds; 0: since the first it never had to

	// WarmDeclared is the generation in which it had told all that it spent of
	// warm-up; 0: likewise.
	WarmDeclared uint64
	Revision     uint64
}

// Holdings is who holds how much of one limit.
type Holdings struct {
	Limit    lease.LimitID
	Of       []lease.Holding // in the order of relays
	Revision uint64
}

// Sum returns what is held altogether.
func (h *Holdings) Sum() lease.Share {
	sum := lease.Share{}
	for i := range h.Of {
		sum.Amount += h.Of[i].Ceiling.Amount + h.Of[i].Floor.Amount
		sum.Burst += h.Of[i].Ceiling.Burst + h.Of[i].Floor.Burst
	}
	return sum
}

// LeaseResult is what applying a leader's tick gave.
type LeaseResult struct {
	Refused []lease.Refusal
}
