package delivery

import (
	"bytes"
	"net/textproto"
	"testing"

	"bufio"
	"io"
)

// send runs a message through the stuffer in the given pieces.
func stuffed(message []byte, cuts ...int) ([]byte, error) {
	var st stuffer
	st.start()
	var out []byte
	var err error
	for _, cut := range append(cuts, len(message)) {
		cut = min(max(cut, 0), len(message))
		if out, err = st.append(out, message[:cut]); err != nil {
			return nil, err
		}
		message = message[cut:]
	}
	return st.finish(out)
}

func TestStuffer(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", ".\r\n"},
		{"a\r\n", "a\r\n.\r\n"},
		{"a", "a\r\n.\r\n"},
		{".", "..\r\n.\r\n"},
		{".\r\n", "..\r\n.\r\n"},
		{"..\r\n.\r\n", "...\r\n..\r\n.\r\n"},
		{"a.b\r\nc.\r\n\r\n.d\r\n", "a.b\r\nc.\r\n\r\n..d\r\n.\r\n"},
		{"\r\n.\r\n", "\r\n..\r\n.\r\n"},
	} {
		for cut := 0; cut <= len(tc.in); cut++ {
			got, err := stuffed([]byte(tc.in), cut)
			if err != nil || string(got) != tc.want {
				t.Errorf("%q cut at %d: %q, %v, want %q", tc.in, cut, got, err, tc.want)
			}
		}
	}
	for _, in := range []string{"\n", "a\nb\r\n", "\r", "a\rb\r\n", "a\r\r\n", "\r\n.\n", "\n.\r\n", "a\r", "\r\n\r.\r\n", "a\n.\n"} {
		for cut := 0; cut <= len(in); cut++ {
			if got, err := stuffed([]byte(in), cut); err == nil {
				t.Errorf("%q cut at %d became %q, want an error", in, cut, got)
			}
		}
	}
}

// FuzzStuffer: what the stuffer lets out is what a server reads back, and
// nothing else ends the data.
func FuzzStuffer(f *testing.F) {
	for _, s := range []string{"", ".", "a\r\n.\r\nb", "\r\n..\r\n", "x\n.\n", "\r\r\n"} {
		f.Add([]byte(s), 1, 2)
	}
	f.Fuzz(func(t *testing.T, message []byte, one, two int) {
		got, err := stuffed(message, one, two)
		clean := bytes.Count(message, []byte("\r\n"))
		wellFormed := bytes.Count(message, []byte{'\r'}) == clean && bytes.Count(message, []byte{'\n'}) == clean
		if (err == nil) != wellFormed {
			t.Fatalf("%q: error %v, well-formed %v", message, err, wellFormed)
		}
		if err != nil {
			return
		}
		if i := bytes.Index(got, []byte("\r\n.\r\n")); i >= 0 && i != len(got)-5 {
			t.Fatalf("%q ends early inside %q", message, got)
		}
		want := message
		if len(want) > 0 && !bytes.HasSuffix(want, []byte("\r\n")) {
			want = append(bytes.Clone(want), "\r\n"...)
		}
		if read := unstuff(bytes.TrimSuffix(got, []byte(".\r\n"))); !bytes.Equal(read, want) {
			t.Fatalf("%q is read back as %q", message, read)
		}
		// A second opinion; it turns CRLF into LF.
		read, err := io.ReadAll(textproto.NewReader(bufio.NewReader(bytes.NewReader(got))).DotReader())
		if err != nil || !bytes.Equal(read, bytes.ReplaceAll(want, []byte("\r\n"), []byte("\n"))) {
			t.Fatalf("%q is read by the library as %q, %v", message, read, err)
		}
	})
}
