package smtpconn

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"

	"github.com/emersion/go-smtp"
)

// BDAT (RFC 3030) is not go-smtp's here: it gives each message a goroutine and
// checks no line ends. For go-smtp a message that comes by BDAT is a DATA
// command whose 354 nobody sees; Chunk reads the chunks and, between them, the
// commands.

// maxChunkDigits bounds the size in a BDAT command.
const maxChunkDigits = 18

// errAbandoned ends the handling of a message that the client gave up; the
// client has its reply.
var errAbandoned = errors.New("smtpconn: the client gave the message up")

// parseBDAT reads the argument of BDAT: a size in octets, and LAST or nothing.
func parseBDAT(arg string) (size int64, last, ok bool) {
	number, rest, _ := strings.Cut(arg, " ")
	rest = strings.TrimLeft(rest, " ")
	if last = strings.EqualFold(rest, "LAST"); !last && rest != "" {
		return 0, false, false
	}
	size = parseNumber(number, maxChunkDigits)
	return size, last, size >= 0
}

// failBDAT ends the connection: where the next command begins is unknown.
func (c *Conn) failBDAT() error {
	return c.fail("bdat_syntax", "501 5.5.4 BDAT has a size in octets and then LAST or nothing, closing the connection")
}

// bdat handles the first BDAT command of a message, or one without a message.
func (c *Conn) bdat(arg string) error {
	size, last, ok := parseBDAT(arg)
	refusal := ""
	switch {
	case !ok:
		return c.failBDAT()
	case c.helo == "":
		refusal = "503 5.5.1 Say EHLO first"
	case !c.inMail:
		refusal = "503 5.5.1 MAIL comes first"
	case c.recipients == 0:
		refusal = "503 5.5.1 There is no valid recipient"
	}
	if refusal != "" {
		// RFC 3030 section 2: the octets follow, whatever the answer is. A client
		// that pipelines sends more chunks behind one that was refused.
		if err := c.skip(size); err != nil {
			return err
		}
		c.refuseSequence(refusal)
		return nil
	}
	c.pass("DATA", "")
	c.data = dataState{bdat: true, lineStart: true}
	c.beginChunk(size, last)
	return nil
}

// beginChunk notes what comes next. A message that will be too large is
// refused now, and its octets discarded.
func (c *Conn) beginChunk(size int64, last bool) {
	d := &c.data
	d.left, d.last = size, last
	if size > c.limits.MaxMessageBytes-d.total && d.refused == nil {
		d.refused = c.tooLarge()
	}
}

func (c *Conn) tooLarge() error {
	return c.Refuse("too_large", 552, smtp.EnhancedCode{5, 3, 4}, "The message is larger than %d octets", c.limits.MaxMessageBytes)
}

// skip discards octets that belong to no message.
func (c *Conn) skip(size int64) error {
	if size > maxDiscardBytes {
		return c.fail("too_large", "552 5.3.4 The chunk is too large, closing the connection")
	}
	c.data = dataState{}
	for size > 0 {
		if err := c.need(1); err != nil {
			return err
		}
		n := min(int64(c.w-c.r), size)
		c.r += int(n)
		size -= n
	}
	return nil
}

// bdatRun is Chunk for a message that comes by BDAT.
func (c *Conn) bdatRun() ([]byte, error) {
	d := &c.data
	for {
		switch {
		case c.dead:
			return nil, errEnded
		case c.mode != modeData:
			return nil, io.EOF
		case d.left == 0 && (d.refused != nil || d.last):
			return c.endBDAT()
		case d.left == 0:
			if err := c.nextBDAT(); err != nil {
				return nil, err
			}
			continue
		}
		if err := c.need(1); err != nil {
			return nil, err
		}
		n := min(int64(c.w-c.r), d.left)
		run := c.in[c.r : c.r+int(n)]
		c.r += int(n)
		d.left -= n
		if d.refused == nil {
			d.total += n // within the limit, see beginChunk
			c.checkText(run)
		}
		if d.refused == nil {
			return run, nil
		}
		if d.discarded += n; d.discarded > maxDiscardBytes {
			return nil, c.fail("too_large", "552 5.3.4 The message is too large, closing the connection")
		}
	}
}

