package dsn

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-message"
	"github.com/emersion/go-message/mail"
	"github.com/emersion/go-message/textproto"
	"pgregory.net/rapid"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var paris = time.FixedZone("", 3600)

// tb is what the helpers need of a *testing.T or *rapid.T.
type tb interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

func address(t tb, s string) mailaddr.Address {
	t.Helper()
	a, err := mailaddr.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func input(t tb) Input {
	t.Helper()
	var id ids.Message
	id[0], id[15] = 1, 2
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, paris)
	return Input{
		ID: id, Now: at, ReportingMTA: "out1.relais.example",
		From: address(t, "mailer-daemon@relais.example"), To: address(t, "shop@acme.example"),
		EnvelopeID: "order+2B42", Arrival: at.Add(-5 * time.Hour),
		Header: []byte("From: Shop <shop@acme.example>\r\nMessage-ID: <42@acme.example>\r\nSubject: Your order\r\n\r\n"),
		Body:   []byte("Thank you.\r\n"),
		Recipients: []Recipient{{
			Address: address(t, "nobody@example.net"), ORCPT: "rfc822;no+2Bbody@example.net", Action: Failed,
			Reply:     relay.Reply{Code: 550, Enhanced: "5.1.1", Text: "No such mailbox here, and this sentence is long enough to be folded at least once"},
			RemoteMTA: "mx.example.net", LastAttempt: at.Add(-time.Minute),
		}},
	}
}

// parsed is a report as an independent reader sees it.
type parsed struct {
	header     mail.Header
	text       string
	message    textproto.Header
	recipients []textproto.Header
	kind       string // of the returned part
	returned   []byte
}

func read(t tb, raw []byte) parsed {
	t.Helper()
	e, err := message.Read(bytes.NewReader(raw))
	if err != nil {
		t.Fatalf("%v in\n%s", err, raw)
	}
	kind, params, err := e.Header.ContentType()
	if err != nil || kind != "multipart/report" || params["report-type"] != "delivery-status" {
		t.Fatalf("content type %s %v, %v", kind, params, err)
	}
	p := parsed{header: mail.Header{Header: e.Header}}
	parts := e.MultipartReader()
	for i := 0; ; i++ {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
			if i != 3 {
				t.Fatalf("%d parts, want 3", i)
			}
			return p
		}
		if err != nil {
			t.Fatal(err)
		}
		kind, _, err := part.Header.ContentType()
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(part.Body)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 0:
			if kind != "text/plain" {
				t.Fatalf("part 0 is %s", kind)
			}
			p.text = string(body)
		case 1:
			if kind != "message/delivery-status" && kind != "message/global-delivery-status" {
				t.Fatalf("part 1 is %s", kind)
			}
			p.message, p.recipients = groups(t, body)
		case 2:
			p.kind, p.returned = kind, body
		}
	}
}

func groups(t tb, body []byte) (textproto.Header, []textproto.Header) {
	t.Helper()
	var all []textproto.Header
	for group := range strings.SplitSeq(strings.TrimRight(string(body), "\r\n"), "\r\n\r\n") {
		h, err := textproto.ReadHeader(bufio.NewReader(strings.NewReader(group + "\r\n\r\n")))
		if err != nil {
			t.Fatalf("%v in %q", err, group)
		}
		all = append(all, h)
	}
	return all[0], all[1:]
}

// wellFormed checks what every mail must keep to.
func wellFormed(t tb, raw []byte, sevenBit bool) {
	t.Helper()
	for line := range strings.SplitAfterSeq(string(raw), "\n") {
		if line == "" {
			continue
		}
		text, ok := strings.CutSuffix(line, "\r\n")
		if !ok || strings.ContainsAny(text, "\r\n\x00") {
			t.Fatalf("line %q has no plain CRLF end", line)
		}
		if len(text) > 998 {
			t.Fatalf("a line has %d octets", len(text))
		}
		for i := 0; i < len(text) && sevenBit; i++ {
			if text[i] > 0x7e {
				t.Fatalf("line %q is not 7-bit", text)
			}
		}
	}
}

