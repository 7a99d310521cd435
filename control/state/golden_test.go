package state

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control/command"
)

// TestGoldenLog2 replays a log of version 2 that the release of that version
// wrote, from a cluster of version 1 through the change to version 2, over
// verdicts, draining, rotated secrets and former policies to a restore.
func TestGoldenLog2(t *testing.T) {
	log, err := os.ReadFile(filepath.Join("testdata", "golden2.log"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("testdata", "golden2.sums"))
	if err != nil {
		t.Fatal(err)
	}
	s, types := New(), map[command.Type]bool{}
	for i, line := range strings.Fields(string(log)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		e, err := command.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		types[e.Type] = true
		s.Apply(uint64(i+1), e) // one of them was refused, which is part of what must not change
	}
	if got := sums(t, s); got != string(want) {
		t.Errorf("the golden log leads to\n%swant\n%s", got, want)
	}
	for _, c := range []command.Type{command.TypeNodeDrain, command.TypeCredentialRotate, command.TypeIPVerify, command.TypeDomainVerify, command.TypeClusterRecover, command.TypeRecoveryEnd} {
		if !types[c] {
			t.Errorf("the golden log has no %s", c)
		}
	}
}
