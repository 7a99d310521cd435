package sign

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-msgauth/dkim"
	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/policy"
)

// ed25519Key makes a key; publicKey is what its record says.
func ed25519Key(t testing.TB, selector string) policy.DKIMKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return policy.DKIMKey{Selector: selector, Algorithm: AlgorithmEd25519, Private: der}
}

// record returns the TXT record of a key (RFC 6376 section 3.6.1, RFC 8463
// section 4).
func record(t testing.TB, key policy.DKIMKey) string {
	t.Helper()
	parsed, err := x509.ParsePKCS8PrivateKey(key.Private)
	if err != nil {
		t.Fatal(err)
	}
	switch private := parsed.(type) {
	case ed25519.PrivateKey:
		return "v=DKIM1; k=ed25519; p=" + base64.StdEncoding.EncodeToString(private.Public().(ed25519.PublicKey))
	case *rsa.PrivateKey:
		public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		return "v=DKIM1; k=rsa; p=" + base64.StdEncoding.EncodeToString(public)
	}
	t.Fatalf("a %T has no record", parsed)
	return ""
}

// twoKeys returns a signer with a key of each algorithm, given in the order
// that is not that of the signatures, and the records by name.
func twoKeys(t testing.TB) (*Signer, map[string]string) {
	t.Helper()
	e, r := ed25519Key(t, "e1"), testKey(t)
	s, err := NewSigner("example.com", []policy.DKIMKey{e, r})
	if err != nil {
		t.Fatal(err)
	}
	return s, map[string]string{"e1._domainkey.example.com": record(t, e), "r1._domainkey.example.com": record(t, r)}
}

func verifyBoth(t testing.TB, records map[string]string, message []byte) {
	t.Helper()
	results, err := dkim.VerifyWithOptions(bytes.NewReader(message), &dkim.VerifyOptions{LookupTXT: func(name string) ([]string, error) {
		if records[name] == "" {
			return nil, fmt.Errorf("no record at %s", name)
		}
		return []string{records[name]}, nil
	}})
	if err != nil || len(results) != 2 {
		t.Fatalf("%d signatures, error %v\n%q", len(results), err, message)
	}
	for _, r := range results {
		if r.Err != nil {
			t.Errorf("not verified: %v\n%q", r.Err, message)
		}
	}
}

func TestSignWithRSAAndEd25519(t *testing.T) {
	s, records := twoKeys(t)
	signed := signMessage(t, s, []byte(plainMessage))
	verifyBoth(t, records, signed)
	text := string(signed[:len(signed)-len(plainMessage)])
	first, second, ok := strings.Cut(strings.TrimPrefix(text, "DKIM-Signature: "), "\r\nDKIM-Signature: ")
	if !ok || !strings.Contains(first, "a=rsa-sha256;") || !strings.Contains(second, "a=ed25519-sha256;") {
		t.Fatalf("RSA does not come first, or there are not two fields:\n%s", text)
	}
	tag := func(field, name string) string {
		_, rest, _ := strings.Cut(field, name+"=")
		value, _, _ := strings.Cut(rest, ";")
		return strings.Join(strings.Fields(value), "")
	}
	for _, name := range []string{"\th", "\tbh"} {
		if tag(first, name) == "" || tag(first, name) != tag(second, name) {
			t.Errorf("%s differs: %q and %q", strings.TrimSpace(name), tag(first, name), tag(second, name))
		}
	}
	h := strings.Split(tag(second, "\th"), ":")
	count := map[string]int{}
	for _, name := range h {
		count[name]++
	}
	for _, name := range []string{"From", "To", "Subject", "Date", "Message-ID"} {
		if count[name] != 2 {
			t.Errorf("h= names %s %d times in the Ed25519 signature, want 2 for oversigning", name, count[name])
		}
	}
}

// capture is a key that keeps the digest it is asked to sign.
type capture struct {
	ed25519.PrivateKey
	digest []byte
}

func (c *capture) Sign(random io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	c.digest = append([]byte(nil), digest...)
	return c.PrivateKey.Sign(random, digest, o)
}

