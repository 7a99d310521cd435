package submission

import (
	"context"
	"io"
	"net/mail"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// stored returns an accepted message without our trace field.
func (a accepted) withoutTrace(t *testing.T) string {
	t.Helper()
	_, rest, ok := strings.Cut(a.text, " +0000\r\n")
	if !ok || !strings.HasPrefix(a.text, "Received: ") {
		t.Fatalf("no trace field at the top of %q", a.text)
	}
	return rest
}

func TestRewriting(t *testing.T) {
	w := newWorld(t, nil)
	const added = "From: a@acme.example\nDate: x\nMessage-ID: <1@x>\n"
	tests := []struct{ name, message, want string }{
		{"nothing to do", added + "\nbody\n", added + "\nbody\n"},
		{"Bcc goes", "Bcc: x@example.net,\n y@example.net\n" + added + "BCC : z@example.net\n\nbody\n", added + "\nbody\n"},
		{"Resent-Bcc and Return-Path go", "Return-Path: <x@example.net>\n" + added + "Resent-Bcc: z@example.net\n\n", added + "\n"},
		{"options go", "x-relais-tag: a\nX-Relais-Stream: bulk\n" + added + "X-RELAIS-Expire:\n 90s\n\nbody\n", added + "\nbody\n"},
		{"like-named fields stay", added + "X-Relaissance: 1\nX-Relais: 2\nBccs: 3\n\nbody\n", added + "X-Relaissance: 1\nX-Relais: 2\nBccs: 3\n\nbody\n"},
		{"no body", added, added + "\n"},
		{"empty body", added + "\n", added + "\n"},
		{"body like a header", added + "\nBcc: x\nX-Relais-Foo: 1\n\n", added + "\nBcc: x\nX-Relais-Foo: 1\n\n"},
		{"subdomain", "From: <a@news.acme.example>\nDate: x\nMessage-ID: <1@x>\n\n", "From: <a@news.acme.example>\nDate: x\nMessage-ID: <1@x>\n\n"},
		{"odd charset in the name", "From: =?x-unknown?q?J=F6?= <a@acme.example>\nDate: x\nMessage-ID: <1@x>\n\n", "From: =?x-unknown?q?J=F6?= <a@acme.example>\nDate: x\nMessage-ID: <1@x>\n\n"},
		{"several authors", "From: a@acme.example,\n\tb@acme.example\nSender: <a@acme.example>\nDate: x\nMessage-ID: <1@x>\n\n", "From: a@acme.example,\n\tb@acme.example\nSender: <a@acme.example>\nDate: x\nMessage-ID: <1@x>\n\n"},
		{"domain in capitals", "FROM: a@ACME.example\nDate: x\nMessage-ID: <1@x>\n\n", "FROM: a@ACME.example\nDate: x\nMessage-ID: <1@x>\n\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w.login(t).mail(tt.message, "250")
			if got, want := w.spool.last(t).withoutTrace(t), strings.ReplaceAll(tt.want, "\n", "\r\n"); got != want {
				t.Errorf("stored %q, want %q", got, want)
			}
		})
	}
}

func TestMissingFieldsAreAdded(t *testing.T) {
	w := newWorld(t, nil)
	w.login(t).mail("From: a@acme.example\n\nbody\n", "250")
	got := w.spool.last(t)
	m, err := mail.ReadMessage(strings.NewReader(got.text))
	if err != nil {
		t.Fatal(err)
	}
	date, err := m.Header.Date()
	if err != nil || got.env.AcceptedAt.Sub(date).Abs() > time.Second {
		t.Errorf("Date is %v, error %v; accepted at %v", date, err, got.env.AcceptedAt)
	}
	if want := "<" + got.env.ID.String() + "@acme.example>"; m.Header.Get("Message-ID") != want {
		t.Errorf("Message-ID is %q, want %q", m.Header.Get("Message-ID"), want)
	}
	if body, _ := io.ReadAll(m.Body); string(body) != "body\r\n" {
		t.Errorf("body is %q", body)
	}
	if got.headerBytes != int64(strings.Index(got.text, "\r\n\r\n")+4) {
		t.Errorf("header section of %d octets in %q", got.headerBytes, got.text)
	}
}

