package lab

// Wording is what a provider says. In every reply {ip} stands for the source
// address, {rcpt} for the recipient, {host} for the MX host and {n} for the
// limit in question; a newline starts another line of the same reply.
type Wording struct {
	Banner         string // 220 greeting, without the code
	OverConns      string // too many connections at once, instead of the greeting
	OverPerConn    string // too many messages on this connection
	OverRate       string // too many messages in the window
	OverRecipients string // too many recipients in this transaction
	NeedTLS        string // MAIL in clear
	NeedPTR        string // no confirmed reverse DNS
	Unknown        string // no such user
	Disabled       string // mailbox switched off
	Full           string // over quota for good
	FullTemp       string // over quota for now
	Greylisted     string
	Deferred       string // a passing fault of its own
	Throttled      string // slow down
	Blocked        string // source address blocked
	Spam           string // content refused after the final dot
	TooLarge       string
	NoRelay        string // recipient's domain is not ours
}

var plainWording = Wording{
	Banner:         "{host} ESMTP",
	OverConns:      "421 4.7.0 {host} too many connections from {ip}, {n} at once are served",
	OverPerConn:    "421 4.7.0 {host} no more than {n} messages on one connection",
	OverRate:       "450 4.7.1 {ip} sends too fast, try again later",
	OverRecipients: "452 4.5.3 too many recipients, {n} at a time",
	NeedTLS:        "530 5.7.0 start TLS first",
	NeedPTR:        "550 5.7.25 reverse name of {ip} does not lead back to it",
	Unknown:        "550 5.1.1 <{rcpt}>: recipient unknown here",
	Disabled:       "550 5.2.1 <{rcpt}>: this mailbox is disabled",
	Full:           "552 5.2.2 <{rcpt}>: mailbox is over its quota",
	FullTemp:       "452 4.2.2 <{rcpt}>: mailbox is over its quota for now",
	Greylisted:     "451 4.7.1 <{rcpt}>: greylisted, try again later",
	Deferred:       "451 4.3.0 <{rcpt}>: local fault, try again later",
	Throttled:      "450 4.7.1 slow down, too much mail from {ip}",
	Blocked:        "554 5.7.1 {ip} is blocked here for its reputation",
	Spam:           "554 5.7.1 message looks like spam and was not taken",
	TooLarge:       "552 5.3.4 message is larger than {n} bytes",
	NoRelay:        "550 5.7.1 <{rcpt}>: relaying denied",
}

var googleWording = Wording{
	Banner:         "mx.google.com ESMTP lab - gsmtp",
	OverConns:      "421 4.7.0 Too many connections are open from {ip} at this time. - gsmtp",
	OverPerConn:    "421 4.7.0 This connection has carried its {n} messages, please open another. - gsmtp",
	OverRate:       "421-4.7.28 An unusual rate of mail is coming from {ip}.\n4.7.28 It is held back for now to protect our users. - gsmtp",
	OverRecipients: "452 4.5.3 This message names too many recipients, {n} are taken at once. - gsmtp",
	NeedTLS:        "421 4.7.29 Mail without TLS from {ip} is rate limited here; use TLS. - gsmtp",
	NeedPTR:        "550-5.7.25 The sending address {ip} has no PTR record,\n5.7.25 or its name does not point back to it. - gsmtp",
	Unknown:        "550-5.1.1 No account answers to the address you wrote to. Check it for\n5.1.1 typing errors. https://support.google.com/mail/?p=NoSuchUser - gsmtp",
	Disabled:       "550 5.2.1 The account you wrote to is disabled. https://support.google.com/mail/?p=DisabledUser - gsmtp",
	Full:           "552 5.2.2 The inbox of this recipient is full and stays so. https://support.google.com/mail/?p=OverQuotaPerm - gsmtp",
	FullTemp:       "452 4.2.2 The inbox of this recipient is out of space. https://support.google.com/mail/?p=OverQuotaTemp - gsmtp",
	Greylisted:     "450 4.2.1 The user you wrote to is receiving mail too quickly, send it again later. - gsmtp",
	Deferred:       "451 4.3.0 Mail server is having a moment, try again. - gsmtp",
	Throttled:      "421 4.7.28 We see an unusual rate of unsolicited mail from {ip}; it is rate limited. - gsmtp",
	Blocked:        "550-5.7.1 This mail was blocked because of the very low reputation of\n5.7.1 the sending IP {ip}. - gsmtp",
	Spam:           "550 5.7.1 This message is likely unsolicited and was blocked. - gsmtp",
	TooLarge:       "552 5.3.4 Your message is past our limit of {n} bytes. - gsmtp",
	NoRelay:        "550 5.7.1 We do not relay for <{rcpt}>. - gsmtp",
}

