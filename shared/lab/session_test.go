package lab

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

func TestPipelinedGroupIsAnsweredTogether(t *testing.T) {
	l := startLab(t, nil)
	c := dial(t, l.mxAddr(t, Google), "127.0.0.7").hello()
	c.send("MAIL FROM:<a@sender.test> SIZE=100 BODY=8BITMIME\r\nRCPT TO:<accept-1@gmail.test>\r\nRCPT TO:<nobody-1@gmail.test>\r\nRCPT TO:<x@elsewhere.test>\r\nDATA\r\n")
	c.want("250 ")
	c.want("250 ")
	c.want("550-5.1.1 ")
	c.want("550 5.7.1 ")
	c.want("354")
	// The next group may follow the final dot (RFC 2920 section 3.1).
	c.send(message("p1@x") + ".\r\nMAIL FROM:<>\r\nRCPT TO:<accept-2@gmail.test>\r\nDATA\r\n")
	c.want("250 ")
	c.want("250 ")
	c.want("250 ")
	c.want("354")
	c.send(message("p2@x") + ".\r\nQUIT\r\n")
	c.want("250 ")
	c.want("221 ")
	c.wantClosed()
	r := l.Report()
	if r.Accepted != 2 || r.Rejected != 2 || r.NullSender != 1 || len(r.ProtocolFaults) != 0 {
		t.Errorf("accepted %d, rejected %d, null sender %d, faults %v", r.Accepted, r.Rejected, r.NullSender, r.ProtocolFaults)
	}
}

func TestContentIsKeptExactly(t *testing.T) {
	l := startLab(t, nil)
	big := strings.Repeat("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\r\n", 8000)
	dotted := strings.ReplaceAll("\r\n"+big, "\r\n01", "\r\n...01")
	tests := []struct{ name, sent, kept string }{
		{"plain", "a: b\r\n\r\nhi\r\n", "a: b\r\n\r\nhi\r\n"},
		{"empty", "", ""},
		{"dots", "..\r\n...\r\n.a\r\nx.\r\n", ".\r\n..\r\na\r\nx.\r\n"},
		{"a dot first", "..first\r\n", ".first\r\n"},
		{"dot lines at the end", "a\r\n..\r\n", "a\r\n.\r\n"},
		{"large", big, big},
		{"large with dots", dotted, strings.ReplaceAll(dotted, "...", "..")},
	}
	for _, tt := range tests {
		for _, pieces := range []int{1, 2, 7} {
			t.Run(fmt.Sprintf("%s in %d", tt.name, pieces), func(t *testing.T) {
				c := dial(t, l.mxAddr(t, SFR), "127.0.0.7").hello()
				c.send("MAIL FROM:<a@sender.test>\r\nRCPT TO:<accept-9@sfr.test>\r\nDATA\r\n")
				c.want("250")
				c.want("250")
				c.want("354")
				wire := tt.sent + ".\r\n"
				for i := range pieces {
					c.send(wire[len(wire)*i/pieces : len(wire)*(i+1)/pieces])
				}
				c.want("250")
				n := l.farm.providers[SFR].store.count()
				m, content, err := l.Mail(SFR, n-1)
				if err != nil || string(content) != tt.kept || m.Length != int64(len(tt.kept)) {
					t.Fatalf("%v: kept %d bytes, want %d: %.200q", err, len(content), len(tt.kept), content)
				}
			})
		}
	}
}

func FuzzUnstuff(f *testing.F) {
	f.Add([]byte("..\r\n.a\r\n\r\n...b"))
	f.Fuzz(func(t *testing.T, content []byte) {
		got := unstuff(append([]byte("\r\n"), content...))[2:]
		lines := bytes.SplitAfter(content, []byte("\r\n"))
		for i := range lines {
			lines[i] = bytes.TrimPrefix(lines[i], []byte("."))
		}
		if want := bytes.Join(lines, nil); !bytes.Equal(got, want) {
			t.Fatalf("unstuff(%q) = %q, want %q", content, got, want)
		}
	})
}

func TestSizeLimit(t *testing.T) {
	l := startLab(t, tuned(Apple, func(p *Profile) { p.MaxMessageSize = 20000 }))
	c := dial(t, l.mxAddr(t, Apple), "127.0.0.7").hello()
	c.do("MAIL FROM:<a@sender.test> SIZE=20001", "552 5.3.4")
	c.do("MAIL FROM:<a@sender.test>", "250")
	c.do("RCPT TO:<accept-1@me.test>", "250")
	c.do("DATA", "354")
	c.send(strings.Repeat("0123456789\r\n", 200000) + ".\r\n")
	c.want("552 5.3.4")
	c.do("NOOP", "250")
	if r := l.Report(); r.Accepted != 0 || r.Rejected != 2 {
		t.Errorf("accepted %d, rejected %d", r.Accepted, r.Rejected)
	}
}

