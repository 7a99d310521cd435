package store

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/relais-mta/relais/shared/fault"
)

// writtenLog is a log of some transactions, the last of many pages, and where each begins.
func writtenLog(t *testing.T, rng *rand.Rand) (data []byte, size int, begins []int) {
	s := openTest(t, testConfig(t.TempDir()))
	for i := range 20 {
		b := s.NewBatch()
		for j := range 3 + 57*(i/19) {
			value := make([]byte, 10+rng.IntN(900))
			for k := range value {
				value[k] = byte(rng.IntN(256))
			}
			b.Set([]byte{SpaceMessage, byte(i), byte(j)}, value)
		}
		if err := s.Commit(context.Background(), b); err != nil {
			t.Fatal(err)
		}
	}
	logs, err := memLogs(s.indexDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range logs {
		if data, size, err = readLog(s.memPath(n)); err != nil {
			t.Fatal(err)
		}
		if len(data) > 0 {
			break
		}
	}
	begins = append(begins, logHeaderBytes)
	for at := logHeaderBytes; at < len(data); {
		e, ok := parseLogEntry(data, at)
		if !ok {
			t.Fatalf("no entry at %d", at)
		}
		if at = e.end; e.meta&logBitEnd != 0 {
			begins = append(begins, at)
		}
	}
	return data, size, begins
}

func scan(data []byte, size int, followed bool) logTail {
	return scanLog(bytes.TrimRight(data, "\x00"), size, followed, func([]byte) {})
}

// TestWhatACrashLeavesOfALogIsNoDamage: a log whose last transaction stops anywhere, or
// lacks any of its pages, is what a kill or a power cut leaves. The relay has to start.
func TestWhatACrashLeavesOfALogIsNoDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 1))
	data, size, begins := writtenLog(t, rng)
	whole := len(begins) - 1
	last := begins[whole-1]
	if tail := scan(data, size, true); tail.damage != "" || tail.transactions != whole {
		t.Fatalf("the whole log: %+v", tail)
	}
	for n := last; n < len(data); n += 1 + rng.IntN(40) {
		if tail := scan(data[:n], size, false); tail.damage != "" || tail.transactions != whole-1 {
			t.Errorf("stops at %d: %+v", n, tail)
		}
	}
	for range 300 {
		torn, first := bytes.Clone(data), last
		for first < len(data) {
			end := min(first/4096*4096+4096, len(data))
			switch rng.IntN(3) {
			case 0:
				clear(torn[first:end]) // the page was not written
			case 1:
				clear(torn[first+rng.IntN(end-first) : end]) // or when the transaction had come to here
			}
			first = end
		}
		if tail := scan(torn, size, false); tail.damage != "" || tail.transactions < whole-1 {
			t.Fatalf("pages were not written: %+v", tail)
		}
	}
	if tail := scan(data[:last+100], size, true); tail.damage == "" {
		t.Error("a log that another follows may stop anywhere")
	}
}

// TestAWrongBitInALogIsNoticed: Badger takes it for the end, and all that follows for
// never written.
func TestAWrongBitInALogIsNoticed(t *testing.T) {
	rng := rand.New(rand.NewPCG(6, 1))
	data, size, begins := writtenLog(t, rng)
	last := begins[len(begins)-2]
	for range 500 {
		at, bit := logHeaderBytes+rng.IntN(last-logHeaderBytes), rng.IntN(8)
		data[at] ^= 1 << bit
		if tail := scan(data, size, false); tail.damage == "" {
			t.Errorf("bit %d at %d is not noticed", bit, at)
		}
		data[at] ^= 1 << bit
	}
	noticed := 0
	for range 200 {
		at := last + rng.IntN(len(data)-last)
		data[at] ^= 4
		if scan(data, size, false).damage != "" {
			noticed++
		}
		data[at] ^= 4
	}
	// What was being written when the power went may look the same, rarely.
	if noticed < 150 {
		t.Errorf("%d of 200 wrong bits in the last transaction are noticed", noticed)
	}
	for n := logHeaderBytes + 1; n < last; n += 1 + rng.IntN(200) {
		between := false
		for _, b := range begins {
			between = between || b == n
		}
		if tail := scanLog(data[:n], n, false, func([]byte) {}); tail.damage == "" && !between {
			t.Errorf("the end of the file at %d is not noticed", n)
		}
	}
}

