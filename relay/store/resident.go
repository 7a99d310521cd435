package store

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"
)

// Badger maps its tables, and every page that a compaction, a count or an
// iteration touched stays with the process until its table goes. With a deep
// queue that would be the whole index, and count as the relay's memory. The
// pages are in the page cache all the same: giving the mappings' pages back
// leaves them there, and the next access finds them with a minor fault.
const (
	residentInterval = 100 * time.Millisecond
	maxMappedBytes   = 128 << 20 // resident pages of files, the program's own included
	statmShared      = 2         // field of proc_pid_statm(5): resident pages of files
)

// residentLoop keeps the resident pages of mapped files near maxMappedBytes.
func (s *Store) residentLoop() {
	defer close(s.residentDone)
	ticker := time.NewTicker(residentInterval)
	defer ticker.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-ticker.C:
		}
		if mapped, err := mappedResident(); err != nil || mapped <= maxMappedBytes {
			continue // without /proc nothing can be found out, and nothing is lost
		}
		if err := s.releaseTables(); err != nil {
			s.log.Warn("pages of the index cannot be given back; the relay holds more memory", "error", err)
		}
	}
}

// mappedResident is how many bytes of files the process has in memory.
func mappedResident() (int64, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(text)
	if len(fields) <= statmShared {
		return 0, nil
	}
	pages, err := strconv.ParseInt(string(fields[statmShared]), 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// releaseTables gives the resident pages of Badger's tables back.
//
// MADV_DONTNEED leaves them in the page cache. It may only be said of a range
// that nothing can unmap: another mapping, such as the heap, could take its
// place, and its pages would be gone. An iterator over everything holds all
// tables that were there when it was made. Numbers of tables are never used
// again, so one that was there before and after was there in between.
//
// A large compaction makes hundreds of tables before the first of them is
// there. They get MADV_PAGEOUT, which takes them out of the page cache as well,
// and can do no harm whatever the range has become. It may wait for the disk, with
// the process's mappings locked, and so is only used when the rest was not enough.
//
// All tables are named in one system call: with hundreds of goroutines ready to
// run, each call may cost this one a tenth of a second until it is its turn again.
func (s *Store) releaseTables() error {
	before := s.db.Tables()
	snap := s.Snapshot()
	defer snap.Close()
	opt := badger.DefaultIteratorOptions
	opt.PrefetchValues = false
	it := snap.view.txn.NewIterator(opt)
	defer it.Close()
	there := make(map[uint64]bool, len(before))
	for _, t := range before {
		there[t.ID] = false
	}
	for _, t := range s.db.Tables() {
		if _, ok := there[t.ID]; ok {
			there[t.ID] = true
		}
	}
	maps, err := s.tableMaps()
	if err != nil {
		return err
	}
	var ours, others []tableMap
	for _, m := range maps {
		if there[m.id] {
			ours = append(ours, m)
		} else {
			others = append(others, m)
		}
	}
	if err := adviseAll(ours, unix.MADV_DONTNEED); err != nil {
		return err
	}
	if mapped, err := mappedResident(); err != nil || mapped <= maxMappedBytes {
		return err
	}
	return adviseAll(others, unix.MADV_PAGEOUT)
}

// tableMap is where a table of Badger's is mapped.
type tableMap struct {
	id         uint64
	at, length uintptr
}

// maxAdvised is how many ranges one call of process_madvise(2) takes.
const maxAdvised = 1024

// adviseAll says the same of many mappings, by address, because they are Badger's
// and not in our hands. A kernel before 6.13 takes MADV_DONTNEED for one at a time
// only.
func adviseAll(maps []tableMap, advice uintptr) error {
	pid, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return adviseEach(maps, advice)
	}
	defer unix.Close(pid) // nothing is written
	ranges := make([]remoteRange, min(len(maps), maxAdvised))
	for len(maps) > 0 {
		n := copyRanges(ranges, maps)
		done, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pid), uintptr(unsafe.Pointer(&ranges[0])), uintptr(n), advice, 0, 0)
		switch errno {
		case 0:
			maps = maps[advised(maps[:n], done):]
		case unix.ENOMEM: // the first was unmapped meanwhile
			maps = maps[1:]
		default:
			return adviseEach(maps, advice)
		}
	}
	return nil
}

// remoteRange is a struct iovec of another process (process_madvise(2)): an
// address that is none to the garbage collector.
type remoteRange struct{ at, length uintptr }

func copyRanges(to []remoteRange, from []tableMap) int {
	n := min(len(to), len(from))
	for i, m := range from[:n] {
		to[i] = remoteRange{m.at, m.length}
	}
	return n
}

// advised is how many of the mappings are done with when so many bytes of them
// are: one that stopped the call is passed over.
func advised(maps []tableMap, bytes uintptr) int {
	for i, m := range maps {
		if bytes < m.length {
			return i + 1
		}
		bytes -= m.length
	}
	return len(maps)
}

func adviseEach(maps []tableMap, advice uintptr) error {
	for _, m := range maps {
		if err := m.advise(advice); err != nil {
			return err
		}
	}
	return nil
}

func (m *tableMap) advise(advice uintptr) error {
	switch _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.at, m.length, advice); errno {
	case 0, unix.EINVAL, unix.ENOMEM: // an older kernel; unmapped since
		return nil
	default:
		return errno
	}
}

// tableMaps finds them in the lines of proc_pid_maps(5).
func (s *Store) tableMaps() ([]tableMap, error) {
	dir, err := filepath.Abs(s.indexDir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []tableMap
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		digits, ok := strings.CutSuffix(line, ".sst")
		if !ok {
			continue
		}
		at := strings.LastIndexByte(digits, '/')
		id, err := strconv.ParseUint(digits[at+1:], 10, 64)
		if at < 0 || err != nil || !strings.HasSuffix(digits[:at], dir) {
			continue
		}
		if from, to, ok := parseRange(line); ok {
			out = append(out, tableMap{id, from, to - from})
		}
	}
	return out, lines.Err()
}

// parseRange reads the addresses of a line, "7f5c2a000000-7f5c2c000000 r--s ...".
func parseRange(line string) (from, to uintptr, ok bool) {
	first, rest, _ := strings.Cut(line, "-")
	last, _, _ := strings.Cut(rest, " ")
	a, err := strconv.ParseUint(first, 16, strconv.IntSize)
	if err != nil {
		return 0, 0, false
	}
	b, err := strconv.ParseUint(last, 16, strconv.IntSize)
	return uintptr(a), uintptr(b), err == nil && b > a
}
