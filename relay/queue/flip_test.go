package queue

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// flipWard is a queue whose files are damaged byte by byte.
type flipWard struct {
	*ward
	to     map[ids.Message][]string
	events int
	now    time.Time
	killed map[string][]byte // the files as a killed relay leaves them: with logs of memory tables
	closed map[string][]byte // and as one that was stopped leaves them
}

func newFlipWard(t *testing.T) *flipWard {
	w := &flipWard{ward: newWard(t, 1), to: map[ids.Message][]string{}}
	w.storage.SegmentBytes = 1 << 20
	for round := range 3 {
		w.open()
		w.loaded()
		for i := range 40 {
			w.acceptRandom(i % 9)
		}
		for id := range w.text {
			if info, err := w.q.Show(id); err == nil && w.to[id] == nil {
				for _, r := range info.Env.Recipients {
					w.to[id] = append(w.to[id], r.Address.String())
				}
			}
		}
		for range 20 {
			if work := w.takeNow(); work != nil {
				w.finishRandom(work)
			}
		}
		if round == 2 {
			w.events, w.now = w.readEvents(t), w.clock.Now()
			w.killed = readFiles(t, w.dir)
		}
		w.close()
	}
	w.closed = readFiles(t, w.dir)
	return w
}

func (f *fixture) readEvents(t *testing.T) (n int) {
	for after := uint64(0); ; {
		list, err := f.ob.Read(after, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			return n
		}
		n += len(list)
		after = list[len(list)-1].Seq
	}
}

func readFiles(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		out[strings.TrimPrefix(path, dir+"/")] = b
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// writeFiles leaves holes where there are zeros: the files are larger than what is in them.
func writeFiles(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, bytes.TrimRight(b, "\x00"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, int64(len(b))); err != nil {
			t.Fatal(err)
		}
	}
}

// harm damages one file: a bit, a page, or its end. Of a log it is the first half: as
// the last transaction is not whole after a power cut either.
func harm(how string, name string, b []byte, rng *rand.Rand) []byte {
	b = bytes.Clone(b)
	used := len(bytes.TrimRight(b, "\x00"))
	if strings.HasSuffix(name, ".mem") {
		used /= 2
	}
	at := rng.IntN(max(used, 1))
	switch how {
	case "bit":
		b[at] ^= 1 << rng.IntN(8)
	case "page":
		from := at &^ 4095
		clear(b[from:min(from+4096, len(b))])
	case "end":
		if strings.HasSuffix(name, ".mem") { // not between two transactions, which a start leaves
			at += bytes.Index(b[at:], []byte("example.com")) + 3
		}
		b = b[:at]
	}
	return b
}

// openHarmed opens a damaged store as the relay does and says what it was told, and
// what is not as it was without a word. The error is that of a store that refuses.
func (w *flipWard) openHarmed(t *testing.T, salvage string) (told bool, wrong []string, err error) {
	log := &listener{tester: t}
	f := newFixtureIn(log, w.dir)
	f.storage, f.clock.now = w.storage, w.now
	f.trusted = w.trusted
	st, err := store.Open(context.Background(), store.Config{Dir: f.dir, Storage: f.storage, Logger: slog.New(slog.DiscardHandler), MemTableBytes: 8 << 20, Inspect: salvage != "", Salvage: salvage})
	if err != nil {
		return true, nil, err
	}
	if salvage != "" {
		count, err := Fsck(context.Background(), st, FsckConfig{Bodies: true, Events: true, Repair: true, Quarantine: filepath.Dir(salvage), Now: f.clock.Now, Logger: slog.New(slog.DiscardHandler)})
		if err != nil || !count.Clean || count.Found[IndexDamaged] == 0 {
			t.Errorf("repair: %+v %v", count, err)
		}
	}
	if salvage != "" { // which ends the process in real life
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
		f.open()
	} else {
		f.openOn(st)
	}
	defer f.close()
	check, err := f.q.CheckInBackground(nil)
	if err != nil {
		t.Fatal(err)
	}
	<-check.Done()
	told = check.Problem() != "" || salvage != ""
	if n := f.readEvents(t); n < w.events {
		wrong = append(wrong, fmt.Sprintf("%d events of %d", n, w.events))
	}
	open := map[ids.Message]bool{}
	for r := range w.left {
		open[r.Message] = true
	}
	for id := range w.text {
		what := w.compare(f, id, open[id])
		told = told || what == unreadableText
		if what != "" && what != unreadableText {
			wrong = append(wrong, what)
		}
	}
	return told, wrong, nil
}

const unreadableText = "the text is known to be damaged"