func build(t tb, in Input) ([]byte, parsed) {
	t.Helper()
	raw, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	return raw, read(t, raw)
}

func TestFields(t *testing.T) {
	raw, p := build(t, input(t))
	wellFormed(t, raw, true)
	for name, want := range map[string]string{
		"Auto-Submitted": "auto-replied", "Mime-Version": "1.0", "To": "<shop@acme.example>",
		"From": "Mail delivery <mailer-daemon@relais.example>", "In-Reply-To": "<42@acme.example>",
		"Date": "Wed, 04 Mar 2026 05:06:07 +0100", "Subject": "Undelivered: your message could not be delivered",
	} {
		if got := p.header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if id, err := p.header.MessageID(); err != nil || id != input(t).ID.String()+"@out1.relais.example" {
		t.Errorf("Message-ID %q, %v", id, err)
	}
	for name, want := range map[string]string{
		"Original-Envelope-Id": "order+42", "Reporting-Mta": "dns; out1.relais.example", "Arrival-Date": "Wed, 04 Mar 2026 00:06:07 +0100",
	} {
		if got := p.message.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if len(p.recipients) != 1 {
		t.Fatalf("%d recipients", len(p.recipients))
	}
	for name, want := range map[string]string{
		"Original-Recipient": "rfc822; no+body@example.net", "Final-Recipient": "rfc822; nobody@example.net", "Action": "failed",
		"Status": "5.1.1", "Remote-Mta": "dns; mx.example.net", "Last-Attempt-Date": "Wed, 04 Mar 2026 05:05:07 +0100", "Will-Retry-Until": "",
		"Diagnostic-Code": "smtp; 550 5.1.1 No such mailbox here, and this sentence is long enough to be folded at least once",
	} {
		if got := p.recipients[0].Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if p.kind != "text/rfc822-headers" || string(p.returned) != "From: Shop <shop@acme.example>\r\nMessage-ID: <42@acme.example>\r\nSubject: Your order\r\n" {
		t.Errorf("returned %s %q", p.kind, p.returned)
	}
	for _, want := range []string{"<nobody@example.net>", "mx.example.net answered: 550 5.1.1 No such mailbox", "will not be tried again"} {
		if !strings.Contains(strings.Join(strings.Fields(p.text), " "), want) {
			t.Errorf("the text lacks %q:\n%s", want, p.text)
		}
	}
}

func TestGolden(t *testing.T) {
	late := input(t)
	late.EnvelopeID, late.ReturnFull = "", true
	late.Recipients[0] = Recipient{
		Address: address(t, "slow@example.net"), Action: Delayed, Reply: relay.Reply{Text: "no host of example.net answered"},
		LastAttempt: late.Now.Add(-time.Minute), WillRetryUntil: late.Now.Add(96 * time.Hour),
	}
	for name, in := range map[string]Input{"failed": input(t), "delayed": late} {
		got, _ := build(t, in)
		file := filepath.Join("testdata", name+".eml")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs; if that is wanted run go test -update\n%s", file, got)
		}
	}
}

func TestDelayedAndMixed(t *testing.T) {
	in := input(t)
	in.Recipients[0].Action, in.Recipients[0].Reply = Delayed, relay.Reply{Code: 451, Text: "later"}
	in.Recipients[0].WillRetryUntil = in.Now.Add(time.Hour)
	_, p := build(t, in)
	if s := p.header.Get("Subject"); !strings.HasPrefix(s, "Delayed:") {
		t.Errorf("subject %q", s)
	}
	r := p.recipients[0]
	if r.Get("Action") != "delayed" || r.Get("Status") != "4.0.0" || r.Get("Will-Retry-Until") != "Wed, 04 Mar 2026 06:06:07 +0100" {
		t.Errorf("%+v", r.Map())
	}
	in.Recipients = append(in.Recipients, input(t).Recipients...)
	_, p = build(t, in)
	if s := p.header.Get("Subject"); !strings.HasPrefix(s, "Undelivered:") || len(p.recipients) != 2 {
		t.Errorf("mixed: subject %q, %d recipients", s, len(p.recipients))
	}
	if !strings.Contains(p.text, "is being tried again") || !strings.Contains(p.text, "will not be tried again") {
		t.Errorf("mixed text:\n%s", p.text)
	}
}

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		given, enhanced string
		code            uint16
		action          Action
		want            string
	}{
		{"", "5.1.1", 550, Failed, "5.1.1"}, {"4.4.7", "5.1.1", 550, Failed, "4.4.7"}, {"", "", 550, Failed, "5.0.0"},
		{"", "", 451, Failed, "4.0.0"}, {"", "", 0, Delayed, "4.0.0"}, {"", "", 0, Failed, "5.0.0"},
		{"", "2.0.0", 550, Failed, "5.0.0"}, {"", "5.1", 550, Failed, "5.0.0"}, {"", "5.1.1111", 550, Failed, "5.0.0"},
	} {
		r := Recipient{Status: tc.given, Action: tc.action, Reply: relay.Reply{Code: tc.code, Enhanced: tc.enhanced}}
		if got := r.status(); got != tc.want {
			t.Errorf("%+v: %s, want %s", tc, got, tc.want)
		}
	}
}

