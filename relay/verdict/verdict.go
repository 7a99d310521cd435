package verdict

import (
	"time"

	"github.com/relais-mta/relais/relay"
)

// Class is one of the canonical classes of results. The names are stable:
// events, counters and rules carry them.
type Class string

// The classes. The comment gives who is at fault and what a 5xx of the class
// means for the recipient.
const (
	Delivered       Class = "delivered"        // the host took the message
	BadMailbox      Class = "bad-mailbox"      // address: no such mailbox
	InactiveMailbox Class = "inactive-mailbox" // address: disabled, suspended or abandoned
	BadDomain       Class = "bad-domain"       // address: the domain does not exist or takes no mail
	Filtered        Class = "filtered"         // address, perhaps: refused after the data without a reason
	Quota           Class = "quota"            // address: mailbox full
	TooLarge        Class = "too-large"        // message: larger than the host takes
	Routing         Class = "routing"          // path: DNS or routing failed
	NoAnswer        Class = "no-answer"        // path: no connection
	BadConnection   Class = "bad-connection"   // path: the connection broke
	Expired         Class = "expired"          // path: our own deadline passed
	IPBlock         Class = "ip-block"         // sender: the source address or its network is blocked
	Blocklist       Class = "blocklist"        // sender: named by a public blocklist
	SpamContent     Class = "spam-content"     // message: looks like spam
	Content         Class = "content"          // message: form or attachment not wanted
	Virus           Class = "virus"            // message: malware
	Policy          Class = "policy"           // sender: against the host's rules
	AuthFailure     Class = "auth-failure"     // sender's set-up: SPF, DKIM, DMARC, reverse DNS, TLS
	InvalidSender   Class = "invalid-sender"   // sender's set-up: the envelope sender is not accepted
	RelayDenied     Class = "relay-denied"     // path: the host is not (any more) responsible for the domain
	Throttled       Class = "throttled"        // sender: too fast or too much
	RecipientRate   Class = "recipient-rate"   // address: this recipient gets mail too quickly
	Greylist        Class = "greylist"         // path: try again from the same source
	RemoteSystem    Class = "remote-system"    // path: the host has trouble of its own
	Protocol        Class = "protocol"         // sender's set-up: the dialogue or our message broke a rule
	LocalSuppressed Class = "local-suppressed" // local: on our own suppression list
	NotABounce      Class = "not-a-bounce"     // no delivery result at all
	Undetermined    Class = "undetermined"     // path: no rule fits
)

// Scope says who is at fault. Only ScopeAddress may ever lead to suppression.
type Scope string

// The scopes.
const (
	ScopeNone         Scope = ""
	ScopeAddress      Scope = "address"
	ScopeMaybeAddress Scope = "address?" // not before it repeats over campaigns
	ScopeMessage      Scope = "message"
	ScopePath         Scope = "path"
	ScopeSender       Scope = "sender"
	ScopeSenderConfig Scope = "sender-config"
	ScopeLocal        Scope = "local"
)

// Action says what becomes of the recipient.
type Action string

// The actions.
const (
	Deliver Action = "deliver" // final: delivered
	Fail    Action = "fail"    // final: bounced
	Retry   Action = "retry"   // again by the retry schedule, not before Verdict.After
	// RetryNow: again at once in another transaction or session, at the cost
	// of no attempt; if the attempt got no recipient of the message any
	// further, as Retry, so that it cannot go round for ever.
	RetryNow Action = "retry-now"
)

// Verdict is what a reply means.
type Verdict struct {
	Class  Class
	Scope  Scope
	Action Action
	After  time.Duration // with Retry: the reply asks for at least this long; 0: by the schedule
	Rule   string        // name of the rule that decided
	Zone   string        // with Blocklist: the list named in the text, if it could be read
}

// scopes is who is at fault by class.
var scopes = map[Class]Scope{
	Delivered: ScopeNone, BadMailbox: ScopeAddress, InactiveMailbox: ScopeAddress, BadDomain: ScopeAddress,
	Filtered: ScopeMaybeAddress, Quota: ScopeAddress, TooLarge: ScopeMessage, Routing: ScopePath, NoAnswer: ScopePath,
	BadConnection: ScopePath, Expired: ScopePath, IPBlock: ScopeSender, Blocklist: ScopeSender, SpamContent: ScopeMessage,
	Content: ScopeMessage, Virus: ScopeMessage, Policy: ScopeSender, AuthFailure: ScopeSenderConfig,
	InvalidSender: ScopeSenderConfig, RelayDenied: ScopePath, Throttled: ScopeSender, RecipientRate: ScopeAddress,
	Greylist: ScopePath, RemoteSystem: ScopePath, Protocol: ScopeSenderConfig, LocalSuppressed: ScopeLocal,
	NotABounce: ScopeNone, Undetermined: ScopePath,
}

// ScopeOf returns who is at fault in a class.
func ScopeOf(c Class) Scope { return scopes[c] }

// delivered is the verdict of every accepted message.
var delivered = Verdict{Class: Delivered, Action: Deliver, Rule: "accepted"}

// Of returns the verdict on an outcome at a provider ("" if unknown).
func Of(provider string, o *relay.Outcome) Verdict {
	if o.Status == relay.Delivered {
		return delivered
	}
	v := Classify(provider, o.Phase, o.Reply)
	switch o.Status {
	case relay.NotTried:
		v.Action, v.After = RetryNow, 0
	case relay.InDoubt:
		// The host may have taken it: whatever the class, the recipient is
		// asked again once, later.
		v.Action = Retry
	}
	return v
}

// OfLine returns the verdict on a reply as a log or a person writes it. A log
// line does not tell its phase; RCPT is assumed, where most refusals happen.
func OfLine(provider, text string) Verdict {
	return Classify(provider, relay.PhaseRCPT, ParseReply(text))
}
