package queue

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// seldom is how many times in a row, on average, what takes long is left out.
const seldom = 4

// crash ends the process's view of the queue as kill -9 does: the files are
// taken as they are, without anything being closed. Their records must agree.
func (m *model) crash(t *rapid.T) {
	if rapid.IntRange(0, seldom).Draw(t, "crash") > 0 {
		return
	}
	m.lives++
	dir := fmt.Sprintf("%s-%d", m.f.dir, m.lives)
	m.quiesce(t)
	copyTree(t, m.f.dir, dir)
	m.f.close()
	if err := os.RemoveAll(m.f.dir); err != nil {
		t.Fatal(err)
	}
	m.f.dir = dir
	st, err := store.Open(context.Background(), store.Config{Dir: dir, Storage: m.f.storage, Logger: m.f.log(), MemTableBytes: 8 << 20, Inspect: true})
	if err != nil {
		t.Fatal(err)
	}
	count, err := Fsck(context.Background(), st, FsckConfig{
		Bodies: true, Events: true, Now: m.f.clock.Now, Logger: m.f.log(), Report: func(f Finding) {
			if !f.Note {
				t.Errorf("after a crash: %+v", f)
			}
		},
	})
	if err != nil || !count.Clean || int(count.Messages) != len(m.envelopes) {
		t.Fatalf("after a crash: %+v, %v, want %d messages", count, err, len(m.envelopes))
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	m.restart(t)
}

// quiesce waits until nothing is on its way to the disk.
func (m *model) quiesce(t *rapid.T) {
	if err := m.f.st.Barrier(func() {}); err != nil {
		t.Fatal(err)
	}
}

// copyTree copies a data directory, holes and all, as it was at one moment: a
// compaction in between makes it begin again.
func copyTree(t *rapid.T, from, to string) {
	for before := ""; ; {
		after := tables(t, from)
		if before == after {
			return
		}
		before = after
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
		err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(from, path)
			if err != nil {
				return err
			}
			if d.IsDir() {
				return os.MkdirAll(filepath.Join(to, rel), 0o700)
			}
			return copyFile(path, filepath.Join(to, rel))
		})
		if errors.Is(err, fs.ErrNotExist) {
			before = "" // a table went meanwhile
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// tables names the files of the index, with the length of what lists them.
func tables(t *rapid.T, dir string) (out string) {
	entries, err := os.ReadDir(filepath.Join(dir, "index"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		out += e.Name() + "\n"
	}
	info, err := os.Stat(filepath.Join(dir, "index", "MANIFEST"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(out, info.Size())
}

const copyPieceBytes = 64 << 10

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	piece, zeros := make([]byte, copyPieceBytes), make([]byte, copyPieceBytes)
	for at := int64(0); at < info.Size(); {
		n, err := in.ReadAt(piece, at)
		if err != nil && err != io.EOF {
			return err
		}
		if !bytes.Equal(piece[:n], zeros[:n]) {
			if _, err := out.WriteAt(piece[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return out.Truncate(info.Size())
}

// move exports the queue and imports it on another relay, as when its machine
// is given up.
func (m *model) move(t *rapid.T) {
	if rapid.IntRange(0, seldom).Draw(t, "move") > 0 {
		return
	}
	m.restart(t) // what is in flight is resolved when the queue is opened for the export
	text, count := m.f.export()
	open := 0
	for _, r := range m.recipients {
		if !r.state.Final() {
			open++
		}
	}
	if count.Messages != len(m.envelopes) || count.Recipients != open {
		t.Fatalf("exported %+v, want %d messages with %d open recipients", count, len(m.envelopes), open)
	}
	m.f.close()
	if err := os.RemoveAll(m.f.dir); err != nil {
		t.Fatal(err)
	}
	m.lives++
	m.f.dir = fmt.Sprintf("%s-%d", m.f.dir, m.lives)
	m.f.open()
	if got, err := m.f.importFrom(text); err != nil || got.Imported != count.Messages {
		t.Fatalf("imported %+v, %v", got, err)
	}
	m.events, m.rules = open, map[string]ids.Hold{} // rules stay behind, what they hold is held by hand
	earliest := m.f.clock.Now().Add(-maxClockLag).UnixMilli()
	for _, r := range m.recipients {
		r.rule = ids.Hold{}
		if r.state == relay.StateWaiting {
			r.due = max(r.due, earliest)
		}
	}
}
