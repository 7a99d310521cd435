package lab

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

const maxRecipientsHeld = 10000 // per transaction, whatever the limits say

// path splits what follows "MAIL FROM:" or "RCPT TO:" into the address
// between angle brackets and the parameters (RFC 5321 section 4.1.2).
func path(arg string) (address, params string, ok bool) {
	arg = strings.TrimLeft(arg, " ")
	if !strings.HasPrefix(arg, "<") {
		return "", "", false
	}
	quoted := false
	for i := 1; i < len(arg); i++ {
		switch c := arg[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == '>' && !quoted:
			return arg[1:i], strings.TrimSpace(arg[i+1:]), true
		}
	}
	return "", "", false
}

func (s *session) mail(arg string) error {
	from, params, ok := path(arg)
	switch {
	case s.hello == "":
		s.p.fault("MAIL before EHLO", s.source, "")
		s.say("503 5.5.1 EHLO first")
		return nil
	case s.tx.open:
		s.p.fault("MAIL inside a transaction", s.source, "")
		s.say("503 5.5.1 a transaction is open")
		return nil
	case !ok:
		s.p.fault("malformed MAIL", s.source, arg)
		s.say("501 5.5.4 malformed address")
		return nil
	}
	now := time.Now()
	s.begun++
	s.tx = transaction{from: from, at: now, to: s.tx.to[:0]}
	if done, err := s.ask(Event{Phase: PhaseMail, From: from}); err != nil || done {
		return err
	}
	if refused, err := s.bounds(now); refused || err != nil {
		return err
	}
	if !s.mailParams(params) {
		return nil
	}
	s.tx.open = true
	s.say("250 2.1.0 sender ok")
	return nil
}

// bounds holds the sender to the provider's limits and to what it requires.
func (s *session) bounds(now time.Time) (refused bool, err error) {
	w, p := &s.p.profile.Wording, &s.p.profile
	lim := *s.p.limits.Load()
	if seen, over := s.lane.begin(now, lim, s.messages+1); over != "" {
		allowed, text := lim.Messages, w.OverRate
		if over == LimitPerConn {
			allowed, text = lim.MessagesPerConnection, w.OverPerConn
		}
		s.p.breach(s.lane, over, allowed, seen, lim.RateWindow, now)
		return true, s.turnAway(s.word(text, "", allowed))
	}
	if p.RequireTLS && s.tls == "" {
		return true, s.turnAway(s.word(w.NeedTLS, "", 0))
	}
	if p.RequirePTR && s.farm.checkPTR && !s.farm.zones.confirmed(s.source) {
		return true, s.turnAway(s.word(w.NeedPTR, "", 0))
	}
	return false, nil
}

// turnAway replies with a refusal; a 421 closes (RFC 5321 section 3.8).
func (s *session) turnAway(reply string) error {
	s.refuse(reply, 1)
	if strings.HasPrefix(reply, "421") {
		return errClosing
	}
	return nil
}

// mailParams reads the parameters of MAIL, false when it refused one.
func (s *session) mailParams(params string) bool {
	for params != "" {
		var word string
		word, params, _ = strings.Cut(params, " ")
		name, value, _ := strings.Cut(word, "=")
		switch strings.ToUpper(name) {
		case "":
		case "SIZE": // RFC 1870 section 6.1
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				s.p.fault("malformed SIZE", s.source, word)
				s.say("501 5.5.4 SIZE wants a number")
				return false
			}
			if n > s.p.profile.MaxMessageSize {
				s.refuse(s.word(s.p.profile.Wording.TooLarge, "", int(s.p.profile.MaxMessageSize)), 1)
				return false
			}
		case "BODY": // RFC 6152 section 2
			s.tx.eightBit = strings.EqualFold(value, "8BITMIME")
		case "SMTPUTF8": // RFC 6531 section 3.4
			s.tx.utf8 = true
		default:
			s.p.fault("unannounced parameter of MAIL", s.source, word)
			s.say("555 5.5.4 parameter " + name + " not recognised")
			return false
		}
		if !s.extended {
			s.p.fault("parameters after HELO", s.source, word)
		}
	}
	return true
}

func (s *session) rcpt(arg string) error {
	rcpt, params, ok := path(arg)
	at := strings.LastIndexByte(rcpt, '@')
	switch {
	case !s.tx.open:
		// A client that pipelines sends RCPT before it knows MAIL was refused.
		s.say("503 5.5.1 MAIL first")
		return nil
	case !ok || at <= 0:
		s.p.fault("malformed RCPT", s.source, arg)
		s.say("501 5.1.3 malformed address")
		return nil
	case params != "":
		s.p.fault("unannounced parameter of RCPT", s.source, params)
		s.say("555 5.5.4 parameters of RCPT not recognised")
		return nil
	case len(s.tx.to) >= maxRecipientsHeld:
		s.refuse("452 4.5.3 too many recipients", 1)
		return nil
	}
	if domain := rcpt[at+1:]; strings.ToLower(domain) != domain {
		rcpt = rcpt[:at+1] + strings.ToLower(domain)
	}
	if done, err := s.ask(Event{Phase: PhaseRcpt, Rcpt: rcpt}); err != nil || done {
		return err
	}
	if !s.p.serves(rcpt[at+1:]) {
		s.refuse(s.word(s.p.profile.Wording.NoRelay, rcpt, 0), 1)
		return nil
	}
	lim := *s.p.limits.Load()
	if n := lim.RecipientsPerTransaction; n > 0 && len(s.tx.to) >= n {
		s.p.breach(s.lane, LimitRecipients, n, len(s.tx.to)+1, 0, time.Now())
		s.refuse(s.word(s.p.profile.Wording.OverRecipients, rcpt, n), 1)
		return nil
	}
	return s.settle(rcpt)
}

