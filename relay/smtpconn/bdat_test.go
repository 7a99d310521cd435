package smtpconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func bdat(chunk string, last bool) string {
	if last {
		return fmt.Sprintf("BDAT %d LAST\r\n%s", len(chunk), chunk)
	}
	return fmt.Sprintf("BDAT %d\r\n%s", len(chunk), chunk)
}

// TestBDAT has each dialogue sent at once after RCPT and all replies awaited.
func TestBDAT(t *testing.T) {
	const text = "Subject: x\r\n\r\n.\r\nbody\r\n"
	for _, tt := range []struct {
		name, body, send string
		replies          []string
		messages         []string
	}{
		{"one chunk", "", bdat(text, true), []string{"250"}, []string{text}},
		{"chunks cut anywhere", "", bdat(text[:11], false) + bdat(text[11:12], false) + bdat("", false) + bdat(text[12:], false) + bdat("", true), []string{"250 2.0.0 11 ", "250 2.0.0 12 ", "250 2.0.0 12 ", "250", "250"}, []string{text}},
		{"NOOP between", "", bdat(text, false) + "NOOP\r\n" + bdat("", true), []string{"250", "250", "250"}, []string{text}},
		{"no line end at the end", "", bdat("a: b\r\n\r\nbody", true), []string{"250"}, []string{"a: b\r\n\r\nbody\r\n"}},
		{"no octets", "", bdat("", true), []string{"250"}, []string{""}},
		{"lower case", "", strings.ToLower("BDAT 0 LAST\r\n"), []string{"250"}, []string{""}},
		{"RSET between", "", bdat(text, false) + "RSET\r\n" + bdat(text, true) + "NOOP\r\n", []string{"250", "250 2.0.0", "503 5.5.1", "250"}, nil},
		{"DATA between", "", bdat(text, false) + "DATA\r\nMAIL FROM:<>\r\nRCPT TO:<x@y.example>\r\nEHLO c\r\nSTARTTLS\r\n" + bdat("", true), []string{"250", "503", "503", "503", "503", "503", "250"}, []string{text}},
		{"QUIT between", "", bdat(text, false) + "QUIT\r\n", []string{"250", "221"}, nil},
		{"a chunk after LAST", "", bdat(text, true) + bdat("MAIL FROM:<>\r\n", true) + "NOOP\r\n", []string{"250", "503", "250"}, []string{text}},
		{"refused, more was pipelined", "", bdat("refuse", false) + bdat("RSET\r\n", true) + "NOOP\r\n", []string{"250", "550", "250"}, nil},
		{"bare LF", "", bdat("a: b\n\nx", true) + bdat("more", true) + "NOOP\r\n", []string{"554 5.6.0", "503", "250"}, nil},
		{"bare CR", "", bdat("a: b\rc\r\n", true) + "NOOP\r\n", []string{"554 5.6.0", "250"}, nil},
		{"CR, and LF in the next chunk", "", bdat("a: b\r", false) + bdat("\n", true), []string{"250", "250"}, []string{"a: b\r\n"}},
		{"CR, and X in the next chunk", "", bdat("a: b\r", false) + bdat("x", true), []string{"250", "554 5.6.0"}, nil},
		{"CR at the end", "", bdat("a: b\r", true), []string{"554 5.6.0"}, nil},
		{"NUL", "", bdat("a: b\x00\r\n", true), []string{"554 5.6.0"}, nil},
		{"long line over chunks", "", bdat(strings.Repeat("x", 600), false) + bdat(strings.Repeat("x", 600), true), []string{"250", "554 5.6.0"}, nil},
		{"smuggling", "", bdat("a: b\r\n.\nMAIL FROM:<x@y.example>\r\n", true) + "NOOP\r\n", []string{"554", "250"}, nil},
		{"too large at once", "", bdat(strings.Repeat("x\r\n", 40_000), true) + "NOOP\r\n", []string{"552 5.3.4", "250"}, nil},
		{"too large together", "", bdat(strings.Repeat("x\r\n", 30_000), false) + bdat(strings.Repeat("x\r\n", 10_000), false) + "NOOP\r\n", []string{"250", "552 5.3.4", "250"}, nil},
		{"chunk too large to discard", "", "BDAT 99999999999 LAST\r\n", nil, nil},
		{"no size", "", "BDAT\r\n", []string{"501 5.5.4"}, nil},
		{"bad size", "", "BDAT x LAST\r\n", []string{"501 5.5.4"}, nil},
		{"negative", "", "BDAT -1\r\n", []string{"501 5.5.4"}, nil},
		{"overflow", "", "BDAT 18446744073709551617\r\n", []string{"501 5.5.4"}, nil},
		{"not LAST", "", "BDAT 1 FIRST\r\nx", []string{"501 5.5.4"}, nil},
		{"bad size later", "", bdat(text, false) + "BDAT x\r\n", []string{"250", "501 5.5.4"}, nil},
		{"binary", "BODY=BINARYMIME", bdat("a: b\r\n\r\nx\ny\rz\x00\r", true), []string{"250"}, []string{"a: b\r\n\r\nx\ny\rz\x00\r"}},
		{"binary by DATA", "BODY=BINARYMIME", "DATA\r\n" + bdat("a: b\r\n", true), []string{"503", "250"}, []string{"a: b\r\n"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, backend, addr := start(t, OfferSTARTTLS, extended)
			p := dial(t, addr)
			p.do("EHLO c", "250-")
			p.do("MAIL FROM:<a@example.com> "+tt.body, "250")
			p.do("RCPT TO:<b@example.net>", "250")
			p.send(tt.send)
			for _, want := range tt.replies {
				p.expect(want)
			}
			if got := backend.got(); !slices.Equal(got, tt.messages) {
				t.Errorf("messages are %q, want %q", got, tt.messages)
			}
		})
	}
}

