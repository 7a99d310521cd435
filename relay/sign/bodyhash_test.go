package sign

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"regexp"
	"strings"
	"testing"

	"github.com/emersion/go-msgauth/dkim"
)

// hashInPieces hashes body in pieces of step bytes.
func hashInPieces(h *BodyHasher, body []byte, step int) [32]byte {
	h.Reset()
	for len(body) > step {
		_, _ = h.Write(body[:step])
		body = body[step:]
	}
	_, _ = h.Write(body)
	return h.Sum()
}

func TestBodyHasherCanonicalForm(t *testing.T) {
	tests := []struct{ name, body, canonical string }{
		{"empty", "", ""},
		{"only line ends", "\r\n\r\n\r\n", ""},
		{"plain", "hello\r\n", "hello\r\n"},
		{"no line end", "hello", "hello\r\n"},
		{"RFC 6376 section 3.4.5", " C \r\nD \t E\r\n\r\n\r\n", " C\r\nD E\r\n"},
		{"inner empty lines stay", "a\r\n\r\n\r\nb\r\n\r\n", "a\r\n\r\n\r\nb\r\n"},
		{"white space lines are empty lines", "a\r\n \t \r\nb\r\n \r\n", "a\r\n\r\nb\r\n"},
		{"leading tab", "\t\tx\r\n", " x\r\n"},
		{"white space at the very end", "x \t", "x\r\n"},
		{"control octets are kept", "a\x01\x7f\x0bb\r\n", "a\x01\x7f\x0bb\r\n"},
		{"octets above 127 are kept", "caf\xc3\xa9  \xff\r\n", "caf\xc3\xa9 \xff\r\n"},
		{"CR alone is kept", "a \rb\r\n\r\rc\r", "a \rb\r\n\r\rc\r\r\n"},
		{"LF alone is kept", "a \n\tb\r\n", "a \n b\r\n"},
		{"longer than the buffer", strings.Repeat("word  ", 1000) + "\r\n", strings.TrimSuffix(strings.Repeat("word ", 1000), " ") + "\r\n"},
	}
	h := NewBodyHasher()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := sha256.Sum256([]byte(tt.canonical))
			for _, step := range []int{1, 2, 3, 7, 1 << 20} {
				if got := hashInPieces(h, []byte(tt.body), step); got != want {
					t.Errorf("pieces of %d: hash differs from that of %q", step, tt.canonical)
				}
			}
		})
	}
}

var bodyHashTag = regexp.MustCompile(`bh=([A-Za-z0-9+/=\s]+);`)

// peerBodyHash is what go-msgauth computes.
func peerBodyHash(t testing.TB, body []byte) string {
	t.Helper()
	var signed bytes.Buffer
	message := append([]byte("From: a@example.com\r\n\r\n"), body...)
	err := dkim.Sign(&signed, bytes.NewReader(message), &dkim.SignOptions{
		Domain: "example.com", Selector: "s",
		Signer:                 ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)),
		HeaderCanonicalization: dkim.CanonicalizationRelaxed,
		BodyCanonicalization:   dkim.CanonicalizationRelaxed,
	})
	if err != nil {
		t.Fatal(err)
	}
	m := bodyHashTag.FindSubmatch(signed.Bytes())
	if m == nil {
		t.Fatalf("no bh= in %q", signed.Bytes())
	}
	return strings.Join(strings.Fields(string(m[1])), "")
}

// toWire makes line ends CRLF, as a body is before it is hashed.
func toWire(body []byte) []byte {
	body = bytes.ReplaceAll(body, []byte("\r"), nil)
	return bytes.ReplaceAll(body, []byte("\n"), []byte("\r\n"))
}

// Lines that are hashed many at a time give the hash of those hashed one octet
// after the other, wherever the one thing that is not canonical stands.
func TestBodyHasherManyLines(t *testing.T) {
	lines := []byte(strings.Repeat("some words of text\r\n\r\n and more, caf\xc3\xa9\r\n", 60) + "\r\n\r\n")
	h, slow := NewBodyHasher(), NewBodyHasher()
	for _, odd := range []string{"", "\t", "  ", " ", "\r", "\n", "\x01", "\r\n\r\n\r\n", " \r\n", "\n\r", "\x00\x00"} {
		for at := 0; at <= len(lines); at += 1 + at%7 {
			body := append(append(append([]byte(nil), lines[:at]...), odd...), lines[at:]...)
			want := hashInPieces(slow, body, 1)
			for _, step := range []int{9, 100, 1500, 1 << 20} {
				if got := hashInPieces(h, body, step); got != want {
					t.Fatalf("%q at %d, pieces of %d: another hash than octet by octet", odd, at, step)
				}
			}
		}
	}
}

func FuzzBodyHasher(f *testing.F) {
	f.Add([]byte("hello\n"), 3)
	f.Add([]byte(" C \nD \t E\n\n\n"), 1)
	f.Add([]byte("\n \n\t\n x"), 2)
	f.Add([]byte(strings.Repeat("a b  c\t\n", 400)), 100)
	f.Fuzz(func(t *testing.T, body []byte, step int) {
		if step < 1 {
			step = 1
		}
		body = toWire(body)
		sum := hashInPieces(NewBodyHasher(), body, step)
		if got, want := base64.StdEncoding.EncodeToString(sum[:]), peerBodyHash(t, body); got != want {
			t.Errorf("body %q in pieces of %d: bh=%s, go-msgauth has %s", body, step, got, want)
		}
	})
}

func BenchmarkBodyHasher(b *testing.B) {
	for name, line := range map[string]string{
		"text":      "Dear reader, this is a line of text as most of them are, with words.\r\n",
		"irregular": "\t\tDear reader, this is a line with  some more white space in it. \r\n",
		"base64":    strings.Repeat("QUJD", 19) + "\r\n",
	} {
		b.Run(name, func(b *testing.B) {
			body := []byte(strings.Repeat(line, 10<<10/len(line)))
			h := NewBodyHasher()
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				h.Reset()
				_, _ = h.Write(body)
				h.Sum()
			}
		})
	}
}