func TestFlags(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	p.mail("Subject: caf\xc3\xa9\n"+goodMessage, "250")
	if env := w.spool.last(t).env; !env.EightBit || env.ClientDKIM {
		t.Errorf("8 bits in the header: %+v", env)
	}
	p.mail("DKIM-Signature: v=1; a=rsa-sha256\n"+goodMessage+"caf\xc3\xa9\n", "250")
	if env := w.spool.last(t).env; !env.EightBit || !env.ClientDKIM {
		t.Errorf("8 bits in the body and a signature: %+v", env)
	}
}

func TestOptionsReachTheEnvelope(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	sendAt := time.Now().Add(48 * time.Hour).Truncate(time.Second).UTC()
	p.mail("X-Relais-Stream: bulk\nX-Relais-Tag: spring sale\nX-Relais-Send-At: "+sendAt.Format(time.RFC3339)+"\n"+goodMessage, "250")
	env := w.spool.last(t).env
	if env.Tag != "spring sale" || env.Stream != "bulk" || env.Kind != policy.Bulk || !env.NotBefore.Equal(sendAt) || env.ExpiresAt.Sub(sendAt) != 108*time.Hour {
		t.Errorf("stream %s, not before %v, expires %v", env.Stream, env.NotBefore, env.ExpiresAt)
	}
	if !strings.Contains(w.log.String(), `"tag":"spring sale"`) {
		t.Error("the log does not hold the tag")
	}
	p.mail("X-Relais-Expire: 90s\n"+goodMessage, "250")
	if env = w.spool.last(t).env; env.ExpiresAt.Sub(env.AcceptedAt) != 90*time.Second {
		t.Errorf("accepted %v, expires %v", env.AcceptedAt, env.ExpiresAt)
	}
	at := time.Now().Add(time.Hour).Truncate(time.Second)
	p.mail("X-Relais-Expire: "+at.Format(time.RFC3339)+"\n"+goodMessage, "250")
	if env = w.spool.last(t).env; !env.ExpiresAt.Equal(at) {
		t.Errorf("expires %v, want %v", env.ExpiresAt, at)
	}
}

