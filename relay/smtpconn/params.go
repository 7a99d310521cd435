package smtpconn

import (
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds of parameters, in octets.
const (
	maxEnvIDBytes = 100 // RFC 3461 section 4.4
	maxORCPTBytes = 500 // RFC 3461 section 4.2
	maxSizeDigits = 18
	maxHoldDigits = 9 // RFC 4865 section 4: future-release-integer
)

// BodyType is the BODY parameter of MAIL.
type BodyType uint8

// The body types.
const (
	Body7Bit   BodyType = iota // RFC 6152, also when the client says nothing
	Body8Bit                   // RFC 6152
	BodyBinary                 // RFC 3030: any octets, which BDAT alone can carry
)

// MailParams is what the client said behind the sender of a MAIL command. The
// values have been checked; what travels on stays encoded.
type MailParams struct {
	Size    int64 // RFC 1870; 0: not told
	Body    BodyType
	UTF8    bool      // RFC 6531: addresses and header fields may hold UTF-8
	RetFull bool      // RFC 3461 section 4.3
	EnvID   string    // RFC 3461 section 4.4, in xtext
	Hold    time.Time // RFC 4865: not to be sent before; zero: at once
}

// RcptParams is what the client said behind a recipient.
type RcptParams struct {
	Notify relay.Notify // RFC 3461 section 4.1
	ORCPT  string       // RFC 3461 section 4.2, "type;text" in xtext
}

// MailParams returns the parameters of the transaction's MAIL command.
func (c *Conn) MailParams() MailParams { return c.mailParams }

// RcptParams returns the parameters of the RCPT command that is being handled.
func (c *Conn) RcptParams() RcptParams { return c.rcptParams }

// Path returns the address of the MAIL or RCPT command that is being handled.
func (c *Conn) Path() (mailaddr.Address, error) {
	if c.verb == "MAIL" {
		return parsePath(c.arg, "FROM:", c.mailParams.UTF8)
	}
	return parsePath(c.arg, "TO:", c.mailParams.UTF8)
}

// A paramError is a reply to a command whose parameters are wrong.
type paramError string

const (
	paramSyntax      paramError = "501 5.5.4 The value of a parameter is malformed: "
	paramTwice       paramError = "501 5.5.4 A parameter is there twice: "
	paramUnsupported paramError = "555 5.5.4 A parameter is not supported here: " // RFC 5321 section 4.1.1.11
	paramTooFar      paramError = "501 5.5.4 The time lies further ahead than FUTURERELEASE allows: "
)

// transactionCommand checks a MAIL or RCPT command and hands go-smtp one of the
// same kind. go-smtp only counts: address and parameters are read here, because
// its reading of them is looser than the RFCs and loses how they were written.
func (c *Conn) transactionCommand(verb, arg string) {
	keyword, shown := "FROM:", "FROM:<>"
	if verb == "RCPT" {
		keyword, shown = "TO:", "TO:<r@r>"
	}
	if len(arg) < len(keyword) || !strings.EqualFold(arg[:len(keyword)], keyword) {
		c.refuse("syntax", "501 5.5.2 "+verb+" begins with "+verb+" "+keyword+"<address>")
		return
	}
	rest := strings.TrimLeft(arg[len(keyword):], " ")
	end := pathEnd(rest)
	var name string
	var bad paramError
	mail, rcpt := c.mailParams, RcptParams{}
	if verb == "MAIL" {
		mail = MailParams{}
	}
	if end > 0 {
		if verb == "MAIL" {
			mail, name, bad = c.parseMail(rest[end+1:], time.Now())
		} else {
			rcpt, name, bad = c.parseRcpt(rest[end+1:])
		}
	}
	if bad != "" {
		c.refuse("parameter", string(bad)+printable(name))
		return
	}
	if !mail.UTF8 && !isASCII(rest[:end+1]) {
		// RFC 6531 section 3.5: non-ASCII addresses need the parameter.
		c.refuse("utf8", "553 5.6.7 The address is not ASCII and MAIL did not say SMTPUTF8")
		return
	}
	c.mailParams, c.rcptParams = mail, rcpt
	c.pass(verb, shown)
	c.arg = arg
}

// eachParam calls f with each parameter, its name in capitals; hasValue tells
// "NAME=" from "NAME". It stops at the first that f or the syntax refuses.
func eachParam(text string, f func(key, value string, hasValue bool) paramError) (name string, bad paramError) {
	var seen [16]string
	n := 0
	for p := range strings.FieldsSeq(text) {
		key, value, hasValue := strings.Cut(p, "=")
		name = strings.ToUpper(key)
		for _, s := range seen[:n] {
			if s == name {
				return name, paramTwice
			}
		}
		if n == len(seen) {
			return name, paramUnsupported
		}
		seen[n] = name
		n++
		if strings.IndexByte(value, '=') >= 0 {
			return name, paramSyntax // RFC 5321 section 4.1.2: esmtp-value
		}
		if bad = f(name, value, hasValue); bad != "" {
			return name, bad
		}
	}
	return "", ""
}

func (c *Conn) parseMail(text string, now time.Time) (m MailParams, name string, bad paramError) {
	cfg := &c.server.cfg
	held := false
	name, bad = eachParam(text, func(key, value string, hasValue bool) paramError {
		switch {
		case key == "SIZE":
			if m.Size = parseNumber(value, maxSizeDigits); m.Size < 0 {
				return paramSyntax
			}
		case key == "BODY":
			return m.setBody(value, cfg)
		case key == "SMTPUTF8" && cfg.SMTPUTF8:
			if m.UTF8 = true; hasValue {
				return paramSyntax // RFC 6531 section 3.4: it has no value
			}
		case key == "RET" && cfg.DSN:
			// RFC 3461 section 4.3
			if m.RetFull = strings.EqualFold(value, "FULL"); !m.RetFull && !strings.EqualFold(value, "HDRS") {
				return paramSyntax
			}
		case key == "ENVID" && cfg.DSN:
			if m.EnvID = value; value == "" || len(value) > maxEnvIDBytes || !isXtext(value) {
				return paramSyntax
			}
		case key == "AUTH" && len(cfg.Mechanisms) > 0:
			// RFC 4954 section 5: what the client says of its own client is not
			// believed, but it may be said.
			if value != "<>" && (value == "" || !isXtext(value)) {
				return paramSyntax
			}
		case (key == "HOLDFOR" || key == "HOLDUNTIL") && cfg.MaxHold > 0:
			if held {
				return paramTwice // RFC 4865 section 4: one of them
			}
			held = true
			return m.setHold(key, value, now, cfg.MaxHold)
		default:
			return paramUnsupported
		}
		return ""
	})
	return m, name, bad
}

func (m *MailParams) setBody(value string, cfg *Config) paramError {
	switch strings.ToUpper(value) {
	case "7BIT":
		m.Body = Body7Bit
	case "8BITMIME":
		m.Body = Body8Bit
	case "BINARYMIME":
		if m.Body = BodyBinary; !cfg.BinaryMIME {
			return paramUnsupported
		}
	default:
		return paramSyntax
	}
	return ""
}

// setHold implements RFC 4865 section 4.
func (m *MailParams) setHold(key, value string, now time.Time, limit time.Duration) paramError {
	if key == "HOLDFOR" {
		seconds := parseNumber(value, maxHoldDigits)
		if seconds < 0 {
			return paramSyntax
		}
		m.Hold = now.Add(time.Duration(seconds) * time.Second)
	} else {
		var err error
		if m.Hold, err = time.Parse(time.RFC3339, value); err != nil {
			return paramSyntax
		}
	}
	if m.Hold.After(now.Add(limit)) {
		return paramTooFar
	}
	return ""
}

func (c *Conn) parseRcpt(text string) (r RcptParams, name string, bad paramError) {
	cfg := &c.server.cfg
	name, bad = eachParam(text, func(key, value string, _ bool) paramError {
		switch {
		case key == "NOTIFY" && cfg.DSN:
			var ok bool
			if r.Notify, ok = parseNotify(value); !ok {
				return paramSyntax
			}
		case key == "ORCPT" && cfg.DSN:
			if r.ORCPT = value; !isTypedAddress(value, c.mailParams.UTF8) {
				return paramSyntax
			}
		default:
			return paramUnsupported
		}
		return ""
	})
	return r, name, bad
}

// parseNotify reads a NOTIFY value: NEVER alone, or the others once each (RFC
// 3461 section 4.1).
func parseNotify(value string) (n relay.Notify, ok bool) {
	for word := range strings.SplitSeq(value, ",") {
		var bit relay.Notify
		switch strings.ToUpper(word) {
		case "NEVER":
			bit = relay.NotifyNever
		case "SUCCESS":
			bit = relay.NotifySuccess
		case "FAILURE":
			bit = relay.NotifyFailure
		case "DELAY":
			bit = relay.NotifyDelay
		}
		if bit == 0 || n&bit != 0 {
			return 0, false
		}
		n |= bit
	}
	return n, n&relay.NotifyNever == 0 || n == relay.NotifyNever
}

// isTypedAddress checks an ORCPT value: an address type, a semicolon and the
// address in xtext (RFC 3461 section 4.2), or for the type utf-8 in the forms of
// RFC 6533 section 3, of which unitext holds UTF-8 as it is.
func isTypedAddress(value string, utf8OK bool) bool {
	kind, text, ok := strings.Cut(value, ";")
	if !ok || text == "" || len(value) > maxORCPTBytes {
		return false
	}
	for i := 0; i < len(kind); i++ {
		if c := kind[i]; !isAlnum(c) && c != '-' {
			return false
		}
	}
	switch {
	case kind == "":
		return false
	case strings.EqualFold(kind, "utf-8"):
		return isUTF8Text(text, utf8OK)
	}
	return isXtext(text)
}

// isXtext implements RFC 3461 section 4, and its demand that what is encoded be
// printable ASCII: everything else could end a line of a report.
func isXtext(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '+' {
			if i+2 >= len(s) || !isHex(s[i+1]) || !isHex(s[i+2]) {
				return false
			}
			n, _ := strconv.ParseUint(s[i+1:i+3], 16, 8) // two hexadecimal digits always fit
			if n < ' ' || n > '~' {
				return false
			}
			i += 2
			continue
		}
		if c < '!' || c > '~' || c == '=' {
			return false
		}
	}
	return true
}

