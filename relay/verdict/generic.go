package verdict

import "github.com/relais-mta/relais/relay"

// atRecipient are the phases in which a refusal can be about the recipient.
var atRecipient = []relay.Phase{relay.PhaseRCPT, relay.PhaseDATA, relay.PhaseFinalDot}

// afterData are the phases in which the host has seen the message.
var afterData = []relay.Phase{relay.PhaseDATA, relay.PhaseFinalDot}

// localRules are for results without a reply: DNS, connections, our own checks.
var localRules = [...]rule{
	{name: "local-bad-domain", phases: []relay.Phase{relay.PhaseResolve}, esc: "5.1.2 5.1.10", class: BadDomain},
	{name: "local-routing", phases: []relay.Phase{relay.PhaseResolve}, class: Routing},
	{name: "local-too-large", phases: []relay.Phase{relay.PhaseLocal}, esc: "x.3.4", class: TooLarge},
	{name: "local-bad-address", phases: []relay.Phase{relay.PhaseLocal}, esc: "x.1.3", class: BadMailbox},
	{name: "local-conversion", phases: []relay.Phase{relay.PhaseLocal}, esc: "x.6.*", class: Content},
	{name: "local-expired", phases: []relay.Phase{relay.PhaseLocal}, esc: "x.4.7", class: Expired},
	{name: "local-fault", phases: []relay.Phase{relay.PhaseLocal}, class: RemoteSystem},
	{name: "no-address", phases: []relay.Phase{relay.PhaseConnect}, esc: "4.4.4", class: Routing},
	{name: "no-answer", phases: []relay.Phase{relay.PhaseConnect}, esc: "4.4.1", class: NoAnswer},
	{name: "no-tls", phases: []relay.Phase{relay.PhaseSTARTTLS}, class: AuthFailure, action: Retry},
	{name: "not-smtp", esc: "4.5.0", class: Protocol, action: Retry},
	{name: "bad-connection", esc: "4.4.2", class: BadConnection},
}

// authRules are about authentication and TLS, in any provider's words.
var authRules = [...]rule{
	{name: "auth-codes", esc: "x.7.20 x.7.21 x.7.22 x.7.23 x.7.24 x.7.25 x.7.26 x.7.29 x.7.30 x.7.32", class: AuthFailure,
		sample: "550 5.7.23 SPF validation failed"},
	{name: "dmarc", codes: "4 5", any: []string{"dmarc"}, class: AuthFailure,
		sample: "550 5.7.1 rejected by the DMARC policy of example.org"},
	{name: "spf", codes: "4 5", any: []string{"spf fail", "spf check", "spf record", "spf valid", "failed spf", "sender policy framework", "not authorized to send from this domain", "spf:", "spf hard", "openspf.org"}, class: AuthFailure,
		sample: "550 5.7.1 SPF check failed for example.org"},
	{name: "dkim", codes: "4 5", any: []string{"dkim"}, class: AuthFailure,
		sample: "550 5.7.1 no passing DKIM signature found"},
	{name: "reverse-dns", codes: "4 5", any: []string{"reverse dns", "ptr record", "rdns", "cannot find your hostname", "cannot find your reverse hostname", "no ptr", "reverse name", "client host rejected: cannot find"}, class: AuthFailure,
		sample: "450 4.7.1 client host rejected: cannot find your reverse hostname"},
	{name: "helo-name", codes: "4 5", any: []string{"helo command rejected", "invalid helo", "ehlo command rejected", "helo/ehlo", "bad helo"}, class: AuthFailure,
		sample: "504 5.5.2 helo command rejected: need fully-qualified hostname"},
	{name: "tls-needed", codes: "530", any: []string{"starttls", "tls"}, class: AuthFailure,
		sample: "530 5.7.0 must issue a STARTTLS command first"},
	{name: "tls-needed-phrase", codes: "4 5", any: []string{"tls required", "requires tls", "encryption required", "must use tls", "session encryption is required", "start tls first"}, class: AuthFailure,
		sample: "554 5.7.10 session encryption is required"},
	{name: "unauthenticated-mail", codes: "5", any: []string{"unauthenticated email", "unauthenticated mail", "email authentication"}, class: AuthFailure,
		sample: "550 5.7.1 unauthenticated email is not accepted"},
}

