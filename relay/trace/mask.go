package trace

import (
	"bytes"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// masked stands in for what is not shown.
const masked = "(secret)"

// Sent shows lines that the relay said, with their line ends.
func (s *Session) Sent(text []byte) { s.lines(Sent, text) }

// Received shows lines of the other end that hold no secret but what was given to
// Hide: replies.
func (s *Session) Received(text []byte) { s.lines(Received, text) }

func (s *Session) lines(side string, text []byte) {
	if !s.On() {
		return
	}
	for len(text) > 0 {
		var line []byte
		line, text, _ = bytes.Cut(text, []byte{'\n'})
		s.line(side, string(bytes.TrimSuffix(line, []byte{'\r'})), false)
	}
}

// Command shows a command that a client said, without what may be a secret in it.
func (s *Session) Command(line []byte) {
	if !s.On() {
		return
	}
	text := string(bytes.TrimRight(line, "\r\n"))
	if s.party.Kind == Inbound {
		// The recipient is a signed return path, which whoever knows it can send
		// bounces to. It is hidden in the reply too.
		if verb, rest, ok := strings.Cut(text, "<"); ok && strings.HasPrefix(strings.ToUpper(verb), "RCPT") {
			local, _, _ := strings.Cut(rest, "@")
			s.Hide(local)
		}
	}
	s.line(Received, maskCommand(text), false)
}

// Secret shows that a line of the other end came which is nobody's business.
func (s *Session) Secret() {
	if s.On() {
		s.line(Received, masked, false)
	}
}

// Headers reports whether Header is worth calling: somebody watches.
func (s *Session) Headers() bool { return s.On() && s.hub.wantsHeaders() }

func (h *Hub) wantsHeaders() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		if w.filter.Headers {
			return true
		}
	}
	return false
}

// Header shows a header section to those who want it, without the links by which
// whoever has them unsubscribes the recipient.
func (s *Session) Header(side string, section []byte) {
	if !s.Headers() {
		return
	}
	hide := false
	for line := range bytes.Lines(section) {
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			return // the body begins
		}
		if line[0] != ' ' && line[0] != '\t' {
			name, _, _ := bytes.Cut(line, []byte{':'})
			if hide = isSecretField(string(name)); hide {
				s.line(side, string(name)+": "+masked, true)
				continue
			}
		}
		if !hide {
			s.line(side, string(line), true)
		}
	}
}

func isSecretField(name string) bool {
	name = strings.TrimSpace(name)
	return strings.EqualFold(name, "List-Unsubscribe") || strings.EqualFold(name, "Return-Path") || strings.EqualFold(name, "CFBL-Address")
}

// line shows one line to whoever wants it.
func (s *Session) line(side, text string, header bool) {
	if s.secret != "" {
		text = strings.ReplaceAll(text, s.secret, masked)
	}
	l := Line{
		At: time.Now(), Session: s.id, Kind: s.party.Kind, Side: side, Text: clean(text), Header: header,
		Provider: s.party.Provider, MX: s.party.MX, Domain: string(s.subject.Domain),
	}
	if s.party.Remote.IsValid() {
		l.Remote = s.party.Remote.String()
	}
	if s.party.Local.IsValid() {
		l.Source = s.party.Local.String()
	}
	if !s.subject.Message.IsZero() {
		l.Message = s.subject.Message.String()
	}
	if !s.subject.Tenant.IsZero() {
		l.Tenant = s.subject.Tenant.String()
	}
	s.hub.publish(&l, &s.party, &s.subject)
}

// clean makes a text fit for a terminal: UTF-8 without control characters.
func clean(text string) string {
	if len(text) > maxTextBytes {
		cut := maxTextBytes
		for cut > 0 && !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + "…"
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r < 0x20 || r >= 0x7f && r < 0xa0 || r == utf8.RuneError:
			return '?'
		}
		return r
	}, text)
}

// verbs are the commands that are shown. Anything else may be a password that
// was sent at the wrong moment.
var verbs = map[string]bool{
	"EHLO": true, "HELO": true, "MAIL": true, "RCPT": true, "DATA": true, "BDAT": true, "RSET": true, "NOOP": true, "QUIT": true,
	"STARTTLS": true, "AUTH": true, "VRFY": true, "EXPN": true, "HELP": true, "ETRN": true, "TURN": true, "BURL": true,
}

// mechanisms are the names that may stand behind AUTH.
var mechanisms = map[string]bool{
	"PLAIN": true, "LOGIN": true, "CRAM-MD5": true, "DIGEST-MD5": true, "SCRAM-SHA-1": true, "SCRAM-SHA-256": true, "XOAUTH2": true,
	"OAUTHBEARER": true, "EXTERNAL": true, "NTLM": true, "GSSAPI": true,
}

// maskCommand takes out of a command what may be a secret.
func maskCommand(text string) string {
	verb, rest, more := strings.Cut(text, " ")
	switch upper := strings.ToUpper(strings.TrimSpace(verb)); {
	case !verbs[upper]:
		return "(no command, " + strconv.Itoa(len(text)) + " octets)"
	case upper == "AUTH":
		mechanism, response, given := strings.Cut(strings.TrimLeft(rest, " "), " ")
		if !mechanisms[strings.ToUpper(mechanism)] {
			return "AUTH " + masked
		}
		if !given || response == "" {
			return "AUTH " + mechanism
		}
		return "AUTH " + mechanism + " " + masked
	case upper == "MAIL":
		// RFC 4954 section 5: who the client says has authenticated.
		if i := strings.Index(strings.ToUpper(rest), " AUTH="); i >= 0 {
			_, behind, _ := strings.Cut(rest[i+1:], " ")
			return strings.TrimRight(verb+" "+rest[:i]+" AUTH="+masked+" "+behind, " ")
		}
	case upper != "RCPT" && upper != "EHLO" && upper != "HELO" && upper != "BDAT" && more && rest != "":
		return verb + " " + masked // nothing belongs there
	}
	return text
}
