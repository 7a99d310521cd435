package dsn

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// several is a report about one recipient of each kind.
func several(t tb) Input {
	in := input(t)
	in.Recipients = append(in.Recipients,
		Recipient{Address: address(t, "slow@example.net"), Action: Delayed, Reply: relay.Reply{Code: 554, Enhanced: "5.7.1", Text: "not from this address"},
			RemoteMTA: "mx2.example.net", LastAttempt: in.Now.Add(-time.Hour), WillRetryUntil: in.Now.Add(time.Hour)},
		Recipient{Address: address(t, `"two  words"@example.org`), ORCPT: "rfc822;+22two+20+20words+22@example.org", Action: Relayed, Reply: relay.Reply{Code: 250, Enhanced: "2.6.0", Text: "queued as 4711"},
			RemoteMTA: "mx.example.org", LastAttempt: in.Now.Add(-2 * time.Minute)},
		Recipient{Address: address(t, "never@example.com"), Action: Failed, Status: "4.4.7", Reply: relay.Reply{Text: "no attempt was possible before the message expired"}})
	return in
}

// utf8Sender is a report that needs SMTPUTF8.
func utf8Sender(t tb) Input {
	in := several(t)
	in.To.Local = "boutique-été"
	in.Header = []byte("From: Boutique <boutique-été@acme.example>\r\nSubject: Été\r\n\r\n")
	in.Recipients[0].Address.Local = "personne-ñ"
	in.Recipients[0].ORCPT = `utf-8;personne-\x{F1}@example.net`
	in.Recipients[0].Reply.Text = "Boîte inconnue"
	return in
}

// utf8Recipient is a report to an ASCII sender about a UTF-8 address.
func utf8Recipient(t tb) Input {
	in := input(t)
	in.ReturnFull = true
	in.Header = []byte("From: Shop <shop@acme.example>\r\nTo: personne-ñ@example.net\r\nSubject: Été\r\n\r\n")
	in.Recipients[0].Address.Local = "personne-ñ"
	in.Recipients[0].ORCPT = "utf-8;personne-ñ@example.net"
	return in
}

