package reflex

import "github.com/relais-mta/relais/relay/verdict"

// Signal is what the end of a transaction, or of the try to open a session, says
// about the lane.
type Signal uint8

// The signals, the weaker first: of the recipients of one transaction the
// strongest counts.
const (
	Silent  Signal = iota // nothing: it concerns one recipient, the sending domain or our own trouble
	Clean                 // the host answered for the message: taken, or refused for what it is
	Broken                // no connection, or it broke
	Unwell                // the host has trouble of its own
	TooFast               // the host asks for less
	Blocked               // the host takes nothing from the source address
)

var signalNames = [...]string{"silent", "clean", "broken", "unwell", "too-fast", "blocked"}

// String returns the name that metrics carry.
func (s Signal) String() string { return signalNames[s] }

// Of returns what a class says. Temporary tells that the host asked to be tried
// again: a policy that refuses for good is not answered by sending it slowly.
func Of(c verdict.Class, temporary bool) Signal {
	switch c {
	case verdict.Throttled:
		return TooFast
	case verdict.Policy:
		if temporary {
			return TooFast
		}
	case verdict.IPBlock, verdict.Blocklist:
		return Blocked
	case verdict.RemoteSystem:
		return Unwell
	case verdict.NoAnswer, verdict.BadConnection:
		return Broken
	case verdict.Delivered, verdict.BadMailbox, verdict.InactiveMailbox, verdict.Filtered, verdict.Quota, verdict.TooLarge,
		verdict.SpamContent, verdict.Content, verdict.Virus:
		return Clean
	}
	return Silent
}