// TestATableThatTheManifestDoesNotName: Badger removes it. That is right while the log
// it was made of is there, and loses mail otherwise.
func TestATableThatTheManifestDoesNotName(t *testing.T) {
	cfg := testConfig(t.TempDir())
	index := func(name string) string { return filepath.Join(cfg.Dir, "index", name) }
	s := openTest(t, cfg)
	id, _ := mustPut(t, s, []byte("a text"))
	before := map[string][]byte{}
	for _, name := range []string{badger.ManifestFilename, memName(1)} {
		data, err := os.ReadFile(index(name))
		if err != nil {
			t.Fatal(err)
		}
		before[name] = data
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	restore := func(name string) {
		if err := os.WriteFile(index(name), before[name], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	restore(badger.ManifestFilename)
	if _, err := Open(context.Background(), cfg); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "000001.sst") {
		t.Fatalf("the only copy is about to be removed: %v", err)
	}
	restore(memName(1))
	s = openTest(t, cfg)
	if _, err := s.Get(AppendMessageKey(nil, id), nil); err != nil {
		t.Error(err)
	}
}

// TestATableThatIsCutOff: whatever a table ends in, and be it zeros that a crash left of
// one that was never written, reading it says so.
func TestATableThatIsCutOff(t *testing.T) {
	b := table.NewTableBuilder(table.Options{TableSize: 1 << 20, BlockSize: 4 << 10, BloomFalsePositive: 0.01})
	defer b.Close()
	for i := range uint64(100) {
		b.Add(y.KeyWithTs(AppendDeadlineKey(nil, int64(i), newID()), 1), y.ValueStruct{Value: make([]byte, 100)}, 0)
	}
	whole := b.Finish()
	path := filepath.Join(t.TempDir(), table.IDToFilename(1))
	check := func(data []byte, right bool) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		read, err := openTable(path)
		if right != (err == nil) || !right && !errors.Is(err, errNotWhole) {
			t.Errorf("%d bytes: %v", len(data), err)
		}
		if err == nil {
			read.close()
		}
	}
	check(whole, true)
	check(make([]byte, len(whole)), false)
	for n := 0; n < len(whole); n += 13 {
		check(whole[:n], false)
	}
}

// BenchmarkVerifyIndex measures what reading all of the index costs a start.
func BenchmarkVerifyIndex(b *testing.B) {
	cfg := testConfig(b.TempDir())
	s := newStore(cfg)
	if err := os.MkdirAll(s.indexDir, 0o700); err != nil {
		b.Fatal(err)
	}
	x := &indexFiles{dir: s.indexDir, named: map[uint64]bool{}, levels: map[uint64]uint32{}}
	for n := range uint64(16) {
		t := table.NewTableBuilder(table.Options{TableSize: 8 << 20, BlockSize: 4 << 10, BloomFalsePositive: 0.01})
		for i := range uint64(20_000) {
			t.Add(y.KeyWithTs(AppendDeadlineKey(nil, int64(i), newID()), n+1), y.ValueStruct{Value: make([]byte, 100)}, 0)
		}
		data := t.Finish()
		t.Close()
		if err := os.WriteFile(filepath.Join(s.indexDir, table.IDToFilename(n+1)), data, 0o600); err != nil {
			b.Fatal(err)
		}
		x.named[n+1] = true
		b.SetBytes(int64(len(data)) * 16)
	}
	if err := s.rewriteManifest(x); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if x, err := examineIndex(s.indexDir); err != nil || len(x.damage) > 0 {
			b.Fatal(x, err)
		}
	}
}
