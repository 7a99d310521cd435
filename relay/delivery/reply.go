package delivery

import (
	"bytes"
	"errors"
	"net"
	"time"
	"unicode/utf8"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/relay/verdict"
)

// Bounds of a remote reply. RFC 5321 section 4.5.3.1.5 allows 512 octets a
// line; real servers say more.
const (
	maxReplyLineBytes = 4096
	maxReplyLines     = 256
	maxReplyBytes     = 64 << 10
)

// errProtocol is a reply that is not SMTP.
type errProtocol string

func (e errProtocol) Error() string { return string(e) }

const (
	errLineTooLong  = errProtocol("reply line of more than 4096 bytes")
	errTooManyLines = errProtocol("reply of more than 256 lines or 64 KiB")
	errNotReply     = errProtocol("reply does not begin with a three-digit code")
	errMixedCodes   = errProtocol("reply lines with codes of different meaning")
	errOutOfTurn    = errProtocol("reply to a command that was not sent")
	errUnexpected   = errProtocol("reply code that does not fit the command")
)

// reply is one reply as read. Its text is valid until the next one is read.
type reply struct {
	code     uint16
	enhanced string
	text     []byte
}

func (r *reply) positive() bool { return r.code >= 200 && r.code < 300 }
func (r *reply) proceed() bool  { return r.code >= 300 && r.code < 400 }
func (r *reply) refusal() bool  { return r.code >= 400 }

// keep returns the reply in the form that outlives the session's buffer.
func (r *reply) keep() relay.Reply {
	return relay.Reply{Code: r.code, Enhanced: r.enhanced, Text: cleanText(r.text)}
}

// cleanText makes bytes of a stranger fit for logs, events and mails: valid
// UTF-8 without control characters.
func cleanText(b []byte) string {
	plain := true
	for _, c := range b {
		if c < 0x20 || c >= 0x7f {
			plain = false
			break
		}
	}
	if plain {
		return string(b)
	}
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		switch {
		case r == utf8.RuneError && n <= 1:
			out = append(out, '?')
		case r < 0x20 || r >= 0x7f && r < 0xa0:
			out = append(out, ' ')
		default:
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	return string(out)
}

// replyReader reads replies from a connection through one fixed buffer.
type replyReader struct {
	conn     net.Conn
	from, to int               // unread bytes of buf
	text     []byte            // of the reply being read, reused
	trace    *trace.Session    // may be nil
	onLine   func(text []byte) // given every line but the first of a positive reply; nil: nobody
	buf      [maxReplyLineBytes]byte
}

func (r *replyReader) buffered() int { return r.to - r.from }

// read reads one reply, all lines of it, within timeout. A server that sends
// slowly but steadily does not get more time.
func (r *replyReader) read(timeout time.Duration) (reply, error) {
	var out reply
	var deadline time.Time
	r.text = r.text[:0]
	total := 0
	for lines := 0; ; lines++ {
		line, err := r.line(timeout, &deadline)
		if err != nil {
			return out, err
		}
		if r.trace != nil && r.trace.On() {
			r.trace.Received(line)
		}
		if total += len(line); lines >= maxReplyLines || total > maxReplyBytes {
			return out, errTooManyLines
		}
		code, more, rest, ok := parseLine(line)
		if !ok {
			return out, errNotReply
		}
		// RFC 5321 section 4.2.1 wants the same code on every line; a different
		// one is tolerated while it means the same.
		if lines > 0 && code/100 != out.code/100 {
			return out, errMixedCodes
		}
		out.code = code
		if r.onLine != nil && lines > 0 && code < 300 {
			r.onLine(rest)
		}
		esc, rest := verdict.CutEnhanced(rest)
		if out.enhanced == "" {
			out.enhanced = intern(esc)
		} else if len(esc) > 0 && string(esc) != out.enhanced {
			rest = line[min(4, len(line)):] // another code inside the text: keep it readable
		}
		r.add(rest)
		if !more {
			out.text = r.text
			return out, nil
		}
	}
}

// add appends a line's text, within relay.MaxReplyTextBytes.
func (r *replyReader) add(text []byte) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return
	}
	if len(r.text) > 0 && len(r.text) < relay.MaxReplyTextBytes {
		r.text = append(r.text, ' ')
	}
	room := relay.MaxReplyTextBytes - len(r.text)
	if len(text) > room {
		for room > 0 && !utf8.RuneStart(text[room]) {
			room--
		}
		text = text[:room]
	}
	r.text = append(r.text, text...)
}

// line returns the next line without its end. The deadline begins when the
// first byte is waited for and is shared by the lines of one reply.
func (r *replyReader) line(timeout time.Duration, deadline *time.Time) ([]byte, error) {
	for scanned := r.from; ; {
		if i := bytes.IndexByte(r.buf[scanned:r.to], '\n'); i >= 0 {
			line := r.buf[r.from : scanned+i]
			r.from = scanned + i + 1
			return bytes.TrimSuffix(line, []byte{'\r'}), nil
		}
		if r.from > 0 {
			r.to = copy(r.buf[:], r.buf[r.from:r.to])
			r.from = 0
		}
		if r.to == len(r.buf) {
			return nil, errLineTooLong
		}
		if deadline.IsZero() {
			*deadline = time.Now().Add(timeout)
			if err := r.conn.SetReadDeadline(*deadline); err != nil {
				return nil, err
			}
		}
		scanned = r.to
		n, err := r.conn.Read(r.buf[r.to:])
		r.to += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// fillNow reads what has already arrived, without waiting for more.
func (r *replyReader) fillNow() bool {
	if r.from > 0 {
		r.to = copy(r.buf[:], r.buf[r.from:r.to])
		r.from = 0
	}
	if r.to == len(r.buf) || r.conn.SetReadDeadline(time.Now().Add(lateReplyWait)) != nil {
		return r.to > 0
	}
	n, _ := r.conn.Read(r.buf[r.to:])
	r.to += n
	return r.to > 0
}

// parseLine splits "250-text" (RFC 5321 section 4.2: Reply-code, then a space,
// a hyphen if more lines follow, or the end of the line).
func parseLine(line []byte) (code uint16, more bool, text []byte, ok bool) {
	if len(line) < 3 {
		return 0, false, nil, false
	}
	for _, c := range line[:3] {
		if c < '0' || c > '9' {
			return 0, false, nil, false
		}
		code = code*10 + uint16(c-'0')
	}
	if code < 200 || code > 599 {
		return 0, false, nil, false
	}
	if len(line) == 3 {
		return code, false, nil, true
	}
	switch line[3] {
	case '-':
		return code, true, line[4:], true
	case ' ':
		return code, false, line[4:], true
	}
	return 0, false, nil, false
}

// intern returns the string of an enhanced code, without allocating for the
// codes of accepted mail.
func intern(b []byte) string {
	switch string(b) {
	case "":
		return ""
	case "2.0.0":
		return "2.0.0"
	case "2.1.0":
		return "2.1.0"
	case "2.1.5":
		return "2.1.5"
	case "2.6.0":
		return "2.6.0"
	case "2.5.0":
		return "2.5.0"
	}
	return string(b)
}

// isProtocol reports whether the peer broke the rules, as opposed to the
// connection breaking.
func isProtocol(err error) bool {
	var p errProtocol
	return errors.As(err, &p)
}
