package submission

import (
	"bytes"
	"fmt"
	"mime"
	"strings"
	"testing"
	"unicode/utf8"
)

// scanned is what a scan says of a message that comes in pieces of so many octets.
func scanned(message string, piece int) bool {
	end := headerEnd([]byte(message), 0)
	if end == 0 {
		return false
	}
	var s partScan
	s.begin([]byte(message[:end]))
	for body := []byte(message[end:]); len(body) > 0; {
		n := min(piece, len(body))
		s.write(body[:n])
		body = body[n:]
	}
	return s.finish()
}

const (
	mixed = "From: a@a.example\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n boundary=\"=_b\"\r\n\r\n"
	part  = "--=_b\r\n"
	text  = "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGrüße\r\n"
	name  = "Content-Type: application/pdf; name=\"Grüße.pdf\"\r\nContent-Transfer-Encoding: base64\r\n\r\nAAAA\r\n"
	end   = "--=_b--\r\n"
)

func TestPartScan(t *testing.T) {
	forwarded := func(header string) string {
		return mixed + part + "Content-Type: message/rfc822\r\n" + header + "\r\nSubject: Grüße\r\n\r\nx\r\n" + end
	}
	deep := mixed + part
	for i := range 2 * maxPartDepth {
		deep += fmt.Sprintf("Content-Type: multipart/mixed; boundary=d%d\r\n\r\n--d%d\r\n", i, i)
	}
	for _, tt := range []struct {
		name, message string
		want          bool
	}{
		{"no parts", "Subject: x\r\n\r\n--=_b\r\nContent-Type: text/plain; name=ü\r\n\r\n", false},
		{"8-bit text", mixed + "préambule\r\n" + part + text + end + "épilogue\r\n", false},
		{"a filename", mixed + part + text + part + name + end, true},
		{"a filename that is not UTF-8", mixed + part + strings.ReplaceAll(name, "ü", "\xfc") + end, false},
		{"a filename, behind one that is not UTF-8", mixed + part + strings.ReplaceAll(name, "ü", "\xfc") + part + name + end, true},
		{"a disposition", mixed + part + "Content-Disposition: attachment;\r\n filename=\"ő\"\r\n\r\nx\r\n" + end, true},
		{"in an alternative", mixed + part + "Content-Type: multipart/alternative; boundary=in\r\n\r\n--in\r\nX: é\r\n\r\n--in--\r\n" + end, true},
		{"an inner boundary is over with the outer part", mixed + part + "Content-Type: multipart/alternative; boundary=in\r\n\r\n--in\r\n\r\n" + part + "\r\n--in\r\nX: é\r\n\r\n" + end, false},
		{"behind the last part", mixed + part + text + end + part + text + "\r\n--=_c\r\nX: é\r\n", false},
		{"a forwarded message", forwarded(""), true},
		{"a forwarded message in base64", forwarded("Content-Transfer-Encoding: base64\r\n"), false},
		{"a forwarded message said to be 8bit", forwarded("Content-Transfer-Encoding: 8BIT\r\n"), true},
		{"an international one", strings.Replace(forwarded(""), "message/rfc822", "message/global", 1), true},
		{"a message as all there is", "Content-Type: message/rfc822\r\n\r\nSubject: é\r\n\r\n", true},
		{"a message as all there is, in ASCII", "Content-Type: message/rfc822\r\n\r\nSubject: e\r\n\r\nSubject: é\r\n", false},
		{"a filename in a forwarded multipart", mixed + part + "Content-Type: message/rfc822\r\n\r\n" + strings.ReplaceAll(mixed+part+name+end, "=_b", "inner") + end, true},
		{"no empty line behind the header", mixed + part + "X: é\r\n" + end, true},
		{"the end comes in a header", mixed + part + "X: é", true},
		{"space behind the delimiter", mixed + "--=_b \t\r\nX: é\r\n\r\n", true},
		{"more behind the delimiter", mixed + "--=_bc\r\nX: é\r\n\r\n", false},
		{"too deep", deep + "X: é\r\n\r\n", false},
		{"not too deep", deep[:strings.Index(deep, "--d5\r\n")+6] + "X: é\r\n\r\n", true},
		{"a long header line", mixed + part + "X: " + strings.Repeat("x", 70_000) + "é\r\n\r\n", false},
		{"many long lines", mixed + part + strings.Repeat("X: "+strings.Repeat("x", 900)+"\r\n", 100) + "\r\nx\r\n" + part + "X: é\r\n\r\n", true},
	} {
		for _, piece := range []int{1, 2, 7, 4096, 1 << 20} {
			if got := scanned(tt.message, piece); got != tt.want {
				t.Errorf("%s, in pieces of %d: %v", tt.name, piece, got)
			}
		}
	}
}

