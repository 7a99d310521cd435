package delivery

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/relais-mta/relais/relay"
)

// scripted is a connection that yields given bytes, a few at a time.
type scripted struct {
	inline
	left []byte
	step int
}

func (c *scripted) Read(b []byte) (int, error) {
	if len(c.left) == 0 {
		return 0, io.EOF
	}
	n := min(len(b), len(c.left), max(c.step, 1))
	copy(b, c.left[:n])
	c.left = c.left[n:]
	return n, nil
}

func readReply(in string, step int) (relay.Reply, *replyReader, error) {
	r := &replyReader{conn: &scripted{left: []byte(in), step: step}}
	got, err := r.read(time.Minute)
	return got.keep(), r, err
}

func TestReadReply(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want relay.Reply
		err  error
	}{
		{"250 ok\r\n", relay.Reply{Code: 250, Text: "ok"}, nil},
		{"250\r\n", relay.Reply{Code: 250}, nil},
		{"250 \r\n", relay.Reply{Code: 250}, nil},
		{"250-one\r\n250-two\r\n250 three\r\n", relay.Reply{Code: 250, Text: "one two three"}, nil},
		{"250-one\r\n250\r\n", relay.Reply{Code: 250, Text: "one"}, nil},
		{"550-5.7.1 one\r\n550 5.7.1 two\r\n", relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "one two"}, nil},
		{"550-one\r\n550 5.7.1 two\r\n", relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "one two"}, nil},
		{"550-5.7.1 one\r\n550 5.7.2 two\r\n", relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "one 5.7.2 two"}, nil},
		{"550 host 91.195.1.10 says 5.1.1\r\n", relay.Reply{Code: 550, Text: "host 91.195.1.10 says 5.1.1"}, nil},
		{"554 30 sorry (554.30)\r\n", relay.Reply{Code: 554, Text: "30 sorry (554.30)"}, nil},
		{"450-x\r\n451 y\r\n", relay.Reply{Code: 451, Text: "x y"}, nil},
		{"550 caf\xc3\xa9 \xff\x00\x07\r\n", relay.Reply{Code: 550, Text: "caf\u00e9 ?  "}, nil},
		{"250 ok", relay.Reply{}, io.EOF},
		{"", relay.Reply{}, io.EOF},
		{"25\r\n", relay.Reply{}, errNotReply},
		{"2500 ok\r\n", relay.Reply{}, errNotReply},
		{"199 no\r\n", relay.Reply{}, errNotReply},
		{"600 no\r\n", relay.Reply{}, errNotReply},
		{"\r\n", relay.Reply{}, errNotReply},
		{" 250 ok\r\n", relay.Reply{}, errNotReply},
		{"250:ok\r\n", relay.Reply{}, errNotReply},
		{"250-ok\r\n550 no\r\n", relay.Reply{}, errMixedCodes},
		{"250 " + strings.Repeat("x", maxReplyLineBytes) + "\r\n", relay.Reply{}, errLineTooLong},
		{strings.Repeat("250-x\r\n", maxReplyLines) + "250 x\r\n", relay.Reply{}, errTooManyLines},
		{strings.Repeat("250-"+strings.Repeat("x", 1000)+"\r\n", 70) + "250 x\r\n", relay.Reply{}, errTooManyLines},
	} {
		for _, step := range []int{1, 3, 1 << 20} {
			got, _, err := readReply(tc.in, step)
			if !errors.Is(err, tc.err) || tc.err == nil && got != tc.want {
				t.Errorf("%.60q in steps of %d: %+v, %v, want %+v, %v", tc.in, step, got, err, tc.want, tc.err)
			}
		}
	}
}

func TestRepliesInOneSegment(t *testing.T) {
	r := &replyReader{conn: &scripted{left: []byte("250 a\r\n250-b\r\n250 c\r\n354 d\r\n"), step: 100}}
	for _, want := range []string{"a", "b c", "d"} {
		got, err := r.read(time.Minute)
		if err != nil || string(got.text) != want {
			t.Fatalf("%q, %v, want %q", got.text, err, want)
		}
	}
	if r.buffered() != 0 {
		t.Errorf("%d bytes are left", r.buffered())
	}
}

func FuzzReadReply(f *testing.F) {
	for _, s := range []string{"250 ok\r\n", "550-5.7.1 a\r\n550 5.7.1 b\r\n", "250-\r\n250 \r\n", "\xff\n", "250 " + strings.Repeat("\xc3\xa9", 600) + "\r\n"} {
		f.Add([]byte(s), 5)
	}
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		got, _, err := readReply(string(in), step)
		if len(got.Text) > relay.MaxReplyTextBytes || !utf8.ValidString(got.Text) || strings.ContainsAny(got.Text, "\r\n\x00") {
			t.Fatalf("%q is kept as %q", in, got.Text)
		}
		if err != nil {
			return
		}
		if got.Code < 200 || got.Code > 599 {
			t.Fatalf("%q has code %d", in, got.Code)
		}
		// What one read at a time yields, all at once yields too, and no byte
		// of the next reply is taken.
		whole, all, err := readReply(string(in), len(in))
		if err != nil || whole != got {
			t.Fatalf("%q: %+v in steps of %d, %+v (%v) at once", in, got, step, whole, err)
		}
		rest := append(bytes.Clone(all.buf[all.from:all.to]), all.conn.(*scripted).left...)
		if !bytes.HasSuffix(in, rest) || len(rest) == len(in) {
			t.Fatalf("%q: the rest is %q", in, rest)
		}
	})
}
