package store

import (
	"context"
	"testing"

	"github.com/relais-mta/relais/relay"
)

// TestAWrongReferenceRemovesNoFile: where a reference cannot be right, the body may be
// in any file, also in one that no other record refers to. A start keeps them all for
// the repair.
func TestAWrongReferenceRemovesNoFile(t *testing.T) {
	for name, wrong := range map[string]func(*relay.BodyRef){
		"a file that does not exist": func(r *relay.BodyRef) { r.Segment += 1 << 20 },
		"a place behind the end":     func(r *relay.BodyRef) { r.Offset = 1 << 40 },
		"an unknown kind":            func(r *relay.BodyRef) { r.Kind = 77 },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := Open(context.Background(), testConfig(dir))
			if err != nil {
				t.Fatal(err)
			}
			id, ref := mustPut(t, s, []byte("small"))
			large, body := mustPut(t, s, make([]byte, 1_200_000)) // of which the record is lost
			b := s.NewBatch()
			damaged := ref
			wrong(&damaged)
			b.Set(AppendMessageKey(nil, id), AppendRef([]byte{1}, damaged))
			b.Delete(AppendMessageKey(nil, large))
			if err := s.Commit(context.Background(), b); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openTest(t, testConfig(dir))
			<-s.Counted()
			s.unlinkDead()
			for _, r := range []relay.BodyRef{ref, body} {
				if _, err := s.ReadBody(r, nil); err != nil {
					t.Errorf("a body is gone: %v", err)
				}
			}
		})
	}
}
