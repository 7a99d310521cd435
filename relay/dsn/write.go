package dsn

import (
	"bytes"
	"fmt"
	"mime/quotedprintable"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// writer writes lines and fields with CRLF.
type writer struct {
	bytes.Buffer
	wide bool // UTF-8 is written as it is, in a report of RFC 6533
}

func (w *writer) line(s string) { w.WriteString(s + "\r\n") }

func (w *writer) open(boundary string) {
	w.line("")
	w.line("--" + boundary)
}

// field writes a header or status field, folded at spaces (RFC 5322 section
// 2.2.3). A word too long for any line is cut.
func (w *writer) field(name, value string) {
	column := len(name) + 1
	w.WriteString(name + ":")
	for i, word := range strings.Fields(value) {
		if i > 0 && column+1+len(word) > foldColumn {
			w.WriteString("\r\n")
			column = 0
		}
		word = cut(word, maxFieldBytes-column-1)
		w.WriteString(" " + word)
		column += 1 + len(word)
	}
	w.WriteString("\r\n")
}

// cut returns at most limit bytes of s, whole characters only.
func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}

func (w *writer) date(name string, at time.Time) {
	if !at.IsZero() {
		w.field(name, at.Format(dateForm))
	}
}

// header writes the report's own header section.
func (w *writer) header(in *Input, boundary, encoding string) {
	subject := "Relayed: your message was handed over"
	switch {
	case in.any(Failed) && in.allUnknown():
		subject = "Unconfirmed: it is not known whether your message was delivered"
	case in.any(Failed):
		subject = "Undelivered: your message could not be delivered"
	case in.any(Delayed):
		subject = "Delayed: your message has not been delivered yet"
	}
	w.line("From: Mail delivery <" + in.From.String() + ">")
	w.line("To: <" + in.To.String() + ">") // never folded: a quoted local part may hold spaces
	w.field("Subject", subject)
	w.date("Date", in.Now)
	w.field("Message-ID", "<"+in.ID.String()+"@"+strings.TrimSuffix(in.ReportingMTA, ".")+">")
	if id := messageID(in.Header); id != "" {
		w.field("In-Reply-To", id)
		w.field("References", id)
	}
	w.field("Auto-Submitted", "auto-replied") // RFC 3834 section 5
	w.field("MIME-Version", "1.0")
	w.field("Content-Type", "multipart/report; report-type=delivery-status; boundary=\""+boundary+"\"") // RFC 6522 section 3
	if encoding == "8bit" || w.wide {
		// RFC 2045 section 6.4: a multipart is as wide as its widest part.
		w.field("Content-Transfer-Encoding", "8bit")
	}
	w.line("")
}

// people writes the part for people: ASCII if it can be. UTF-8 in a report that
// may have to pass servers without 8BITMIME is encoded.
func (w *writer) people(in *Input, part returnedPart) {
	text := writer{wide: w.wide}
	for i := range in.Recipients {
		text.wide = text.wide || !printable(in.Recipients[i].Address.Local)
	}
	text.text(in, part)
	body := text.Bytes()
	switch wide, _ := widths(body); {
	case !wide:
		w.field("Content-Type", "text/plain; charset=us-ascii")
	case w.wide:
		w.field("Content-Type", "text/plain; charset=utf-8")
		w.field("Content-Transfer-Encoding", "8bit")
	default:
		w.field("Content-Type", "text/plain; charset=utf-8")
		w.field("Content-Transfer-Encoding", "quoted-printable")
		body = quotedPrintable(body)
	}
	w.line("")
	w.Write(body)
}

// text writes the part for people.
func (w *writer) text(in *Input, part returnedPart) {
	w.paragraph("", "This is the mail system at "+in.ReportingMTA+".")
	w.line("")
	when := ""
	if !in.Arrival.IsZero() {
		when = ", accepted on " + in.Arrival.Format(dateForm) + ","
	}
	for _, group := range [...]struct {
		action  Action
		unknown bool
		intro   string
	}{
		{Failed, false, "Your message" + when + " could not be delivered to the recipients below. It will not be tried again for them; send it anew once the cause is mended."},
		{Failed, true, "Your message" + when + " was sent to the recipients below, but the answer was lost, each time. It may have been delivered or not, and will not be sent to them again; ask them before you send it anew."},
		{Delayed, false, "Your message" + when + " has not been delivered to the recipients below yet. It is being tried again; there is no need to send it anew."},
		{Relayed, false, "Your message" + when + " was handed over to the mail servers of the recipients below. They were not asked to confirm that it reached the mailbox, so this is the last notice of success."},
	} {
		intro := group.intro
		for i := range in.Recipients {
			r := &in.Recipients[i]
			if r.Action != group.action || r.Unknown != group.unknown {
				continue
			}
			if intro != "" {
				w.paragraph("", intro)
				w.line("")
				intro = ""
			}
			w.recipient(r)
		}
	}
	w.paragraph("", part.told)
}