// compare says how a message differs from what was accepted. What must not be, told or
// not, begins with an exclamation mark.
func (w *flipWard) compare(f *fixture, id ids.Message, open bool) string {
	info, err := f.q.Show(id)
	if !open && err == nil {
		return fmt.Sprintf("%v has come back", id)
	}
	if !open || err != nil && strings.Contains(err.Error(), "set aside") {
		return ""
	}
	if err != nil {
		return fmt.Sprintf("%v: %v", id, err)
	}
	if len(info.Env.Recipients) != len(w.to[id]) {
		return fmt.Sprintf("! %v has %d recipients", id, len(info.Env.Recipients))
	}
	for i, r := range info.Env.Recipients {
		if r.Address.String() != w.to[id][i] {
			return fmt.Sprintf("! %v goes to %v", id, r.Address)
		}
		if want, left := w.left[ids.Recipient{Message: id, Index: uint16(i)}]; info.Damaged == "" && (left && info.States[i].State != want || !left && !info.States[i].State.Final()) {
			return fmt.Sprintf("%v/%d is %v", id, i, info.States[i].State)
		}
	}
	text, err := f.st.ReadBody(info.Env.Body, nil)
	if err != nil {
		return unreadableText
	}
	if string(text) != w.text[id] {
		return fmt.Sprintf("! %v has another text", id)
	}
	return ""
}

// TestAWrongByteLosesNoMailSilently: a bit, a page or the end of any file of the store
// is damaged. The store either is as it was, says what it lacks, or does not open; and
// what does not open is repaired, with the damaged file kept.
func TestAWrongByteLosesNoMailSilently(t *testing.T) {
	w := newFlipWard(t)
	rng := rand.New(rand.NewPCG(11, 3))
	refused := map[string]int{}
	for round, files := range []map[string][]byte{w.killed, w.closed, w.killed, w.closed} {
		kinds := map[string][]string{}
		for name, b := range files {
			kind := filepath.Base(name)
			if ext := filepath.Ext(name); ext != "" {
				kind = ext
			}
			if len(b) > 0 && !slices.Contains([]string{"lock", "LOCK", "reserve"}, kind) && (kind != ".mem" || bytes.Contains(b, []byte("example.com"))) {
				kinds[kind] = append(kinds[kind], name)
			}
		}
		for _, kind := range slices.Sorted(maps.Keys(kinds)) {
			names := slices.Sorted(slices.Values(kinds[kind]))
			how := []string{"bit", "bit", "page", "end"}[(round+len(kind))%4]
			name := names[rng.IntN(len(names))]
			t.Run(fmt.Sprintf("%d/%s/%s", round, filepath.Base(name), how), func(t *testing.T) {
				if w.harmed(t, files, name, how, rng) {
					refused[kind]++
				}
			})
		}
	}
	for _, kind := range []string{".sst", ".mem", "MANIFEST"} {
		if refused[kind] == 0 {
			t.Errorf("damage of %s was never refused", kind)
		}
	}
}

// harmed damages a file and reports whether the store did not open with it.
func (w *flipWard) harmed(t *testing.T, files map[string][]byte, name, how string, rng *rand.Rand) bool {
	now := make(map[string][]byte, len(files))
	for n, b := range files {
		now[n] = b
	}
	now[name] = harm(how, name, files[name], rng)
	writeFiles(t, w.dir, now)
	told, wrong, err := w.openHarmed(t, "")
	if err == nil {
		for _, what := range wrong {
			if !told || strings.HasPrefix(what, "!") {
				t.Errorf("without a word: %s", what)
			}
		}
		return false
	}
	if file := filepath.Base(name); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "fsck --repair") || filepath.Ext(file) == ".mem" && !strings.Contains(err.Error(), file) {
		t.Errorf("the refusal says %q", err)
	}
	for n, b := range readFiles(t, w.dir) {
		if strings.HasPrefix(n, "index/") && !bytes.Equal(b, now[n]) {
			t.Errorf("%s was changed", n)
		}
	}
	folder := filepath.Join(t.TempDir(), "index")
	_, wrong, err = w.openHarmed(t, folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range wrong {
		if strings.HasPrefix(what, "!") {
			t.Error(what)
		}
	}
	if kept := readFiles(t, folder); len(now[name]) > 0 && !containsValue(kept, now[name]) {
		t.Errorf("%s is not kept as it was", name)
	}
	return true
}

func containsValue(files map[string][]byte, want []byte) bool {
	for _, b := range files {
		if bytes.Equal(b, want) {
			return true
		}
	}
	return false
}