// isUTF8Text implements utf-8-addr-xtext and utf-8-addr-unitext of RFC 6533
// section 3: \x{HEX} stands for a character.
func isUTF8Text(s string, unitext bool) bool {
	if !mailaddr.IsUTF8Text(s) {
		return false
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= 0x80:
			if !unitext {
				return false
			}
		case c < '!' || c > '~' || c == '+' || c == '=':
			return false
		case c == '\\':
			end := strings.IndexByte(s[i:], '}')
			if end < 5 || end > 10 || s[i+1] != 'x' || s[i+2] != '{' {
				return false
			}
			n, err := strconv.ParseUint(s[i+3:i+end], 16, 32)
			for _, h := range []byte(s[i+3 : i+end]) {
				if !isHex(h) {
					return false
				}
			}
			if err != nil || n < ' ' || n == 0x7f || n >= 0x80 && n < 0xa0 || n >= 0xd800 && n < 0xe000 || n > 0x10ffff {
				return false
			}
			i += end
		}
	}
	return true
}

// isHex knows capitals only, as xtext does.
func isHex(c byte) bool { return c >= '0' && c <= '9' || c >= 'A' && c <= 'F' }

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// parseNumber reads 1 to maxDigits digits; -1 is anything else.
func parseNumber(s string, maxDigits int) int64 {
	if s == "" || len(s) > maxDigits {
		return -1
	}
	n := int64(0)
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return -1
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n
}

// printable makes a client's word fit for a reply.
func printable(s string) string {
	const maxShownBytes = 40
	b := []byte(s[:min(len(s), maxShownBytes)])
	for i, c := range b {
		if c < '!' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}