func (w *writer) recipient(r *Recipient) {
	w.line("  <" + r.Address.String() + ">")
	switch {
	case r.Reply.Code > 0 && r.RemoteMTA != "":
		w.paragraph("    ", clean(r.RemoteMTA, 255, false)+" answered: "+r.diagnostic(maxShownReply, w.wide))
	case r.Reply.Text != "":
		w.paragraph("    ", r.diagnostic(maxShownReply, w.wide))
	}
	if r.Action == Delayed && !r.WillRetryUntil.IsZero() {
		w.paragraph("    ", "It is tried until "+r.WillRetryUntil.Format(dateForm)+".")
	}
	w.line("")
}

// paragraph writes text wrapped at foldColumn.
func (w *writer) paragraph(indent, text string) {
	column := 0
	for _, word := range strings.Fields(text) {
		word = cut(word, maxFieldBytes-len(indent))
		switch {
		case column == 0:
			w.WriteString(indent)
			column = len(indent)
		case column+1+len(word) > foldColumn:
			w.WriteString("\r\n" + indent)
			column = len(indent)
		default:
			w.WriteByte(' ')
			column++
		}
		w.WriteString(word)
		column += len(word)
	}
	w.WriteString("\r\n")
}

// diagnostic returns code, enhanced code and text of the last answer.
func (r *Recipient) diagnostic(limit int, wide bool) string {
	var parts []string
	if r.Reply.Code > 0 {
		parts = append(parts, strconv.Itoa(int(r.Reply.Code)))
	}
	if r.Reply.Enhanced != "" && r.Reply.Code > 0 {
		parts = append(parts, clean(r.Reply.Enhanced, 20, false))
	}
	if text := clean(r.Reply.Text, limit, wide); text != "" {
		parts = append(parts, text)
	}
	return strings.Join(parts, " ")
}

// status writes the part for programs: fields of the message, then one group
// of fields for each recipient (RFC 3464 section 2.1).
func (w *writer) status(in *Input) {
	if in.EnvelopeID != "" {
		w.line("Original-Envelope-Id: " + clean(xtext(in.EnvelopeID), 900, w.wide)) // section 2.2.1
	}
	w.field("Reporting-MTA", "dns; "+in.ReportingMTA) // section 2.2.2
	w.date("Arrival-Date", in.Arrival)                // section 2.2.5
	for i := range in.Recipients {
		r := &in.Recipients[i]
		w.line("")
		if kind, text, ok := strings.Cut(r.ORCPT, ";"); ok && isAtom(kind) {
			w.line("Original-Recipient: " + kind + "; " + clean(w.original(kind, text), 900, w.wide)) // section 2.3.1
		}
		w.line("Final-Recipient: " + w.final(r.Address)) // section 2.3.2
		w.field("Action", string(r.Action))              // section 2.3.3
		w.field("Status", r.status())                    // section 2.3.4
		if r.RemoteMTA != "" {
			w.field("Remote-MTA", "dns; "+clean(r.RemoteMTA, 255, false)) // section 2.3.5
		}
		if d := r.diagnostic(1024, w.wide); d != "" { // section 2.3.6
			kind := "smtp"
			if r.Reply.Code == 0 {
				kind = "x-relais" // our own words: no SMTP server said them
			}
			w.field("Diagnostic-Code", kind+"; "+d)
		}
		w.date("Last-Attempt-Date", r.LastAttempt) // section 2.3.7
		if r.Action == Delayed {
			w.date("Will-Retry-Until", r.WillRetryUntil) // section 2.3.9
		}
	}
}

// isAtom checks an address type (RFC 3461 section 4.2).
func isAtom(s string) bool {
	return s != "" && len(s) <= 40 && printable(s) && !strings.ContainsAny(s, " ()<>@,;:\\\"/[]?=.")
}

// returnedPart is what goes back of the message.
type returnedPart struct {
	contentType string
	encoding    string // empty: 7bit
	told        string // what the text for people says of it
	body        []byte // ends with CRLF, or is empty
}

