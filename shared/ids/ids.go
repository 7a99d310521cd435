// Package ids holds the typed 128-bit identifiers that name everything in a
// cluster. An id is time-ordered (48 bits of Unix milliseconds in front of 80
// random bits), so keys made of ids sort by age, and its text form carries a
// prefix, so a message id can never be pasted where a tenant id is expected.
package ids

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Size is the length of a binary id in bytes.
const Size = 16

// textBytes is the length of the base32 part of the text form: 128 bits in
// 5-bit digits.
const textBytes = 26

// alphabet is Crockford's base32 in lower case: no i, l, o, u.
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"

var digits = func() (d [256]byte) {
	for i := range d {
		d[i] = 0xff
	}
	for i := 0; i < len(alphabet); i++ {
		d[alphabet[i]] = byte(i)
		if c := alphabet[i]; c >= 'a' {
			d[c-'a'+'A'] = byte(i)
		}
	}
	return d
}()

// Kind is implemented by the marker types that tell ids apart.
type Kind interface{ prefix() string }

// ID is an identifier of one kind of thing. The zero value means "none".
type ID[K Kind] [Size]byte

type (
	messageKind    struct{}
	tenantKind     struct{}
	projectKind    struct{}
	credentialKind struct{}
	poolKind       struct{}
	sourceKind     struct{}
	nodeKind       struct{}
	clusterKind    struct{}
	tokenKind      struct{}
	operatorKind   struct{}
	keyKind        struct{}
	holdKind       struct{}
	brakeKind      struct{}
)

func (messageKind) prefix() string    { return "msg" }
func (tenantKind) prefix() string     { return "tnt" }
func (projectKind) prefix() string    { return "prj" }
func (credentialKind) prefix() string { return "crd" }
func (poolKind) prefix() string       { return "pol" }
func (sourceKind) prefix() string     { return "src" }
func (nodeKind) prefix() string       { return "nod" }
func (clusterKind) prefix() string    { return "cls" }
func (tokenKind) prefix() string      { return "tok" }
func (operatorKind) prefix() string   { return "opr" }
func (keyKind) prefix() string        { return "key" }
func (holdKind) prefix() string       { return "hld" }
func (brakeKind) prefix() string      { return "brk" }

// The kinds of ids.
type (
	Message    = ID[messageKind]
	Tenant     = ID[tenantKind]
	Project    = ID[projectKind]
	Credential = ID[credentialKind]
	Pool       = ID[poolKind]
	Source     = ID[sourceKind]
	Node       = ID[nodeKind]
	Cluster    = ID[clusterKind]
	Token      = ID[tokenKind]
	Operator   = ID[operatorKind]
	Key        = ID[keyKind]
	Hold       = ID[holdKind]
	Brake      = ID[brakeKind]
)

// New returns a fresh id stamped with now. Its random part comes from the
// operating system, whose reader cannot fail (crypto/rand).
func New[K Kind](now time.Time) ID[K] {
	var random [10]byte
	_, _ = rand.Read(random[:]) // documented never to return an error
	return Make[K](now, random)
}

// Make returns the id of the given time and random part; it is the pure form
// of New, for simulations and golden files.
func Make[K Kind](now time.Time, random [10]byte) ID[K] {
	var id ID[K]
	ms := uint64(now.UnixMilli())
	binary.BigEndian.PutUint16(id[0:2], uint16(ms>>32))
	binary.BigEndian.PutUint32(id[2:6], uint32(ms))
	copy(id[6:], random[:])
	return id
}

// FromBytes returns the id held in b, which must be Size bytes long.
func FromBytes[K Kind](b []byte) (ID[K], error) {
	var id ID[K]
	if len(b) != Size {
		return id, fault.New(fault.Invalid, "ids.FromBytes", "%s id has %d bytes, want %d", id.kind(), len(b), Size)
	}
	copy(id[:], b)
	return id, nil
}

func (id ID[K]) kind() string {
	var k K
	return k.prefix()
}

// IsZero reports whether the id is unset.
func (id ID[K]) IsZero() bool { return id == ID[K]{} }

// Time returns the millisecond in which the id was made.
func (id ID[K]) Time() time.Time {
	ms := int64(binary.BigEndian.Uint16(id[0:2]))<<32 | int64(binary.BigEndian.Uint32(id[2:6]))
	return time.UnixMilli(ms)
}

// String returns the text form, such as "msg_06c8…", 30 bytes long, or the
// empty string for the zero id.
func (id ID[K]) String() string {
	if id.IsZero() {
		return ""
	}
	return string(id.AppendText(make([]byte, 0, 4+textBytes)))
}