func TestBDATOutOfOrder(t *testing.T) {
	_, backend, addr := start(t, OfferSTARTTLS, extended)
	p := dial(t, addr)
	p.send(bdat("QUIT\r\n", true))
	p.expect("503 5.5.1")
	p.do("EHLO c", "250-")
	p.send(bdat("QUIT\r\n", true))
	p.expect("503 5.5.1")
	p.do("MAIL FROM:<>", "250")
	p.send(bdat("QUIT\r\n", false))
	p.expect("503 5.5.1")
	p.do("RCPT TO:<b@example.net>", "250")
	p.send(bdat("a: b\r\n", true))
	p.expect("250")
	p.do("MAIL FROM:<>", "250") // and by DATA in the same session
	p.do("RCPT TO:<b@example.net>", "250")
	p.do("DATA", "354")
	p.do("..\r\n.", "250")
	if got := backend.got(); !slices.Equal(got, []string{"a: b\r\n", ".\r\n"}) {
		t.Errorf("messages are %q", got)
	}
}

func TestBDATIsNotTakenWhereItIsNotOffered(t *testing.T) {
	_, _, addr := start(t, OfferSTARTTLS, nil)
	p := dial(t, addr)
	p.do("EHLO c", "250-")
	p.send(bdat("MAIL FROM:<>\r\n", true))
	p.expect("502 5.5.1")
	if rest, err := io.ReadAll(p.r); err != nil || len(rest) > 0 {
		t.Errorf("after the refusal came %q, %v", rest, err)
	}
}

// However a message is cut into chunks and reads, the session sees the octets of
// the chunks, if they are text or the client said BINARYMIME, and what follows
// the last chunk stays unread.
func FuzzBDAT(f *testing.F) {
	f.Add([]byte("a: b\r\n\r\nx\r\n"), 3, 2, false)
	f.Add([]byte("a\r\n.\r\nb"), 1, 1, false)
	f.Add([]byte("a\nb\r\x00"), 2, 5, true)
	m, err := newMetrics("fuzz", nil)
	if err != nil {
		f.Fatal(err)
	}
	server := &Server{cfg: Config{Name: "fuzz", Hostname: "mx.example", Logger: slog.New(slog.DiscardHandler)}, metrics: m}
	limits := testLimits()
	limits.MaxLineBytes, limits.MaxMessageBytes, limits.MaxCommandsPerSession = 1<<20, 1<<20, 1<<20
	f.Fuzz(func(t *testing.T, message []byte, chunk, step int, binary bool) {
		if len(message) > 10_000 {
			return
		}
		chunk = max(1, chunk)
		first, in := min(chunk, len(message)), []byte(nil)
		for at := first; at < len(message); at += chunk {
			piece := message[at:min(at+chunk, len(message))]
			in = append(append(in, fmt.Sprintf("BDAT %d\r\n", len(piece))...), piece...)
		}
		in = append(append(slices.Clone(message[:first]), in...), "BDAT 0 LAST\r\nNOOP\r\n"...)
		s := &script{in: in, step: max(step, 1)}
		c := newConn(server, s, OfferSTARTTLS, netip.Addr{}, limits)
		c.in, c.inMail, c.helo = make([]byte, inputBytes), true, "c"
		if binary {
			c.mailParams.Body = BodyBinary
		}
		c.mode, c.data = modeData, dataState{bdat: true, begun: true, lineStart: true}
		c.beginChunk(int64(first), false)
		var got []byte
		for err = nil; err == nil; {
			var run []byte
			run, err = c.Chunk()
			got = append(got, run...)
		}
		text := bytes.ReplaceAll(message, []byte("\r\n"), nil)
		isText := !bytes.ContainsAny(text, "\r\n\x00")
		if taken := errors.Is(err, io.EOF); taken != (binary || isText) {
			t.Fatalf("%q in chunks of %d is taken: %v (%v)", message, chunk, taken, err)
		} else if !taken {
			return
		}
		want := slices.Clone(message)
		ended := len(message) == 0 || bytes.HasSuffix(message, []byte("\r\n"))
		if !binary && !ended {
			want = append(want, "\r\n"...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%q in chunks of %d gives %q", message, chunk, got)
		}
		if c.Binary() != (binary && (!isText || !ended)) {
			t.Errorf("%q is binary: %v", message, c.Binary())
		}
		if left := string(c.in[c.r:c.w]) + string(s.in); left != "NOOP\r\n" {
			t.Errorf("%q is left", left)
		}
	})
}
