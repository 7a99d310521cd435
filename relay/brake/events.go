package brake

import (
	"context"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/reflex"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

const (
	maxEvents    = 1024             // that wait for the disk
	eventTimeout = 10 * time.Second // for the disk
)

// much reports whether a lane that is slowed down may send half of what the last
// event about it said, or less. Steps in between have no event.
func much(told, now *reflex.Allowance) bool {
	half := func(before, after int64) bool { return after > 0 && (before == 0 || 2*after <= before) }
	return now.Phase == reflex.Slowed && (half(told.Rate, now.Rate) || half(int64(told.Connections), int64(now.Connections)))
}

// tellReflex has an event say what the reflex of a lane does, and after what. k.mu
// is held.
func (k *Keeper) tellReflex(l *lane) {
	a, c := l.state.Allowance(), l.state.Cause()
	e := outbox.Event{At: k.cfg.Now(), Source: l.key.Source, SourceIP: l.bind, Epoch: l.epoch, Provider: l.key.Provider, Pool: l.pool,
		Class: c.Class, Reply: relay.Reply{Text: c.Reply}, StartedAt: l.state.Since(), Next: a.Until, PerHour: a.Rate, Conns: a.Connections}
	switch a.Phase {
	case reflex.Slowed:
		e.Type, e.Next = outbox.Slowed, l.state.Next()
	case reflex.Held:
		e.Type = outbox.Stopped
	case reflex.Probing:
		e.Type = outbox.Probed
	default:
		e.Type, e.Next, e.PerHour, e.Conns = outbox.Restored, time.Time{}, 0, 0
	}
	k.tellEvent(e)
}

// tellBrakes has events say which brakes began and ended here. Those that the view on
// disk had at the start were told before. k.mu is held.
func (k *Keeper) tellBrakes(before []policy.Brake, now time.Time) {
	if !k.attached {
		return
	}
	was := make(map[ids.Brake]*policy.Brake, len(before))
	for i := range before {
		was[before[i].ID] = &before[i]
	}
	for i := range k.brakes {
		b := &k.brakes[i]
		if old := was[b.ID]; old == nil || old.Percent != b.Percent {
			k.tellEvent(eventOf(outbox.Braked, b, now))
		}
		delete(was, b.ID)
	}
	for i := range before {
		if b := was[before[i].ID]; b != nil {
			k.tellEvent(eventOf(outbox.Unbraked, b, now))
		}
	}
}

func eventOf(kind outbox.Type, b *policy.Brake, now time.Time) outbox.Event {
	e := outbox.Event{Type: kind, At: now, Brake: b.ID, Source: b.Source, Provider: b.Provider, Pool: b.Pool, Tenant: b.Tenant, Address: string(b.Domain),
		Class: "hold", Reply: relay.Reply{Text: holdOf(b, now, b.Until).Text}, Next: b.Until, Actor: b.Owner}
	if b.Percent > 0 {
		e.Class = "slow"
	}
	return e
}

// tellEvent has an event kept. k.mu is held.
func (k *Keeper) tellEvent(e outbox.Event) {
	if k.cfg.Events == nil {
		return
	}
	if len(k.events) >= maxEvents {
		k.untold++
		return
	}
	if k.view != nil {
		e.Revision = k.view.View().Revision
	}
	k.events = append(k.events, e)
	select {
	case k.tells <- struct{}{}:
	default:
	}
}

// keepEvents keeps events until ctx ends, and then what is left. It has a goroutine
// of its own, so that a slow disk does not keep brakes from mail.
func (k *Keeper) keepEvents(ctx context.Context) {
	for stops := false; !stops; {
		select {
		case <-ctx.Done():
			stops = true
		case <-k.tells:
		}
		k.mu.Lock()
		events, untold := k.events, k.untold
		k.events, k.untold = nil, 0
		k.mu.Unlock()
		if untold > 0 {
			k.cfg.Logger.Error("events of reflexes and brakes were dropped: the disk is too slow for them", "events", untold)
		}
		if len(events) == 0 {
			continue
		}
		writing, cancel := context.WithTimeout(context.WithoutCancel(ctx), eventTimeout)
		if err := k.cfg.Events(writing, events); err != nil {
			k.cfg.Logger.Error("events of reflexes and brakes were not kept", "events", len(events), "error", err)
		}
		cancel()
	}
}
