package quota

import (
	"context"
	"encoding/json"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

// requestStatus asks the leader who holds and wants how much of some limits.
const requestStatus = "quota-status"

// MaxStatusLimits is how many limits one question is about at most.
const MaxStatusLimits = 200

const statusTimeout = 5 * time.Second

// HolderStatus is what the leader knows of one relay's part in one limit.
type HolderStatus struct {
	Node        ids.Node      `json:"node"`
	Limit       lease.LimitID `json:"limit"`
	Ceiling     lease.Share   `json:"ceiling"` // may be held at most, beyond the floor
	Floor       lease.Share   `json:"floor"`
	Granted     lease.Share   `json:"granted"` // was told to the relay last
	Demand      int64         `json:"demand"`
	Used        int64         `json:"used"`   // between the last two reports
	Denied      int64         `json:"denied"` // times that the limit said no meanwhile
	Heard       bool          `json:"heard"`  // within a lease
	SilentMS    int64         `json:"silent_ms"`
	WaitsInTurn bool          `json:"waits_in_turn"` // there are fewer rights than relays that want one
}

// ask is a question to the goroutine that owns the grantor; the answer is nil
// while nothing is lent.
type ask struct {
	limits []lease.LimitID
	answer chan []HolderStatus
}

// status answers an ask.
func (t *term) status(limits []lease.LimitID) []HolderStatus {
	out := []HolderStatus{}
	now := t.l.o.Clock()
	for _, id := range limits {
		holders, _ := t.grantor.Status(id)
		for _, h := range holders {
			out = append(out, HolderStatus{Node: t.nodes[h.Node], Limit: id, Ceiling: h.Ceiling, Floor: h.Floor, Granted: h.Granted, Demand: h.Demand, Used: h.Used, Denied: h.Denied,
				Heard: h.Heard, SilentMS: now.Sub(h.SilentSince).Milliseconds(), WaitsInTurn: h.WaitsForASeat})
		}
	}
	return out
}

// statusHere answers if this server lends the limits out.
func (l *Lease) statusHere(ctx context.Context, limits []lease.LimitID) ([]HolderStatus, error) {
	const op = "quota.Status"
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	a := ask{limits, make(chan []HolderStatus, 1)}
	nobody := fault.New(fault.Unavailable, op, "nobody lends shared limits out now: a leader begins to")
	select {
	case l.asks <- a:
	case <-ctx.Done():
		return nil, nobody
	}
	select {
	case out := <-a.answer:
		if out == nil {
			return nil, nobody
		}
		return out, nil
	case <-ctx.Done():
		return nil, nobody
	}
}

// Status returns what the leader knows of who holds and wants how much of some
// limits, 200 at most. The error is Unavailable while nobody lends.
func (q *Quota) Status(ctx context.Context, limits []lease.LimitID) ([]HolderStatus, error) {
	limits = limits[:min(len(limits), MaxStatusLimits)]
	if _, leads := q.o.Cluster.Term(); leads {
		return q.leaseStatus(ctx, limits)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	var out []HolderStatus
	return out, q.o.Cluster.AskLeader(ctx, requestStatus, limits, &out)
}

func (q *Quota) leaseStatus(ctx context.Context, limits []lease.LimitID) ([]HolderStatus, error) {
	for _, p := range q.parts {
		if l, ok := p.Part.(*Lease); ok {
			return l.statusHere(ctx, limits)
		}
	}
	return nil, fault.New(fault.Unavailable, "quota.Status", "this server does not lend limits out")
}

func (q *Quota) onStatus(ctx context.Context, _ ids.Node, body []byte) (any, error) {
	var limits []lease.LimitID
	if err := json.Unmarshal(body, &limits); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "quota.onStatus", "the request cannot be read")
	}
	return q.leaseStatus(ctx, limits[:min(len(limits), MaxStatusLimits)])
}
