package store

import (
	"testing"

	"github.com/relais-mta/relais/relay"
)

// All bodies together keep a bounded part in memory: those that find no room get
// files, and the room comes back, whatever becomes of a body.
func TestLargeBodiesShareTheirMemory(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	text := make([]byte, 200_000)
	const fit = maxLargeBodiesBytes / largeBodyBytes
	var open []*Body
	for range fit + 3 {
		b := s.NewBody()
		if _, err := b.Write(text); err != nil {
			t.Fatal(err)
		}
		open = append(open, b)
	}
	for i, b := range open {
		if inMemory := b.Bytes() != nil; inMemory != (i < fit) {
			t.Fatalf("body %d of %d: in memory %v", i, len(open), inMemory)
		}
	}
	if _, err := open[0].Write(make([]byte, maxBodyMemoryBytes)); err != nil { // no room to grow, so it leaves
		t.Fatal(err)
	}
	if open[0].Bytes() != nil || s.largeBodies.Load() != maxLargeBodiesBytes-largeBodyBytes {
		t.Errorf("a body that went to a file keeps its memory: %d bytes are counted", s.largeBodies.Load())
	}
	for _, b := range open {
		b.Discard()
	}
	if _, ref := mustPut(t, s, text); ref.Kind != relay.BodySegment {
		t.Errorf("with room again a body is stored as kind %d", ref.Kind)
	}
	if n := s.largeBodies.Load(); n != 0 || files(t, s, "*.body") != 0 {
		t.Errorf("nothing is under way: %d bytes are counted, and there are %d files", n, files(t, s, "*.body"))
	}
}
