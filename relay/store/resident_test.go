package store

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fillIndex writes records until the index has some tables on disk.
func fillIndex(t *testing.T, s *Store, from, n int) {
	t.Helper()
	for n > 0 {
		b := s.NewBatch()
		for range min(n, 500) {
			b.Set(recordKey(from), recordValue(from))
			from++
			n--
		}
		if err := s.Commit(context.Background(), b); err != nil {
			t.Fatal(err)
		}
	}
}

func recordKey(i int) []byte { return binary.BigEndian.AppendUint64([]byte("z"), uint64(i)) }

func recordValue(i int) []byte {
	return bytes.Repeat(binary.BigEndian.AppendUint64(nil, uint64(i)*2654435761), 100)
}

func checkIndex(t *testing.T, s *Store, n int) {
	t.Helper()
	snap := s.Snapshot()
	defer snap.Close()
	i := 0
	err := snap.Iterate([]byte("z"), nil, false, func(k, v []byte) bool {
		if !bytes.Equal(k, recordKey(i)) || !bytes.Equal(v, recordValue(i)) {
			t.Errorf("record %d of %d is wrong: key %x", i, n, k)
			return false
		}
		i++
		return true
	})
	if err != nil || i != n {
		t.Fatalf("read %d of %d records, %v", i, n, err)
	}
}

// tablesResident is how much of the store's tables is resident, by smaps, and
// how many of them are mapped.
func tablesResident(t *testing.T, s *Store) (bytes int64, tables int) {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ours := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		switch {
		case strings.Contains(words[0], "-"):
			ours = strings.HasPrefix(words[len(words)-1], s.indexDir) && strings.HasSuffix(words[len(words)-1], ".sst")
			if ours {
				tables++
			}
		case ours && words[0] == "Rss:":
			kib, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			bytes += kib << 10
		}
	}
	return bytes, tables
}

func TestPagesOfTablesAreGivenBack(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.MemTableBytes = minMemTableBytes
	s := openTest(t, cfg)
	const records = 40_000
	fillIndex(t, s, 0, records)
	eventually(t, "tables on disk", func() bool { return len(s.db.Tables()) > 0 })
	checkIndex(t, s, records)
	before, tables := tablesResident(t, s)
	if tables == 0 || before < minMemTableBytes/2 {
		t.Fatalf("%d tables with %d resident bytes: nothing to give back", tables, before)
	}
	// A compaction may map another table meanwhile, so it is asked for again.
	eventually(t, "the pages to be given back", func() bool {
		if err := s.releaseTables(); err != nil {
			t.Fatal(err)
		}
		after, _ := tablesResident(t, s)
		return after < before/4
	})
	checkIndex(t, s, records)
}

// What a compaction has made and not yet put into place is paged out.
func TestPagesOfUnfinishedTablesArePagedOut(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.MemTableBytes = minMemTableBytes
	s := openTest(t, cfg)
	const records = 40_000
	fillIndex(t, s, 0, records)
	eventually(t, "tables on disk", func() bool { return len(s.db.Tables()) > 0 })
	checkIndex(t, s, records)
	before, _ := tablesResident(t, s)
	eventually(t, "the pages to be paged out", func() bool {
		maps, err := s.tableMaps()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range maps {
			if err := m.advise(unix.MADV_PAGEOUT); err != nil && !errors.Is(err, unix.ENOMEM) {
				t.Fatal(err)
			}
		}
		after, _ := tablesResident(t, s)
		return after < before/4
	})
	checkIndex(t, s, records)
}

// Tables come and go while their pages are given back: nothing that is written
// or read meanwhile is lost, neither on disk nor in the heap.
func TestPagesAreGivenBackWhileTablesChange(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.MemTableBytes = minMemTableBytes
	s := openTest(t, cfg)
	const rounds, perRound = 12, 5_000
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := s.releaseTables(); err != nil {
				done <- err
				return
			}
		}
	}()
	seen := make(map[uint64]bool)
	for i := range rounds {
		fillIndex(t, s, i*perRound, perRound)
		for _, table := range s.db.Tables() {
			seen[table.ID] = true
		}
	}
	checkIndex(t, s, rounds*perRound)
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	checkIndex(t, s, rounds*perRound)
	if len(seen) < 3 {
		t.Errorf("only %d tables were made: the test shows nothing", len(seen))
	}
}

func TestParseRange(t *testing.T) {
	for _, tc := range []struct {
		line     string
		from, to uintptr
		ok       bool
	}{
		{"7f5c2a000000-7f5c2c000000 r--s 00000000 fe:00 123 /data/index/000012.sst", 0x7f5c2a000000, 0x7f5c2c000000, true},
		{"7f5c2c000000-7f5c2a000000 r--s", 0, 0, false},
		{"nonsense", 0, 0, false},
		{"12-", 0, 0, false},
		{"", 0, 0, false},
	} {
		from, to, ok := parseRange(tc.line)
		if ok != tc.ok || ok && (from != tc.from || to != tc.to) {
			t.Errorf("parseRange(%q) = %x, %x, %v", tc.line, from, to, ok)
		}
	}
}

// Many ranges go into one call, and those that are gone do not keep the others
// from being told. MADV_PAGEOUT does no harm to what may be mapped there instead.
func TestRangesAreAdvisedTogether(t *testing.T) {
	const size = 64 << 10
	var maps []tableMap
	kept := make(map[uintptr][]byte)
	for i := range 5 {
		f, err := os.Create(t.TempDir() + "/f")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		data, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		copy(data, bytes.Repeat([]byte{byte(i)}, size))
		if err := unix.Msync(data, unix.MS_SYNC); err != nil {
			t.Fatal(err)
		}
		at := uintptr(unsafe.Pointer(&data[0]))
		maps = append(maps, tableMap{id: uint64(i), at: at, length: size})
		kept[at] = data
	}
	for i, m := range maps {
		if i == 0 || i == 2 {
			if err := unix.Munmap(kept[m.at]); err != nil {
				t.Fatal(err)
			}
			delete(kept, m.at)
		}
	}
	defer func() {
		for _, data := range kept {
			_ = unix.Munmap(data)
		}
	}()
	eventually(t, "the pages to be paged out", func() bool {
		if err := adviseAll(maps, unix.MADV_PAGEOUT); err != nil {
			t.Fatal(err)
		}
		left := int64(0)
		for at := range kept {
			left += residentAt(t, at)
		}
		return left == 0
	})
	for at, data := range kept {
		for i, m := range maps {
			if m.at == at && (data[0] != byte(i) || data[size-1] != byte(i)) {
				t.Errorf("range %d reads %d", i, data[0])
			}
		}
	}
}

// residentAt is how much of the mapping at an address is resident, by smaps.
func residentAt(t *testing.T, at uintptr) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	ours := false
	for line := range strings.Lines(string(text)) {
		if from, to, ok := parseRange(line); ok {
			ours = from <= at && at < to
		} else if words := strings.Fields(line); ours && words[0] == "Rss:" {
			kib, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatalf("nothing is mapped at %x", at)
	return 0
}

func TestAdvisedRangesAreCounted(t *testing.T) {
	maps := []tableMap{{length: 10}, {length: 20}, {length: 30}}
	for _, tc := range []struct{ bytes, want int }{{0, 1}, {10, 2}, {30, 3}, {60, 3}} {
		if got := advised(maps, uintptr(tc.bytes)); got != tc.want {
			t.Errorf("%d bytes are %d ranges, want %d", tc.bytes, got, tc.want)
		}
	}
}
