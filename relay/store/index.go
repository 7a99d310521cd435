package store

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// Settings of Badger. Memory: at most memTables tables in memory, each with a
// log of the same size mapped beside it.
const (
	defaultMemTableBytes = 32 << 20
	memTables            = 3
	valueThreshold       = 1 << 20 // nothing goes into the value log
	valueLogBytes        = 1 << 20 // the smallest that Badger takes: it stays empty
	fixedIndexBytes      = 8 << 20 // value log, discard statistics, manifest, key registry
	maxValueBytes        = valueThreshold - 1
)

// indexOptions are Badger's settings. Each that differs from the default has
// its reason in DESIGN.md.
func indexOptions(dir string, memTableBytes int64, log *slog.Logger) badger.Options {
	opt := badger.DefaultOptions(dir).
		WithSyncWrites(true).
		WithDetectConflicts(false).
		WithMetricsEnabled(false).
		WithMemTableSize(memTableBytes).
		WithNumMemtables(memTables).
		WithNumCompactors(2).
		WithNumGoroutines(2).
		WithBaseTableSize(2 << 20).
		WithValueThreshold(min(valueThreshold, memTableBytes/8)).
		WithValueLogFileSize(valueLogBytes).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithCompactL0OnClose(false).
		WithLogger(&badgerLog{log: log.With("part", "badger")})
	opt.TableSizeMultiplier = 1
	return opt
}

// badgerLog passes Badger's messages on; what it says in passing is for
// debugging only.
type badgerLog struct{ log *slog.Logger }

func (l *badgerLog) Errorf(f string, a ...any)   { l.log.Error(logLine(f, a)) }
func (l *badgerLog) Warningf(f string, a ...any) { l.log.Warn(logLine(f, a)) }
func (l *badgerLog) Infof(f string, a ...any)    { l.log.Debug(logLine(f, a)) }
func (l *badgerLog) Debugf(string, ...any)       {}

func logLine(f string, a []any) string { return strings.TrimSpace(fmt.Sprintf(f, a...)) }

func memName(n uint64) string { return fmt.Sprintf("%05d.mem", n) }

func (s *Store) memPath(n uint64) string { return filepath.Join(s.indexDir, memName(n)) }

// memLogs returns the numbers of the memory tables' logs in the index folder.
func memLogs(dir string) ([]uint64, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	if err != nil {
		return nil, err
	}
	var found []uint64
	for _, p := range paths {
		n, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(p), ".mem"), 10, 64)
		if err == nil {
			found = append(found, n)
		}
	}
	return found, nil
}

// removeUnusedLogs removes logs of length 0: Badger refuses to open with one,
// and there is one after every run, because the next log is made ahead of time.
func (s *Store) removeUnusedLogs() error {
	logs, err := memLogs(s.indexDir)
	if err != nil {
		return err
	}
	for _, n := range logs {
		info, err := os.Stat(s.memPath(n))
		if err != nil {
			return err
		}
		if info.Size() == 0 {
			if err := os.Remove(s.memPath(n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// openIndex opens Badger and gives the files it maps real blocks.
func (s *Store) openIndex(salvage string) error {
	if err := s.removeUnusedLogs(); err != nil {
		return diskFault(err, "store.Open")
	}
	if err := s.verifyIndex(salvage); err != nil {
		return err
	}
	opt := indexOptions(s.indexDir, s.memTableBytes, s.log)
	db, err := badger.Open(opt)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "store.Open", "the queue's index in %s does not open", s.indexDir)
	}
	s.db = db
	// A quarter of what a transaction may hold stays free for the committer's
	// own writes.
	s.maxGroupBytes = db.MaxBatchSize() * 3 / 4
	s.maxGroupEntries = int(db.MaxBatchCount() * 3 / 4)
	logs, err := memLogs(s.indexDir)
	if err != nil {
		return diskFault(err, "store.Open")
	}
	for _, n := range logs {
		s.nextMem = max(s.nextMem, n)
	}
	s.fillLog(s.memPath(s.nextMem))
	for _, pattern := range []string{"*.vlog", "DISCARD"} {
		found, _ := filepath.Glob(filepath.Join(s.indexDir, pattern)) // the pattern is well-formed
		for _, path := range found {
			s.fillFile(path)
		}
	}
	s.nextMem++
	s.makeLog()
	return nil
}

// prepareMemtable runs after every transaction. If that one made Badger take
// the log that was made ahead, it makes the next, so that a log's name and
// blocks are durable before the first acknowledged write goes into it: Badger
// syncs neither the directory nor the size, and maps a sparse file.
func (s *Store) prepareMemtable() {
	info, err := os.Stat(s.memPath(s.nextMem))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if s.prepareMemtableSoon.Swap(false) {
			s.makeLog()
		}
		return
	case err != nil || info.Size() == 0:
		return
	}
	if !s.logReady {
		// Badger had to make it by itself.
		s.fillLog(s.memPath(s.nextMem))
		if err := s.fs.SyncDir(s.indexDir); err != nil {
			s.log.Error("cannot sync the index directory", "error", err)
		}
	}
	s.nextMem++
	s.makeLog()
}

// makeLog makes the next memory table's log: empty, so that Badger takes it
// for new, but with its blocks reserved behind the end.
func (s *Store) makeLog() {
	s.logReady = false
	path := s.memPath(s.nextMem)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		s.log.Warn("cannot make the next log of the index ahead of time", "error", err)
		return
	}
	err = allocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, s.walBytes)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = s.fs.SyncDir(s.indexDir)
	}
	if err != nil {
		s.log.Warn("cannot reserve space for the next log of the index; the reserve covers it", "error", err)
		if rerr := os.Remove(path); rerr != nil {
			s.log.Warn("cannot remove an unused log", "error", rerr)
		}
		return
	}
	s.logReady = true
}

// fillLog reserves the blocks of a log that Badger made.
func (s *Store) fillLog(path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		err = allocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, s.walBytes)
		_ = f.Close() // nothing was written through it
	}
	if err != nil {
		s.log.Warn("cannot reserve space for a log of the index; the reserve covers it", "error", err)
	}
}

// fillFile reserves blocks for all of a sparse file.
func (s *Store) fillFile(path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		var info os.FileInfo
		if info, err = f.Stat(); err == nil && info.Size() > 0 {
			err = allocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, info.Size())
		}
		_ = f.Close() // nothing was written through it
	}
	if err != nil {
		s.log.Warn("cannot reserve space for a file of the index; the reserve covers it", "file", path, "error", err)
	}
}
