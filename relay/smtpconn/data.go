package smtpconn

import (
	"bytes"
	"errors"
	"io"
	"os"
	"time"

	"github.com/emersion/go-smtp"
)

// rateWindow is the time spent waiting for message data after which the client's
// speed is judged.
const rateWindow = 30 * time.Second

// maxDiscardBytes bounds what is read of a message that is refused already, in
// the hope of telling the client at the right moment; then the connection ends.
const maxDiscardBytes = 64 << 20

// dataState is where the reading of a message stands.
type dataState struct {
	lineStart bool  // the next octet begins a line
	lineBytes int   // of the current line so far
	bdat      bool  // comes in chunks
	begun     bool  // go-smtp said 354 for the first chunk
	last      bool  // this chunk is the last
	cr        bool  // the last octet of the chunks so far was CR
	binary    bool  // is not text
	left      int64 // octets of the chunk that were not read yet
	total     int64 // octets of the message, dot-stuffing removed
	refused   error // the message will be refused with it, the rest is discarded
	discarded int64

	waited   time.Duration // waiting for the client in this window
	received int64         // octets that came in this window
}

// Chunk returns the next octets of the message, dot-stuffing removed (RFC 5321
// section 4.5.2); they are valid until the next call. io.EOF says that the
// message is complete. Any other error is to be returned from Session.Data as
// it is: it is the refusal of a message that broke a limit and was read to its
// end, or the connection is over and the client has been told.
func (c *Conn) Chunk() ([]byte, error) {
	if c.data.bdat {
		return c.bdatRun()
	}
	for {
		if c.dead {
			return nil, errEnded
		}
		if c.mode != modeData {
			return nil, io.EOF
		}
		run, err := c.nextRun()
		if err != nil {
			return nil, err
		}
		if c.mode != modeData {
			if c.data.refused != nil {
				return nil, c.data.refused
			}
			return nil, io.EOF
		}
		if c.data.refused != nil {
			if c.data.discarded += int64(len(run)); c.data.discarded > maxDiscardBytes {
				return nil, c.fail("too_large", "552 5.3.4 The message is too large, closing the connection")
			}
			continue
		}
		if len(run) == 0 {
			continue
		}
		if c.data.total += int64(len(run)); c.data.total > c.limits.MaxMessageBytes {
			c.data.refused = c.tooLarge()
			continue
		}
		return run, nil
	}
}

// Drain reads the rest of a message that the session refuses, so that the reply
// comes when the client expects it. The returned error is refusal, or that of
// the connection if it ended.
func (c *Conn) Drain(refusal error) error {
	if c.data.refused == nil {
		c.data.refused = refusal
	}
	for {
		if _, err := c.Chunk(); err != nil {
			if errors.Is(err, io.EOF) {
				return refusal
			}
			return err
		}
	}
}

// drain serves go-smtp's wish to discard what the session left.
func (c *Conn) drain() error {
	if err := c.Drain(errEnded); c.dead {
		return err
	}
	return nil
}

// nextRun returns octets of the message that stand together in the buffer, and
// reads more if there are none. At the end of the data it changes the mode.
func (c *Conn) nextRun() ([]byte, error) {
	d := &c.data
	if d.lineStart {
		if err := c.need(1); err != nil {
			return nil, err
		}
		if c.in[c.r] == '.' {
			return c.leadingDot()
		}
		d.lineStart = false
	} else if c.r == c.w {
		if err := c.need(1); err != nil {
			return nil, err
		}
	}
	start, end := c.r, c.r
	for end < c.w {
		// Up to the CR there may be neither LF nor NUL, and behind it must be LF.
		rest := c.in[end:c.w]
		cr := bytes.IndexByte(rest, '\r')
		content := rest
		if cr >= 0 {
			content = rest[:cr]
		}
		if bytes.IndexByte(content, '\n') >= 0 {
			return nil, c.failData("bare_lf", "LF without CR")
		}
		if bytes.IndexByte(content, 0) >= 0 {
			return nil, c.failData("nul", "NUL")
		}
		d.lineBytes += len(content)
		c.checkLineLength()
		end += len(content)
		if cr < 0 {
			break
		}
		if end+1 == c.w {
			if end > start {
				break // the CR waits for its LF
			}
			if err := c.need(2); err != nil {
				return nil, err
			}
			start, end = c.r, c.r // need may have moved the buffer
			continue
		}
		if c.in[end+1] != '\n' {
			return nil, c.failData("bare_cr", "CR without LF")
		}
		end += 2
		d.lineBytes = 0
		if end == c.w || c.in[end] == '.' {
			d.lineStart = true
			break
		}
	}
	c.r = end
	return c.in[start:end], nil
}

// leadingDot handles a line that begins with a dot: the end of the data, which
// is CRLF . CRLF and nothing else, or a stuffed line (RFC 5321 section 4.5.2).
func (c *Conn) leadingDot() ([]byte, error) {
	if err := c.need(2); err != nil {
		return nil, err
	}
	switch c.in[c.r+1] {
	case '\n':
		return nil, c.failData("smuggling", "a dot that ends in LF without CR")
	case 0:
		return nil, c.failData("nul", "NUL")
	case '\r':
		if err := c.need(3); err != nil {
			return nil, err
		}
		if c.in[c.r+2] != '\n' {
			return nil, c.failData("smuggling", "a dot and CR without LF")
		}
		c.r += 3
		c.mode = modeDataEnd
		return nil, nil
	}
	c.r++ // the stuffed dot
	c.data.lineStart = false
	return nil, nil
}

func (c *Conn) checkLineLength() {
	if c.data.lineBytes > c.limits.MaxLineBytes && c.data.refused == nil {
		c.data.refused = c.Refuse("long_line", 554, smtp.EnhancedCode{5, 6, 0}, "A line of the message is longer than %d octets", c.limits.MaxLineBytes)
	}
}

// failData refuses a message whose line ends could be read in two ways. Nothing
// after it can be trusted, so the connection ends.
func (c *Conn) failData(reason, found string) error {
	return c.fail(reason, "554 5.6.0 The message holds "+found+", lines end in CRLF only; closing the connection")
}

// need makes sure that n octets are buffered, n being small.
func (c *Conn) need(n int) error {
	for c.w-c.r < n {
		if err := c.fillData(); err != nil {
			return err
		}
	}
	return nil
}

// fillData reads message data and judges the client's speed.
func (c *Conn) fillData() error {
	d := &c.data
	began := time.Now()
	wait := c.limits.CommandTimeout
	if c.limits.MinBytesPerSecond > 0 {
		wait = min(wait, rateWindow-d.waited)
	}
	before := c.w - c.r
	err := c.fill(began.Add(wait), false)
	d.waited += time.Since(began)
	d.received += int64(c.w - c.r - before)
	if c.limits.MinBytesPerSecond > 0 && d.waited >= rateWindow {
		if d.received < c.limits.MinBytesPerSecond*int64(rateWindow/time.Second) {
			return c.fail("slow", "421 4.4.2 The message came too slowly, closing the connection")
		}
		d.waited, d.received = 0, 0
		if errors.Is(err, os.ErrDeadlineExceeded) && wait < c.limits.CommandTimeout {
			return nil // the window ended, not the client's patience
		}
	}
	if err != nil {
		return c.failRead(err)
	}
	return nil
}