func TestOptions(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	const byStream = 24 * time.Hour
	tests := []struct {
		name                string
		sendAt, expire      string
		wantStart, wantEnds time.Time // zero: refused
	}{
		{"none", "", "", now, now.Add(byStream)},
		{"past is now", "2026-03-04T05:00:00Z", "", now, now.Add(byStream)},
		{"later", "2026-03-05T00:00:00+01:00", "", now.Truncate(24 * time.Hour).Add(23 * time.Hour), now.Truncate(24 * time.Hour).Add(47 * time.Hour)},
		{"30 days", "2026-04-03T05:06:07Z", "1s", now.Add(maxAhead), now.Add(maxAhead + time.Second)},
		{"over 30 days", "2026-04-03T05:06:08Z", "", time.Time{}, time.Time{}},
		{"duration counts from sending", "2026-03-04T06:06:07Z", "2h", now.Add(time.Hour), now.Add(3 * time.Hour)},
		{"time", "", "2026-03-04T05:06:08Z", now, now.Add(time.Second)},
		{"time has passed", "", "2026-03-04T05:06:07Z", time.Time{}, time.Time{}},
		{"time before sending", "2026-03-04T07:00:00Z", "2026-03-04T06:00:00Z", time.Time{}, time.Time{}},
		{"too long", "", "31d", time.Time{}, time.Time{}},
		{"time too far", "", "2026-05-04T05:06:07Z", time.Time{}, time.Time{}},
		{"below a second", "", "500ms", time.Time{}, time.Time{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw := "From: a@acme.example\r\n"
			if tt.sendAt != "" {
				raw += "X-Relais-Send-At: " + tt.sendAt + "\r\n"
			}
			if tt.expire != "" {
				raw += "X-Relais-Expire: " + tt.expire + "\r\n"
			}
			fields, err := splitHeader(nil, []byte(raw+"\r\n"))
			if err != nil {
				t.Fatal(err)
			}
			h, err := inspect([]byte(raw+"\r\n"), fields, now)
			if err == nil {
				err = h.options.check(now)
			}
			if tt.wantStart.IsZero() {
				if !fault.Is(err, fault.Invalid) {
					t.Errorf("error %v, want invalid", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := h.options.start(now); !got.Equal(tt.wantStart) {
				t.Errorf("starts %v, want %v", got, tt.wantStart)
			}
			if got := h.options.expires(now, byStream); !got.Equal(tt.wantEnds) {
				t.Errorf("expires %v, want %v", got, tt.wantEnds)
			}
		})
	}
}

// Whatever header section comes, the fields found cover it without a gap, and
// what is taken out is gone from what a reader sees.
func FuzzHeader(f *testing.F) {
	f.Add("From: a@acme.example\nBcc: x\n y\nX-Relais-Tag: t\nSubject: z\n")
	f.Add("from:a@b\n\tc\nfrom :d\n")
	f.Add("X-Relais-Send-At: 2026-03-04T06:06:07Z\nFrom: <a@b.example>, c@d\nSender: e@f\n")
	f.Add(" x\n:\n")
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	f.Fuzz(func(t *testing.T, text string) {
		raw := []byte(strings.ReplaceAll(strings.NewReplacer("\r", "", "\x00", "").Replace(text), "\n", "\r\n") + "\r\n\r\n")
		raw = raw[:headerEnd(raw, 0)]
		fields, err := splitHeader(nil, raw)
		if err != nil {
			return
		}
		at := 0
		for _, fd := range fields {
			if fd.start != at || fd.end <= fd.colon || fd.colon <= fd.start {
				t.Fatalf("field %+v begins at %d, want %d", fd, fd.start, at)
			}
			at = fd.end
		}
		if at+2 != len(raw) {
			t.Fatalf("the fields cover %d of %d octets", at, len(raw))
		}
		h, err := inspect(raw, fields, now)
		if err != nil {
			return
		}
		var kept strings.Builder
		for _, fd := range fields {
			if !fd.drop {
				kept.Write(raw[fd.start:fd.end])
			}
		}
		kept.WriteString("\r\n")
		m, err := mail.ReadMessage(strings.NewReader(kept.String()))
		if err != nil {
			return // net/mail is stricter about continuation lines
		}
		if n := len(m.Header["From"]); n != 1 {
			t.Errorf("%d From fields in %q", n, kept.String())
		}
		for name := range m.Header {
			if lower := strings.ToLower(name); lower == "bcc" || strings.HasPrefix(lower, optionPrefix) {
				t.Errorf("%s was kept in %q", name, kept.String())
			}
		}
		if h.from == "" || len(h.domains) == 0 || h.domains[0] != h.from {
			t.Errorf("authors' domains are %q, the first %q", h.domains, h.from)
		}
		if starts, ends := h.options.start(now), h.options.expires(now, time.Hour); !ends.After(starts) || starts.Before(now) {
			t.Errorf("starts %v, expires %v", starts, ends)
		}
	})
}

// discardSpool takes messages and keeps nothing.
type discardSpool struct{}

type discardBody struct{}

func (discardSpool) Admit(int64) error                                   { return nil }
func (discardSpool) NewBody() Body                                       { return discardBody{} }
func (discardSpool) Accept(context.Context, *relay.Envelope, Body) error { return nil }
func (discardBody) Write(p []byte) (int, error)                          { return len(p), nil }
func (discardBody) Seal(int64, [32]byte) error                           { return nil }
func (discardBody) Discard()                                             {}

// BenchmarkAccept measures one message of 10 KB over one pipelined TLS session,
// the client's side included.
func BenchmarkAccept(b *testing.B) {
	w := newWorld(b, func(v *policy.View) {
		v.Document.Submission.MaxMessagesPerSession = 10_000_000
		v.Document.Submission.MaxCommandsPerSession = 10_000_000
	})
	w.server.opt.Spool = discardSpool{}
	p := w.login(b)
	line := strings.Repeat("Some words of text ", 3) + "\r\n"
	message := strings.ReplaceAll(goodMessage, "\n", "\r\n") + strings.Repeat(line, 10<<10/len(line))
	b.SetBytes(int64(len(message)))
	b.ReportAllocs()
	for b.Loop() {
		p.send("MAIL FROM:<a@acme.example>\r\nRCPT TO:<ann@example.net>\r\nDATA\r\n")
		p.expect("250")
		p.expect("250")
		p.expect("354")
		p.send(message + ".\r\n")
		p.expect("250")
	}
}

func BenchmarkInspect(b *testing.B) {
	raw := []byte(strings.ReplaceAll(goodMessage, "\n", "\r\n"))
	raw = raw[:headerEnd(raw, 0)]
	now := ids.NewMessage(time.Now()).Time()
	var fields []field
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if fields, err = splitHeader(fields[:0], raw); err != nil {
			b.Fatal(err)
		}
		if _, err = inspect(raw, fields, now); err != nil {
			b.Fatal(err)
		}
	}
}