// enhancedRules read a code that agrees with the three digits. Codes that
// hosts use for anything (X.0.0, X.7.0, X.7.1) are left to the phrases, but
// for X.7.1 with a phrase of its own.
var enhancedRules = [...]rule{
	{name: "esc-relay", esc: "x.7.1 x.7.64", any: []string{"relay", "relais interdit"}, none: []string{"mail relay "}, class: RelayDenied,
		sample: "554 5.7.1 relay access denied"},
	{name: "esc-mailbox-blocked", esc: "5.1.1", any: []string{"over quota", "quota exceeded", "mailbox full", "mailbox is full"}, class: Quota,
		sample: "552 5.1.1 mailbox full"},
	{name: "esc-suspended", esc: "5.1.1", any: []string{"suspended", "disabled", "inactive", "deactivated"}, class: InactiveMailbox,
		sample: "550 5.1.1 this account is suspended"},
	{name: "esc-mailbox", esc: "5.1.1 5.1.3 5.1.6 5.1.4", phases: atRecipient, class: BadMailbox,
		sample: "550 5.1.1 no such user here"},
	{name: "esc-mailbox-unproven", esc: "4.1.1 4.1.3 4.1.6", phases: atRecipient, class: BadMailbox,
		sample: "450 4.1.1 recipient address rejected for now: unverified"},
	{name: "esc-recipient-not-found", esc: "5.1.10", any: []string{"recipient", "user", "mailbox"}, phases: atRecipient, class: BadMailbox,
		sample: "550 5.1.10 recipient not found"},
	{name: "esc-domain", esc: "5.1.2 5.1.10", class: BadDomain,
		sample: "550 5.1.2 bad destination system"},
	{name: "esc-domain-later", esc: "4.1.2", class: Routing,
		sample: "450 4.1.2 domain not found just now"},
	{name: "esc-sender", esc: "x.1.7 x.1.8 5.7.27", class: InvalidSender,
		sample: "550 5.1.8 sender's domain not found"},
	{name: "esc-inactive", esc: "5.2.1 5.7.13", phases: atRecipient, class: InactiveMailbox,
		sample: "550 5.2.1 mailbox disabled"},
	{name: "esc-recipient-rate", esc: "4.2.1", any: []string{"too quickly", "receiving mail", "rate"}, class: RecipientRate, after: recipientPause,
		sample: "450 4.2.1 this user is receiving mail too quickly"},
	{name: "esc-greylist", esc: "4.2.0 4.7.1 4.7.0 4.2.1", codes: "450 451", any: []string{"greylist", "graylist", "grey list", "greylisting"}, class: Greylist,
		sample: "450 4.2.0 greylisted, try later"},
	{name: "esc-inactive-later", esc: "4.2.1", any: []string{"disabled", "inactive", "suspended"}, class: InactiveMailbox,
		sample: "450 4.2.1 this mailbox is inactive"},
	{name: "esc-quota", esc: "x.2.2", class: Quota,
		sample: "552 5.2.2 over quota"},
	{name: "esc-too-large", esc: "5.2.3 5.3.4", class: TooLarge,
		sample: "552 5.3.4 message too large"},
	{name: "esc-throttled", esc: "4.7.28 4.7.650 4.7.651 4.7.652", class: Throttled,
		sample: "421 4.7.28 rate limited"},
	{name: "esc-expired", esc: "x.4.7", class: Routing,
		sample: "451 4.4.7 delivery time expired at the next hop"},
	{name: "esc-routing", esc: "x.4.0 x.4.1 x.4.2 x.4.3 x.4.4 x.4.5 x.4.6", class: Routing,
		sample: "554 5.4.6 too many hops"},
	{name: "esc-too-many-recipients", esc: "4.5.3 5.5.3", codes: "4 5", phases: []relay.Phase{relay.PhaseRCPT}, class: Protocol, action: RetryNow,
		sample: "452 4.5.3 too many recipients"},
	{name: "esc-protocol", esc: "x.5.*", class: Protocol, none: []string{"mailbox", "user", "recipient"},
		sample: "503 5.5.1 bad sequence of commands"},
	{name: "esc-system", esc: "x.3.*", class: RemoteSystem,
		sample: "451 4.3.0 local fault"},
	{name: "esc-content", esc: "x.6.*", class: Content,
		sample: "554 5.6.0 message is malformed"},
	{name: "esc-tls", esc: "x.7.10 x.7.11", class: AuthFailure,
		sample: "550 5.7.10 encryption needed"},
}