func TestGoldenOfMoreKinds(t *testing.T) {
	relayed := several(t)
	relayed.Recipients = relayed.Recipients[2:3]
	for name, in := range map[string]Input{"several": several(t), "relayed": relayed, "utf8-sender": utf8Sender(t), "utf8-recipient": utf8Recipient(t)} {
		got, _ := build(t, in)
		wellFormed(t, got, !in.UTF8())
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

// fieldsAre compares every field of a group, so that neither a wrong nor a
// further one passes.
func fieldsAre(t *testing.T, where string, got map[string][]string, want map[string]string) {
	t.Helper()
	flat := make(map[string]string, len(got))
	for name, values := range got {
		flat[name] = strings.Join(values, " AND ")
	}
	if !reflect.DeepEqual(flat, want) {
		t.Errorf("%s\n got %q\nwant %q", where, flat, want)
	}
}

func TestEveryFieldOfEachAction(t *testing.T) {
	_, p := build(t, several(t))
	fieldsAre(t, "message", p.message.Map(), map[string]string{
		"Original-Envelope-Id": "order+42", "Reporting-Mta": "dns; out1.relais.example", "Arrival-Date": "Wed, 04 Mar 2026 00:06:07 +0100",
	})
	for i, want := range []map[string]string{
		{"Original-Recipient": "rfc822; no+body@example.net", "Final-Recipient": "rfc822; nobody@example.net", "Action": "failed", "Status": "5.1.1",
			"Remote-Mta": "dns; mx.example.net", "Last-Attempt-Date": "Wed, 04 Mar 2026 05:05:07 +0100",
			"Diagnostic-Code": "smtp; 550 5.1.1 No such mailbox here, and this sentence is long enough to be folded at least once"},
		{"Final-Recipient": "rfc822; slow@example.net", "Action": "delayed", "Status": "4.7.1", "Remote-Mta": "dns; mx2.example.net",
			"Diagnostic-Code": "smtp; 554 5.7.1 not from this address", "Last-Attempt-Date": "Wed, 04 Mar 2026 04:06:07 +0100", "Will-Retry-Until": "Wed, 04 Mar 2026 06:06:07 +0100"},
		{"Original-Recipient": `rfc822; "two  words"@example.org`, "Final-Recipient": `rfc822; "two  words"@example.org`, "Action": "relayed", "Status": "2.6.0",
			"Remote-Mta": "dns; mx.example.org", "Diagnostic-Code": "smtp; 250 2.6.0 queued as 4711", "Last-Attempt-Date": "Wed, 04 Mar 2026 05:04:07 +0100"},
		{"Final-Recipient": "rfc822; never@example.com", "Action": "failed", "Status": "4.4.7", "Diagnostic-Code": "x-relais; no attempt was possible before the message expired"},
	} {
		fieldsAre(t, want["Final-Recipient"], p.recipients[i].Map(), want)
	}
	for _, want := range []string{"handed over to the mail servers", "is being tried again", "will not be tried again"} {
		if !strings.Contains(strings.Join(strings.Fields(p.text), " "), want) {
			t.Errorf("the text lacks %q:\n%s", want, p.text)
		}
	}
}

func TestReportInUTF8(t *testing.T) {
	raw, p := build(t, utf8Sender(t))
	if !utf8.Valid(raw) || !bytes.Contains(raw, []byte("\r\nContent-Type: message/global-delivery-status\r\nContent-Transfer-Encoding: 8bit\r\n")) {
		t.Errorf("not a report of RFC 6533:\n%s", raw)
	}
	if to := p.header.Get("To"); to != "<boutique-été@acme.example>" {
		t.Errorf("To: %s", to)
	}
	r := p.recipients[0]
	for name, want := range map[string]string{
		"Original-Recipient": "utf-8; personne-ñ@example.net", "Final-Recipient": "utf-8; personne-ñ@example.net", "Diagnostic-Code": "smtp; 550 5.1.1 Boîte inconnue",
	} {
		if got := r.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if got := p.recipients[1].Get("Final-Recipient"); got != "rfc822; slow@example.net" {
		t.Errorf("an ASCII address as %q", got)
	}
	if p.kind != "message/global-headers" || !strings.Contains(string(p.returned), "Subject: Été") || !strings.Contains(p.text, "<personne-ñ@example.net>") {
		t.Errorf("returned %s %q, text\n%s", p.kind, p.returned, p.text)
	}
}

// A sender with an ASCII address may sit behind servers without SMTPUTF8.
func TestReportAboutUTF8ToASCII(t *testing.T) {
	raw, p := build(t, utf8Recipient(t))
	wellFormed(t, raw, true)
	r := p.recipients[0]
	for _, name := range []string{"Original-Recipient", "Final-Recipient"} {
		if got := r.Get(name); got != `utf-8; personne-\x{F1}@example.net` {
			t.Errorf("%s: %q", name, got)
		}
	}
	if p.kind != "message/global" || !strings.Contains(string(p.returned), "Subject: Été\r\n\r\nThank you.\r\n") {
		t.Errorf("returned %s %q", p.kind, p.returned)
	}
	if !strings.Contains(p.text, "<personne-ñ@example.net>") {
		t.Errorf("the text lacks the address:\n%s", p.text)
	}
}

func TestUTF8AddressForms(t *testing.T) {
	for _, tc := range []struct{ in, plain, escaped string }{
		{"a@b", "a@b", "a@b"},
		{`\x{E9}t\x{e9}@b`, "été@b", `\x{E9}t\x{E9}@b`},
		{"été@b", "été@b", `\x{E9}t\x{E9}@b`},
		{`\x{1F600}+=@b`, "😀+=@b", `\x{1F600}\x{2B}\x{3D}@b`},
		{`\x{2B}\x{5C}@b`, `+\@b`, `\x{2B}\x{5C}@b`},
		{`bad\x{D800}@b`, `bad\x{D800}@b`, `bad\x{5C}x{D800}@b`}, // no character
		{`bad\x{A}@b`, `bad\x{A}@b`, `bad\x{5C}x{A}@b`},          // would end the line
		{`bad\q@b`, `bad\q@b`, `bad\x{5C}q@b`},
		{`bad\x{}@b`, `bad\x{}@b`, `bad\x{5C}x{}@b`},
		{`bad\x{41`, `bad\x{41`, `bad\x{5C}x{41`},
	} {
		if got := (&writer{wide: true}).original("UTF-8", tc.in); got != tc.plain {
			t.Errorf("%s in UTF-8: %s, want %s", tc.in, got, tc.plain)
		}
		if got := (&writer{}).original("utf-8", tc.in); got != tc.escaped {
			t.Errorf("%s in ASCII: %s, want %s", tc.in, got, tc.escaped)
		}
	}
}

// pythonReader prints what Python's email package makes of a report.
const pythonReader = `
import email, email.policy, json, sys
out = []
for name in sys.argv[1:]:
    m = email.message_from_binary_file(open(name, "rb"), policy=email.policy.SMTP)
    parts = list(m.iter_parts())
    out.append({
        "defects": [repr(d) for p in m.walk() for d in p.defects],
        "type": m.get_content_type(), "report": m.get_param("report-type"), "to": m["To"].addresses[0].addr_spec, "auto": m["Auto-Submitted"],
        "date": m["Date"].datetime.isoformat(), "parts": [p.get_content_type() for p in parts],
        "text": parts[0].get_content(),
        "groups": [dict(g.items()) for g in parts[1].get_payload()],
        "returned": parts[2].get_payload(0).as_string() if parts[2].get_content_type() == "message/rfc822" else parts[2].get_payload(decode=True).decode(),
    })
json.dump(out, sys.stdout)
`

// TestPythonReadsReports has an independent parser read the golden files, field
// by field.
func TestPythonReadsReports(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"failed", "delayed", "several", "relayed"}
	args := []string{"-c", pythonReader}
	for _, name := range names {
		args = append(args, filepath.Join("testdata", name+".eml"))
	}
	var stderr bytes.Buffer
	cmd := exec.Command(python, args...)
	cmd.Stderr = &stderr
	printed, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	var seen []struct {
		Defects, Parts                               []string
		Type, Report, To, Auto, Date, Text, Returned string
		Groups                                       []map[string]string
	}
	if err := json.Unmarshal(printed, &seen); err != nil {
		t.Fatal(err)
	}
	for i, m := range seen {
		raw, err := os.ReadFile(filepath.Join("testdata", names[i]+".eml"))
		if err != nil {
			t.Fatal(err)
		}
		want := read(t, raw)
		if len(m.Defects) > 0 || m.Type != "multipart/report" || m.Report != "delivery-status" || m.To != "shop@acme.example" || m.Auto != "auto-replied" || m.Date != "2026-03-04T05:06:07+01:00" {
			t.Errorf("%s: %+v", names[i], m)
		}
		if kinds := []string{"text/plain", "message/delivery-status", want.kind}; !reflect.DeepEqual(m.Parts, kinds) {
			t.Errorf("%s: parts %q, want %q", names[i], m.Parts, kinds)
		}
		if len(m.Groups) != 1+len(want.recipients) {
			t.Fatalf("%s: %d groups, want %d", names[i], len(m.Groups), 1+len(want.recipients))
		}
		for j, group := range m.Groups {
			from := want.message
			if j > 0 {
				from = want.recipients[j-1]
			}
			if len(group) != from.Len() {
				t.Errorf("%s group %d: %q, want %q", names[i], j, group, from.Map())
			}
			for name, value := range group {
				if got := strings.Join(strings.Fields(value), " "); got != strings.Join(strings.Fields(from.Get(name)), " ") {
					t.Errorf("%s group %d %s: %q, want %q", names[i], j, name, got, from.Get(name))
				}
			}
		}
		if flat := func(s string) string { return strings.Join(strings.Fields(s), " ") }; flat(m.Returned) != flat(string(want.returned)) || flat(m.Text) != flat(want.text) {
			t.Errorf("%s: returned %q, text %q", names[i], m.Returned, m.Text)
		}
	}
}

func FuzzBuild(f *testing.F) {
	f.Add("a", "b", "rfc822;a+2Bb@c", "id+20x", "5.1.1", "no such user", "mx.example", []byte("A: b\r\n\r\n"), []byte("x"), uint16(550), byte(0))
	f.Add("é", "ñ", `utf-8;\x{F1}@c`, "+", "2.0.0", "ok\r\n\r\nAction: failed", "a\r\nb", []byte("S: é\n\n"), []byte("é\x00"), uint16(250), byte(7))
	f.Fuzz(func(t *testing.T, to, rcpt, orcpt, envID, enhanced, text, mx string, header, body []byte, code uint16, kind byte) {
		in := Input{
			ID: ids.Message{1}, Now: time.Unix(1_700_000_000, 0), ReportingMTA: "out.example.net",
			From: mailaddr.Address{Local: "a", Domain: "example.net"}, To: mailaddr.Address{Local: to, Domain: "example.net"},
			EnvelopeID: envID, Header: header, Body: body, ReturnFull: kind&4 != 0,
			Recipients: []Recipient{{
				Address: mailaddr.Address{Local: rcpt, Domain: "example.org"}, ORCPT: orcpt, Action: [...]Action{Failed, Delayed, Relayed, Failed}[kind&3],
				Reply: relay.Reply{Code: code, Enhanced: enhanced, Text: text}, RemoteMTA: mx,
			}},
		}
		raw, err := Build(in)
		if err != nil || len(to)+len(rcpt) > 500 { // longer than the parsers at the entrance let pass
			return
		}
		wellFormed(t, raw, false)
		p := read(t, raw)
		if len(p.recipients) != 1 || len(p.recipients[0].Values("Action")) != 1 || p.recipients[0].Get("Action") != string(in.Recipients[0].Action) {
			t.Fatalf("forged:\n%s", raw)
		}
		if s := p.recipients[0].Get("Status"); !isStatus(s, in.Recipients[0].Action) {
			t.Fatalf("status %q", s)
		}
	})
}

// A field folded thousands of times must not cost its square.
func TestFoldedHeaderIsReadOnce(t *testing.T) {
	in := input(t)
	in.Header = []byte("X-Long: a" + strings.Repeat("\r\n b", 1<<19) + "\r\nMessage-ID:\r\n <42@acme.example>\r\n\r\n")
	begun := time.Now()
	_, p := build(t, in)
	if took := time.Since(begun); took > time.Minute { // copied at each fold, the megabytes would be a terabyte
		t.Errorf("took %v", took)
	}
	if id := p.header.Get("In-Reply-To"); id != "<42@acme.example>" {
		t.Errorf("In-Reply-To %q", id)
	}
}