// returned makes the last part: the message if it was asked for and fits, else
// its header section (RFC 6522 section 4). Header sections with UTF-8 have media
// types of their own (RFC 6533 section 5), which may be encoded; others may not.
func returned(in *Input) returnedPart {
	if len(in.Header) == 0 {
		return returnedPart{contentType: "text/rfc822-headers", told: "The message itself cannot be read any more, so nothing of it is attached."}
	}
	wideHeader, _ := widths(in.Header)
	global := wideHeader && utf8.Valid(in.Header)
	if in.ReturnFull && len(in.Header)+len(in.Body) <= MaxReturnedBytes {
		body := append(bytes.Clone(in.Header), in.Body...)
		wide, unfit := widths(body)
		if !unfit {
			p := returnedPart{contentType: "message/rfc822", told: "The message is attached.", body: lines(body)}
			switch {
			case global && !in.UTF8():
				p.contentType, p.encoding, p.body = "message/global", "quoted-printable", quotedPrintable(p.body)
			case global:
				p.contentType, p.encoding = "message/global", "8bit"
			case wide:
				p.encoding = "8bit" // RFC 2046 section 5.2.1 allows no other for such a part
			}
			return p
		}
	}
	p := returnedPart{contentType: "text/rfc822-headers", told: "The header of the message is attached.", body: lines(clipHeader(in.Header))}
	if in.ReturnFull {
		p.told = fmt.Sprintf("The header of the message is attached; the message itself has over %d octets or too long lines, so it is not returned.", MaxReturnedBytes)
	}
	wide, unfit := widths(p.body)
	if in.UTF8() && global {
		p.contentType, p.encoding = "message/global-headers", "8bit"
		wide = false
	}
	if wide || unfit {
		p.encoding, p.body = "quoted-printable", quotedPrintable(p.body)
	}
	return p
}

// clipHeader cuts a long header section between two fields and ends it before
// the empty line.
func clipHeader(h []byte) []byte {
	for _, end := range []string{"\r\n\r\n", "\n\n"} {
		if i := bytes.Index(h, []byte(end)); i >= 0 {
			h = h[:i+len(end)/2]
		}
	}
	if len(h) <= maxReturnedHeader {
		return h
	}
	for i := maxReturnedHeader; i > 0; i-- {
		if h[i-1] == '\n' && h[i] != ' ' && h[i] != '\t' {
			return h[:i]
		}
	}
	return nil // a single field that large is not worth returning
}

// widths reports octets above 126, and what SMTP cannot carry at all: NUL and
// lines over 998 octets.
func widths(b []byte) (wide, unfit bool) {
	column := 0
	for _, c := range b {
		switch {
		case c == '\n':
			column = 0
			continue
		case c != '\r':
			column++
		}
		wide = wide || c > 0x7e
		unfit = unfit || c == 0 || column > maxFieldBytes
	}
	return wide, unfit
}

// lines returns b with every line end as CRLF and one at its end.
func lines(b []byte) []byte {
	out := make([]byte, 0, len(b)+len(b)/40+2)
	for len(b) > 0 {
		i := bytes.IndexAny(b, "\r\n")
		if i < 0 {
			return append(append(out, b...), '\r', '\n')
		}
		out = append(append(out, b[:i]...), '\r', '\n')
		if b[i] == '\r' && i+1 < len(b) && b[i+1] == '\n' {
			i++
		}
		b = b[i+1:]
	}
	return out
}

// messageID returns the Message-ID of a header section with its angle
// brackets, or "" if it has none that can be repeated safely.
func messageID(h []byte) string {
	for len(h) > 0 {
		line, rest, _ := bytes.Cut(h, []byte("\n"))
		for len(rest) > 0 && (rest[0] == ' ' || rest[0] == '\t') { // folded
			more, after, _ := bytes.Cut(rest, []byte("\n"))
			if rest = after; len(line) <= maxFieldBytes { // a longer one is no id
				line = append(bytes.Clone(line), more...)
			}
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			return ""
		}
		if strings.EqualFold(strings.TrimSpace(string(name)), "Message-ID") {
			id := strings.TrimSpace(strings.ReplaceAll(string(value), "\r", ""))
			const maxIDBytes = 250
			if len(id) > maxIDBytes || len(id) < 5 || !printable(id) || id[0] != '<' || id[len(id)-1] != '>' || strings.ContainsAny(id[1:len(id)-1], "<> ") {
				return ""
			}
			return id
		}
		h = rest
	}
	return ""
}

// quotedPrintable encodes text whose lines end with CRLF (RFC 2045 section 6.7).
func quotedPrintable(text []byte) []byte {
	var out bytes.Buffer
	w := quotedprintable.NewWriter(&out)
	_, _ = w.Write(text) // a bytes.Buffer takes everything
	_ = w.Close()
	return out.Bytes()
}
