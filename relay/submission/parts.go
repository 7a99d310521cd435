package submission

import (
	"bytes"
	"mime"
	"strings"
	"unicode/utf8"
)

// The header sections of MIME parts may hold UTF-8 like that of the message (RFC
// 6532 section 3), and need SMTPUTF8 as much. partScan looks for it while the
// message comes in. Only mail of clients that say SMTPUTF8 is looked at: what
// others send as 8-bit text in a filename is what it always was.

// Bounds of a scan. What lies beyond them is not looked at.
const (
	maxPartDepth        = 20       // multiparts and messages, one within the other
	maxPartHeaderBytes  = 64 << 10 // of a part's header section
	maxDelimiterBytes   = 2 + 70 + 2 + 254
	maxBoundaryBytes    = 70 // RFC 2046 section 5.1.1
	contentType         = "content-type"
	transferEncoding    = "content-transfer-encoding"
	multipartPrefix     = "multipart/"
	embeddedMessage     = "message/rfc822"
	embeddedMessageUTF8 = "message/global" // RFC 6532 section 3.7
)

// partScan reads the body of a message, in pieces of any size, for UTF-8 in header
// sections (RFC 6532 section 3). The zero value looks at nothing.
type partScan struct {
	boundaries [][]byte // of the multiparts that are open, the outermost first
	depth      int      // of what is being read
	depths     []int    // of each open multipart
	inHeader   bool
	header     []byte // the section being read
	line       []byte // the beginning of the line being read, in a body
	found      bool   // a header section is UTF-8 and not ASCII
}

// begin takes the message's own header section, which ends in its empty line,
// and says by it whether there are parts.
func (s *partScan) begin(header []byte) {
	s.boundaries, s.depths, s.depth = s.boundaries[:0], s.depths[:0], 0
	s.header, s.line, s.inHeader, s.found = s.header[:0], s.line[:0], false, false
	s.descend(header)
}

// active reports whether more of the body is worth a look.
func (s *partScan) active() bool { return !s.found && (s.inHeader || len(s.boundaries) > 0) }

// write takes the next octets of the body.
func (s *partScan) write(p []byte) {
	for len(p) > 0 && s.active() {
		i := bytes.IndexByte(p, '\n')
		whole := i >= 0
		if !whole {
			i = len(p) - 1
		}
		// Of a line in a body only what could be a delimiter is kept.
		if room := s.room() - len(s.line); room > 0 {
			s.line = append(s.line, p[:min(i+1, room)]...)
		}
		if p = p[i+1:]; whole {
			s.endLine()
			s.line = s.line[:0]
		}
	}
}

// finish takes the end of the body, which ends a header section too.
func (s *partScan) finish() bool {
	if s.active() && len(s.line) > 0 {
		s.endLine()
	}
	if s.active() && s.inHeader {
		s.endHeader()
	}
	return s.found
}

// room is how much of a line is kept.
func (s *partScan) room() int {
	if s.inHeader {
		return max(maxDelimiterBytes, maxPartHeaderBytes-len(s.header))
	}
	return maxDelimiterBytes
}

func (s *partScan) endLine() {
	if bytes.HasPrefix(s.line, []byte("--")) && s.delimiter(bytes.TrimRight(s.line[2:], " \t\r\n")) {
		return
	}
	if !s.inHeader {
		return
	}
	if len(s.header)+len(s.line) <= maxPartHeaderBytes {
		s.header = append(s.header, s.line...)
	}
	if len(bytes.TrimRight(s.line, "\r\n")) == 0 {
		s.endHeader()
	}
}

// delimiter deals with a line that may separate parts (RFC 2046 section 5.1.1);
// that of an outer multipart ends those within it. It reports whether the line
// is one.
func (s *partScan) delimiter(text []byte) bool {
	for i := len(s.boundaries) - 1; i >= 0; i-- {
		rest, ok := bytes.CutPrefix(text, s.boundaries[i])
		if !ok || len(rest) > 0 && string(rest) != "--" {
			continue
		}
		if s.inHeader {
			s.endHeader() // a part without an empty line has no body
		}
		s.depth = s.depths[i] + 1
		s.inHeader = len(rest) == 0
		keep := i
		if s.inHeader {
			keep++
		}
		s.boundaries, s.depths = s.boundaries[:keep], s.depths[:keep]
		s.header = s.header[:0]
		return true
	}
	return false
}

// endHeader judges the header section that was read, and looks into the part if
// it has parts itself.
func (s *partScan) endHeader() {
	s.inHeader = false
	if hasEightBit(s.header) {
		// What is not UTF-8 is not of RFC 6532 section 3: nothing that SMTPUTF8
		// could help.
		s.found = utf8.Valid(s.header)
	}
	if !s.found {
		s.descend(s.header)
	}
	s.header = s.header[:0]
}

// descend opens the multipart or message whose header section this is.
func (s *partScan) descend(header []byte) {
	if s.depth >= maxPartDepth {
		return
	}
	kind, parameters, err := mime.ParseMediaType(partField(header, contentType))
	if err != nil {
		return
	}
	switch {
	case strings.HasPrefix(kind, multipartPrefix):
		if b := parameters["boundary"]; b != "" && len(b) <= maxBoundaryBytes {
			s.boundaries, s.depths = append(s.boundaries, []byte(b)), append(s.depths, s.depth)
		}
	case kind == embeddedMessage || kind == embeddedMessageUTF8:
		switch strings.ToLower(strings.TrimSpace(partField(header, transferEncoding))) {
		case "", "7bit", "8bit", "binary": // RFC 2045 section 6.4: else it is encoded, and ASCII
			s.depth++
			s.inHeader = true
		}
	}
}

// partField returns the value of the first field of a name, unfolded; empty if
// there is none.
func partField(header []byte, lower string) string {
	for at := 0; at < len(header); {
		end := at + lineLength(header[at:])
		for end < len(header) && (header[end] == ' ' || header[end] == '\t') {
			end += lineLength(header[end:])
		}
		name, value, ok := bytes.Cut(header[at:end], []byte{':'})
		if ok && strings.EqualFold(string(bytes.TrimRight(name, " \t")), lower) {
			return strings.TrimSpace(strings.NewReplacer("\r\n", "", "\n", "").Replace(string(value)))
		}
		at = end
	}
	return ""
}

func lineLength(p []byte) int {
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		return i + 1
	}
	return len(p)
}