func TestReturnedPart(t *testing.T) {
	long := "X-Long: " + strings.Repeat("x", 2000)
	for _, tc := range []struct {
		name           string
		header, body   string
		full           bool
		kind, want     string
		sevenBit, told bool // told: the text says that the whole message is missing
	}{
		{"header only", "A: b\r\n\r\n", "text\r\n", false, "text/rfc822-headers", "A: b\r\n", true, false},
		{"whole message", "A: b\r\n\r\n", "text\r\n", true, "message/rfc822", "A: b\r\n\r\ntext\r\n", true, false},
		{"whole message of 8 bits", "A: b\r\n\r\n", "café\r\n", true, "message/rfc822", "A: b\r\n\r\ncafé\r\n", false, false},
		{"too large", "A: b\r\n\r\n", strings.Repeat("0123456789\r\n", MaxReturnedBytes/12+1), true, "text/rfc822-headers", "A: b\r\n", true, true},
		{"a line too long to return", "A: b\r\n\r\n", strings.Repeat("x", 1200) + "\r\n", true, "text/rfc822-headers", "A: b\r\n", true, true},
		{"header of 8 bits", "A: café\r\n\r\n", "", false, "text/rfc822-headers", "A: café\r\n", true, false},
		{"header with a long line", long + "\r\n\r\n", "", false, "text/rfc822-headers", long + "\r\n", true, false},
		{"other line ends", "A: b\nC: d\n\n", "x\ry\n", true, "message/rfc822", "A: b\r\nC: d\r\n\r\nx\r\ny\r\n", true, false},
		{"no header", "", "", false, "text/rfc822-headers", "", true, false},
		{"huge header", strings.Repeat("A: b\r\n c\r\n", 10_000) + "\r\n", "", false, "text/rfc822-headers", strings.Repeat("A: b\r\n c\r\n", 65536/10), true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := input(t)
			in.Header, in.Body, in.ReturnFull = []byte(tc.header), []byte(tc.body), tc.full
			raw, p := build(t, in)
			wellFormed(t, raw, tc.sevenBit)
			if got := string(p.returned); p.kind != tc.kind || strings.TrimSuffix(got, "\r\n") != strings.TrimSuffix(tc.want, "\r\n") {
				t.Errorf("%s with %d bytes %.80q, want %s with %d bytes %.80q", p.kind, len(got), got, tc.kind, len(tc.want), tc.want)
			}
			if told := strings.Contains(p.text, "it is not returned"); told != tc.told {
				t.Errorf("told %v:\n%s", told, p.text)
			}
		})
	}
}

