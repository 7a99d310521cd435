package lab

import (
	"bytes"
	"fmt"
)

var endOfData = []byte("\r\n.\r\n")

// content reads a message up to its final dot and undoes dot-stuffing (RFC
// 5321 section 4.5.2). What follows the dot stays in s.in. The memory is good
// until the next message. drop closes as soon as content arrives.
func (s *session) content(drop bool) (content []byte, tooLarge bool, err error) {
	// The CRLF kept in front lets one search find an end at the very start, too.
	s.msg = append(append(s.msg[:0], "\r\n"...), s.in[s.r:s.w]...)
	s.r, s.w = 0, 0
	limit := int(s.p.profile.MaxMessageSize) + sizeMargin
	searched := 0
	for {
		if i := bytes.Index(s.msg[searched:], endOfData); i >= 0 && !drop {
			end := searched + i
			s.w = copy(s.in, s.msg[end+len(endOfData):])
			if tooLarge {
				return nil, true, nil
			}
			return unstuff(s.msg[:end+2])[2:], end > limit, nil
		}
		if len(s.msg) > limit { // keep only what an end could start in
			tooLarge = true
			s.msg = append(s.msg[:0], s.msg[len(s.msg)-len(endOfData):]...)
		}
		searched = max(len(s.msg)-len(endOfData)+1, 0)
		if cap(s.msg)-len(s.msg) < sessionBufferBytes/4 {
			s.msg = append(make([]byte, 0, 2*cap(s.msg)+sessionBufferBytes), s.msg...)
		}
		// Never more than s.in can take back after the final dot.
		room := s.msg[len(s.msg):min(cap(s.msg), len(s.msg)+sessionBufferBytes)]
		n, err := s.fill(room)
		if err != nil {
			return nil, false, err
		}
		if drop {
			s.lane.drop()
			return nil, false, errClosing
		}
		s.msg = s.msg[:len(s.msg)+n]
	}
}

// unstuff removes the first dot of every line that starts with one, in place.
// msg starts with a CRLF that is not content.
func unstuff(msg []byte) []byte {
	stuffed := []byte("\r\n.")
	i := bytes.Index(msg, stuffed)
	if i < 0 {
		return msg
	}
	to := i + 2
	for from := to + 1; ; {
		next := bytes.Index(msg[from:], stuffed)
		if next < 0 {
			to += copy(msg[to:], msg[from:])
			return msg[:to]
		}
		to += copy(msg[to:], msg[from:from+next+2])
		from += next + 3
	}
}

// inspect notes what RFC 5321 and 5322 forbid in a message on the wire.
func (s *session) inspect(content []byte) {
	lf := bytes.Count(content, []byte("\n"))
	cr := bytes.Count(content, []byte("\r"))
	if crlf := bytes.Count(content, []byte("\r\n")); crlf != lf || crlf != cr { // RFC 5321 section 2.3.8
		s.p.fault("bare CR or LF in content", s.source, fmt.Sprintf("%d CR, %d LF, %d CRLF", cr, lf, crlf))
	}
	if bytes.IndexByte(content, 0) >= 0 {
		s.p.fault("NUL in content", s.source, "")
	}
	for rest := content; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		if i > maxLineBytes || i < 0 && len(rest) > maxLineBytes { // RFC 5321 section 4.5.3.1.6
			s.p.fault("line too long in content", s.source, "")
			return
		}
		if i < 0 {
			return
		}
		rest = rest[i+1:]
	}
}

// maxLineBytes is the length of a line with its CR: 1000 octets with CRLF.
const maxLineBytes = 999

// eightBit reports whether content has a byte above 127.
func eightBit(content []byte) bool {
	for len(content) >= 8 {
		c := content[:8]
		if (c[0]|c[1]|c[2]|c[3]|c[4]|c[5]|c[6]|c[7])&0x80 != 0 {
			return true
		}
		content = content[8:]
	}
	for _, b := range content {
		if b&0x80 != 0 {
			return true
		}
	}
	return false
}
