package brake

import (
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/reflex"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/throttle"
)

// reflexGates does what is due of the reflexes and returns the gates that are to
// be set. When some are to go, keep is all that stay.
func (k *Keeper) reflexGates(now time.Time) (set []schedule.Gate, keep map[uint64]bool, dropped bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.slowed {
		at := l.state.Next()
		if at.IsZero() || at.After(now) {
			continue
		}
		before := l.state.Allowance().Phase
		if l.state.Tick(now, &l.settings) {
			k.note(l)
			k.tell(l, before, reflex.Silent)
		}
	}
	for _, l := range k.changed {
		l.queued = false
		a := l.state.Allowance()
		if a.Phase == reflex.Free {
			delete(k.slowed, l.number)
			dropped = true
			continue
		}
		k.slowed[l.number] = l
		set = append(set, l.gate(&a))
	}
	clear(k.changed)
	k.changed = k.changed[:0]
	if dropped {
		keep = make(map[uint64]bool, len(k.slowed))
		for n := range k.slowed {
			keep[n] = true
		}
	}
	return set, keep, dropped
}

// gate puts what the reflex allows as a gate in front of the lane.
func (l *lane) gate(a *reflex.Allowance) schedule.Gate {
	held := a.Phase == reflex.Held
	return schedule.Gate{
		ID: schedule.GateID{Owner: ownerReflex, Number: l.number}, Match: schedule.Match{Source: l.key.Source, Provider: l.key.Provider},
		Slots: true, Reason: ownerReflex, Messages: rateOf(a.Rate), Sessions: a.Connections, NoMessages: held, NoSessions: held, Until: a.Until,
	}
}

// rateOf is a number of messages an hour for a gate; 0 is none.
func rateOf(perHour int64) schedule.Rate {
	if perHour == 0 {
		return schedule.Rate{}
	}
	n, per := reflex.Spaced(perHour, throttle.MaxLimit)
	return schedule.Rate{Max: n, Per: per, Burst: int(min(max(1, perHour/3600), throttle.MaxBurst))}
}

// tell logs and counts that a reflex did something. k.mu is held.
func (k *Keeper) tell(l *lane, before reflex.Phase, signal reflex.Signal) {
	a, c := l.state.Allowance(), l.state.Cause()
	if signal != reflex.Silent && signal != reflex.Clean {
		k.metrics.decreases.WithLabelValues(engine.ProviderLabel(l.key.Provider), signal.String()).Inc()
	}
	if before == a.Phase && !much(&l.told, &a) {
		l.told.Rate, l.told.Connections = max(l.told.Rate, a.Rate), max(l.told.Connections, a.Connections)
		return
	}
	l.told = a
	k.tellReflex(l)
	args := []any{"source", l.key.Source, "provider", l.key.Provider, "phase", a.Phase.String(), "was", before.String(), "messages_per_hour", a.Rate, "connections", a.Connections}
	if !a.Until.IsZero() {
		args = append(args, "until", a.Until)
	}
	if c.Class != "" {
		args = append(args, "class", c.Class, "reply", c.Reply)
	}
	k.cfg.Logger.Info("the reflex of a lane changed", args...)
}

// Reflex is what the reflex does to a lane, for people and for control.
type Reflex struct {
	Source      ids.Source
	Provider    string
	Phase       string
	PerHour     int64
	Connections int
	Until       time.Time
	Next        time.Time
	Class       string
	Reply       string
	CauseAt     time.Time
	Since       time.Time
}

func (l *lane) show() Reflex {
	a, c := l.state.Allowance(), l.state.Cause()
	return Reflex{Source: l.key.Source, Provider: l.key.Provider, Phase: a.Phase.String(), PerHour: a.Rate, Connections: a.Connections, Until: a.Until,
		Next: l.state.Next(), Class: c.Class, Reply: c.Reply, CauseAt: c.At, Since: l.state.Since()}
}

// Long returns at most n lanes that were slowed down long ago and still are, the
// longest first.
func (k *Keeper) Long(n int) []Reflex {
	now := k.cfg.Now()
	k.mu.Lock()
	var out []Reflex
	for _, l := range k.slowed {
		if now.Sub(l.state.Since()) >= longReflex {
			out = append(out, l.show())
		}
	}
	k.mu.Unlock()
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if !a.Since.Equal(b.Since) {
			return a.Since.Before(b.Since)
		}
		return a.Provider+a.Source.String() < b.Provider+b.Source.String()
	})
	return out[:min(n, len(out))]
}

// DescribeLane implements engine.Describer: what the reflex does to a lane, in
// words; empty: nothing.
func (k *Keeper) DescribeLane(key schedule.Lane) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.lanes[key]
	if l == nil || l.state.Allowance().Phase == reflex.Free {
		return ""
	}
	x := l.show()
	return x.text()
}

// text says what is allowed, after what, and when that changes.
func (x *Reflex) text() string {
	var out strings.Builder
	switch {
	case x.Phase == reflex.Held.String():
		fmt.Fprintf(&out, "held until %s UTC", x.Until.UTC().Format(time.TimeOnly))
	case x.Phase == reflex.Probing.String():
		out.WriteString("probed by one connection")
	default:
		out.WriteString(x.allowed())
	}
	fmt.Fprintf(&out, " after %q (%s) at %s UTC", x.Reply, x.Class, x.CauseAt.UTC().Format(time.TimeOnly))
	if x.Phase == reflex.Slowed.String() && !x.Next.IsZero() {
		fmt.Fprintf(&out, ", next step at %s UTC", x.Next.UTC().Format(time.TimeOnly))
	}
	return out.String()
}

// allowed words a rate and a number of connections.
func (x *Reflex) allowed() string {
	var parts []string
	switch {
	case x.PerHour >= 6*60:
		parts = append(parts, fmt.Sprintf("%d/min", x.PerHour/60))
	case x.PerHour > 0:
		parts = append(parts, fmt.Sprintf("%d/h", x.PerHour))
	}
	if x.Connections == 1 {
		parts = append(parts, "1 connection")
	} else if x.Connections > 1 {
		parts = append(parts, fmt.Sprintf("%d connections", x.Connections))
	}
	if len(parts) == 0 {
		return "as policy allows"
	}
	return strings.Join(parts, " on ")
}