func TestProtocolFaultsAreNoted(t *testing.T) {
	l := startLab(t, nil)
	addr := l.mxAddr(t, Yahoo)
	open := func() *talk { return dial(t, addr, "127.0.0.7") }
	begin := func(c *talk) {
		c.do("MAIL FROM:<a@sender.test>", "250")
		c.do("RCPT TO:<accept-1@yahoo.test>", "250")
	}
	tests := []struct {
		kind string
		do   func(c *talk)
	}{
		{"MAIL before EHLO", func(c *talk) { c.want("220"); c.do("MAIL FROM:<a@b.test>", "503") }},
		{"command ended by a bare LF", func(c *talk) { c.want("220"); c.send("EHLO x\n"); c.want("250") }},
		{"bare CR or LF in content", func(c *talk) { c.hello(); begin(c); c.do("DATA", "354"); c.do("a\nb\r\n.", "250") }},
		{"NUL in content", func(c *talk) { c.hello(); begin(c); c.do("DATA", "354"); c.do("a\x00b\r\n.", "250") }},
		{"line too long in content", func(c *talk) {
			c.hello()
			begin(c)
			c.do("DATA", "354")
			c.do(strings.Repeat("x", 999)+"\r\n.", "250")
		}},
		{"8-bit content without BODY=8BITMIME", func(c *talk) { c.hello(); begin(c); c.do("DATA", "354"); c.do("é\r\n.", "250") }},
		{"sent content before 354", func(c *talk) { c.hello(); begin(c); c.send("DATA\r\nearly\r\n.\r\n"); c.want("354"); c.want("250") }},
		{"unannounced parameter of RCPT", func(c *talk) {
			c.hello()
			c.do("MAIL FROM:<a@b.test>", "250")
			c.do("RCPT TO:<accept-1@yahoo.test> NOTIFY=NEVER", "555")
		}},
		{"unannounced parameter of MAIL", func(c *talk) { c.hello(); c.do("MAIL FROM:<a@b.test> RET=HDRS", "555") }},
		{"malformed MAIL", func(c *talk) { c.hello(); c.do("MAIL FROM:a@b.test", "501") }},
		{"malformed RCPT", func(c *talk) { c.hello(); c.do("MAIL FROM:<>", "250"); c.do("RCPT TO:<nowhere>", "501") }},
		{"MAIL inside a transaction", func(c *talk) { c.hello(); begin(c); c.do("MAIL FROM:<a@b.test>", "503") }},
		{"unknown command", func(c *talk) { c.hello(); c.do("BDAT 10", "500") }},
		{"command line too long", func(c *talk) { c.want("220"); c.send(strings.Repeat("x", 70000)); c.want("500") }},
		{"pipelined after STARTTLS", func(c *talk) { c.hello(); c.send("STARTTLS\r\nMAIL FROM:<evil@b.test>\r\n"); c.want("220") }},
	}
	for _, tt := range tests {
		t.Run(tt.kind, func(t *testing.T) {
			c := open()
			c.t = t
			tt.do(c)
			for _, f := range l.Report().ProtocolFaults {
				if f.Kind == tt.kind && f.Provider == Yahoo && f.Source.String() == "127.0.0.7" {
					return
				}
			}
			t.Errorf("not noted: %v", l.Report().ProtocolFaults)
		})
	}
}

func TestLineOf998IsAllowed(t *testing.T) {
	l := startLab(t, nil)
	c := dial(t, l.mxAddr(t, Yahoo), "127.0.0.7").hello()
	if r := c.mail("a@sender.test", "accept-1@yahoo.test", strings.Repeat("x", 998)+"\r\n"); !strings.HasPrefix(r, "250") {
		t.Fatal(r)
	}
	if f := l.Report().ProtocolFaults; len(f) != 0 {
		t.Errorf("faults %v", f)
	}
}

func TestPath(t *testing.T) {
	tests := []struct {
		arg, address, params string
		ok                   bool
	}{
		{"<a@b.test>", "a@b.test", "", true},
		{" <a@b.test> SIZE=1 BODY=7BIT", "a@b.test", "SIZE=1 BODY=7BIT", true},
		{"<>", "", "", true},
		{`<"odd>name"@b.test> X`, `"odd>name"@b.test`, "X", true},
		{`<"odd\">"@b.test>`, `"odd\">"@b.test`, "", true},
		{"a@b.test", "", "", false},
		{"<a@b.test", "", "", false},
	}
	for _, tt := range tests {
		a, p, ok := path(tt.arg)
		if a != tt.address || p != tt.params || ok != tt.ok {
			t.Errorf("path(%q) = %q, %q, %v", tt.arg, a, p, ok)
		}
	}
}

func TestMessageIDOf(t *testing.T) {
	for content, want := range map[string]string{
		"Message-ID: <a@b>\r\n\r\n":                          "<a@b>",
		"X: y\r\nmessage-id:\r\n <folded@b>\r\nY: z\r\n\r\n": "<folded@b>",
		"X: y\r\n\r\nMessage-ID: <in-the-body@b>\r\n":        "",
		"X-Message-ID: <no@b>\r\n\r\n":                       "",
		"":                                                   "",
		"MESSAGE-ID: <end@b>":                                "<end@b>",
	} {
		if got := messageIDOf([]byte(content)); got != want {
			t.Errorf("%q: %q, want %q", content, got, want)
		}
	}
}