// phraseRules read common words. Those that blame the sender stand before
// those that blame the recipient, because a wrong suppression costs more than
// a wrong ticket.
var phraseRules = [...]rule{
	{name: "says-relay", codes: "4 5", any: []string{"relay access denied", "relaying denied", "relay not permitted", "unable to relay", "relaying not allowed", "not permitted to relay", "do not relay", "we do not relay", "rcpthosts", "relaying is not allowed", "relais interdit", "relay denied"}, class: RelayDenied,
		sample: "550 relaying denied"},
	{name: "says-virus", codes: "5", any: []string{"virus", "malware", "infected", "trojan"}, class: Virus,
		sample: "554 virus found in the message"},
	{name: "says-attachment", codes: "5", any: []string{"attachment", "executable", "file type", "bare linefeed", "bare lf"}, class: Content,
		sample: "552 attachments of this type are not accepted"},
	{name: "says-ip-block", codes: "4 5", any: []string{"bad reputation", "poor reputation", "low reputation", "ip is blocked", "your ip has been blocked", "ip address is blocked", "blocked for its reputation", "your ip address", "sending ip", "client host blocked", "block list", "blacklist", "blocklist", "blocked by our", "is blocked here"}, none: []string{"slow down", "too many", "too much", "rate"}, class: IPBlock,
		sample: "554 your IP address has a poor reputation"},
	{name: "says-recipient-rate", codes: "4", any: []string{"receiving mail too quickly", "receiving mail at a rate"}, class: RecipientRate, after: recipientPause,
		sample: "450 the user is receiving mail too quickly"},
	{name: "says-throttled", codes: "4", any: []string{"rate limit", "too many connections", "too many messages", "too many mails", "too much mail", "slow down", "throttl", "too fast", "too quickly", "unusual rate", "exceeded the rate", "excessive volume", "unexpected volume", "concurrent connections", "sending rate", "messages on one connection", "connections from your"}, class: Throttled,
		sample: "421 too many connections from your host"},
	{name: "says-throttled-for-good", codes: "5", any: []string{"rate limit", "too many connections", "throttl", "sending too fast"}, class: Throttled,
		sample: "554 rate limit exceeded"},
	{name: "says-too-many-recipients", codes: "452 552 450 550", any: []string{"too many recipients"}, phases: []relay.Phase{relay.PhaseRCPT}, class: Protocol, action: RetryNow,
		sample: "452 too many recipients"},
	{name: "says-greylist", codes: "4", any: []string{"greylist", "graylist", "grey list", "grey-list"}, class: Greylist,
		sample: "451 greylisting in effect, try again later"},
	{name: "says-spam", codes: "4 5", any: []string{"spam", "unsolicited", "bulk mail", "junk", "content rejected", "content filter", "phish"}, class: SpamContent,
		sample: "554 message looks like spam"},
	{name: "says-quota", codes: "4 5", any: []string{"over quota", "quota exceeded", "over its quota", "overquota", "mailbox full", "mailbox is full", "mailbox for", "exceeded storage", "insufficient storage", "storage allocation", "quota", "boite pleine"}, none: []string{"insufficient system storage", "mailbox for "}, class: Quota,
		sample: "552 mailbox is full"},
	{name: "says-quota-system", codes: "4", all: []string{"insufficient system storage", "mailbox full"}, class: Quota,
		sample: "452 insufficient system storage, mailbox full"},
	{name: "says-too-large", codes: "5", any: []string{"message too large", "size exceeds", "message size", "exceeds maximum", "too big", "larger than", "exceeds the maximum", "fixed limit"}, class: TooLarge,
		sample: "552 message size exceeds the maximum"},
	{name: "says-sender", codes: "4 5", any: []string{"sender address rejected", "sender rejected", "sender domain", "invalid sender", "sender verify", "sender not", "domain of sender", "bad sender", "return path", "sender denied"}, class: InvalidSender,
		sample: "550 sender address rejected: domain not found"},
	{name: "says-inactive", codes: "4 5", any: []string{"mailbox disabled", "mailbox is disabled", "account disabled", "account is disabled", "account has been disabled", "mailbox is inactive", "account is inactive", "inactive mailbox", "inactive account", "due to inactivity", "account suspended", "account has been suspended", "account is suspended", "mailbox suspended", "account closed", "account has been closed", "no longer active", "deactivated", "mailbox blocked", "account blocked", "account expired", "archived"}, phases: atRecipient, class: InactiveMailbox,
		sample: "550 the account is disabled"},
	{name: "says-unknown-user", codes: "5", any: []string{"user unknown", "unknown user", "no such user", "no such recipient", "no such mailbox", "no such address", "unknown recipient", "recipient unknown", "user not found", "mailbox not found", "recipient not found", "mailbox unavailable", "does not exist", "doesn't exist", "invalid recipient", "invalid mailbox", "unknown address", "address unknown", "unrouteable address", "not our customer", "no mailbox", "user doesn't", "unknown local", "invalid address", "recipientnotfound", "inconnu", "undeliverable address", "no account", "unknown or illegal alias", "not a valid mailbox", "no longer available", "has moved"}, phases: atRecipient, class: BadMailbox,
		sample: "550 no such user here"},
	{name: "says-mailbox-later", codes: "4", any: []string{"user unknown", "unknown user", "mailbox unavailable", "unverified", "recipient unknown"}, phases: atRecipient, class: BadMailbox,
		sample: "450 mailbox unavailable"},
	{name: "says-domain", codes: "5", any: []string{"domain not found", "unknown domain", "does not accept mail", "no such domain", "domain does not accept", "host unknown"}, class: BadDomain,
		sample: "556 the domain does not accept mail"},
	{name: "says-loop", codes: "4 5", any: []string{"too many hops", "mail loop", "routing loop", "loops back", "hop count"}, class: Routing,
		sample: "554 too many hops, this message is looping"},
	{name: "says-dns", codes: "4", any: []string{"dns", "lookup failure", "look-up failed", "name service", "could not resolve"}, class: RemoteSystem,
		sample: "451 temporary lookup failure"},
	{name: "says-later-at-recipient", codes: "450 451", any: []string{"try again later", "try later", "please retry", "temporarily rejected", "temporarily deferred"}, phases: []relay.Phase{relay.PhaseRCPT}, none: []string{"system", "busy", "internal", "fault", "error", "load", "moment"}, class: Greylist,
		sample: "450 recipient temporarily rejected, try again later"},
	{name: "says-system", codes: "4", any: []string{"local error", "internal error", "system error", "service unavailable", "service not available", "server busy", "server error", "too busy", "temporary failure", "temporary fault", "temporarily unavailable", "not available now", "overload", "high load", "insufficient system", "queue file", "not taking mail", "shutting down", "is busy"}, class: RemoteSystem,
		sample: "421 service not available, closing"},
	{name: "says-system-for-good", codes: "5", any: []string{"system error", "internal server error", "configuration error", "misconfigur", "internal error"}, class: RemoteSystem,
		sample: "554 internal error in the mail system"},
	{name: "says-timeout", codes: "4", any: []string{"timeout", "timed out", "idle"}, class: BadConnection,
		sample: "421 timeout exceeded"},
	{name: "says-protocol", codes: "5", any: []string{"syntax error", "bad sequence", "command not recognized", "not implemented", "command unrecognized", "unrecognized command", "out of sequence", "line too long", "pipelining", "protocol"}, class: Protocol,
		sample: "503 bad sequence of commands"},
	{name: "says-content", codes: "5", any: []string{"header", "mime", "rfc 5322", "rfc5322", "rfc 2822", "malformed", "message-id", "content", "not rfc"}, phases: afterData, class: Content,
		sample: "550 message is not RFC 5322 compliant"},
	{name: "says-policy", codes: "4 5", any: []string{"policy", "not allowed", "access denied", "not authorized", "denied", "rejected", "refused", "blocked", "not accepted", "forbidden", "administrative", "prohibited", "not permitted", "unacceptable"}, class: Policy,
		sample: "554 refused for policy reasons"},
}

