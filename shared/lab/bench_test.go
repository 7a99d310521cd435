package lab

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"
	"testing"
)

// BenchmarkFarm measures how fast mails of 10 kB are accepted and kept; the
// load generator shares the processors with the farm.
func BenchmarkFarm(b *testing.B) {
	for _, secure := range []bool{false, true} {
		b.Run(fmt.Sprintf("tls=%v", secure), func(b *testing.B) {
			l := startLab(b, func(c *Config) { c.SkipDKIM = true })
			ld := &Load{
				Addr: l.mxAddr(b, Google), Messages: b.N, Connections: 8, Size: 10 << 10,
				From: func(int) string { return "a@sender.test" },
				To:   func(i int) string { return "accept-1@gmail.test" },
			}
			if secure {
				ld.TLS = &tls.Config{RootCAs: l.CAPool()}
			}
			b.SetBytes(10 << 10)
			b.ReportAllocs()
			b.ResetTimer()
			s, err := Send(context.Background(), ld)
			if err != nil || s.Accepted != b.N {
				b.Fatalf("%v: %d of %d accepted", err, s.Accepted, b.N)
			}
			b.ReportMetric(float64(b.N)/s.Took.Seconds(), "msg/s")
		})
	}
}

// BenchmarkVerify measures how fast signatures of mails of 10 kB are verified
// behind the farm.
func BenchmarkVerify(b *testing.B) {
	l := startLab(b, nil)
	content := []byte(signedMessage(b, l, "bench@x", strings.Repeat(loadLine, 10<<10/len(loadLine))))
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		if c := l.verifier.verify(content); c.Verdict != VerdictPass {
			b.Fatal(c)
		}
	}
}