// AppendText appends the text form to b.
func (id ID[K]) AppendText(b []byte) []byte {
	b = append(b, id.kind()...)
	b = append(b, '_')
	hi := binary.BigEndian.Uint64(id[0:8])
	lo := binary.BigEndian.Uint64(id[8:16])
	for i := textBytes - 1; i >= 0; i-- {
		shift := uint(i * 5)
		var v uint64
		switch {
		case shift >= 64:
			v = hi >> (shift - 64)
		case shift == 60:
			v = lo>>60 | hi<<4
		default:
			v = lo >> shift
		}
		b = append(b, alphabet[v&31])
	}
	return b
}

// MarshalText implements encoding.TextMarshaler; the zero id is empty.
func (id ID[K]) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return nil, nil
	}
	return id.AppendText(nil), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID[K]) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = ID[K]{}
		return nil
	}
	v, err := Parse[K](string(text))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// Parse reads the text form. The prefix must be of the wanted kind; digits are
// accepted in either case.
func Parse[K Kind](text string) (ID[K], error) {
	var id ID[K]
	const op = "ids.Parse"
	want := id.kind()
	prefix, rest, ok := strings.Cut(text, "_")
	if !ok || prefix != want {
		return id, fault.New(fault.Invalid, op, "%q is not a %s id, which looks like %s_ and %d letters and digits", clip(text), want, want, textBytes)
	}
	if len(rest) != textBytes || digits[rest[0]] > 7 {
		return id, fault.New(fault.Invalid, op, "%q is not a whole %s id: %d letters and digits follow the prefix", clip(text), want, textBytes)
	}
	var hi, lo uint64
	for i := 0; i < textBytes; i++ {
		d := digits[rest[i]]
		if d == 0xff {
			return id, fault.New(fault.Invalid, op, "%q holds %q, which no %s id has", clip(text), rest[i], want)
		}
		hi = hi<<5 | lo>>59
		lo = lo<<5 | uint64(d)
	}
	binary.BigEndian.PutUint64(id[0:8], hi)
	binary.BigEndian.PutUint64(id[8:16], lo)
	return id, nil
}

func clip(s string) string {
	const maxShownBytes = 60
	if len(s) > maxShownBytes {
		return s[:maxShownBytes] + "…"
	}
	return s
}

// Recipient names one recipient of one message: the message id and the index
// of the recipient in its envelope.
type Recipient struct {
	Message Message
	Index   uint16
}

// String returns "rcp_<message digits>-<index>".
func (r Recipient) String() string {
	b := make([]byte, 0, 4+textBytes+6)
	b = r.Message.AppendText(b)
	copy(b, "rcp")
	b = append(b, '-')
	return string(strconv.AppendUint(b, uint64(r.Index), 10))
}

// ParseRecipient reads the text form of a recipient.
func ParseRecipient(text string) (Recipient, error) {
	digitsPart, index, ok := strings.Cut(text, "-")
	if !ok || !strings.HasPrefix(digitsPart, "rcp_") {
		return Recipient{}, fault.New(fault.Invalid, "ids.ParseRecipient", "%q is not a recipient id, which looks like rcp_…-0", clip(text))
	}
	m, err := Parse[messageKind]("msg_" + digitsPart[4:])
	if err != nil {
		return Recipient{}, err
	}
	n, err := strconv.ParseUint(index, 10, 16)
	if err != nil {
		return Recipient{}, fault.New(fault.Invalid, "ids.ParseRecipient", "recipient index %q is not a number from 0 to 65535", clip(index))
	}
	return Recipient{Message: m, Index: uint16(n)}, nil
}

// NewMessage returns a fresh message id.
func NewMessage(now time.Time) Message { return New[messageKind](now) }

// ParseMessage reads the text form of a message id.
func ParseMessage(text string) (Message, error) { return Parse[messageKind](text) }

// NewHold returns a fresh id of a rule that holds mail.
func NewHold(now time.Time) Hold { return New[holdKind](now) }

// ParseHold reads the text form of the id of a rule that holds mail.
func ParseHold(text string) (Hold, error) { return Parse[holdKind](text) }

// Short returns the prefix and the last eight digits, for tables where whole
// ids do not fit; it is not unique enough to look things up.
func (id ID[K]) Short() string {
	s := id.String()
	if s == "" {
		return ""
	}
	return fmt.Sprintf("%s…%s", id.kind(), s[len(s)-8:])
}