// theirs lets go-msgauth sign the fields that we would, and returns its field,
// the digest it signed and its body hash.
func theirs(t testing.TB, c *capture, names []string, message []byte) (field string, digest []byte, bodyHash string) {
	t.Helper()
	signer, err := dkim.NewSigner(&dkim.SignOptions{
		Domain: "example.com", Selector: "e1", Signer: c, HeaderKeys: names,
		HeaderCanonicalization: dkim.CanonicalizationRelaxed, BodyCanonicalization: dkim.CanonicalizationRelaxed,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signer.Write(message); err != nil {
		t.Fatal(err)
	}
	if err := signer.Close(); err != nil {
		t.Fatal(err)
	}
	field = signer.Signature()
	_, rest, _ := strings.Cut(field, "bh=")
	bodyHash, _, _ = strings.Cut(rest, ";")
	return field, c.digest, strings.Join(strings.Fields(bodyHash), "")
}

var signatureValue = regexp.MustCompile(`([ \t;]b=)[^;]*`)

// Messages at random: our signatures verify, and the body hash and the
// canonical fields are those of go-msgauth.
func TestCanonicalFormIsThatOfGoMsgauth(t *testing.T) {
	s, records := twoKeys(t)
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := capture{PrivateKey: private}
	value := rapid.StringMatching(`[ \t]{0,3}([!-~]{1,8}[ \t]{0,3}(\r\n[ \t]{1,3}[!-~]{1,4})?){0,5}[ \t]{0,2}`)
	line := rapid.StringMatching(`[ \t]{0,3}([!-~\x{e9}]{1,9}[ \t]{0,3}){0,6}`)
	rapid.Check(t, func(rt *rapid.T) {
		var m strings.Builder
		m.WriteString("From:" + value.Draw(rt, "from") + "\r\n")
		for range rapid.IntRange(0, 8).Draw(rt, "fields") {
			name := rapid.SampledFrom([]string{"To", "SUBJECT", "cc", "Date", "Message-ID", "References", "Reply-To", "MIME-Version", "Content-Type", "List-Id", "Feedback-ID", "CFBL-Address", "X-Other", "Received"}).Draw(rt, "name")
			m.WriteString(name + rapid.SampledFrom([]string{"", " ", "\t"}).Draw(rt, "gap") + ":" + value.Draw(rt, "value") + "\r\n")
		}
		m.WriteString("\r\n")
		lines := rapid.SliceOfN(line, 0, 8).Draw(rt, "body")
		m.WriteString(strings.Join(lines, "\r\n"))
		if rapid.Bool().Draw(rt, "last CRLF") {
			m.WriteString(strings.Repeat("\r\n", rapid.IntRange(1, 3).Draw(rt, "empty lines")))
		}
		message := []byte(m.String())
		signed := signMessage(t, s, message)
		verifyBoth(t, records, signed)
		header, body := split(message)
		sum := hashInPieces(NewBodyHasher(), body, rapid.IntRange(1, 50).Draw(rt, "piece"))
		var w scratch
		w.found = findFields(nil, header)
		names := strings.Split(strings.Join(strings.Fields(string(w.appendNames(nil))), ""), ":")
		field, digest, bodyHash := theirs(t, &key, names, message)
		if got := base64.StdEncoding.EncodeToString(sum[:]); got != bodyHash {
			t.Errorf("body hash %s, go-msgauth has %s for %q", got, bodyHash, body)
		}
		// Our canonical fields and its own field without the value of b=.
		unsigned := signatureValue.ReplaceAllString(strings.ReplaceAll(field, "\r\n", ""), "$1") + "\r\n"
		canon := appendRelaxed(w.canon, []byte(unsigned))
		if got := sha256.Sum256(canon[:len(canon)-2]); string(got[:]) != string(digest) {
			t.Errorf("our canonical fields %q are not those that go-msgauth signs in %q", canon, field)
		}
	})
}

// A provider that wants one algorithm gets that one, and every signature of a
// domain that has no key of it.
func TestSignWithWantedAlgorithms(t *testing.T) {
	both, _ := twoKeys(t)
	onlyRSA, _ := newSigner(t)
	header, body := split([]byte(plainMessage))
	sum := hashInPieces(NewBodyHasher(), body, 1<<20)
	for _, tc := range []struct {
		signer *Signer
		want   string
		rsa    int
		ed     int
	}{
		{both, "", 1, 1},
		{both, AlgorithmRSA, 1, 0},
		{both, AlgorithmEd25519, 0, 1},
		{onlyRSA, AlgorithmEd25519, 1, 0},
	} {
		signed, err := tc.signer.Sign(nil, nil, header, sum, OnlyAlgorithm(tc.want), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if rsa, ed := strings.Count(string(signed), "a=rsa-sha256;"), strings.Count(string(signed), "a=ed25519-sha256;"); rsa != tc.rsa || ed != tc.ed {
			t.Errorf("%q: %d RSA and %d Ed25519 signatures, want %d and %d", tc.want, rsa, ed, tc.rsa, tc.ed)
		}
	}
}