var crlf = []byte("\r\n")

// endBDAT ends a message that is complete or refused. Text whose last line has
// no end gets one: DATA could not carry it on without, and it changes neither
// the text nor its signatures (RFC 6376 section 3.4.3).
func (c *Conn) endBDAT() ([]byte, error) {
	d := &c.data
	if d.refused == nil && d.cr {
		c.notText("bare_cr", "CR without LF")
	}
	if d.refused == nil && !d.lineStart {
		if c.mailParams.Body != BodyBinary {
			d.lineStart = true
			return crlf, nil
		}
		d.binary = true
	}
	c.mode = modeDataEnd
	if d.refused != nil {
		return nil, d.refused
	}
	return nil, io.EOF
}

// checkText looks for what text may not hold (RFC 5321 section 2.3.8). BDAT
// without BINARYMIME carries text: else it would be a way around the rules for
// DATA, into the DATA of the next host. With BINARYMIME it is noted that the
// message can go on as it is to such hosts only that take BINARYMIME too.
func (c *Conn) checkText(run []byte) {
	d := &c.data
	for len(run) > 0 && d.refused == nil {
		if d.cr {
			d.cr = false
			if run[0] != '\n' {
				c.notText("bare_cr", "CR without LF")
				continue
			}
			d.lineBytes, d.lineStart = 0, true
			run = run[1:]
			continue
		}
		content, rest, found := bytes.Cut(run, crlf[:1])
		switch {
		case bytes.IndexByte(content, '\n') >= 0:
			c.notText("bare_lf", "LF without CR")
		case bytes.IndexByte(content, 0) >= 0:
			c.notText("nul", "NUL")
		}
		if d.lineBytes += len(content); d.lineBytes > c.limits.MaxLineBytes {
			if c.mailParams.Body == BodyBinary {
				d.binary = true
			} else {
				c.checkLineLength()
			}
		}
		if d.lineStart = d.lineStart && len(content) == 0; found {
			d.cr, d.lineStart = true, false
		}
		run = rest
	}
}

// notText refuses or marks a message that is not text. Chunks say where they
// end, so the session can go on.
func (c *Conn) notText(reason, found string) {
	if c.mailParams.Body == BodyBinary {
		c.data.binary = true
		return
	}
	if c.data.refused == nil {
		c.data.refused = c.Refuse(reason, 554, smtp.EnhancedCode{5, 6, 0}, "The message holds %s, lines end in CRLF only", found)
	}
}

// Binary reports whether the message that was read holds what is not text, as
// only a client that said BINARYMIME may send.
func (c *Conn) Binary() bool { return c.data.binary }

// nextBDAT answers for a chunk and reads commands until the next one.
func (c *Conn) nextBDAT() error {
	c.say("250 2.0.0 " + strconv.FormatInt(c.data.total, 10) + " octets received")
	for {
		verb, arg, err := c.command()
		if err != nil {
			return err
		}
		switch verb {
		case "BDAT":
			size, last, ok := parseBDAT(arg)
			if !ok {
				return c.failBDAT()
			}
			c.beginChunk(size, last)
			return nil
		case "RSET":
			c.say("250 2.0.0 The message is forgotten")
			c.endMail()
			c.mode, c.swallow = modeDataEnd, true
			return errAbandoned
		case "NOOP":
			c.say("250 2.0.0 OK")
		case "QUIT":
			c.say("221 2.0.0 Bye")
			_ = c.flush() // the connection ends either way
			c.dead = true
			return errEnded
		default:
			// RFC 3030 section 2: BDAT and DATA cannot be mixed within a message.
			c.refuse("sequence", "503 5.5.1 The message is not complete: send BDAT with LAST, or RSET")
		}
	}
}