func TestPartScanIsBounded(t *testing.T) {
	var s partScan
	s.begin([]byte(mixed))
	s.write([]byte(part + "X: y\r\n"))
	for range 1000 {
		s.write(bytes.Repeat([]byte("x"), 1000))
	}
	if cap(s.line) > 2*maxPartHeaderBytes || cap(s.header) > 2*maxPartHeaderBytes {
		t.Errorf("a line of 1 MB takes %d and %d octets", cap(s.line), cap(s.header))
	}
	for i := range 1000 {
		s.write([]byte("\r\n" + part + "Content-Type: message/rfc822\r\n\r\nContent-Type: multipart/mixed; boundary=" + fmt.Sprint(i) + "\r\n\r\n--" + fmt.Sprint(i) + "\r\n"))
		if i%2 == 0 {
			s.write([]byte("Content-Type: multipart/mixed; boundary=z" + fmt.Sprint(i) + "\r\n\r\n"))
		}
	}
	if len(s.boundaries) > maxPartDepth+1 || cap(s.header) > 2*maxPartHeaderBytes {
		t.Errorf("%d multiparts are open", len(s.boundaries))
	}
}

// A slower reading of the same rules, of the whole message at once.
type naive struct{ found bool }

func (n *naive) entity(lines []string, open []string, depth int) (rest []string) {
	var header strings.Builder
	for len(lines) > 0 && n.level(lines[0], open) < 0 {
		line := lines[0]
		lines = lines[1:]
		header.WriteString(line)
		if strings.TrimRight(line, "\r\n") == "" {
			break
		}
	}
	h := header.String()
	if hasEightBit([]byte(h)) && utf8.ValidString(h) {
		n.found = true
	}
	return n.body(h, lines, open, depth)
}

func (n *naive) body(h string, lines, open []string, depth int) []string {
	kind, parameters, err := mime.ParseMediaType(partField([]byte(h), contentType))
	if err != nil || depth >= maxPartDepth {
		kind = ""
	}
	encoding := strings.ToLower(strings.TrimSpace(partField([]byte(h), transferEncoding)))
	ended := strings.HasSuffix(h, "\r\n\r\n") || strings.TrimRight(h, "\r\n") == "" || strings.HasSuffix(h, "\n\n") || strings.HasSuffix(h, "\n\r\n")
	b := parameters["boundary"]
	switch {
	case !ended:
	case strings.HasPrefix(kind, multipartPrefix) && b != "" && len(b) <= maxBoundaryBytes:
		inner := append(open[:len(open):len(open)], b)
		lines = n.skip(lines, inner)
		for len(lines) > 0 && n.level(lines[0], inner) == len(open) && !n.closing(lines[0], b) {
			lines = n.entity(lines[1:], inner, depth+1)
		}
		if len(lines) > 0 && n.level(lines[0], inner) == len(open) {
			lines = lines[1:] // the last delimiter; the rest is nobody's
		}
	case kind == embeddedMessage || kind == embeddedMessageUTF8:
		if encoding == "" || encoding == "7bit" || encoding == "8bit" || encoding == "binary" {
			return n.entity(lines, open, depth+1)
		}
	}
	return n.skip(lines, open)
}

func (n *naive) skip(lines, open []string) []string {
	for len(lines) > 0 && n.level(lines[0], open) < 0 {
		lines = lines[1:]
	}
	return lines
}

