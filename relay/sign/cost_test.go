package sign

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"strings"
	"testing"
	"time"
)

// maxCost is what two signatures may cost in all, as a multiple of what the two
// private-key operations cost.
const maxCost = 1.3

// costs runs the bare operations and the whole of Sign, body hash of a 10 KiB
// body included, and returns what each took.
func costs(tb testing.TB, s *Signer, header, body []byte) (bare, whole time.Duration) {
	var r *rsa.PrivateKey
	var e ed25519.PrivateKey
	for _, k := range s.keys {
		if k.rsa != nil {
			r = k.rsa
		} else {
			e = k.ed25519
		}
	}
	digest := sha256.Sum256(header)
	start := time.Now()
	if _, err := rsa.SignPKCS1v15(nil, r, crypto.SHA256, digest[:]); err != nil {
		tb.Fatal(err)
	}
	_ = ed25519.Sign(e, digest[:])
	bare = time.Since(start)
	h := NewBodyHasher()
	start = time.Now()
	_, _ = h.Write(body)
	if _, err := s.Sign(nil, nil, header, h.Sum(), 0, start); err != nil {
		tb.Fatal(err)
	}
	return bare, time.Since(start)
}

// The two are measured in turn and the fastest of each is compared, which a
// busy machine disturbs least.
func TestCostOfBothSignatures(t *testing.T) {
	const rounds = 200
	s, _ := twoKeys(t)
	header, body := split([]byte(plainMessage + strings.Repeat("ten words of text that nobody reads in this mail\r\n", 205)))
	bare, whole := costs(t, s, header, body)
	for range rounds {
		b, w := costs(t, s, header, body)
		bare, whole = min(bare, b), min(whole, w)
	}
	if ratio := float64(whole) / float64(bare); ratio > maxCost {
		t.Errorf("both signatures take %v, the private-key operations %v: %.2f times, allowed are %.1f", whole, bare, ratio, maxCost)
	} else {
		t.Logf("both signatures %v, private-key operations %v, ratio %.3f", whole, bare, ratio)
	}
}

// BenchmarkSignBoth prints the ratio of the two costs over the whole run.
func BenchmarkSignBoth(b *testing.B) {
	s, _ := twoKeys(b)
	header, body := split([]byte(plainMessage + strings.Repeat("ten words of text that nobody reads in this mail\r\n", 205)))
	var bare, whole time.Duration
	b.ReportAllocs()
	for b.Loop() {
		x, y := costs(b, s, header, body)
		bare, whole = bare+x, whole+y
	}
	b.ReportMetric(float64(bare.Nanoseconds())/float64(b.N), "bare-ns/op")
	b.ReportMetric(float64(whole.Nanoseconds())/float64(b.N), "whole-ns/op")
	b.ReportMetric(float64(whole)/float64(bare), "ratio")
}