// settle gives a recipient its fate.
func (s *session) settle(rcpt string) error {
	p, w := s.p, &s.p.profile.Wording
	o, try := outcomeOf(rcpt), 1
	if counted(&p.profile, o, s.farm.open) {
		try = p.try(rcpt)
	}
	f := p.dice.decide(&p.profile, rcpt, o, try, s.farm.open)
	if f == fateGrey && !p.greylisted(s.source, s.tx.from, rcpt, time.Now()) {
		f = fateAccept
	}
	var reply string
	switch f {
	case fateUnknown:
		reply = w.Unknown
	case fateDisabled:
		reply = w.Disabled
	case fateFull:
		reply = w.Full
	case fateFullTemp:
		reply = w.FullTemp
	case fateGrey:
		reply = w.Greylisted
	case fateDefer:
		reply = w.Deferred
	case fateThrottle:
		reply = w.Throttled
	case fateBlock:
		reply = w.Blocked
	case fateDropAtRcpt:
		_, err := s.act(Answer{Close: true})
		return err
	case fateSlow:
		s.tx.delay = s.farm.slow
		if _, err := s.act(Answer{Delay: s.farm.slow}); err != nil {
			return err
		}
	case fateSpam, fateDropInData, fateLate:
		s.tx.worst = max(s.tx.worst, f)
	}
	if reply != "" {
		return s.turnAway(s.word(reply, rcpt, 0))
	}
	s.tx.to = append(s.tx.to, rcpt)
	s.say("250 2.1.5 recipient ok")
	return nil
}

func (s *session) data() error {
	if !s.tx.open || len(s.tx.to) == 0 {
		s.tx = transaction{to: s.tx.to[:0]}
		s.say("503 5.5.1 no valid recipients")
		return nil
	}
	if done, err := s.ask(Event{Phase: PhaseData}); err != nil || done {
		s.tx = transaction{to: s.tx.to[:0]}
		return err
	}
	if s.w > s.r { // RFC 2920 section 3.1: DATA ends a group
		s.p.fault("sent content before 354", s.source, "")
	}
	s.say("354 go ahead, end with a single dot")
	content, tooLarge, err := s.content(s.tx.worst == fateDropInData)
	if err != nil {
		return err
	}
	s.messages++
	s.lane.carried(s.messages)
	defer func() {
		s.tx = transaction{to: s.tx.to[:0]}
		if cap(s.msg) > maxKeptBytes {
			s.msg = []byte("\r\n")
		}
	}()
	if tooLarge {
		s.refuse(s.word(s.p.profile.Wording.TooLarge, "", int(s.p.profile.MaxMessageSize)), len(s.tx.to))
		return nil
	}
	return s.finalDot(content)
}

// finalDot answers for a message that was read in full, storing it before a
// 250.
func (s *session) finalDot(content []byte) error {
	w := &s.p.profile.Wording
	answer := Answer{}
	if b := s.p.behaviour.Load(); b.Answer != nil {
		answer = b.Answer(Event{
			Provider: s.p.profile.Name, Phase: PhaseFinalDot, Source: s.source, MX: s.mx, Hello: s.hello,
			TLS: s.tls != "", From: s.tx.from, Message: s.begun,
		})
	}
	switch {
	case answer != Answer{}:
	case s.tx.worst == fateSpam:
		answer.Reply = s.word(w.Spam, "", 0)
	case s.tx.worst == fateLate:
		answer = Answer{Close: true, Keep: true}
	default:
		answer.Delay = s.tx.delay
	}
	refusing := answer.Reply != "" && answer.Reply[0] != '2' || answer.Close && answer.Reply == ""
	if refusing && !answer.Keep {
		if answer.Reply != "" {
			s.lane.refuse(answer.Reply[0], len(s.tx.to)-1) // act counts one
		}
		_, err := s.act(answer)
		return err
	}
	if err := s.store(content, refusing); err != nil {
		s.refuse("451 4.3.0 mail cannot be kept", len(s.tx.to))
		return nil
	}
	done, err := s.act(answer)
	if !done && err == nil {
		s.say("250 2.0.0 kept as " + s.p.profile.Name)
	}
	return err
}

// store keeps a message and counts it.
func (s *session) store(content []byte, lostReply bool) error {
	s.inspect(content)
	m := &Mail{
		Provider: s.p.profile.Name, From: s.tx.from, To: s.tx.to,
		Source: s.source, MX: s.mx, Hello: s.hello, TLS: s.tls,
		Begun: s.tx.at, Received: time.Now(),
		MessageID: messageIDOf(content), LostReply: lostReply,
	}
	m.EightBit = eightBit(content)
	if m.EightBit && !s.tx.eightBit && !s.tx.utf8 {
		s.p.fault("8-bit content without BODY=8BITMIME", s.source, m.MessageID)
	}
	if err := s.p.store.append(m, content); err != nil {
		s.farm.log.Error("lab store", "provider", s.p.profile.Name, "err", err)
		return errors.Join(err, s.p.keepFault(err))
	}
	s.farm.stored(m)
	s.lane.arrive(m.Received, len(m.To), s.tls != "")
	s.farm.moved()
	return nil
}

// keepFault remembers the first store error for Close to return.
func (p *provider) keepFault(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.storeFault == nil {
		p.storeFault = err
	}
	return nil
}
