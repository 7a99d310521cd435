package smtpconn

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/emersion/go-smtp"
)

// maxReplyTextBytes keeps reply lines within 512 octets (RFC 5321 section
// 4.5.3.1.5).
const maxReplyTextBytes = 480

// serverLine takes one reply line of go-smtp, notes what it means for the
// dialogue, and passes it on, or something better.
func (c *Conn) serverLine(line []byte) {
	if len(line) < 4 {
		return
	}
	code, err := strconv.Atoi(string(line[:3]))
	if err != nil || line[3] != ' ' {
		return // only the last line of a reply decides; go-smtp has longer ones for EHLO alone
	}
	if c.swallow {
		c.swallow = false
		return
	}
	text := strings.TrimRight(string(line[4:]), "\r\n")
	switch c.verb {
	case "":
		c.say("220 " + c.server.cfg.Hostname + " ESMTP Relais")
	case "EHLO", "HELO":
		c.replyToGreeting(code, text)
	case "MAIL":
		c.replyToMail(code, text)
	case "RCPT":
		if code == 250 {
			c.recipients++
			text = "2.1.5 Recipient accepted"
		}
		c.putOff = c.putOff || code/100 == 4
		c.say(strconv.Itoa(code) + " " + text)
	case "DATA":
		c.replyToData(code, text)
	case "AUTH":
		c.replyToAuth(code, text)
	case "RSET":
		c.endMail()
		c.say(string(line[:4]) + text)
	default:
		c.say(string(line[:4]) + text)
	}
	if c.verb == "" || code == 221 || code == 421 {
		_ = c.flush() // a broken connection shows in the next read
		c.dead = c.dead || code == 421
	}
}

func (c *Conn) endMail() {
	c.inMail, c.recipients, c.mailParams, c.putOff = false, 0, MailParams{}, false
}

func (c *Conn) replyToGreeting(code int, text string) {
	if code != 250 {
		c.say(strconv.Itoa(code) + " " + text)
		return
	}
	c.endMail()
	c.helo, c.esmtp = c.arg, c.verb == "EHLO"
	host := c.server.cfg.Hostname
	if !c.esmtp {
		c.say("250 " + host)
		return
	}
	c.say("250-" + host + " at your service")
	c.say("250-PIPELINING")          // RFC 2920
	c.say("250-8BITMIME")            // RFC 6152
	c.say("250-ENHANCEDSTATUSCODES") // RFC 2034
	if c.server.cfg.TLS != nil && c.tls == nil {
		c.say("250-STARTTLS") // RFC 3207
	}
	if len(c.server.cfg.Mechanisms) > 0 && c.mayAuth() && !c.authed {
		c.say("250-AUTH " + strings.Join(c.server.cfg.Mechanisms, " ")) // RFC 4954
	}
	if c.server.cfg.DSN {
		c.say("250-DSN") // RFC 3461
	}
	if c.server.cfg.SMTPUTF8 {
		c.say("250-SMTPUTF8") // RFC 6531
	}
	if c.server.cfg.Chunking {
		c.say("250-CHUNKING") // RFC 3030
	}
	if c.server.cfg.BinaryMIME {
		c.say("250-BINARYMIME") // RFC 3030
	}
	if hold := c.server.cfg.MaxHold; hold > 0 { // RFC 4865 section 3
		c.say("250-FUTURERELEASE " + strconv.FormatInt(int64(hold/time.Second), 10) + " " + time.Now().Add(hold).UTC().Format(time.RFC3339))
	}
	c.say("250-LIMITS RCPTMAX=" + strconv.Itoa(c.limits.MaxRecipients) + " MAILMAX=" + strconv.Itoa(c.limits.MaxMessagesPerSession)) // RFC 9422
	c.say("250 SIZE " + strconv.FormatInt(c.limits.MaxMessageBytes, 10))                                                             // RFC 1870
}

func (c *Conn) replyToMail(code int, text string) {
	if code == 250 {
		c.inMail, c.recipients, c.putOff = true, 0, false
		text = "2.1.0 Sender accepted"
	}
	c.putOff = c.putOff || code/100 == 4
	c.say(strconv.Itoa(code) + " " + text)
}

func (c *Conn) replyToData(code int, text string) {
	if code == 354 {
		if c.mode = modeData; c.data.bdat {
			c.data.begun = true
			return // the client sends its chunk without being asked
		}
	}
	if c.data.bdat && !c.data.begun {
		// The chunk must not be read as commands.
		_ = c.fail("bdat", strconv.Itoa(code)+" "+text) // the next read ends
		return
	}
	if c.mode != modeData && c.trace.On() {
		c.trace.Note("a message of %d octets", c.data.total)
	}
	c.say(strconv.Itoa(code) + " " + text)
	if c.mode != modeData {
		// The message was taken or refused as a whole.
		if code/100 == 2 {
			c.messages++
		}
		c.endMail()
	}
}

func (c *Conn) replyToAuth(code int, text string) {
	switch {
	case code == 334:
		c.mode = modeAuth
	case code == 235:
		c.authed = true
		text = "2.7.0 Authentication succeeded" // RFC 4954 section 6
	case c.instead != "":
		c.refuse("syntax", c.instead)
		c.instead = ""
		return
	case code == 501 && strings.HasPrefix(text, "5.0.0"):
		text = "5.7.0 Authentication cancelled"
	}
	c.say(strconv.Itoa(code) + " " + text)
}

// Refuse counts a refusal and returns it for go-smtp to say. code and enhanced
// follow RFC 5321 and RFC 3463; the text is for people.
func (c *Conn) Refuse(reason string, code int, enhanced smtp.EnhancedCode, format string, args ...any) error {
	c.server.Refused(reason)
	return Reply(code, enhanced, format, args...)
}

// Reply makes a reply line for go-smtp: one line of printable ASCII, cut to
// what a reply may hold.
func Reply(code int, enhanced smtp.EnhancedCode, format string, args ...any) *smtp.SMTPError {
	text := []byte(fmt.Sprintf(format, args...))
	if len(text) > maxReplyTextBytes {
		text = text[:maxReplyTextBytes]
	}
	for i, b := range text {
		if b < ' ' || b > '~' {
			text[i] = '?' // RFC 5321 section 4.2: textstring
		}
	}
	return &smtp.SMTPError{Code: code, EnhancedCode: enhanced, Message: string(text)}
}
