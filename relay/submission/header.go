package submission

import (
	"bytes"
	"io"
	"mime"
	"net/mail"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// maxAuthors bounds the addresses in a From field.
const maxAuthors = 20

// field is one field of a header section.
type field struct {
	start, end int // with its folded lines and CRLF
	colon      int // end of the name
	drop       bool
}

// header is what the rules need to know of a header section.
type header struct {
	from       mailaddr.Domain   // of the first author
	domains    []mailaddr.Domain // of all authors and of Sender: each must be the tenant's
	received   int
	date       bool
	messageID  bool
	clientDKIM bool
	options    options
}

// headerEnd returns where the header section ends, its empty line included, or
// 0 if the end has not come yet. Only what lies behind from is searched.
func headerEnd(b []byte, from int) int {
	if len(b) >= 2 && b[0] == '\r' && b[1] == '\n' {
		return 2
	}
	if i := bytes.Index(b[from:], []byte("\r\n\r\n")); i >= 0 {
		return from + i + 4
	}
	return 0
}

// splitHeader finds the fields of a header section that ends in its empty line.
// RFC 5322 section 2.2: a field has a name of printable ASCII and a colon.
func splitHeader(fields []field, raw []byte) ([]field, error) {
	const op = "submission.splitHeader"
	for at := 0; at < len(raw); {
		end := at + bytes.IndexByte(raw[at:], '\n') + 1
		if end-at == 2 {
			return fields, nil
		}
		for end < len(raw) && (raw[end] == ' ' || raw[end] == '\t') {
			end += bytes.IndexByte(raw[end:], '\n') + 1
		}
		colon := bytes.IndexByte(raw[at:end], ':')
		name := bytes.TrimRight(raw[at:at+max(colon, 0)], " \t") // RFC 5322 section 4.5: obsolete syntax has white space there
		if colon <= 0 || !isFieldName(name) {
			return nil, fault.New(fault.Invalid, op, "The header section holds a line that is not a field: %q", clip(raw[at:end]))
		}
		fields = append(fields, field{start: at, end: end, colon: at + len(name)})
		at = end
	}
	return fields, nil
}

// isFieldName implements ftext of RFC 5322 section 3.6.8.
func isFieldName(name []byte) bool {
	if len(name) == 0 {
		return false
	}
	for _, c := range name {
		if c <= ' ' || c > '~' || c == ':' {
			return false
		}
	}
	return true
}

func clip(b []byte) string {
	const maxShownBytes = 60
	s := strings.TrimRight(string(b[:min(len(b), maxShownBytes)]), "\r\n")
	if len(b) > maxShownBytes {
		s += "…"
	}
	return s
}

// value returns the unfolded text of a field.
func value(raw []byte, f *field) string {
	_, v, _ := bytes.Cut(raw[f.colon:f.end], []byte{':'})
	v = bytes.TrimSpace(v)
	if bytes.IndexByte(v, '\r') < 0 {
		return string(v)
	}
	return string(bytes.ReplaceAll(v, []byte("\r\n"), nil)) // RFC 5322 section 2.2.3
}

// maxKnownNameBytes is the length of the longest name that inspect looks for.
const maxKnownNameBytes = 24

// inspect applies the rules for single fields: it marks those that do not go
// on, and gathers what the rules for the whole message need. now is the time
// of acceptance.
func inspect(raw []byte, fields []field, now time.Time) (header, error) {
	const op = "submission.inspect"
	var h header
	var from, sender *field
	var buf [maxKnownNameBytes]byte
	for i := range fields {
		f := &fields[i]
		name := raw[f.start:f.colon]
		if len(name) > maxKnownNameBytes {
			if len(name) > len(optionPrefix) && strings.EqualFold(string(name[:len(optionPrefix)]), optionPrefix) {
				return h, unknownOption(string(name))
			}
			continue
		}
		switch lowerName := string(lowerInto(buf[:], name)); lowerName {
		case "from":
			if from != nil {
				return h, fault.New(fault.Invalid, op, "The message has more than one From field")
			}
			from = f
		case "sender":
			if sender != nil {
				return h, fault.New(fault.Invalid, op, "The message has more than one Sender field")
			}
			sender = f
		case "bcc", "resent-bcc": // RFC 5322 section 3.6.3: blind copies are not to be shown
			f.drop = true
		case "return-path": // RFC 5321 section 4.4: the last server's to write
			f.drop = true
		case "received":
			h.received++
		case "date":
			h.date = true
		case "message-id":
			h.messageID = true
		case "dkim-signature":
			h.clientDKIM = true
		default:
			if strings.HasPrefix(lowerName, optionPrefix) {
				f.drop = true
				if err := h.options.set(lowerName, string(name), value(raw, f), now); err != nil {
					return h, err
				}
			}
		}
	}
	if from == nil {
		return h, fault.New(fault.Invalid, op, "The message has no From field")
	}
	if err := h.authors(raw, from, sender); err != nil {
		return h, err
	}
	return h, nil
}

func lowerInto(buf, name []byte) []byte {
	for i, c := range name {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		buf[i] = c
	}
	return buf[:len(name)]
}

// addressParser leaves the charset of display names alone: only the addresses
// matter here, and a name in a rare charset must not make them unreadable.
var addressParser = mail.AddressParser{WordDecoder: &mime.WordDecoder{
	CharsetReader: func(_ string, input io.Reader) (io.Reader, error) { return input, nil },
}}

// authors reads the addresses of From and Sender.
func (h *header) authors(raw []byte, from, sender *field) error {
	const op = "submission.authors"
	list, err := addressParser.ParseList(value(raw, from))
	if err != nil || len(list) == 0 || len(list) > maxAuthors {
		return fault.New(fault.Invalid, op, "The From field cannot be read as 1 to %d addresses", maxAuthors)
	}
	if len(list) > 1 && sender == nil {
		return fault.New(fault.Invalid, op, "A From field with several addresses needs a Sender field") // RFC 5322 section 3.6.2
	}
	if sender != nil {
		one, err := addressParser.Parse(value(raw, sender))
		if err != nil {
			return fault.New(fault.Invalid, op, "The Sender field cannot be read as one address")
		}
		list = append(list, one)
	}
	h.domains = make([]mailaddr.Domain, 0, len(list))
	for _, a := range list {
		at := strings.LastIndexByte(a.Address, '@')
		domain, err := mailaddr.ParseDomain(a.Address[at+1:])
		if err != nil {
			return fault.New(fault.Invalid, op, "The From or Sender field names a domain that cannot be: %s", fault.Public(err))
		}
		h.domains = append(h.domains, domain)
	}
	h.from = h.domains[0]
	return nil
}
