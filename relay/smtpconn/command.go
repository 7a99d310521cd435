package smtpconn

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"strings"
	"time"
)

// readLine returns the next line without its CRLF. An error means that the
// connection has ended; the client has been told why.
func (c *Conn) readLine(idle bool) ([]byte, error) {
	deadline := time.Now().Add(c.limits.CommandTimeout)
	for searched := 0; ; {
		if i := bytes.IndexByte(c.in[c.r+searched:c.w], '\n'); i >= 0 {
			line := c.in[c.r : c.r+searched+i]
			c.r += len(line) + 1
			if len(line)+1 > lineLimit(line) {
				return nil, c.failLong()
			}
			return c.checkLine(line)
		}
		searched = c.w - c.r
		if searched > lineLimit(c.in[c.r:c.w]) {
			return nil, c.failLong()
		}
		if err := c.fill(deadline, idle); err != nil {
			return nil, c.failRead(err)
		}
	}
}

// lineLimit is how long a line that begins like this may be, in octets. Only
// SASL needs long ones.
func lineLimit(line []byte) int {
	if len(line) >= 4 && strings.EqualFold(string(line[:4]), "AUTH") || isBase64(line) {
		return maxAuthBytes
	}
	return maxCommandBytes
}

// isBase64 tells a SASL response from a command by the absence of a space.
func isBase64(line []byte) bool { return bytes.IndexByte(line, ' ') < 0 }

// checkLine takes the CR off a line. RFC 5321 section 2.3.8: CR and LF never
// appear alone; section 4.1.2 knows no NUL.
func (c *Conn) checkLine(line []byte) ([]byte, error) {
	n := len(line) - 1
	if n < 0 || line[n] != '\r' {
		return nil, c.fail("bare_lf", "500 5.5.2 A command ended in LF without CR, closing the connection")
	}
	line = line[:n]
	if bytes.IndexByte(line, '\r') >= 0 {
		return nil, c.fail("bare_cr", "500 5.5.2 A command holds CR without LF, closing the connection")
	}
	if bytes.IndexByte(line, 0) >= 0 {
		return nil, c.fail("nul", "500 5.5.2 A command holds NUL, closing the connection")
	}
	return line, nil
}

func (c *Conn) failLong() error {
	return c.fail("long_command", "500 5.5.2 Command line too long, closing the connection")
}

// failRead ends the connection after a failed read.
func (c *Conn) failRead(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if c.server.draining.Load() && !c.inMail {
			return c.fail("draining", "421 4.3.2 "+c.server.cfg.Hostname+" is shutting down, try again later")
		}
		return c.fail("timeout", "421 4.4.2 Nothing came for "+c.limits.CommandTimeout.String()+", closing the connection")
	}
	c.dead = true
	return errEnded // never io.EOF, which says that a message is complete
}

// command reads a command line within the limits and rates.
func (c *Conn) command() (verb, arg string, err error) {
	for {
		if verb, arg, err = c.nextLine(); err != nil {
			return "", "", err
		}
		reason, wait := c.overRate(time.Now())
		if reason == "" {
			return verb, arg, nil
		}
		if answered, err := c.held(verb, reason, wait); err != nil || !answered {
			return verb, arg, err
		}
	}
}

// nextLine reads a command line within the limits of the session.
func (c *Conn) nextLine() (verb, arg string, err error) {
	line, err := c.readLine(!c.inMail)
	if err != nil {
		return "", "", err
	}
	if c.trace.On() {
		c.trace.Command(line)
	}
	if c.commands++; c.commands > c.limits.MaxCommandsPerSession {
		return "", "", c.fail("commands", "421 4.7.0 Too many commands in one session, connect again")
	}
	if c.errors >= c.limits.MaxErrorsPerSession {
		return "", "", c.fail("errors", "421 4.7.0 Too many errors, closing the connection")
	}
	if c.errorRate != "" {
		return "", "", c.fail(c.errorRate, "421 "+rateTexts[c.errorRate]+", closing the connection")
	}
	if c.server.draining.Load() && !c.inMail {
		return "", "", c.fail("draining", "421 4.3.2 "+c.server.cfg.Hostname+" is shutting down, try again later")
	}
	text := strings.TrimRight(string(line), " \t")
	verb, arg, _ = strings.Cut(text, " ")
	return strings.ToUpper(verb), strings.TrimLeft(arg, " "), nil
}