// codeRules read the three digits alone.
var codeRules = [...]rule{
	{name: "code-421", codes: "421", class: RemoteSystem, sample: "421 goodbye"},
	{name: "code-432", codes: "432 454", class: RemoteSystem, sample: "454 not now"},
	{name: "code-450", codes: "450", phases: []relay.Phase{relay.PhaseRCPT}, class: Greylist, sample: "450 later"},
	{name: "code-451", codes: "451", class: RemoteSystem, sample: "451 aborted"},
	{name: "code-452", codes: "452", class: RemoteSystem, sample: "452 no"},
	{name: "code-500", codes: "500 501 502 503 504 555", class: Protocol, sample: "503 no"},
	{name: "code-521", codes: "521 556", class: BadDomain, sample: "556 no"}, // RFC 7504
	{name: "code-530", codes: "530 535 538", class: Policy, sample: "530 no"},
	{name: "code-551", codes: "551", phases: []relay.Phase{relay.PhaseRCPT}, class: BadMailbox, sample: "551 elsewhere"},
	{name: "code-552", codes: "552", phases: []relay.Phase{relay.PhaseRCPT}, class: Quota, sample: "552 no"},
	{name: "code-552-size", codes: "552", phases: []relay.Phase{relay.PhaseMAIL, relay.PhaseDATA, relay.PhaseFinalDot}, class: TooLarge, sample: "552 no"},
	{name: "code-553", codes: "553", phases: []relay.Phase{relay.PhaseRCPT}, class: BadMailbox, sample: "553 no"},
	{name: "code-553-sender", codes: "553", phases: []relay.Phase{relay.PhaseMAIL}, class: InvalidSender, sample: "553 no"},
}

// phaseRules are the last resort: when something was refused without a word.
var phaseRules = [...]rule{
	{name: "phase-connect", codes: "5", phases: []relay.Phase{relay.PhaseConnect, relay.PhaseEHLO, relay.PhaseSTARTTLS}, class: Policy, sample: "554 no"},
	{name: "phase-mail", codes: "5", phases: []relay.Phase{relay.PhaseMAIL}, class: Policy, sample: "550 no"},
	{name: "phase-after-data", codes: "5", phases: afterData, class: Filtered, sample: "554 transaction failed"},
	{name: "phase-any-4xx", codes: "4", class: RemoteSystem, sample: "455 no"},
}