var microsoftWording = Wording{
	Banner:         "{host} Microsoft ESMTP MAIL Service ready",
	OverConns:      "421 4.7.652 The mail server {ip} has exceeded the maximum number of connections.",
	OverPerConn:    "421 RP-002 {ip} has used up this connection after {n} messages.",
	OverRate:       "451 4.7.650 The mail server {ip} is temporarily rate limited for its reputation. (S775)",
	OverRecipients: "452 4.5.3 Too many recipients, {n} at most",
	NeedTLS:        plainWording.NeedTLS,
	NeedPTR:        plainWording.NeedPTR,
	Unknown:        "550 5.5.0 Requested action not taken: mailbox unavailable (S2017062302)",
	Disabled:       "550 5.2.1 Mailbox of this recipient cannot be used",
	Full:           "552 5.2.2 Mailbox of this recipient is full",
	FullTemp:       "452 4.2.2 Mailbox of this recipient is full, try again later",
	Greylisted:     "451 4.7.500 Server busy. Please come back later from {ip}. AS(200)",
	Deferred:       "451 4.3.2 System not taking mail just now",
	Throttled:      "421 RP-001 Too much mail from {ip}, its rate exceeds what its reputation allows",
	Blocked:        "550 5.7.1 Mail from [{ip}] was not sent: part of its network is on our block list (S3150)",
	Spam:           "550 5.7.1 Message refused for its content",
	TooLarge:       "552 5.3.4 Message exceeds the fixed maximum of {n} bytes",
	NoRelay:        "550 5.7.1 Unable to relay for {rcpt}",
}

var exchangeWording = Wording{
	Banner:         "{host} Microsoft ESMTP MAIL Service ready",
	OverConns:      "421 4.3.2 The maximum number of concurrent server connections for {ip} is {n}, closing",
	OverPerConn:    "421 4.4.2 Message submission limit of {n} on this connection reached",
	OverRate:       "451 4.7.500 Server busy. Please try again later from {ip}. AS(77714)",
	OverRecipients: "452 4.5.3 Too many recipients",
	NeedTLS:        plainWording.NeedTLS,
	NeedPTR:        plainWording.NeedPTR,
	Unknown:        "550 5.1.10 RESOLVER.ADR.RecipientNotFound; recipient {rcpt} not found by SMTP address lookup",
	Disabled:       "550 5.4.1 Recipient address rejected: access denied for {rcpt}",
	Full:           "552 5.2.2 Mailbox full; quota of {rcpt} exceeded",
	FullTemp:       "452 4.2.2 Mailbox full for now; {rcpt}",
	Greylisted:     "451 4.7.501 Server busy. Please try again later from {ip}.",
	Deferred:       "451 4.3.0 Temporary server error, try again later",
	Throttled:      "451 4.7.550 Access denied for now, {ip} sends unusual traffic, try again later",
	Blocked:        "550 5.7.606 Access denied, banned sending IP [{ip}]",
	Spam:           "550 5.7.1 Message was blocked as spam by organisation policy",
	TooLarge:       "552 5.3.4 Message size exceeds the fixed limit of {n} bytes",
	NoRelay:        "550 5.7.64 Relay access denied for {rcpt}",
}

var yahooWording = Wording{
	Banner:         "{host} ESMTP ready",
	OverConns:      "421 4.7.0 [TS01] Too many connections from {ip}, deferred",
	OverPerConn:    "421 Max message per connection reached, closing transmission channel",
	OverRate:       "421 4.7.0 [TS01] Messages from {ip} are deferred due to unexpected volume",
	OverRecipients: "452 4.5.3 Too many recipients",
	NeedTLS:        plainWording.NeedTLS,
	NeedPTR:        plainWording.NeedPTR,
	Unknown:        "552 1 Requested mail action aborted, mailbox not found",
	Disabled:       "554 30 Sorry, your message to {rcpt} cannot be delivered. This mailbox is disabled (554.30).",
	Full:           "552 5.2.2 Mailbox of {rcpt} is over quota",
	FullTemp:       "452 4.2.2 Mailbox of {rcpt} is over quota for now",
	Greylisted:     "451 4.2.0 Message temporarily deferred, try again later",
	Deferred:       "451 4.3.2 Internal error, try again later",
	Throttled:      "421 4.7.0 [TSS04] Messages from {ip} temporarily deferred due to unexpected volume or user complaints",
	Blocked:        "553 5.7.1 [BL21] Connections not accepted from {ip}, it is on a Spamhaus list",
	Spam:           "554 5.7.9 Message not accepted for policy reasons",
	TooLarge:       "552 5.3.4 Message size exceeds {n}",
	NoRelay:        "554 5.7.1 Relaying not allowed for {rcpt}",
}

var appleWording = Wording{
	Banner:         "{host} ESMTP",
	OverConns:      "421 4.7.1 [HCM1] Too many connections from {ip}, try again later",
	OverPerConn:    "421 4.7.1 [HCM1] {n} messages on one connection are enough",
	OverRate:       "421 4.7.1 Messages from {ip} are deferred due to excessive volume",
	OverRecipients: "452 4.5.3 Too many recipients",
	NeedTLS:        plainWording.NeedTLS,
	NeedPTR:        plainWording.NeedPTR,
	Unknown:        "550 5.1.1 <{rcpt}>: user does not exist",
	Disabled:       "550 5.2.1 <{rcpt}>: account is inactive",
	Full:           "552 5.2.2 <{rcpt}>: user is over quota",
	FullTemp:       "452 4.2.2 <{rcpt}>: user is over quota",
	Greylisted:     "451 4.7.1 [BS02] Service is not available now, try again later",
	Deferred:       "451 4.3.0 [BS02] Temporary fault",
	Throttled:      "421 4.7.1 Messages from {ip} are deferred due to excessive volume",
	Blocked:        "550 5.7.1 Mail from {ip} refused. Blocked - see https://ipcheck.proofpoint.com/?ip={ip}",
	Spam:           "554 5.7.1 [CS01] Message rejected by local policy",
	TooLarge:       "552 5.3.4 Message is too large, {n} bytes at most",
	NoRelay:        "550 5.7.1 <{rcpt}>: relay access denied",
}
