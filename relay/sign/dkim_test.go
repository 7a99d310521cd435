package sign

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-msgauth/dkim"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// makeTestKey makes one key for all tests: it takes longer than each of them.
var makeTestKey = sync.OnceValues(func() ([]byte, error) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKCS8PrivateKey(private)
})

func testKey(t testing.TB) policy.DKIMKey {
	t.Helper()
	der, err := makeTestKey()
	if err != nil {
		t.Fatal(err)
	}
	return policy.DKIMKey{Selector: "r1", Algorithm: AlgorithmRSA, Private: slices.Clone(der)}
}

// verify asks go-msgauth about every signature of a message.
func verify(t testing.TB, key policy.DKIMKey, message []byte) []*dkim.Verification {
	t.Helper()
	parsed, err := x509.ParsePKCS8PrivateKey(key.Private)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&parsed.(*rsa.PrivateKey).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	record := "v=DKIM1; k=rsa; p=" + base64.StdEncoding.EncodeToString(public)
	verifications, err := dkim.VerifyWithOptions(bytes.NewReader(message), &dkim.VerifyOptions{
		LookupTXT: func(name string) ([]string, error) {
			if name != key.Selector+"._domainkey.example.com" {
				return nil, errors.New("no such record")
			}
			return []string{record}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return verifications
}

// split cuts a message behind the empty line.
func split(message []byte) (header, body []byte) {
	i := bytes.Index(message, []byte("\r\n\r\n")) + 4
	return message[:i], message[i:]
}

func signMessage(t testing.TB, s *Signer, message []byte) []byte {
	t.Helper()
	header, body := split(message)
	signed, err := s.Sign(nil, nil, header, hashInPieces(NewBodyHasher(), body, 1<<20), 0, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return append(signed, message...)
}

func newSigner(t testing.TB) (*Signer, policy.DKIMKey) {
	t.Helper()
	key := testKey(t)
	s, err := NewSigner("example.com", []policy.DKIMKey{key})
	if err != nil {
		t.Fatal(err)
	}
	return s, key
}

const plainMessage = "Received: from a by b; Thu, 1 Jan 2026 00:00:00 +0000\r\n" +
	"From: \"Joe\" <joe@example.com>\r\n" +
	"To: ann@example.net,\r\n\t bob@example.net\r\n" +
	"Subject:   two   spaces\r\n\tand a fold \r\n" +
	"Date: Thu, 1 Jan 2026 00:00:00 +0000\r\n" +
	"Message-ID: <1@example.com>\r\n" +
	"List-Unsubscribe: <https://example.com/u>\r\n" +
	"List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" +
	"MIME-Version: 1.0\r\n" +
	"content-type : text/plain\r\n" +
	"Feedback-ID: a:b:c:d\r\n" +
	"\r\n" +
	"Hello,\r\n\r\nthis is  text \r\n\r\n"

func TestSignIsVerifiedByPeer(t *testing.T) {
	s, key := newSigner(t)
	messages := map[string]string{
		"plain":            plainMessage,
		"empty body":       "From: a@example.com\r\n\r\n",
		"no signed fields": "X-Only: one\r\nFrom: a@example.com\r\n\r\nx\r\n",
		"several of one":   "From: a@example.com\r\nTo: b@example.net\r\nTo: c@example.net\r\nReferences: <1>\r\nReferences: <2>\r\n\r\nx\r\n",
		"empty value":      "From: a@example.com\r\nSubject:\r\nTo: \r\n \r\n\r\nx\r\n",
	}
	for name, message := range messages {
		t.Run(name, func(t *testing.T) {
			signed := signMessage(t, s, []byte(message))
			for _, v := range verify(t, key, signed) {
				if v.Err != nil {
					t.Errorf("not verified: %v\n%s", v.Err, signed)
				}
				if v.Domain != "example.com" {
					t.Errorf("domain is %q", v.Domain)
				}
			}
			for line := range strings.SplitSeq(strings.TrimSuffix(string(signed), message), "\r\n") {
				if len(line) > maxSignatureLineBytes+2 {
					t.Errorf("line of %d octets: %q", len(line), line)
				}
			}
		})
	}
}

// A field added to, or changed in, a signed message must break the signature.
func TestSignOversigns(t *testing.T) {
	s, key := newSigner(t)
	signed := signMessage(t, s, []byte(plainMessage))
	if v := verify(t, key, signed); len(v) != 1 || v[0].Err != nil {
		t.Fatalf("the untouched message does not verify: %+v", v)
	}
	for _, field := range []string{"From", "To", "Subject", "Date", "Message-ID", "List-Unsubscribe", "List-Unsubscribe-Post"} {
		at := bytes.Index(signed, []byte("Received:"))
		forged := append(append(append([]byte{}, signed[:at]...), field+": forged\r\n"...), signed[at:]...)
		if v := verify(t, key, forged); len(v) != 1 || v[0].Err == nil {
			t.Errorf("a second %s field does not break the signature", field)
		}
	}
	for _, field := range []string{"content-type", "MIME-Version", "Feedback-ID"} {
		forged := bytes.Replace(signed, []byte("\r\n"+field), []byte("\r\nX-"+field), 1)
		if v := verify(t, key, forged); len(v) != 1 || v[0].Err == nil {
			t.Errorf("taking %s away does not break the signature", field)
		}
	}
	// A relay on the way may add trace fields.
	if v := verify(t, key, append([]byte("Received: from c by d\r\n"), signed...)); len(v) != 1 || v[0].Err != nil {
		t.Errorf("a Received field added later breaks the signature")
	}
}

func TestSignWithSeveralKeys(t *testing.T) {
	first, second := testKey(t), testKey(t)
	second.Selector = "r2"
	s, err := NewSigner("example.com", []policy.DKIMKey{first, second})
	if err != nil {
		t.Fatal(err)
	}
	signed := signMessage(t, s, []byte(plainMessage))
	for _, key := range []policy.DKIMKey{first, second} {
		passed := 0
		for _, v := range verify(t, key, signed) {
			if v.Err == nil {
				passed++
			}
		}
		if passed != 1 {
			t.Errorf("selector %s: %d signatures verify, want 1", key.Selector, passed)
		}
	}
}

func FuzzSign(f *testing.F) {
	s, key := newSigner(f)
	f.Add("a  b\n\tc", "d", "hello\n")
	f.Add("", " ", "")
	f.Add("\n ", "x\n y \n z", "\n\n")
	f.Fuzz(func(t *testing.T, subject, to, body string) {
		// Only what acceptance lets through: folded lines begin with white space.
		fold := func(s string) string {
			return strings.ReplaceAll(string(toWire([]byte(strings.ReplaceAll(s, "\x00", "")))), "\r\n", "\r\n ")
		}
		message := fmt.Sprintf("Subject: %s\r\nFrom: a@example.com\r\nTo:%s\r\n\r\n%s", fold(subject), fold(to), toWire([]byte(body)))
		signed := signMessage(t, s, []byte(message))
		if v := verify(t, key, signed); len(v) != 1 || v[0].Err != nil {
			t.Errorf("not verified: %+v\n%q", v, signed)
		}
	})
}

func TestAppendRelaxed(t *testing.T) {
	// RFC 6376 section 3.4.5 and corner cases of section 3.4.2.
	tests := []struct{ field, want string }{
		{"A: X\r\n", "a:X\r\n"},
		{"B : Y\t\r\n\tZ  \r\n", "b:Y Z\r\n"},
		{"Subject:\r\n", "subject:\r\n"},
		{"SUBJECT: \t \r\n", "subject:\r\n"},
		{"X-Y:a:b : c\r\n", "x-y:a:b : c\r\n"},
		{"X:\r\n folded first\r\n", "x:folded first\r\n"},
	}
	for _, tt := range tests {
		if got := string(appendRelaxed(nil, []byte(tt.field))); got != tt.want {
			t.Errorf("appendRelaxed(%q) = %q, want %q", tt.field, got, tt.want)
		}
	}
}

func TestNewSignerRefuses(t *testing.T) {
	good := testKey(t)
	_, ed, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	edDER, err := x509.MarshalPKCS8PrivateKey(ed)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string][]policy.DKIMKey{
		"no keys":           nil,
		"unknown algorithm": {{Selector: "r1", Algorithm: "rsa-sha1", Private: good.Private}},
		"not a key":         {good, {Selector: "r2", Algorithm: AlgorithmRSA, Private: []byte("SECRET-BYTES")}},
		"not RSA":           {{Selector: "r1", Algorithm: AlgorithmRSA, Private: edDER}},
		"not Ed25519":       {{Selector: "r1", Algorithm: AlgorithmEd25519, Private: good.Private}},
	}
	for name, keys := range tests {
		_, err := NewSigner("example.com", keys)
		if !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: error %v, want invalid", name, err)
			continue
		}
		if strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: the error shows key material: %v", name, err)
		}
	}
}

func TestCache(t *testing.T) {
	var c Cache
	domain := policy.Domain{Name: "example.com", DKIM: []policy.DKIMKey{testKey(t)}}
	first, err := c.Signer(&domain)
	if err != nil {
		t.Fatal(err)
	}
	again := policy.Domain{Name: "example.com", DKIM: []policy.DKIMKey{testKey(t)}} // as a new view brings it
	if got, err := c.Signer(&again); err != nil || got != first {
		t.Errorf("equal keys in a new slice: signer %p, error %v, want the kept one", got, err)
	}
	rotated := testKey(t)
	rotated.Selector = "r2"
	again.DKIM = append(again.DKIM, rotated)
	got, err := c.Signer(&again)
	if err != nil || got == first || len(got.keys) != 2 {
		t.Errorf("after rotation: signer %p with error %v, want a new one with 2 keys", got, err)
	}
	bad := policy.Domain{Name: "example.com"}
	if _, err := c.Signer(&bad); err == nil {
		t.Error("a domain that lost its keys still has a signer")
	}
}

func BenchmarkSign(b *testing.B) {
	s, _ := newSigner(b)
	header, body := split([]byte(plainMessage))
	sum := hashInPieces(NewBodyHasher(), body, 1<<20)
	now := time.Now()
	var dst []byte
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if dst, err = s.Sign(dst[:0], nil, header, sum, 0, now); err != nil {
			b.Fatal(err)
		}
	}
}
