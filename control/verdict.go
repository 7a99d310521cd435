package control

import (
	"fmt"
	"time"
)

// ReverseVerdict says what is known of an address's reverse DNS.
type ReverseVerdict string

// The verdicts. Receivers distrust or refuse an address whose PTR record is
// missing or whose name does not lead back to it, so only a confirmed address,
// or one that an operator overrides, is used.
const (
	ReverseUnchecked ReverseVerdict = ""
	ReverseConfirmed ReverseVerdict = "confirmed" // PTR gives the name, and the name gives the address
	ReverseFailed    ReverseVerdict = "failed"
)

// Usable reports whether mail may leave from the address.
func (s *Source) Usable() bool { return s.Reverse == ReverseConfirmed || s.Overridden }

// PTRName is the name that the address's PTR record must give.
func (s *Source) PTRName() string {
	if s.PTR != "" {
		return s.PTR
	}
	return s.EHLO
}

// PolicyVersion is a policy that was put, kept to compare with and go back to.
type PolicyVersion struct {
	Policy   uint64 // revision of the policy
	Time     time.Time
	Actor    string
	Reason   string
	Sections []PolicySection
	Revision uint64
}

// Summary renders the row for the audit tail.
func (v *PolicyVersion) Summary() string {
	return fmt.Sprintf("policy=%d actor=%s", v.Policy, v.Actor)
}
