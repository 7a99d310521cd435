// Package dsn writes delivery status notifications (RFC 3464): the mail that
// tells a sender that a message failed, is late or was handed over. Programs
// read these as much as people do, so each report carries both a plain text and
// every field that a program needs to find the message and the recipient again.
package dsn

import (
	"bytes"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds of a report.
const (
	MaxRecipients     = 1000     // of one report; more need several reports
	MaxReturnedBytes  = 1 << 20  // of a message returned whole; of a larger one only the header section goes back
	maxReturnedHeader = 64 << 10 // bytes of a header section; further fields are left out
	maxFieldBytes     = 998      // RFC 5322 section 2.1.1
	foldColumn        = 76       // lines are folded here where they can be
	maxShownReply     = 512      // bytes of a reply in the text for people
	dateForm          = time.RFC1123Z
)

// Action is what became of a recipient (RFC 3464 section 2.3.3).
type Action string

// The actions. "delivered" and "expanded" are not among them: this side hands
// mail over to other servers and has neither mailboxes nor lists.
const (
	Failed  Action = "failed"  // given up
	Delayed Action = "delayed" // still being tried
	Relayed Action = "relayed" // taken by a server that sends no notification of success for us
)

// Input is what a report tells.
type Input struct {
	ID           ids.Message      // of the report itself
	Now          time.Time        // its Date
	ReportingMTA string           // host name of this relay
	From         mailaddr.Address // the report's From
	To           mailaddr.Address // envelope sender of the message, who gets the report; never null

	EnvelopeID string    // ENVID as the client gave it, in xtext; may be empty
	Arrival    time.Time // when the message was accepted
	Recipients []Recipient

	// Header is the message's header section with its empty line. Body follows
	// it and is used only with ReturnFull (RET=FULL, RFC 3461 section 4.3),
	// which is for reports of failure. Without a header the report says that the
	// message cannot be read.
	Header     []byte
	Body       []byte
	ReturnFull bool
}

// Recipient is one recipient of the message.
type Recipient struct {
	Address        mailaddr.Address
	ORCPT          string // as the client gave it, "type;text" in xtext; may be empty
	Action         Action
	Status         string      // RFC 3463; empty: taken from Reply
	Reply          relay.Reply // last answer, or our own words with Code 0
	RemoteMTA      string      // host that gave Reply; empty if none did
	LastAttempt    time.Time   // zero: never tried
	WillRetryUntil time.Time   // of a delayed recipient
	Unknown        bool        // of a failed one: it may have been delivered all the same
}

// Build returns the report with CRLF line ends, ready to be queued. Its
// envelope sender must be null (RFC 3464 section 2). It is 7-bit unless the
// message goes back whole and is not, or To holds UTF-8: then the report is one
// of RFC 6533, whose header section and parts hold UTF-8 too, and needs
// SMTPUTF8 (see Input.UTF8). Errors are fault.Invalid and name the
// field; a null To is one, because a report about a report could go round for
// ever (RFC 5321 section 6.1). More than MaxRecipients is fault.TooLarge.
func Build(in Input) ([]byte, error) {
	if err := check(&in); err != nil {
		return nil, err
	}
	part := returned(&in)
	boundary := boundaryFor(in.ID, part.body)
	w := writer{wide: in.UTF8()}
	w.Grow(4096 + 512*len(in.Recipients) + len(part.body))
	w.header(&in, boundary, part.encoding)
	w.line("This report has several parts: a text, the same for programs, and the message.")
	w.open(boundary)
	w.people(&in, part)
	w.open(boundary)
	if w.wide {
		w.field("Content-Type", "message/global-delivery-status") // RFC 6533 section 4
		w.field("Content-Transfer-Encoding", "8bit")
	} else {
		w.field("Content-Type", "message/delivery-status")
	}
	w.line("")
	w.status(&in)
	w.open(boundary)
	w.field("Content-Type", part.contentType)
	if part.encoding != "" {
		w.field("Content-Transfer-Encoding", part.encoding)
	}
	w.line("")
	w.Write(part.body)
	w.line("")
	w.line("--" + boundary + "--")
	return w.Bytes(), nil
}

func check(in *Input) error {
	const op = "dsn.Build"
	bad := func(field, public string, args ...any) error { return fault.Field(op, field, public, args...) }
	switch {
	case in.To.IsNull():
		return bad("to", "the null sender gets no report (RFC 5321 section 6.1)")
	case !printableUTF8(in.To.String()):
		return bad("to", "the sender's address holds control characters or is not UTF-8")
	case in.From.IsNull() || !printable(in.From.String()):
		return bad("from", "the report needs an ASCII address to come from")
	case !isHost(in.ReportingMTA):
		return bad("reporting_mta", "%q is not a host name", clean(in.ReportingMTA, 80, false))
	case in.ID.IsZero():
		return bad("id", "the report needs an id")
	case in.Now.IsZero():
		return bad("now", "the report needs a date")
	case len(in.Recipients) == 0:
		return bad("recipients", "there is nothing to report")
	case len(in.Recipients) > MaxRecipients:
		return fault.New(fault.TooLarge, op, "%d recipients are too many for one report, make several of at most %d", len(in.Recipients), MaxRecipients)
	}
	for i := range in.Recipients {
		r := &in.Recipients[i]
		field := "recipients[" + strconv.Itoa(i) + "]"
		if r.Address.IsNull() || !printableUTF8(r.Address.String()) {
			return bad(field+".address", "the address is empty, holds control characters or is not UTF-8")
		}
		if r.Action != Failed && r.Action != Delayed && r.Action != Relayed {
			return bad(field+".action", "is %q, use failed, delayed or relayed", clean(string(r.Action), 20, false))
		}
		if r.Status != "" && !isStatus(r.Status, r.Action) {
			return bad(field+".status", "%q is no enhanced status code such as 5.1.1 (RFC 3463) that fits the action", clean(r.Status, 20, false))
		}
	}
	return nil
}

// UTF8 reports whether the report is one of RFC 6533, which needs SMTPUTF8 on
// its way. It is when it goes to an address that needs that anyway. A sender
// with an ASCII address gets a report that every server takes, with UTF-8
// addresses of recipients in the ASCII form of RFC 6533 section 3.
func (in *Input) UTF8() bool { return !printable(in.To.Local) }

// any reports whether something became of at least one recipient.
// allUnknown reports whether no recipient failed for certain.
func (in *Input) allUnknown() bool {
	for i := range in.Recipients {
		if r := &in.Recipients[i]; r.Action == Failed && !r.Unknown {
			return false
		}
	}
	return true
}

func (in *Input) any(a Action) bool {
	for i := range in.Recipients {
		if in.Recipients[i].Action == a {
			return true
		}
	}
	return false
}

// status returns the status code of a recipient: the given one, the remote
// side's, or the general one of its class (RFC 3463 section 3.1).
func (r *Recipient) status() string {
	switch {
	case r.Status != "":
		return r.Status
	case isStatus(r.Reply.Enhanced, r.Action):
		return r.Reply.Enhanced
	case r.Action == Relayed:
		return "2.0.0"
	case r.Action == Delayed && isStatus(r.Reply.Enhanced, Failed):
		// A 5xx that is tried again, such as one about our address, has not
		// failed for good (RFC 3463 section 2).
		return "4" + r.Reply.Enhanced[1:]
	case r.Action == Delayed || r.Reply.Code >= 400 && r.Reply.Code < 500:
		return "4.0.0"
	}
	return "5.0.0"
}

// isStatus implements the syntax of RFC 3463 section 2, with the classes that
// an action can have. What was given up may have the class 4: the condition was
// temporary, the deadline was not (X.4.7).
func isStatus(s string, a Action) bool {
	class, rest, _ := strings.Cut(s, ".")
	subject, detail, ok := strings.Cut(rest, ".")
	switch {
	case !ok || !isShortNumber(subject) || !isShortNumber(detail):
		return false
	case a == Relayed:
		return class == "2"
	case a == Delayed:
		return class == "4"
	}
	return class == "4" || class == "5"
}

func isShortNumber(s string) bool {
	if len(s) < 1 || len(s) > 3 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

func isHost(s string) bool {
	d, err := mailaddr.ParseDomain(s)
	return err == nil && d != ""
}

// boundaryFor returns a boundary that does not occur in the returned part.
func boundaryFor(id ids.Message, body []byte) string {
	b := "relais-" + id.String()
	for n := 0; bytes.Contains(body, []byte(b)); n++ {
		b = "relais-" + strconv.Itoa(n) + "-" + id.String()
	}
	return b
}
