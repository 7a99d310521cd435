package sign

import "bytes"

// signedField is a header field name that a signature covers.
type signedField struct {
	name     string
	oversign bool // h= names it once more than it occurs, so that none can be added (RFC 6376 section 8.15)
}

// signedFields lists what is signed, in the order of h=. Fields that a relay on
// the way may rightly add or change (Received, Return-Path,
// Authentication-Results) are not in it (RFC 6376 section 5.4.1).
var signedFields = [...]signedField{
	{"From", true},
	{"To", true},
	{"Subject", true},
	{"Date", true},
	{"Message-ID", true},
	{"List-Unsubscribe", true},      // RFC 8058 section 4
	{"List-Unsubscribe-Post", true}, // RFC 8058 section 4
	{"Sender", false},
	{"Reply-To", false},
	{"Cc", false},
	{"In-Reply-To", false},
	{"References", false},
	{"MIME-Version", false},
	{"Content-Type", false},
	{"Content-Transfer-Encoding", false},
	{"Content-Language", false},
	{"List-Id", false},   // RFC 2919
	{"List-Help", false}, // RFC 2369 section 3
	{"List-Owner", false},
	{"List-Post", false},
	{"List-Subscribe", false},
	{"List-Archive", false},
	{"Feedback-ID", false},
	{"CFBL-Address", false},     // RFC 9477 section 3.1
	{"CFBL-Feedback-ID", false}, // RFC 9477 section 3.1
	{"Auto-Submitted", false},
	{"Resent-From", false},
	{"Resent-To", false},
	{"Resent-Date", false},
	{"Resent-Message-ID", false},
}

// foundField is one field of a message that will be signed.
type foundField struct {
	which      int // index into signedFields
	start, end int // in the header section, CRLF included
}

// findFields appends the fields of header that are to be signed, in the order
// of the message. header ends with the empty line, or at the end of the bytes.
func findFields(found []foundField, header []byte) []foundField {
	for at := 0; at < len(header); {
		end := fieldEnd(header, at)
		field := header[at:end]
		if colon := bytes.IndexByte(field, ':'); colon > 0 {
			name := bytes.TrimRight(field[:colon], " \t")
			for which := range signedFields {
				if len(name) == len(signedFields[which].name) && equalFold(name, signedFields[which].name) {
					found = append(found, foundField{which: which, start: at, end: end})
					break
				}
			}
		} else if len(bytes.TrimRight(field, "\r\n")) == 0 {
			return found // the empty line: the body begins
		}
		at = end
	}
	return found
}

// fieldEnd returns where the field that begins at start ends, its folded lines
// included (RFC 5322 section 2.2.3).
func fieldEnd(header []byte, start int) int {
	for at := start; ; {
		i := bytes.IndexByte(header[at:], '\n')
		if i < 0 {
			return len(header)
		}
		at += i + 1
		if at == len(header) || header[at] != ' ' && header[at] != '\t' {
			return at
		}
		if at-start <= 2 {
			return at // an empty line is never folded
		}
	}
}

// equalFold compares ASCII without regard to case; both have the same length.
func equalFold(b []byte, s string) bool {
	for i := 0; i < len(s); i++ {
		if lower(b[i]) != lower(s[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// appendRelaxed appends the relaxed canonical form of a header field (RFC 6376
// section 3.4.2): name in lower case, value unfolded, white space runs as one
// space, none around the colon or at the end, CRLF.
func appendRelaxed(dst, field []byte) []byte {
	colon := bytes.IndexByte(field, ':')
	if colon < 0 {
		colon = len(field)
	}
	for _, c := range bytes.Trim(field[:colon], " \t\r\n") {
		dst = append(dst, lower(c))
	}
	dst = append(dst, ':')
	if colon < len(field) {
		first, space := true, false
		for _, c := range field[colon+1:] {
			if c == ' ' || c == '\t' || c == '\r' || c == '\n' {
				space = true
				continue
			}
			if space && !first {
				dst = append(dst, ' ')
			}
			first, space = false, false
			dst = append(dst, c)
		}
	}
	return append(dst, '\r', '\n')
}
