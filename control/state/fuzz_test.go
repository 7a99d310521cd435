package state

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control/command"
)

// FuzzRestore reads snapshots that somebody else wrote: what is not whole
// changes nothing, and what is taken says the same when it is written again.
func FuzzRestore(f *testing.F) {
	log, err := os.ReadFile(filepath.Join("testdata", "golden2.log"))
	if err != nil {
		f.Fatal(err)
	}
	golden := New()
	for i, line := range strings.Fields(string(log)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			f.Fatal(err)
		}
		e, err := command.Decode(b)
		if err != nil {
			f.Fatal(err)
		}
		golden.Apply(uint64(i+1), e)
	}
	var whole bytes.Buffer
	if _, err := golden.Read().WriteTo(&whole); err != nil {
		f.Fatal(err)
	}
	f.Add(whole.Bytes())
	f.Add(whole.Bytes()[:whole.Len()/2])
	var empty bytes.Buffer
	if _, err := New().Read().WriteTo(&empty); err != nil {
		f.Fatal(err)
	}
	f.Add(empty.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New()
		before := s.Read().Hash()
		if err := s.Restore(bytes.NewReader(b)); err != nil {
			if s.Read().Hash() != before {
				t.Fatal("a snapshot that was refused changed the state")
			}
			return
		}
		var again bytes.Buffer
		if _, err := s.Read().WriteTo(&again); err != nil {
			t.Fatal(err)
		}
		other := New()
		if err := other.Restore(&again); err != nil {
			t.Fatalf("what was restored cannot be: %v", err)
		}
		if other.Read().Hash() != s.Read().Hash() || other.Read().Index() != s.Read().Index() {
			t.Fatal("a snapshot of a snapshot says something else")
		}
	})
}
