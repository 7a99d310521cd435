package sign

import "bytes"

// signedField is a header field name that a signature covers.
type signedField struct {
	name     string
	oversign oversigning
}

// oversigning says when h= names a field once more than it occurs, so that none
// can be added (RFC 6376 section 8.15).
type oversigning uint8

const (
	never oversigning = iota
	always
	whenPresent // forwarders that write one of their own leave mail without it alone
)

// signedFields lists what is signed, in the order of h=. Fields that a relay on
// the way may rightly add or change (Received, Return-Path,
// Authentication-Results) are not in it (RFC 6376 section 5.4.1).
var signedFields = [...]signedField{
	{"From", always},
	{"To", always},
	{"Subject", always},
	{"Date", always},
	{"Message-ID", always},
	{"List-Unsubscribe", always},      // RFC 8058 section 4
	{"List-Unsubscribe-Post", always}, // RFC 8058 section 4
	{"Sender", never},
	{"Reply-To", never},
	{"Cc", never},
	{"In-Reply-To", never},
	{"References", never},
	{"MIME-Version", never},
	{"Content-Type", never},
	{"Content-Transfer-Encoding", never},
	{"Content-Language", never},
	{"List-Id", never},   // RFC 2919
	{"List-Help", never}, // RFC 2369 section 3
	{"List-Owner", never},
	{"List-Post", never},
	{"List-Subscribe", never},
	{"List-Archive", never},
	{"Feedback-ID", whenPresent},
	{"CFBL-Address", whenPresent},     // RFC 9477 section 3.1.4
	{"CFBL-Feedback-ID", whenPresent}, // RFC 9477 section 3.1.4
	{"Auto-Submitted", never},
	{"Resent-From", never},
	{"Resent-To", never},
	{"Resent-Date", never},
	{"Resent-Message-ID", never},
}

// foundField is one field of a message that will be signed.
type foundField struct {
	which int    // index into signedFields
	text  []byte // CRLF included
}

// findFields appends the fields of header that are to be signed, in the order
// of the message. header ends with the empty line, or at the end of the bytes.
func findFields(found []foundField, header []byte) []foundField {
	for at := 0; ; {
		name, end, ok := NextField(header, at)
		if !ok {
			return found
		}
		for which := range signedFields {
			if IsField(name, signedFields[which].name) {
				found = append(found, foundField{which: which, text: header[at:end]})
				break
			}
		}
		at = end
	}
}

// NextField returns the name of the field of a header section that begins at
// the offset, and the offset behind its line end; the name is empty if the line
// is no field. False: there is no further field, because header ends or the
// empty line comes.
func NextField(header []byte, at int) (name []byte, end int, ok bool) {
	if at >= len(header) {
		return nil, at, false
	}
	end = fieldEnd(header, at)
	field := header[at:end]
	if colon := bytes.IndexByte(field, ':'); colon > 0 {
		return bytes.TrimRight(field[:colon], " \t"), end, true
	}
	return nil, end, len(bytes.TrimRight(field, "\r\n")) > 0
}

// IsField compares the name of a field, in which case does not matter.
func IsField(name []byte, is string) bool { return len(name) == len(is) && equalFold(name, is) }

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
