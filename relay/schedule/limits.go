package schedule

import "time"

// What can hold a lane, a group or a site from being served now: the words of
// Waiting.Reason.
const (
	holdBackoff           = "backoff"
	holdRate              = "rate"
	holdSourceConnections = "source-connections"
	holdTrial             = "unproven"
	holdRelayConnections  = "relay-connections"
	holdProviderShare     = "provider-share"
	holdSessions          = "sessions"
	holdConnects          = "connects"
)

// A host is proven by a message that it took, or answered to, within prompt,
// and for provenFor.
const (
	prompt    = 15 * time.Second
	provenFor = 15 * time.Minute
)

// part returns a part of a limit in percent, at least one. All of it, which 0
// percent stand for too, is no limit of its own: 0.
func part(limit, of int) int {
	if limit == 0 || of == 0 || of >= percent {
		return 0
	}
	return max(1, limit*of/percent)
}

func reached(n, limit int) bool { return limit > 0 && n >= limit }

// laneHolds returns what of the lane's own limits holds it, and until when if
// that is known. A hold without a time ends with a session.
func (g *group) laneHolds(l *lane, connect bool, now time.Time) (string, time.Time) {
	if _, wait := l.messages.Peek(now, 1); wait > 0 {
		return holdRate, now.Add(wait)
	}
	if len(l.gates) > 0 {
		if reason, until := l.gateHolds(connect, now); reason != "" {
			return reason, until
		}
	}
	if !connect {
		return "", time.Time{}
	}
	if g.laneFull(l) {
		return holdSourceConnections, time.Time{}
	}
	if _, wait := l.connects.Peek(now, 1); wait > 0 {
		return holdRate, now.Add(wait)
	}
	return "", time.Time{}
}

func (g *group) laneFull(l *lane) bool { return reached(l.sessions, g.limits.SourceConnections) }

// providerHolds returns what holds all lanes of the relay to a provider.
func (s *Scheduler) providerHolds(g *group, connect bool, now time.Time) (string, time.Time) {
	u := g.use
	if _, wait := u.messages.Peek(now, 1); wait > 0 {
		return holdRate, now.Add(wait)
	}
	if !connect {
		return "", time.Time{}
	}
	if g.relayFull() {
		return holdRelayConnections, time.Time{}
	}
	if s.shareFull(u) {
		return holdProviderShare, time.Time{}
	}
	if _, wait := u.connects.Peek(now, 1); wait > 0 {
		return holdRate, now.Add(wait)
	}
	return "", time.Time{}
}

func (g *group) relayFull() bool { return reached(g.use.sessions, g.limits.RelayConnections) }

// shareFull reports whether a provider has all that one provider may have of
// the relay: a provider that became slow must leave room for the others.
func (s *Scheduler) shareFull(u *providerUse) bool {
	return reached(u.sessions, part(s.limits.MaxSessions, s.limits.ProviderShare)) ||
		reached(u.opening, part(s.limits.MaxConnectsInFlight, s.limits.ProviderShare))
}

// trialHolds reports whether no more sessions may be opened to hosts that have
// not taken mail promptly of late: those that are slow or never answer must
// leave room for those that do.
func (s *Scheduler) trialHolds(st *site, now time.Time) bool {
	return !st.proven(now) && !s.trialRoom()
}

func (st *site) proven(now time.Time) bool {
	return !st.provedAt.IsZero() && now.Sub(st.provedAt) <= provenFor
}

// relayHolds returns which of the relay's own limits allows no session now.
func (s *Scheduler) relayHolds() string {
	switch {
	case s.sessionsFull():
		return holdSessions
	case reached(s.opening, s.limits.MaxConnectsInFlight):
		return holdConnects
	}
	return ""
}

func (s *Scheduler) sessionsFull() bool { return reached(len(s.sessions), s.limits.MaxSessions) }

// laneReady returns what holds a lane from work of a site, and until when if
// that is known: the smallest scope first, so that the nearest limit is named.
func (s *Scheduler) laneReady(l *lane, st *site, connect bool, now time.Time) (string, time.Time) {
	if p := st.byLane[l]; p != nil && p.backoff.After(now) {
		return holdBackoff, p.backoff
	}
	if reason, until := l.group.laneHolds(l, connect, now); reason != "" {
		return reason, until
	}
	if connect && s.trialHolds(st, now) {
		return holdTrial, time.Time{}
	}
	if connect {
		for _, gt := range st.gates {
			if reason, until := gt.holdsSession(now); reason != "" {
				return reason, until
			}
		}
	}
	if reason, until := l.group.gateHolds(connect, now); reason != "" {
		return reason, until
	}
	if reason, until := s.providerHolds(l.group, connect, now); reason != "" || !connect {
		return reason, until
	}
	return s.relayHolds(), time.Time{}
}
