package limits

import (
	"context"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/throttle"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	helloEvery = 3 * time.Second // until the leader welcomes us
	idleLook   = time.Minute
)

// Run talks with the leader, keeps the gates right and ends sessions in time,
// until ctx ends.
func (l *Limits) Run(ctx context.Context) {
	var saving sync.WaitGroup
	saving.Go(func() { l.saver(ctx.Done()) })
	defer saving.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.kick:
		case <-timer.C:
		}
		timer.Reset(l.round())
	}
}

// round does what is due and returns how long the loop may rest.
func (l *Limits) round() time.Duration {
	l.sample()
	l.refresh()
	l.mu.Lock()
	now := l.cfg.Clock()
	next := now.Add(idleLook)
	sooner := func(at lease.Instant) {
		if at > 0 && at < next {
			next = at
		}
	}
	t := l.table.Load()
	abort, closeBy := l.closeSlots(now, t)
	sooner(closeBy)
	for _, lim := range t.limits {
		if lim.rights != nil {
			sooner(lim.rights.Ends(now))
		}
	}
	if len(t.limits) > 0 {
		sooner(l.sampled.Add(sampleEvery))
	}
	l.saveFloors()
	message, again := l.speak(now, t)
	sooner(again)
	l.mu.Unlock()
	for _, end := range abort {
		end()
	}
	if message != nil {
		if err := l.cfg.Send(message); err != nil {
			l.log.Debug("the leader cannot be told", "error", err)
		}
	}
	return max(time.Millisecond, next.Sub(l.cfg.Clock()))
}

// speak returns what is to be said to the leader now, and when to ask again. A
// report earns a lease from when it was made, so it is written at once. l.mu is
// held.
func (l *Limits) speak(now lease.Instant, t *table) (proto.Message, lease.Instant) {
	if !l.linked || len(t.limits) == 0 {
		return nil, 0
	}
	if !l.welcomed {
		if l.helloAt > 0 && now.Sub(l.helloAt) < helloEvery {
			return nil, l.helloAt.Add(helloEvery)
		}
		l.helloAt = now
		return wire.EncodeLeaseHello(l.holder.Hello(), l.declared()), now.Add(helloEvery)
	}
	if at := l.holder.ReportAt(l.spread); now < at {
		return nil, at
	}
	l.spread = rand.IntN(1000)
	report := l.holder.Report(now)
	return wire.EncodeLeaseReport(&report), l.holder.ReportAt(l.spread)
}

// refresh sets the gates of limits under which the relay may use something else
// than before.
func (l *Limits) refresh() {
	if l.gates == nil {
		return
	}
	l.setting.Lock() // the last word must be the last
	defer l.setting.Unlock()
	var changed []schedule.Gate
	l.mu.Lock()
	now := l.cfg.Clock()
	for _, lim := range l.table.Load().limits {
		if g := lim.gateAt(now); !lim.set || g != lim.gate {
			lim.gate, lim.set = g, true
			changed = append(changed, g)
		}
	}
	l.mu.Unlock()
	if len(changed) > 0 {
		l.gates.SetGates(changed...)
	}
}

// gateAt is what the relay may use of a limit, as a gate. Without a right it is
// shut.
func (lim *limit) gateAt(now lease.Instant) schedule.Gate {
	g := schedule.Gate{
		ID:    schedule.GateID{Owner: Owner, Number: uint64(lim.ID)},
		Match: schedule.Match{Provider: lim.Provider, Pool: lim.Pool, Tenant: lim.Tenant, Domain: lim.Domain},
		Slots: lim.Kind == lease.Slots, Reason: Reason,
	}
	share := lim.usable(now)
	switch {
	case lim.Kind == lease.Slots && share.Amount > 0:
		g.Sessions = int(share.Amount)
	case lim.Kind == lease.Slots:
		g.NoSessions = true
	case share.Amount > 0 && share.Burst > 0:
		g.Messages = schedule.Rate{Max: 1, Per: spacing(share.Amount, lim.Per), Burst: burstOf(share, lim.Per)}
	default:
		g.NoMessages = true
	}
	return g
}

// maxSaved bounds what a burst is worth, in nanoseconds of its rate: 36 years. More
// is never saved, and a bucket does not know it.
const maxSaved = 1 << 60

// burstOf is the burst of a share, of as much as can be saved.
func burstOf(share lease.Share, per time.Duration) int {
	return int(min(share.Burst, maxSaved/int64(spacing(share.Amount, per))))
}

// rate is the whole limit, and one event more, for the bucket of the rights rounds
// differently.
func (lim *limit) rate() throttle.Rate {
	r, err := throttle.NewRate(1, spacing(lim.Max, lim.Per), burstOf(lease.Share{Amount: lim.Max, Burst: lim.Burst}, lim.Per)+1)
	if err != nil { // a limit that is checked is within the bounds of a rate; one must fail closed
		r, _ = throttle.NewRate(1, throttle.MaxPer, 1)
	}
	return r
}

// spacing is the time from one event to the next of an amount: thousandths of an
// event within a span.
func spacing(amount int64, per time.Duration) time.Duration {
	return time.Duration(math.Ceil(float64(per) * lease.Milli / float64(max(amount, 1))))
}

// Release gives everything back to the leader, for a relay that ends. Whoever calls
// it has ended all sessions.
func (l *Limits) Release() {
	var messages []proto.Message
	l.mu.Lock()
	now := l.cfg.Clock()
	if l.linked && l.welcomed {
		for _, lim := range l.table.Load().limits {
			if r := lim.rights; r != nil && r.Stamp() != (lease.Stamp{}) && r.Opened() == 0 {
				if m, ok := l.holder.Release(now, r); ok {
					messages = append(messages, wire.EncodeLeaseRelease(m))
				}
			}
		}
	}
	l.mu.Unlock()
	for _, m := range messages {
		if l.cfg.Send(m) != nil {
			return // the leases end by themselves
		}
	}
}
