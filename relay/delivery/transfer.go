package delivery

import (
	"strconv"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxGroupBytes bounds the commands written before their replies are read
// (RFC 2920 section 3.1): less than any socket buffer, so that two sides that
// both write first cannot block each other.
const maxGroupBytes = 16 << 10

// undecided marks a recipient about which the host has said nothing yet, and
// accepted one that it took; neither leaves this package.
const (
	undecided relay.Status = 0
	accepted  relay.Status = 200
)

// transfer is the state of one transaction.
type transfer struct {
	tx       *Transaction
	content  Content
	timeouts *policy.Delivery
	outcomes []relay.Outcome

	convertedBytes []byte // the content after a downgrade, else nil

	awaiting int // commands written or queued whose replies are not read
	step     int // the next reply's command: see stepReset and the following
	replies  int // read in this transaction

	mailRefused bool
	utf8        bool // MAIL says SMTPUTF8
	chunked     bool // goes out by BDAT
	accepted    int  // recipients
	proceed     bool // 354 was said
	over        bool // nothing more may be sent
}

// Steps of a transaction: RSET, MAIL, each RCPT, DATA.
const (
	stepReset = iota
	stepMail
	stepRcpt // plus the recipient's place
)

// Send carries one transaction and returns an outcome for every recipient, in
// the order of tx.Recipients. What happens to the session shows in Dead.
func (s *Session) Send(tx *Transaction) []relay.Outcome {
	t := &s.run
	*t = transfer{tx: tx, content: tx.Content, timeouts: s.policy(), step: stepMail, outcomes: tx.Outcomes[:0]}
	s.trace.About(tx.Subject)
	s.trace.Hide(tx.Sender.Local) // a signed return path
	for i := range tx.Recipients {
		t.outcomes = append(t.outcomes, relay.Outcome{Index: tx.Recipients[i].Index})
	}
	switch {
	case s.Dead():
		t.settle(relay.NotTried, relay.PhaseNone, relay.Reply{Enhanced: "4.4.2", Text: "the session had ended before"})
	case s.prepare(t) && s.inTurn(t):
		s.started++
		switch s.offerEnvelope(t); {
		case s.Dead():
		case t.chunked && t.accepted > 0:
			s.sendChunks(t)
		case t.proceed:
			s.sendData(t)
		}
	}
	tx.Outcomes = t.outcomes
	out := t.outcomes
	*t = transfer{} // lets go of the message
	return out
}

// settle gives every undecided recipient, and every accepted one, a result.
func (t *transfer) settle(status relay.Status, phase relay.Phase, r relay.Reply) {
	for i := range t.outcomes {
		if o := &t.outcomes[i]; o.Status == undecided || o.Status == accepted {
			o.Status, o.Phase, o.Reply = status, phase, r
		}
	}
}

// prepare makes the content fit the host and checks what need not be asked. It
// returns false when the transaction is decided.
func (s *Session) prepare(t *transfer) bool {
	if len(t.tx.Recipients) == 0 || len(t.tx.Recipients) > MaxRecipients {
		t.settle(relay.Deferred, relay.PhaseLocal, relay.Reply{Enhanced: "4.5.3", Text: "a transaction has 1 to " + strconv.Itoa(MaxRecipients) + " recipients"})
		return false
	}
	if !s.adapt(t) {
		return false
	}
	if !t.chunked {
		var err error
		if t.chunked, err = s.chunks(t); err != nil {
			t.settleLocal(err, "5.6.0")
			return false
		}
	}
	size := t.content.Size() + int64(t.tx.SignatureBytes)
	if s.ext.MaxBytes > 0 && size > s.ext.MaxBytes {
		// RFC 1870 section 5: what the host will refuse need not be sent.
		t.settle(relay.Failed, relay.PhaseLocal, relay.Reply{Enhanced: "5.3.4", Text: "the message has " + strconv.FormatInt(size, 10) +
			" bytes, the host takes at most " + strconv.FormatInt(s.ext.MaxBytes, 10)})
		return false
	}
	if !sendable(t.tx.Sender) {
		t.settle(relay.Failed, relay.PhaseLocal, relay.Reply{Enhanced: "5.1.7", Text: "the return path cannot be written in SMTP"})
		return false
	}
	ok := false
	for i := range t.tx.Recipients {
		a, why := &t.tx.Recipients[i].Address, relay.Reply{Enhanced: "5.1.3", Text: "the address cannot be written in SMTP"}
		if sendable(*a) && !a.IsNull() {
			if a.IsASCII() {
				ok = true
				continue
			}
			if s.ext.takesUTF8() {
				ok, t.utf8 = true, true
				continue
			}
			why = needsUTF8("the address is not ASCII")
		}
		t.outcomes[i] = relay.Outcome{Index: t.tx.Recipients[i].Index, Status: relay.Failed, Phase: relay.PhaseLocal, Reply: why}
	}
	return ok
}

// sendable reports whether an address can stand in a command: ASCII or, in the
// local part, UTF-8, without control characters. It is a last check behind the parsers at the entrance,
// because a line end here would be a command of its own.
func sendable(a mailaddr.Address) bool {
	ascii := true
	for i := 0; i < len(a.Local); i++ {
		c := a.Local[i]
		if c < 0x20 || c == 0x7f {
			return false
		}
		ascii = ascii && c < 0x80
	}
	if !ascii && !mailaddr.IsUTF8Text(a.Local) {
		return false
	}
	for i := 0; i < len(a.Domain); i++ {
		if c := a.Domain[i]; c <= 0x20 || c > 0x7e || c == '>' {
			return false
		}
	}
	return true
}

// inTurn checks that the host did not speak since the last reply. A 421 that
// came in the meantime, and anything else, ends the session before the
// message was offered.
func (s *Session) inTurn(t *transfer) bool {
	if s.in.buffered() == 0 {
		return true
	}
	r, err := s.in.read(orFallback(t.timeouts.MailTimeout))
	s.dead = true
	if err != nil || r.code != 421 {
		t.settle(relay.NotTried, relay.PhaseMAIL, brokenReply(errOutOfTurn))
		return false
	}
	t.settle(relay.NotTried, relay.PhaseMAIL, r.keep())
	return false
}

// offerEnvelope sends RSET if it is due, MAIL, RCPT and DATA, in one write if
// the host takes that, and deals with the replies.
func (s *Session) offerEnvelope(t *transfer) {
	s.out = s.out[:0]
	if s.needReset {
		t.step = stepReset
		s.out = append(s.out, "RSET\r\n"...)
		s.queued(t)
	}
	if !t.over {
		s.appendMail(t)
		s.queued(t)
	}
	for i := 0; i < len(t.tx.Recipients) && !t.over; i++ {
		if t.outcomes[i].Phase == relay.PhaseLocal {
			continue // decided in prepare
		}
		s.out = appendPath(append(s.out, "RCPT TO:<"...), t.tx.Recipients[i].Address)
		s.out = append(s.out, ">\r\n"...)
		s.queued(t)
	}
	if t.over || !s.ext.Pipelining && t.accepted == 0 {
		s.drain(t)
		return
	}
	if !t.chunked { // RFC 3030 section 2: BDAT stands in place of DATA
		s.out = append(s.out, "DATA\r\n"...)
		t.awaiting++
	}
	s.drain(t)
}

// appendMail appends MAIL with SIZE (RFC 1870 section 3) and BODY (RFC 6152
// section 2).
func (s *Session) appendMail(t *transfer) {
	s.needReset = false
	s.out = appendPath(append(s.out, "MAIL FROM:<"...), t.tx.Sender)
	s.out = append(s.out, '>')
	if s.ext.Size {
		s.out = strconv.AppendInt(append(s.out, " SIZE="...), t.content.Size()+int64(t.tx.SignatureBytes), 10)
	}
	switch {
	case t.tx.Binary:
		s.out = append(s.out, " BODY=BINARYMIME"...) // RFC 3030 section 3
	case t.tx.EightBit && t.convertedBytes == nil:
		s.out = append(s.out, " BODY=8BITMIME"...)
	}
	if t.utf8 {
		s.out = append(s.out, " SMTPUTF8"...) // RFC 6531 section 3.4: only when it is needed
	}
	s.out = append(s.out, '\r', '\n')
}

func appendPath(b []byte, a mailaddr.Address) []byte {
	if a.IsNull() {
		return b
	}
	b = append(append(b, a.Local...), '@')
	return append(b, a.Domain...)
}

// queued counts a command that was appended to s.out, and writes out what is
// there when its replies must or should be read now.
func (s *Session) queued(t *transfer) {
	t.awaiting++
	if !s.ext.Pipelining || len(s.out) >= maxGroupBytes {
		s.drain(t)
	}
}

// drain writes the queued commands and reads their replies.
func (s *Session) drain(t *transfer) {
	if len(s.out) > 0 {
		if s.in.buffered() > 0 {
			s.unasked(t)
			return
		}
		if err := s.flush(orFallback(t.timeouts.BlockTimeout)); err != nil && !s.readable() {
			s.broken(t, err)
			return
		}
	}
	for ; t.awaiting > 0 && !s.dead; t.awaiting-- {
		timeout, phase := t.expect()
		r, err := s.in.read(timeout)
		if err != nil {
			s.broken(t, err)
			return
		}
		t.replies++
		s.handle(t, phase, &r)
		t.step++
	}
}

// unasked deals with a reply that came before its command was sent: a 421 may
// come at any time (RFC 5321 section 3.8); after anything else replies and
// commands could no longer be told apart.
func (s *Session) unasked(t *transfer) {
	timeout, phase := t.expect()
	switch r, err := s.in.read(timeout); {
	case err != nil:
		s.broken(t, err)
	case r.code == 421:
		s.closing(t, phase, &r)
	default:
		s.nonsense(t, phase)
	}
}

// readable reports whether a host to which writing failed had said something
// before: a 421 or a refusal, as a rule, which tells more than the error.
func (s *Session) readable() bool { return s.in.buffered() > 0 || s.in.fillNow() }

// expect returns the phase of the next reply and how long it may take (RFC
// 5321 section 4.5.3.2). Recipients decided in prepare have no reply.
func (t *transfer) expect() (time.Duration, relay.Phase) {
	for i := t.step - stepRcpt; i >= 0 && i < len(t.outcomes) && t.outcomes[i].Phase == relay.PhaseLocal; i++ {
		t.step++
	}
	switch {
	case t.step == stepReset || t.step == stepMail:
		return orFallback(t.timeouts.MailTimeout), relay.PhaseMAIL
	case t.step < stepRcpt+len(t.outcomes):
		return orFallback(t.timeouts.RcptTimeout), relay.PhaseRCPT
	}
	return orFallback(t.timeouts.DataTimeout), relay.PhaseDATA
}

// handle takes one reply of the envelope phases.
func (s *Session) handle(t *transfer, phase relay.Phase, r *reply) {
	if r.code == 421 {
		s.closing(t, phase, r)
		return
	}
	switch {
	case t.step == stepReset:
		if !r.positive() {
			// A session whose state is unknown carries no mail.
			s.dead, t.over = true, true
			t.settle(relay.NotTried, relay.PhaseMAIL, r.keep())
		}
	case t.step == stepMail:
		s.handleMail(t, r)
	case phase == relay.PhaseRCPT:
		s.handleRcpt(t, r)
	default:
		s.handleData(t, r)
	}
}

func (s *Session) handleMail(t *transfer, r *reply) {
	switch {
	case r.positive():
	case r.refusal():
		// What is said at MAIL is about the message.
		t.mailRefused, t.over = true, true
		s.needReset = true
		t.settle(statusOf(r), relay.PhaseMAIL, r.keep())
	default:
		s.nonsense(t, relay.PhaseMAIL)
	}
}

func (s *Session) handleRcpt(t *transfer, r *reply) {
	if t.mailRefused {
		return // a consequence, not an answer
	}
	o := &t.outcomes[t.step-stepRcpt]
	switch {
	case r.positive():
		o.Status = accepted
		t.accepted++
	case r.refusal():
		o.Status, o.Phase, o.Reply = statusOf(r), relay.PhaseRCPT, r.keep()
		s.needReset = true
	default:
		s.nonsense(t, relay.PhaseRCPT)
	}
}

func (s *Session) handleData(t *transfer, r *reply) {
	switch {
	case r.proceed():
		t.proceed = true
	case r.refusal():
		s.needReset = true
		if t.accepted > 0 {
			t.settle(statusOf(r), relay.PhaseDATA, r.keep())
		}
	default:
		s.nonsense(t, relay.PhaseDATA)
	}
}

func statusOf(r *reply) relay.Status {
	if r.code >= 500 {
		return relay.Failed
	}
	return relay.Deferred
}

// closing ends the session after a 421, which is about the connection (RFC
// 5321 section 3.8). A recipient that the host refused before keeps that
// answer; those that it has not judged are free to go elsewhere at once,
// except the one that was answered with the 421 and those accepted before it:
// they were tried. A 421 to MAIL in a session that has already carried mail
// only means that this session is used up.
func (s *Session) closing(t *transfer, phase relay.Phase, r *reply) {
	s.dead, t.over = true, true
	kept := r.keep()
	usedUp := (t.step == stepReset || t.step == stepMail) && s.started > 1
	first := t.step - stepRcpt // the recipients behind it were not judged
	for i := range t.outcomes {
		o := &t.outcomes[i]
		switch {
		case o.Status == undecided && (usedUp || phase == relay.PhaseRCPT && i > first):
			o.Status, o.Phase, o.Reply = relay.NotTried, phase, kept
		case o.Status == undecided || o.Status == accepted:
			o.Status, o.Phase, o.Reply = relay.Deferred, phase, kept
		}
	}
}

// nonsense ends a session with a host whose reply does not fit the command.
// Nobody can tell any more which reply belonged to which command, so no
// recipient fails on the word of this transaction.
func (s *Session) nonsense(t *transfer, phase relay.Phase) {
	s.dead, t.over = true, true
	for i := range t.outcomes {
		if o := &t.outcomes[i]; o.Phase == relay.PhaseRCPT {
			o.Status = undecided
		}
	}
	t.settle(relay.Deferred, phase, brokenReply(errUnexpected))
}

// broken ends a session whose connection broke before the data. If not one
// reply came and the session is an old one, the host had closed it while it
// was idle, and the message was never offered.
func (s *Session) broken(t *transfer, err error) {
	s.traceBreak(err)
	s.dead, t.over = true, true
	_, phase := t.expect()
	if t.replies == 0 && s.started > 1 && !isProtocol(err) {
		t.settle(relay.NotTried, phase, brokenReply(err))
		return
	}
	t.settle(relay.Deferred, phase, brokenReply(err))
}

// settleLocal ends the transaction because of an error of our own.
func (t *transfer) settleLocal(err error, enhanced string) {
	status := relay.Failed
	if f, ok := err.(*fault.Error); !ok || f.Temporary() {
		status = relay.Deferred
		enhanced = "4" + enhanced[1:]
	}
	t.settle(status, relay.PhaseLocal, relay.Reply{Enhanced: enhanced, Text: fault.Public(err)})
}
