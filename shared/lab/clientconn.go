package lab

import (
	"bytes"
	"errors"
	"net"
	"strconv"
	"time"
)

var errReplyTooLong = errors.New("lab: load: reply too long")

// clientConn is one submission connection. Its buffers are used for all
// messages it carries.
type clientConn struct {
	conn net.Conn
	in   []byte
	r, w int
	out  []byte
}

// reply reads one reply and returns its code and its last line, valid until
// the next call.
func (c *clientConn) reply() (int, []byte, error) {
	for {
		line, err := c.line()
		if err != nil {
			return 0, nil, err
		}
		if len(line) >= 4 && line[3] == '-' {
			continue
		}
		code, err := strconv.Atoi(string(line[:min(3, len(line))]))
		if err != nil {
			return 0, nil, errors.New("lab: load: malformed reply " + strconv.Quote(string(line)))
		}
		return code, line, nil
	}
}

func (c *clientConn) line() ([]byte, error) {
	for {
		if i := bytes.IndexByte(c.in[c.r:c.w], '\n'); i >= 0 {
			line := c.in[c.r : c.r+i]
			c.r += i + 1
			return bytes.TrimSuffix(line, []byte("\r")), nil
		}
		if c.r > 0 {
			c.w = copy(c.in, c.in[c.r:c.w])
			c.r = 0
		}
		if c.w == len(c.in) {
			if len(c.in) >= maxReplyBytes {
				return nil, errReplyTooLong
			}
			c.in = append(c.in, make([]byte, len(c.in))...)
		}
		if err := c.conn.SetReadDeadline(time.Now().Add(clientReplyTimeout)); err != nil {
			return nil, err
		}
		n, err := c.conn.Read(c.in[c.w:])
		c.w += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// expect sends a command (none for the greeting) and wants a 2xx.
func (c *clientConn) expect(command string) error {
	if command != "" {
		if _, err := c.conn.Write([]byte(command)); err != nil {
			return err
		}
	}
	code, line, err := c.reply()
	switch {
	case err != nil:
		return err
	case code/100 == 5:
		return &refusedSession{string(line)} // the reply, never the command: that may hold a password
	case code/100 != 2:
		return errors.New("lab: load: " + string(line))
	}
	return nil
}

// messages sends messages until there are no more, the connection has carried
// its share, or it breaks.
func (c *clientConn) messages(w *load) error {
	now, next := -1, -1 // message numbers; -1 for none
	defer func() {
		for _, i := range [...]int{now, next} {
			if i >= 0 && w.results[i].State == StateUnsent {
				w.putBack(i)
			}
		}
	}()
	carried := 0
	take := func() int {
		if w.PerConnection > 0 && carried >= w.PerConnection {
			return -1
		}
		carried++
		return w.take()
	}
	if now = take(); now < 0 {
		return nil
	}
	c.out = w.envelope(c.out[:0], now)
	for now >= 0 {
		if err := c.write(); err != nil {
			return err
		}
		ready, err := c.envelopeReplies(w, now)
		if err != nil {
			return err
		}
		next = take()
		if !ready { // refused before DATA: nothing to send for this one
			now, next = next, -1
			if c.out = c.out[:0]; now >= 0 {
				c.out = w.envelope(c.out, now)
			}
			continue
		}
		c.out = w.message(c.out[:0], now)
		if w.Overlap && next >= 0 {
			c.out = w.envelope(c.out, next)
		}
		if err := c.write(); err != nil {
			w.settle(now, StateInDoubt, 0, nil)
			return err
		}
		code, line, err := c.reply()
		if err != nil {
			w.settle(now, StateInDoubt, 0, nil)
			return err
		}
		w.decide(now, code, line)
		c.out = c.out[:0]
		now, next = next, -1
		if now >= 0 && !w.Overlap {
			c.out = w.envelope(c.out, now)
		}
	}
	return nil
}

func (c *clientConn) write() error {
	if len(c.out) == 0 {
		return nil
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(clientReplyTimeout)); err != nil {
		return err
	}
	_, err := c.conn.Write(c.out)
	return err
}

// envelopeReplies reads the replies to MAIL, RCPT and DATA. ready means the
// server waits for the message.
func (c *clientConn) envelopeReplies(w *load, i int) (ready bool, err error) {
	refused := false
	for step := range 3 {
		code, line, err := c.reply()
		if err != nil {
			return false, err
		}
		switch {
		case step == 2 && code == 354 && !refused:
			return true, nil
		case step == 2 && code == 354:
			// Refused and yet a 354: an empty message ends it (RFC 2920 section 3.1).
			if _, err := c.conn.Write([]byte(".\r\n")); err != nil {
				return false, err
			}
			if _, _, err := c.reply(); err != nil {
				return false, err
			}
		case code/100 != 2 && !refused:
			refused = true
			w.decide(i, code, line)
			if code == 421 { // RFC 5321 section 3.8: the connection is gone
				return false, errors.New("lab: load: " + string(line))
			}
		}
	}
	return false, nil
}

// envelope appends the pipelined commands of a message.
func (w *load) envelope(dst []byte, i int) []byte {
	w.results[i].Begun = time.Since(w.start)
	dst = append(dst, "MAIL FROM:<"...)
	dst = append(dst, w.From(i)...)
	dst = append(dst, ">\r\nRCPT TO:<"...)
	dst = append(dst, w.To(i)...)
	return append(dst, ">\r\nDATA\r\n"...)
}

// message appends a message and its final dot.
func (w *load) message(dst []byte, i int) []byte {
	begin := len(dst)
	dst = append(dst, "From: <"...)
	dst = append(dst, w.From(i)...)
	dst = append(dst, ">\r\nTo: <"...)
	dst = append(dst, w.To(i)...)
	dst = append(dst, ">\r\nSubject: Message "...)
	dst = strconv.AppendInt(dst, int64(i), 10)
	dst = append(dst, "\r\nDate: "...)
	dst = time.Now().AppendFormat(dst, dateFormat)
	dst = append(dst, "\r\nMessage-ID: <"...)
	dst = append(dst, w.Tag...)
	dst = append(dst, '.')
	dst = strconv.AppendInt(dst, int64(i), 10)
	dst = append(dst, "@load.lab.test>\r\n"...)
	dst = append(dst, w.Headers...)
	dst = append(dst, "\r\n"...)
	lines := max((w.Size-(len(dst)-begin))/len(loadLine), 1)
	dst = append(dst, w.body[:lines*len(loadLine)]...)
	return append(dst, ".\r\n"...)
}

// decide records a reply.
func (w *load) decide(i, code int, line []byte) {
	if code/100 == 2 {
		w.settle(i, StateAccepted, code, nil)
		return
	}
	w.settle(i, StateRefused, code, line)
}

func (w *load) settle(i int, s State, code int, line []byte) {
	r := &w.results[i]
	r.State, r.Code, r.Reply, r.Ended = s, code, string(line), time.Since(w.start)
	w.decided.Add(1)
	if w.Done != nil {
		w.Done(i, r)
	}
}
