package backup

import (
	"bytes"
	"testing"
)

// FuzzOpen reads files that an operator names: what is no whole backup is
// refused before any of it is believed.
func FuzzOpen(f *testing.F) {
	f.Add([]byte(magic))
	f.Add(append([]byte(magic), 0, 1, 0, 0, 0, 2, '{', '}'))
	f.Add(append([]byte(magic), 0, 9, 0xff, 0xff, 0xff, 0xff))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := Open(bytes.NewReader(b))
		if err != nil {
			return
		}
		if a.CheckSum() == nil && len(b) < len(magic)+tagBytes+saltBytes {
			t.Fatalf("%d bytes are called a whole backup", len(b))
		}
	})
}