// nextCommand reads commands and answers those that are ours, until there is
// one for go-smtp.
func (c *Conn) nextCommand() error {
	verb, arg, err := c.command()
	if err != nil {
		return err
	}
	if c.security == RequireSTARTTLS && c.tls == nil && needsTLS(verb) {
		if verb == "AUTH" {
			// RFC 4954 section 4: the code for a mechanism that needs encryption.
			c.refuse("tls_required", "538 5.7.11 Encryption required for authentication, issue STARTTLS first")
		} else {
			c.refuse("tls_required", "530 5.7.0 Must issue a STARTTLS command first") // RFC 3207 section 4
		}
		return nil
	}
	switch verb {
	case "EHLO", "HELO":
		return c.greet(verb, arg)
	case "STARTTLS":
		return c.startTLS(arg)
	case "AUTH":
		c.auth(arg)
	case "MAIL", "RCPT":
		if !c.outOfOrder(verb) {
			c.transactionCommand(verb, arg)
		}
	case "DATA":
		if !c.outOfOrder(verb) {
			c.data = dataState{lineStart: true}
			c.pass(verb, arg)
		}
	case "BDAT":
		if !c.server.cfg.Chunking {
			return c.fail("unknown_command", "502 5.5.1 BDAT is not offered here, closing the connection")
		}
		return c.bdat(arg)
	case "RSET", "NOOP", "QUIT", "VRFY": // RFC 5321 section 3.5.3: VRFY gets 252
		c.pass(verb, arg)
	case "EXPN", "HELP", "SEND", "SOML", "SAML", "TURN", "ETRN", "BURL":
		c.refuse("unknown_command", "502 5.5.1 "+verb+" is not offered here")
	default:
		c.refuse("unknown_command", "500 5.5.2 Command not recognised")
	}
	return nil
}

// needsTLS names the commands that RFC 3207 section 4 allows before STARTTLS,
// by exclusion.
func needsTLS(verb string) bool {
	switch verb {
	case "EHLO", "HELO", "STARTTLS", "NOOP", "RSET", "QUIT":
		return false
	}
	return true
}

// outOfOrder refuses a command that RFC 5321 section 4.1.4 does not allow now.
func (c *Conn) outOfOrder(verb string) bool {
	switch {
	case c.helo == "":
		c.refuse("sequence", "503 5.5.1 Say EHLO first")
	case verb == "MAIL" && c.inMail:
		c.refuse("sequence", "503 5.5.1 A sender was given already, RSET starts over")
	case verb == "MAIL" && c.messages >= c.limits.MaxMessagesPerSession:
		_ = c.fail("messages", "421 4.7.0 Enough messages in one session, connect again") // the next read ends
	case verb != "MAIL" && !c.inMail:
		c.refuseSequence("503 5.5.1 MAIL comes first")
	case verb == "DATA" && c.recipients == 0:
		c.refuseSequence("554 5.5.1 There is no valid recipient")
	case verb == "DATA" && c.mailParams.Body == BodyBinary:
		c.refuse("sequence", "503 5.5.1 A message of BINARYMIME comes by BDAT") // RFC 3030 section 3
	default:
		return false
	}
	return true
}

// pass hands a command to go-smtp.
func (c *Conn) pass(verb, arg string) {
	c.verb, c.arg = verb, arg
	b := append(c.pendingBuf[:0], verb...)
	if arg != "" {
		b = append(append(b, ' '), arg...)
	}
	c.pendingBuf = append(b, '\r', '\n')
	c.pending = c.pendingBuf
}

