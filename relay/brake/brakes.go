package brake

import (
	"fmt"
	"time"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// defaultPerHour stands for the rate of a provider whose profile has none, when a
// brake is to leave a part of it.
const defaultPerHour = 100 * 3600

// mixedWait is how long mail is left alone that was given to the one source on which
// a brake holds it before the brake's gate was there.
const mixedWait = time.Second

// brakeGate is what a brake becomes at one place.
type brakeGate struct {
	brake    ids.Brake
	source   ids.Source
	provider string
}

// lookAtView takes over the brakes of the view, and makes their gates anew if
// they, the lanes or the profiles have changed.
func (k *Keeper) lookAtView(gates Gates, now time.Time) {
	k.mu.Lock()
	dir := k.cfg.Directory()
	if dir != k.view {
		k.view, k.stale = dir, true
		k.revise(dir)
	}
	if dir == nil || !k.stale && !k.over(now) {
		k.mu.Unlock()
		return
	}
	k.stale = false
	before := k.brakes
	k.brakes, k.mixed = nil, nil
	view := dir.View()
	for i := range view.Brakes {
		b := &view.Brakes[i]
		if !b.InForce(now) && (!b.Released.IsZero() || k.cfg.ClockTrusted()) {
			continue
		}
		k.brakes = append(k.brakes, *b)
		if mixed(b) && b.Percent == 0 {
			k.mixed = append(k.mixed, *b)
		}
	}
	set, keep := k.brakeGates(dir)
	recalled := ended(before, k.brakes)
	k.tellBrakes(before, now)
	k.mu.Unlock()
	gates.SetGates(set...)
	gates.KeepGates(ownerBrake, keep)
	for _, id := range recalled {
		gates.Recall(id.String())
	}
}

// over reports whether the time of a brake has passed. k.mu is held.
func (k *Keeper) over(now time.Time) bool {
	for i := range k.brakes {
		if !k.brakes[i].InForce(now) && k.cfg.ClockTrusted() {
			return true
		}
	}
	return false
}

// ended returns the brakes that are in force no more.
func ended(before, after []policy.Brake) []ids.Brake {
	still := make(map[ids.Brake]bool, len(after))
	for i := range after {
		still[after[i].ID] = true
	}
	var out []ids.Brake
	for i := range before {
		if !still[before[i].ID] {
			out = append(out, before[i].ID)
		}
	}
	return out
}

// revise takes over what the view says of the reflexes. k.mu is held.
func (k *Keeper) revise(dir *policy.Directory) {
	for _, l := range k.lanes {
		l.settings = settingsOf(dir, l.key.Provider)
		before := l.state.Allowance().Phase
		if l.state.Clamp(&l.settings) {
			k.note(l)
			k.tell(l, before, 0)
		}
	}
	if dir == nil {
		return
	}
	view := dir.View()
	for i := range view.Brakes {
		b := &view.Brakes[i]
		if b.Released.IsZero() || b.Node != view.Node {
			continue
		}
		l := k.lanes[schedule.Lane{Source: b.Source, Provider: b.Provider}]
		if l == nil || l.state.Cause().At.After(b.Released) {
			continue
		}
		before := l.state.Allowance().Phase
		if l.state.Release() {
			k.note(l)
			k.tell(l, before, 0)
		}
	}
}

// slows reports whether a brake slows mail of a lane down, so that the lane needs
// a gate. k.mu is held.
func (k *Keeper) slows(l *lane) bool {
	for i := range k.brakes {
		if b := &k.brakes[i]; b.Percent > 0 && b.MatchesLane(l.key.Provider, l.pool, l.key.Source) {
			return true
		}
	}
	return false
}

// mixed reports whether a brake is for some mail of one source.
func mixed(b *policy.Brake) bool { return !b.Source.IsZero() && !b.ByLane() }

// brakeGates returns the gates of all brakes, and all their numbers. k.mu is held.
func (k *Keeper) brakeGates(dir *policy.Directory) (set []schedule.Gate, keep map[uint64]bool) {
	keep = make(map[uint64]bool)
	add := func(id brakeGate, g schedule.Gate) {
		if len(set) >= maxGates {
			k.cfg.Logger.Error("there are more brakes and lanes than this relay keeps gates for, some mail is not slowed down: set fewer brakes of a wider scope", "gates", maxGates, "brake", id.brake)
			return
		}
		g.ID, g.Reason = schedule.GateID{Owner: ownerBrake, Number: k.numberOf(id)}, ownerBrake
		keep[g.ID.Number] = true
		set = append(set, g)
	}
	for i := range k.brakes {
		b := &k.brakes[i]
		switch {
		case b.Percent == 0:
			add(brakeGate{brake: b.ID}, schedule.Gate{Match: matchOf(b), Slots: b.ByLane(), NoMessages: true, NoSessions: b.ByLane()})
		case b.ByLane() || mixed(b):
			for _, l := range k.lanes {
				if b.MatchesLane(l.key.Provider, l.pool, l.key.Source) {
					rate, connections := partOf(dir, l.key.Provider, b.Percent, 1)
					g := schedule.Gate{Match: schedule.Match{Source: l.key.Source, Provider: l.key.Provider, Tenant: b.Tenant, Domain: b.Domain}, Messages: rate}
					if b.ByLane() {
						g.Slots, g.Sessions = true, connections
					}
					add(brakeGate{b.ID, l.key.Source, l.key.Provider}, g)
				}
			}
		default:
			for provider, lanes := range k.lanesOf(b) {
				rate, _ := partOf(dir, provider, b.Percent, lanes)
				m := matchOf(b)
				m.Provider = provider
				add(brakeGate{brake: b.ID, provider: provider}, schedule.Gate{Match: m, Messages: rate})
			}
		}
	}
	for id, n := range k.numbers {
		if !keep[n] {
			delete(k.numbers, id)
			delete(k.byNumber, n)
		}
	}
	return set, keep
}

// lanesOf counts the lanes that a brake is for, by provider. k.mu is held.
func (k *Keeper) lanesOf(b *policy.Brake) map[string]int {
	out := make(map[string]int)
	for _, l := range k.lanes {
		if b.MatchesLane(l.key.Provider, l.pool, l.key.Source) {
			out[l.key.Provider]++
		}
	}
	return out
}

func (k *Keeper) numberOf(id brakeGate) uint64 {
	n, ok := k.numbers[id]
	if !ok {
		k.last++
		n = k.last
		k.numbers[id], k.byNumber[n] = n, id
	}
	return n
}

func matchOf(b *policy.Brake) schedule.Match {
	return schedule.Match{Source: b.Source, Provider: b.Provider, Pool: b.Pool, Tenant: b.Tenant, Domain: b.Domain}
}

// partOf is a part of what a provider's profile allows so many sources.
func partOf(dir *policy.Directory, provider string, percent, sources int) (schedule.Rate, int) {
	profile, ok := dir.Providers().Named(provider)
	if !ok {
		profile = dir.Providers().Default()
	}
	perHour := profile.MessageRate(policy.ScopeSource).PerHour()
	if perHour == 0 {
		perHour = defaultPerHour
	}
	connections := profile.Connections(policy.ScopeSource)
	if connections > 0 {
		connections = max(1, connections*percent/100)
	}
	return rateOf(max(1, perHour*int64(percent)*int64(sources)/100)), connections
}

// refuses returns the mixed brake that holds the mail of a place. Its gate keeps such
// mail away; this is for what was under way when the gate came, or if there are too
// many gates. k.mu is held.
func (k *Keeper) refuses(p *engine.Place, now time.Time) engine.Hold {
	for i := range k.mixed {
		if b := &k.mixed[i]; b.MatchesLane(p.Lane.Provider, p.Key.Pool, p.Lane.Source) && b.MatchesMail(p.Key.Tenant, p.Key.Domain) {
			h := holdOf(b, now, endOf(b, now))
			h.Look = now.Add(mixedWait)
			return h
		}
	}
	return engine.Hold{}
}

// endOf is when a brake ends by itself, if nobody tells more; zero: that is not
// known.
func endOf(b *policy.Brake, now time.Time) time.Time {
	for _, end := range []time.Time{b.Until, b.Until.Add(policy.BrakeGrace)} {
		if !b.Until.IsZero() && end.After(now) {
			return end
		}
	}
	return time.Time{}
}

// holdOf words a brake.
func holdOf(b *policy.Brake, now, until time.Time) engine.Hold {
	level := "holds it"
	if b.Percent > 0 {
		level = fmt.Sprintf("lets through %d %% of what policy allows", b.Percent)
	}
	text := fmt.Sprintf("a brake of %s %s: %s", b.Owner, level, b.Cause)
	switch end := endOf(b, now); {
	case b.Until.IsZero():
		text += "; until it is cancelled"
	case b.Until.After(now):
		text += "; until " + b.Until.UTC().Format(time.RFC3339)
	default: // a relay that is cut off tightens and never relaxes
		text += "; its time ended at " + b.Until.UTC().Format(time.RFC3339) + ", it stays until control is heard"
		if !end.IsZero() {
			text += ", or until " + end.UTC().Format(time.RFC3339)
		}
	}
	return engine.Hold{Reason: ownerBrake, Name: b.ID.String(), Scope: scopeOf(b), Text: text, Until: until}
}

// scopeOf words what a brake is for.
func scopeOf(b *policy.Brake) string {
	out := ""
	for _, p := range []struct {
		name, value string
		given       bool
	}{
		{"provider", b.Provider, b.Provider != ""}, {"pool", b.Pool.String(), !b.Pool.IsZero()}, {"source", b.Source.String(), !b.Source.IsZero()},
		{"tenant", b.Tenant.String(), !b.Tenant.IsZero()}, {"domain", string(b.Domain), b.Domain != ""},
	} {
		if p.given {
			out += ", " + p.name + " " + p.value
		}
	}
	return out[min(2, len(out)):]
}

// Explain implements engine.Explainer.
func (k *Keeper) Explain(gate schedule.GateID) (engine.Hold, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch gate.Owner {
	case ownerReflex:
		if l := k.slowed[gate.Number]; l != nil {
			x := l.show()
			return engine.Hold{Reason: ownerReflex, Name: ownerReflex, Scope: "provider " + x.Provider + ", this source", Text: "reflex: " + x.text(), Until: x.Until}, true
		}
	case ownerBrake:
		id := k.byNumber[gate.Number].brake
		for i := range k.brakes {
			if k.brakes[i].ID == id {
				now := k.cfg.Now()
				return holdOf(&k.brakes[i], now, endOf(&k.brakes[i], now)), true
			}
		}
	}
	return engine.Hold{}, false
}

// Brakes returns how many brakes are in force.
func (k *Keeper) Brakes() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.brakes)
}