func TestBoundaryIsNotInTheMessage(t *testing.T) {
	in := input(t)
	in.ReturnFull = true
	in.Body = []byte("--relais-" + in.ID.String() + "--\r\nrelais-0-" + in.ID.String() + "\r\n")
	_, p := build(t, in)
	if !bytes.HasSuffix(p.returned, in.Body) {
		t.Errorf("the message was cut: %q", p.returned)
	}
}

func TestRefuses(t *testing.T) {
	for _, tc := range []struct {
		field string
		spoil func(*Input)
	}{
		{"to", func(in *Input) { in.To = mailaddr.Address{} }},
		{"to", func(in *Input) { in.To.Local = "caf\xe9" }},
		{"from", func(in *Input) { in.From = mailaddr.Address{} }},
		{"reporting_mta", func(in *Input) { in.ReportingMTA = "a b" }},
		{"id", func(in *Input) { in.ID = ids.Message{} }},
		{"now", func(in *Input) { in.Now = time.Time{} }},
		{"recipients", func(in *Input) { in.Recipients = nil }},
		{"recipients[0].address", func(in *Input) { in.Recipients[0].Address.Local = "a\r\nAction: relayed" }},
		{"recipients[0].action", func(in *Input) { in.Recipients[0].Action = "expanded" }},
		{"recipients[0].status", func(in *Input) { in.Recipients[0].Status = "2.0.0" }},
	} {
		in := input(t)
		tc.spoil(&in)
		raw, err := Build(in)
		var f *fault.Error
		if raw != nil || !errors.As(err, &f) || f.Kind != fault.Invalid || f.Field != tc.field {
			t.Errorf("%s: %v", tc.field, err)
		}
	}
	in := input(t)
	in.Recipients = make([]Recipient, MaxRecipients+1)
	if _, err := Build(in); !fault.Is(err, fault.TooLarge) {
		t.Errorf("too many recipients: %v", err)
	}
}

// Whatever a remote server or a client said, the report stays well-formed and
// has exactly the fields it should.
func TestForeignTextForgesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := Input{
			ID: ids.Message{1}, Now: time.Unix(1_700_000_000, 0), ReportingMTA: "out.example.net",
			From: mailaddr.Address{Local: "a", Domain: "example.net"}, To: mailaddr.Address{Local: "b", Domain: "example.net"},
			EnvelopeID: rapid.String().Draw(t, "envid"), Header: []byte(rapid.String().Draw(t, "header")), Body: rapid.SliceOf(rapid.Byte()).Draw(t, "body"),
			ReturnFull: rapid.Bool().Draw(t, "full"),
		}
		n := rapid.IntRange(1, 3).Draw(t, "recipients")
		for i := range n {
			in.Recipients = append(in.Recipients, Recipient{
				Address: mailaddr.Address{Local: fmt.Sprint("r", i), Domain: "example.org"}, Action: Failed,
				ORCPT: rapid.String().Draw(t, "orcpt"), RemoteMTA: rapid.String().Draw(t, "mta"),
				Reply: relay.Reply{Code: rapid.SampledFrom([]uint16{0, 450, 550}).Draw(t, "code"), Enhanced: rapid.String().Draw(t, "enhanced"), Text: rapid.String().Draw(t, "text") + "\r\nAction: delivered\r\n\r\nStatus: 2.0.0"},
			})
		}
		raw, err := Build(in)
		if err != nil {
			t.Fatal(err)
		}
		wellFormed(t, raw, false)
		p := read(t, raw)
		if len(p.recipients) != n {
			t.Fatalf("%d groups of fields for %d recipients:\n%s", len(p.recipients), n, raw)
		}
		for _, r := range p.recipients {
			if len(r.Values("Action")) != 1 || r.Get("Action") != "failed" || len(r.Values("Status")) != 1 {
				t.Fatalf("forged: %v", r.Map())
			}
		}
	})
}
