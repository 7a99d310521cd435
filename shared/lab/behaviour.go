package lab

import (
	"fmt"
	"net/netip"
	"time"
)

// Phase is a point of an SMTP session at which a provider can misbehave.
type Phase int

// The phases, in the order of a session.
const (
	PhaseConnect Phase = iota
	PhaseEhlo
	PhaseStartTLS
	PhaseMail
	PhaseRcpt
	PhaseData
	PhaseFinalDot
)

var phaseNames = [...]string{"connect", "ehlo", "starttls", "mail", "rcpt", "data", "final dot"}

func (p Phase) String() string {
	if p >= 0 && int(p) < len(phaseNames) {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", int(p))
}

// TLSMode is what a provider does about STARTTLS (RFC 3207).
type TLSMode int

// The TLS modes.
const (
	TLSOffered   TLSMode = iota // works, with a certificate of the lab's CA
	TLSAbsent                   // not announced, 502 when asked for
	TLSRefused                  // announced, 454 when asked for
	TLSBroken                   // announced, 220, then bytes that are not TLS
	TLSWrongName                // works, with a certificate for another name
)

// Event is what a Behaviour is asked about.
type Event struct {
	Provider string
	Phase    Phase
	Source   netip.Addr // of the client
	MX       netip.Addr // it connected to
	Hello    string     // EHLO or HELO name, once given
	TLS      bool
	From     string // from PhaseMail on
	Rcpt     string // in PhaseRcpt
	Message  int    // transactions begun on this connection, this one included
}

// Answer is what a provider does at a phase instead of what its profile says.
// The zero Answer leaves the profile in charge.
type Answer struct {
	Reply string        // e.g. "451 4.3.0 later"; lines separated by newlines
	Delay time.Duration // wait before the reply, or before going on as usual
	Close bool          // close after Reply, at once when Reply is empty
	Keep  bool          // in PhaseFinalDot: store the mail although the reply is not a 250
}

// Behaviour overrides a provider while it is set.
type Behaviour struct {
	// Answer is asked at every phase, from many connections at once.
	Answer func(Event) Answer
	TLS    TLSMode
	// Without leaves EHLO keywords out, e.g. "PIPELINING", "8BITMIME".
	Without []string
}

// SetBehaviour overrides how a provider answers, from the next command on; the
// zero Behaviour ends that.
func (l *Lab) SetBehaviour(provider string, b Behaviour) error {
	p := l.farm.providers[provider]
	if p == nil {
		return fmt.Errorf("lab: provider %q does not exist", provider)
	}
	p.behaviour.Store(&b)
	return nil
}

// SetLimits replaces the limits a provider states, also for open connections.
func (l *Lab) SetLimits(provider string, limits Limits) error {
	p := l.farm.providers[provider]
	if p == nil {
		return fmt.Errorf("lab: provider %q does not exist", provider)
	}
	if err := limits.check(provider); err != nil {
		return err
	}
	p.limits.Store(&limits)
	return nil
}

// At returns a Behaviour.Answer that gives one answer at one phase and leaves
// the rest alone.
func At(phase Phase, a Answer) func(Event) Answer {
	return func(e Event) Answer {
		if e.Phase == phase {
			return a
		}
		return Answer{}
	}
}
