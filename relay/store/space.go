package store

import (
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// How often free space is looked at, and in how many slices the ballast is
// given up, so that another process that eats what it finds does not get all
// of it at once.
const (
	spaceInterval   = 100 * time.Millisecond
	ballastInterval = 500 * time.Millisecond
	ballastSlices   = 8
	calmBytes       = 1 << 20 // free space that shrinks by less from sample to sample is at rest,
	calmSamples     = 4       // after so many of them in a row: a process that writes may be paused for a moment
)

// SetLimits changes the limits while the store runs.
func (s *Store) SetLimits(limits policy.Storage) {
	s.limitsNow.Store(&limits)
	s.wakeReclaim()
}

func (s *Store) limits() *policy.Storage { return s.limitsNow.Load() }

// Admit says whether a message of so many bytes may be accepted now; if not,
// it returns a fault of kind NoSpace, or Unavailable when the disk or the
// index failed. Call it before the message is received, with the size the
// client declared, or with 0 to ask in general. What was admitted since free
// space was last measured counts as used.
func (s *Store) Admit(bytes int64) error {
	if err := s.failure(); err != nil {
		return err
	}
	if err := s.diskHealth(); err != nil {
		return err
	}
	if err := s.stalled(); err != nil {
		return err
	}
	s.measureSpace(false)
	const op = "store.Admit"
	if s.readOnly.Load() {
		return fault.New(fault.Unavailable, op, "the data directory's file system is read-only")
	}
	limits := s.limits()
	// The reserve is not for new mail: what of it was given up does not count.
	given := max(limits.ReserveBytes-s.ballastBytes.Load(), 0)
	free := s.freeBytes.Load() - given - s.admitted.Add(bytes)
	if free < limits.MinFreeBytes {
		return fault.New(fault.NoSpace, op, "the disk has %d MiB left for mail, fewer than storage.min_free_bytes allows", max(free, 0)>>20)
	}
	if short := s.growthBytes.Load() - free - limits.ReserveBytes; short > 0 {
		return fault.New(fault.NoSpace, op, "the disk has too little left for the queue's own growth; free %d MiB", short>>20+1)
	}
	if inodes := s.freeInodes.Load(); inodes >= 0 && inodes < limits.MinFreeInodes {
		return fault.New(fault.NoSpace, op, "the disk has %d inodes left, fewer than storage.min_free_inodes allows", inodes)
	}
	return nil
}

// Health is nil while the store can accept mail, and otherwise says why not.
func (s *Store) Health() error { return s.Admit(0) }

// measureSpace asks the file system at most every spaceInterval.
func (s *Store) measureSpace(now bool) {
	at := time.Now()
	if last := s.measuredAt.Load(); !now && at.UnixNano()-last < int64(spaceInterval) {
		return
	}
	if !s.measuring.TryLock() {
		return
	}
	defer s.measuring.Unlock()
	space, err := s.fs.Space(s.bodyDir)
	if err != nil {
		s.diskFailed(err)
		return
	}
	s.admitted.Store(0)
	s.freeBytes.Store(space.FreeBytes)
	inodes := space.FreeInodes
	if space.NoInodes {
		inodes = -1
	}
	s.freeInodes.Store(inodes)
	s.readOnly.Store(space.ReadOnly)
	s.measuredAt.Store(at.UnixNano())
	if space.FreeBytes < s.lowWater() && s.ballastBytes.Load() > 0 {
		s.wakeReclaim()
	}
}

// lowWater is the free space below which the ballast is given up slice by
// slice: what the index may need before anybody looks again.
func (s *Store) lowWater() int64 {
	return max(s.limits().MinFreeBytes/2, 2*s.walBytes)
}

// hardMark is the free space below which no transaction is committed: a commit
// may rotate the memory table, and then its table and a new log need blocks at
// once, or the process dies in a map of a sparse file.
func (s *Store) hardMark() int64 { return s.memTableBytes + fixedIndexBytes }

// keepBallast gives the reserve up when space runs out, so that deliveries can
// still be recorded, and takes it again when space is back. It also estimates
// how much the index may grow before it shrinks.
func (s *Store) keepBallast() {
	s.ballastLock.Lock()
	defer s.ballastLock.Unlock()
	s.growthBytes.Store(s.estimateGrowth())
	s.measureSpace(true)
	want := s.limits().ReserveBytes
	have := s.ballastBytes.Load()
	free := s.freeBytes.Load()
	slice := max(want/ballastSlices, 1<<20)
	switch {
	case have > want:
		s.shrinkBallast(want)
	case free < s.lowWater() && have > 0 && s.calm(free):
		// Whole slices, enough to be above the mark again.
		give := (s.lowWater() - free + slice - 1) / slice * slice
		s.shrinkBallast(max(have-give, 0))
		s.log.Warn("disk nearly full: gave up a part of the reserve", "free_bytes", free, "reserve_bytes", s.ballastBytes.Load())
	case have < want && free > s.limits().MinFreeBytes+slice:
		s.growBallast(min(have+min(slice*ballastSlices, free-s.limits().MinFreeBytes-slice), want))
	}
}

// calm reports whether free space has stopped shrinking. What another process
// that is still writing would take within the millisecond is kept: most of them
// end when the disk is full, and until then commits wait.
func (s *Store) calm(free int64) bool {
	now := time.Now()
	if now.Sub(s.sampledAt) < spaceInterval*3/4 {
		return false
	}
	if now.Sub(s.sampledAt) < 4*ballastInterval && free >= s.sampledFree-calmBytes {
		s.calmSamples++
	} else {
		s.calmSamples = 0
	}
	s.sampledAt, s.sampledFree = now, free
	return s.calmSamples >= calmSamples
}

// estimateGrowth bounds what Badger may add to the disk before it removes
// anything: the memory tables that wait to be flushed, and one compaction of
// all of level 0 with the level below it, whose inputs are removed last.
func (s *Store) estimateGrowth() int64 {
	growth := int64(memTables+1) * s.memTableBytes
	for _, level := range s.db.Levels() {
		if level.Level == 0 || level.IsBaseLevel {
			growth += level.Size
		}
	}
	return growth
}

func (s *Store) ballastPath() string { return filepath.Join(s.dir, "reserve") }

func (s *Store) shrinkBallast(to int64) {
	if err := s.ballast.Truncate(to); err != nil {
		s.log.Error("cannot give up the reserve", "error", err)
		return
	}
	s.ballastBytes.Store(to)
	s.measureSpace(true)
}

func (s *Store) growBallast(to int64) {
	have := s.ballastBytes.Load()
	if to <= have {
		return
	}
	if err := s.ballast.Allocate(have, to-have); err != nil {
		if !isNoSpace(err) {
			s.log.Warn("cannot reserve disk space", "error", err)
		}
		_ = s.ballast.Truncate(have) // whatever part of the range was allocated
		return
	}
	s.ballastBytes.Store(to)
	s.measureSpace(true)
}

// openBallast opens the reserve as an earlier run left it and makes sure that
// Badger has room to open: its files are sparse maps, and touching one on a
// full disk kills the process.
func (s *Store) openBallast() error {
	const op = "store.Open"
	f, err := s.fs.Open(s.ballastPath())
	if err != nil {
		if f, err = s.fs.Create(s.ballastPath()); err != nil {
			return diskFault(err, op)
		}
	}
	s.ballast = f
	size, _, err := f.Stat()
	if err != nil {
		return diskFault(err, op)
	}
	s.ballastBytes.Store(size)
	s.measureSpace(true)
	need := s.openNeeds()
	if short := need - s.freeBytes.Load(); short > 0 && size > 0 {
		s.shrinkBallast(max(size-short, 0))
	}
	if free := s.freeBytes.Load(); free < need {
		return fault.New(fault.NoSpace, op, "%s has %d MiB free, opening the queue takes %d MiB: free some space first", s.dir, free>>20, need>>20)
	}
	return nil
}

// openNeeds is what opening Badger can write before anything is removed: every
// log that the last run left becomes a table, and there are new logs.
func (s *Store) openNeeds() int64 {
	logs := int64(1)
	if left, err := filepath.Glob(filepath.Join(s.indexDir, "*.mem")); err == nil {
		logs += int64(len(left))
	}
	return logs*s.memTableBytes + 2*s.walBytes + fixedIndexBytes
}

// allocate gives an existing file real blocks, so that writing through its map
// cannot fail.
func allocate(fd int, mode uint32, length int64) error {
	return ignoreInterrupts(func() error { return unix.Fallocate(fd, mode, 0, length) })
}