// level is the place of the multipart whose delimiter the line is, -1 if none.
func (n *naive) level(line string, open []string) int {
	text, ok := strings.CutPrefix(strings.TrimRight(line, " \t\r\n"), "--")
	for i := len(open) - 1; ok && i >= 0; i-- {
		if text == open[i] || text == open[i]+"--" {
			return i
		}
	}
	return -1
}

func (n *naive) closing(line, boundary string) bool {
	return strings.TrimRight(line, " \t\r\n") == "--"+boundary+"--"
}

func FuzzPartScan(f *testing.F) {
	f.Add(mixed+part+text+part+name+end, 3)
	f.Add(mixed+part+"Content-Type: multipart/x; boundary=in\r\n\r\n--in\r\nX: é\r\n\r\n--in--\r\n"+end, 1)
	f.Add(mixed+part+"Content-Type: message/rfc822\r\n\r\n"+mixed+part+name+end, 5)
	f.Add(mixed+part+"Content-Type: message/global", 5)
	f.Fuzz(func(t *testing.T, message string, piece int) {
		got := scanned(message, max(1, piece))
		if whole := scanned(message, len(message)+1); got != whole {
			t.Fatalf("in pieces of %d %v, whole %v", piece, got, whole)
		}
		at := headerEnd([]byte(message), 0)
		if at == 0 || len(message) > maxPartHeaderBytes/2 {
			return
		}
		for line := range strings.Lines(message) {
			if len(line) > maxDelimiterBytes {
				return // the naive reading has no bound
			}
		}
		var n naive
		n.body(message[:at], strings.SplitAfter(message[at:], "\n"), nil, 0)
		if n.found != got {
			t.Fatalf("%v, and naively %v", got, n.found)
		}
	})
}

func BenchmarkPartScan(b *testing.B) {
	line := strings.Repeat("QUJD", 19) + "\r\n"
	body := []byte(part + "Content-Type: application/pdf\r\nContent-Transfer-Encoding: base64\r\n\r\n" + strings.Repeat(line, 1<<20/len(line)) + end)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	var s partScan
	for b.Loop() {
		s.begin([]byte(mixed))
		s.write(body)
		s.finish()
	}
}

// What parts say in UTF-8 makes the message need SMTPUTF8, if the client knows of
// that. Of another client it is 8-bit mail as it always was; nothing is changed
// either way.
func TestSMTPUTF8OfParts(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	message := "From: joe@acme.example\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <1@acme.example>\r\nMIME-Version: 1.0\r\n" +
		"Content-Type: multipart/mixed; boundary=\"=_b\"\r\n\r\n" + part + text + part + name + end
	for _, tt := range []struct {
		what, params, message string
		needs, eightBit       bool
	}{
		{"a client that knows", " SMTPUTF8 BODY=8BITMIME", message, true, true},
		{"a client that does not", " BODY=8BITMIME", message, false, true},
		{"a client of old", "", message, false, true},
		{"not UTF-8", " SMTPUTF8", strings.ReplaceAll(message, "name=\"Grü", "name=\"Gr\xfc"), false, true},
		{"8-bit text alone", " SMTPUTF8", strings.ReplaceAll(message, "name=\"Grüße", "name=\"Gruesse"), false, true},
		{"all of it ASCII", " SMTPUTF8", strings.NewReplacer("ü", "ue", "ß", "ss").Replace(message), false, false},
	} {
		p.do("MAIL FROM:<bounce@acme.example>"+tt.params, "250")
		p.do("RCPT TO:<ann@example.net>", "250")
		p.do("DATA", "354")
		p.send(tt.message + ".\r\n")
		p.expect("250")
		got := w.spool.last(t)
		if got.env.SMTPUTF8 != tt.needs || got.env.EightBit != tt.eightBit {
			t.Errorf("%s: needs SMTPUTF8 %v, 8-bit %v", tt.what, got.env.SMTPUTF8, got.env.EightBit)
		}
		if !strings.HasSuffix(got.text, tt.message) {
			t.Errorf("%s: it is stored as %q", tt.what, got.text)
		}
	}
}
