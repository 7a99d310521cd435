package queue

import (
	"bytes"
	"io"
	"testing"
)

// FuzzCheckExport reads exports that another relay's disk gave: damage is
// found, and never more is asked for than the file has.
func FuzzCheckExport(f *testing.F) {
	from := newFixture(f).open()
	from.accept("one@one.example")
	from.accept("two@one.example", "three@two.example")
	whole, _ := from.export()
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add([]byte("From MAILER-DAEMON"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		_, count, err := CheckExport(r)
		if err == nil && count.Bytes > int64(len(b)) {
			t.Fatalf("%d bytes of mail in %d bytes", count.Bytes, len(b))
		}
		if err == nil && count.Messages > 0 {
			// A whole export is whole without its last byte no more.
			if _, _, err := CheckExport(io.LimitReader(bytes.NewReader(b), int64(len(b)-r.Len()-1))); err == nil {
				t.Fatal("an export that was cut is called whole")
			}
		}
	})
}
