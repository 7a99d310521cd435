package delivery

import (
	"bytes"
	"encoding/base64"
	"mime"
	"mime/quotedprintable"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of a conversion. It is rare and needs the message in memory.
const (
	maxDowngradeBytes = 64 << 20
	maxMIMEDepth      = 20
	maxMIMEParts      = 1000
)

// A message that cannot be converted: RFC 3463 section 3.7, X.6.3, conversion
// required but not supported.
func cannotConvert(why string) error {
	return fault.New(fault.Invalid, "delivery.downgrade", "the host does not take 8-bit mail, and %s", why)
}

// downgrade returns the message without octets above 127, for a host without
// 8BITMIME (RFC 6152 section 3): 8-bit text becomes quoted-printable, anything
// else base64 (RFC 2045 section 6). What a signature covers is never touched.
func downgrade(c *Content, clientSigned bool) ([]byte, error) {
	if clientSigned {
		return nil, cannotConvert("the message carries a signature that a conversion would break")
	}
	if c.Size() > maxDowngradeBytes {
		return nil, cannotConvert("the message is too large to be converted")
	}
	message := c.Bytes
	if message == nil {
		message = make([]byte, c.Length)
		if n, err := c.Reader.ReadAt(message, 0); n < len(message) {
			return nil, fault.Wrap(err, fault.Internal, "delivery.downgrade", "the stored message could not be read")
		}
	}
	d := downgrader{out: make([]byte, 0, len(message)+len(message)/2)}
	if err := d.entity(message, 0); err != nil {
		return nil, err
	}
	return d.out, nil
}

type downgrader struct {
	out   []byte
	parts int
}

func sevenBit(b []byte) bool {
	for _, c := range b {
		if c >= 0x80 {
			return false
		}
	}
	return true
}

// entity appends one entity: the message, a part of it, or a message inside it.
func (d *downgrader) entity(entity []byte, depth int) error {
	if d.parts++; d.parts > maxMIMEParts || depth > maxMIMEDepth {
		return cannotConvert("the message has too many parts")
	}
	header, body := splitHeader(entity)
	if !sevenBit(header) {
		return cannotConvert("the message has header fields with octets above 127")
	}
	if sevenBit(body) {
		d.out = append(append(d.out, header...), body...)
		return nil
	}
	kind, parameters, err := mime.ParseMediaType(field(header, "Content-Type"))
	if err != nil {
		kind, parameters = "text/plain", nil
	}
	encoding := strings.ToLower(strings.TrimSpace(field(header, "Content-Transfer-Encoding")))
	switch encoding {
	case "", "7bit", "8bit", "binary":
	default:
		return cannotConvert("a part has octets above 127 against its own Content-Transfer-Encoding")
	}
	switch {
	case kind == "multipart/signed" || kind == "multipart/encrypted":
		return cannotConvert("the message carries a signature that a conversion would break")
	case strings.HasPrefix(kind, "multipart/"):
		d.header(header, "7bit", depth)
		return d.multipart(body, parameters["boundary"], depth)
	case kind == "message/rfc822":
		// RFC 2046 section 5.2.1: no other encoding than 7bit, 8bit or binary.
		d.header(header, "7bit", depth)
		return d.entity(body, depth+1)
	case strings.HasPrefix(kind, "message/"):
		return cannotConvert("it has a part of type " + kind)
	case strings.HasPrefix(kind, "text/"):
		d.header(header, "quoted-printable", depth)
		return d.quotedPrintable(body)
	}
	d.header(header, "base64", depth)
	d.base64(body)
	return nil
}

// splitHeader cuts an entity behind the empty line that ends its header.
func splitHeader(entity []byte) (header, body []byte) {
	if bytes.HasPrefix(entity, []byte("\r\n")) {
		return entity[:2], entity[2:]
	}
	if i := bytes.Index(entity, []byte("\r\n\r\n")); i >= 0 {
		return entity[:i+4], entity[i+4:]
	}
	return entity, nil
}

// fields yields the header's fields with their folded lines and line ends.
func fields(header []byte, yield func(f []byte) bool) {
	for len(header) > 0 {
		end := 0
		for {
			i := bytes.Index(header[end:], []byte("\r\n"))
			if i < 0 {
				end = len(header)
				break
			}
			end += i + 2
			if end >= len(header) || header[end] != ' ' && header[end] != '\t' {
				break
			}
		}
		if !yield(header[:end]) {
			return
		}
		header = header[end:]
	}
}

func named(f []byte, name string) bool {
	return len(f) > len(name) && bytes.EqualFold(f[:len(name)], []byte(name)) && bytes.HasPrefix(bytes.TrimLeft(f[len(name):], " \t"), []byte{':'})
}

// field returns a field's value, unfolded, "" if there is none.
func field(header []byte, name string) string {
	value := ""
	fields(header, func(f []byte) bool {
		if !named(f, name) {
			return true
		}
		_, after, _ := bytes.Cut(f, []byte{':'})
		value = strings.TrimSpace(strings.ReplaceAll(string(after), "\r\n", ""))
		return false
	})
	return value
}

// header appends a header with another transfer encoding. A message that was
// not MIME becomes so, with the charset that says "8-bit, nobody knows which"
// (RFC 1428 section 3).
func (d *downgrader) header(header []byte, encoding string, depth int) {
	fields(header, func(f []byte) bool {
		if !named(f, "Content-Transfer-Encoding") && string(f) != "\r\n" {
			d.out = append(d.out, f...)
		}
		return true
	})
	if depth == 0 && field(header, "MIME-Version") == "" {
		d.out = append(d.out, "MIME-Version: 1.0\r\n"...)
	}
	if field(header, "Content-Type") == "" {
		d.out = append(d.out, "Content-Type: text/plain; charset=unknown-8bit\r\n"...)
	}
	d.out = append(d.out, "Content-Transfer-Encoding: "+encoding+"\r\n\r\n"...)
}

// multipart appends the parts between the boundary's delimiter lines (RFC 2046
// section 5.1.1). The texts before and behind them mean nothing; their octets
// above 127 become question marks.
func (d *downgrader) multipart(body []byte, boundary string, depth int) error {
	if boundary == "" {
		return cannotConvert("a multipart has no boundary")
	}
	delimiter := []byte("--" + boundary)
	begin, inPart := 0, false
	for at := 0; at < len(body); {
		end := at + bytes.Index(body[at:], []byte("\r\n")) + 2
		if end < at+2 {
			end = len(body)
		}
		line := body[at:end]
		tail, ok := bytes.CutPrefix(line, delimiter)
		closing := bytes.HasPrefix(tail, []byte("--"))
		if !ok || len(bytes.TrimSpace(bytes.TrimPrefix(tail, []byte("--")))) > 0 {
			at = end
			continue
		}
		if err := d.between(body[begin:at], inPart, depth); err != nil {
			return err
		}
		d.out = append(d.out, line...)
		begin, at, inPart = end, end, !closing
		if closing {
			break
		}
	}
	return d.between(body[begin:], inPart, depth)
}

// between appends what stands between two delimiter lines. The line end in
// front of a delimiter belongs to it, not to the part.
func (d *downgrader) between(text []byte, part bool, depth int) error {
	if !part {
		for _, c := range text {
			if c >= 0x80 {
				c = '?'
			}
			d.out = append(d.out, c)
		}
		return nil
	}
	inner, hadEnd := bytes.CutSuffix(text, []byte("\r\n"))
	if err := d.entity(inner, depth+1); err != nil {
		return err
	}
	if hadEnd {
		d.out = append(d.out, '\r', '\n')
	}
	return nil
}

// appender lets an encoder write to the output.
type appender struct{ d *downgrader }

func (a appender) Write(b []byte) (int, error) {
	a.d.out = append(a.d.out, b...)
	return len(b), nil
}

func (d *downgrader) quotedPrintable(body []byte) error {
	w := quotedprintable.NewWriter(appender{d})
	if _, err := w.Write(body); err != nil {
		return fault.Wrap(err, fault.Internal, "delivery.downgrade", "the message could not be converted")
	}
	return fault.Wrap(w.Close(), fault.Internal, "delivery.downgrade", "the message could not be converted")
}

// base64LineBytes of input make a line of 76 characters (RFC 2045 section 6.8).
const base64LineBytes = 57

func (d *downgrader) base64(body []byte) {
	for len(body) > 0 {
		n := min(len(body), base64LineBytes)
		d.out = base64.StdEncoding.AppendEncode(d.out, body[:n])
		if body = body[n:]; len(body) > 0 {
			d.out = append(d.out, '\r', '\n')
		}
	}
}
