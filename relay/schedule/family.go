package schedule

import (
	"slices"
	"time"
)

// Families says which address families lead to the mail hosts of a route. The
// zero value: both, and neither before the other.
type Families struct {
	NoIPv4  bool // no host has an IPv4 address
	NoIPv6  bool // no host has an IPv6 address
	Refused bool // with NoIPv6: the policy rules IPv6 out, whatever the hosts have
	First   Family
}

// Family names the family whose sources go first.
type Family uint8

// The families. Sources of the second one are used while all of the first are
// backing off, or there is none.
const (
	AnyFamily Family = iota
	IPv4First
	IPv6First
)

// Ranks of a lane for a site. A lane is used only when those of better rank
// cannot reach the site.
const (
	preferred = iota
	fallback  // of the family that goes second
	pointless // no host has an address of its family: the attempt says so
	ruledOut  // by policy
)

// rank returns the place of a lane's family at a site.
func (st *site) rank(l *lane) int {
	f := &st.families
	switch {
	case l.ipv6 && f.Refused:
		return ruledOut
	case l.ipv6 && f.NoIPv6, !l.ipv6 && f.NoIPv4:
		return pointless
	case l.ipv6 && f.First == IPv4First, !l.ipv6 && f.First == IPv6First:
		return fallback
	}
	return preferred
}

// ranks reports of which ranks a lane may serve the site now: those whose every
// better lane is backing off there, is barred or was tried in vain for what waits. A family
// without an address is tried only for what no other lane may carry, so that it
// does not wait for ever.
func (s *Scheduler) ranks(st *site, now time.Time) (may [ruledOut + 1]bool) {
	may = [...]bool{preferred: true, fallback: true, pointless: true, ruledOut: false}
	if !st.group.mixed && st.families == (Families{}) {
		return may
	}
	for _, l := range st.group.lanes {
		r := st.rank(l)
		if r >= pointless || slices.Contains(s.tried, l) {
			continue
		}
		may[pointless] = false
		if r == preferred && !st.backingOff(l, now) && !st.shutTo(l.key, now) {
			may[fallback] = false
		}
	}
	return may
}