// greet checks the client's name and lets go-smtp reset itself; the answer is
// ours, because go-smtp would announce what we do not do.
func (c *Conn) greet(verb, arg string) error {
	if !isHeloName(arg) {
		c.refuse("syntax", "501 5.5.4 "+verb+" needs your host name or address literal")
		return nil
	}
	c.pass(verb, arg)
	return nil
}

// maxHeloBytes is the length of a domain name (RFC 5321 section 4.5.3.1.2).
const maxHeloBytes = 255

// isHeloName is wider than RFC 5321 section 4.1.1.1 demands, as clients name
// themselves badly; it keeps anything out of the trace header that could be
// read as syntax.
func isHeloName(s string) bool {
	if s == "" || len(s) > maxHeloBytes {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._-:[]", c) >= 0 {
			continue
		}
		return false
	}
	return true
}

// startTLS implements RFC 3207 section 4.
func (c *Conn) startTLS(arg string) error {
	switch {
	case c.tls != nil:
		c.refuse("sequence", "503 5.5.1 TLS is active already")
		return nil
	case c.server.cfg.TLS == nil:
		c.refuse("unknown_command", "502 5.5.1 STARTTLS is not offered here")
		return nil
	case arg != "":
		c.refuse("syntax", "501 5.5.4 STARTTLS has no parameter")
		return nil
	case c.inMail:
		c.refuse("sequence", "503 5.5.1 STARTTLS is not possible within a mail transaction")
		return nil
	case c.r < c.w:
		// What was sent in clear text behind STARTTLS would be taken for part of
		// the protected session: an attacker could have put it there.
		return c.fail("starttls_injection", "554 5.5.1 STARTTLS must be the last command before the handshake, closing the connection")
	}
	c.say("220 2.0.0 Ready to start TLS")
	if err := c.flush(); err != nil {
		return err
	}
	if err := c.handshake(); err != nil {
		return err
	}
	// RFC 3207 section 4.2: forget everything the client said before.
	c.helo, c.esmtp = "", false
	c.pass("RSET", "")
	c.swallow = true
	return nil
}

// auth refuses what go-smtp would answer with the wrong code.
func (c *Conn) auth(arg string) {
	mechanism, response, _ := strings.Cut(arg, " ")
	switch {
	case len(c.server.cfg.Mechanisms) == 0:
		c.refuse("unknown_command", "502 5.5.1 AUTH is not offered here")
	case c.helo == "":
		c.refuse("sequence", "503 5.5.1 Say EHLO first")
	case !c.mayAuth():
		c.refuse("tls_required", "538 5.7.11 Encryption required for authentication, issue STARTTLS first")
	case c.authed:
		c.refuse("sequence", "503 5.5.1 You are authenticated already")
	case c.inMail:
		c.refuse("sequence", "503 5.5.1 AUTH is not possible within a mail transaction") // RFC 4954 section 4
	case mechanism == "":
		c.refuse("syntax", "501 5.5.4 AUTH needs a mechanism: "+strings.Join(c.server.cfg.Mechanisms, " or "))
	case response != "" && response != "=" && !validBase64(response):
		c.refuse("syntax", "501 5.5.2 The initial response is not base64") // RFC 4954 section 4
	default:
		c.pass("AUTH", arg)
	}
}

// mayAuth reports whether the connection is one over which secrets may go.
func (c *Conn) mayAuth() bool { return c.tls != nil || c.security == ClearText }

func validBase64(s string) bool {
	_, err := base64.StdEncoding.DecodeString(s)
	return err == nil
}

// nextAuthLine reads the client's answer to a SASL challenge.
func (c *Conn) nextAuthLine() error {
	line, err := c.readLine(false)
	if err != nil {
		return err
	}
	c.trace.Secret()
	c.mode = modeCommand // until go-smtp asks for another line
	text := string(line)
	if text == "" {
		text = "=" // an empty response; go-smtp would read it as none
	}
	if text != "*" && text != "=" && !validBase64(text) {
		c.instead = "501 5.5.2 The response is not base64"
		text = "*"
	}
	c.pendingBuf = append(append(c.pendingBuf[:0], text...), '\r', '\n')
	c.pending = c.pendingBuf
	return nil
}
