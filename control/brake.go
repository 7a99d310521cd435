package control

import (
	"fmt"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// BrakesVersion is the version of the commands that brought brakes.
const BrakesVersion = 4

// BrakeReflex is the owner of the brakes that tell of a relay's own reflex: the
// relay slowed a lane down by itself long ago and still does.
const BrakeReflex = "reflex"

// BrakeScope says which mail a brake is for: that which matches all that is
// given. Something is.
type BrakeScope struct {
	Provider string
	Pool     ids.Pool
	Source   ids.Source
	Tenant   ids.Tenant
	Domain   mailaddr.Domain // of recipients
}

// IsZero reports whether nothing is given.
func (s BrakeScope) IsZero() bool { return s == BrakeScope{} }

// Brake is a restriction of mail, by a person or a rule. It only ever restricts:
// of several that match the strictest counts, and policy's limits hold as well.
type Brake struct {
	ID         ids.Brake
	Scope      BrakeScope
	Percent    int    // of what policy allows a lane, 1 to 99; 0: nothing
	Cause      string // why, for people
	Evidence   string // what it was decided from
	EvidenceAt time.Time
	Owner      string // name of the person, or of the rule
	Automatic  bool   // a rule decided
	Node       ids.Node
	CreatedAt  time.Time
	Until      time.Time // zero: until it is cancelled
	Pinned     bool      // neither time nor a rule ends it
	EndedAt    time.Time // zero: it is in force
	EndedBy    string    // who did; empty: its time was over
	EndReason  string
	Revision   uint64
}

// InForce reports whether the brake restricts anything.
func (b *Brake) InForce() bool { return b.EndedAt.IsZero() }

// Level returns the level in words: "hold" or "slow to N %".
func (b *Brake) Level() string {
	if b.Percent == 0 {
		return "hold"
	}
	return fmt.Sprintf("slow to %d %%", b.Percent)
}

// Summary describes the brake in an audit entry.
func (b *Brake) Summary() string {
	var out strings.Builder
	fmt.Fprintf(&out, "percent=%d owner=%s", b.Percent, b.Owner)
	for _, p := range []struct{ name, value string }{
		{"provider", b.Scope.Provider}, {"pool", idText(b.Scope.Pool)}, {"source", idText(b.Scope.Source)},
		{"tenant", idText(b.Scope.Tenant)}, {"domain", string(b.Scope.Domain)}, {"until", timeText(b.Until)},
	} {
		if p.value != "" {
			fmt.Fprintf(&out, " %s=%s", p.name, p.value)
		}
	}
	if b.Pinned {
		out.WriteString(" pinned")
	}
	switch {
	case b.InForce():
	case b.EndedBy == "":
		out.WriteString(" ended: its time is over")
	default:
		out.WriteString(" ended by " + b.EndedBy)
	}
	return out.String()
}

func idText[K ids.Kind](id ids.ID[K]) string {
	if id.IsZero() {
		return ""
	}
	return id.String()
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
