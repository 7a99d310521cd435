package store

import (
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Segment sizes and how long a failed disk is left alone.
const (
	minSegmentBytes  = 1 << 20
	maxSegmentBytes  = 4 << 30
	diskRetryAfter   = 2 * time.Second
	tailSpareDivisor = 4 // a new segment takes at most this part of the space above the high-water mark
)

// segment is the file that bodies are appended to. Only writeLoop touches it.
type segment struct {
	number uint64
	file   File
	end    int64 // where the next record begins
	size   int64 // allocated
}

// writeBodies appends the bodies of a group to the segment and syncs it. On
// failure the batches with bodies get the error and the segment is left for
// good: after a failed sync nobody knows what its pages hold.
func (s *Store) writeBodies(g *group) {
	for _, b := range g.batches {
		for _, p := range b.bodies {
			if p.body.file != nil {
				s.ledger.addFile(p.body.ref)
			}
		}
	}
	if g.bodyBytes == 0 {
		return
	}
	// The write counts like the sync: a file system that hangs may take neither,
	// nor give a new segment.
	s.bodySince.Store(time.Now().UnixNano())
	err := s.appendBodies(g)
	s.bodySince.Store(0)
	if err == nil {
		return
	}
	s.diskFailed(err)
	for _, b := range g.batches {
		if len(b.bodies) == 0 {
			continue
		}
		b.err = err
		for _, p := range b.bodies {
			if p.body.file != nil {
				s.ledger.forget(p.body.ref)
			}
		}
	}
}

func (s *Store) appendBodies(g *group) error {
	const op = "store.Commit"
	if err := s.roomInSegment(g.bodyBytes); err != nil {
		return diskFault(err, op)
	}
	seg := s.segment
	at := seg.end
	for _, b := range g.batches {
		for i, p := range b.bodies {
			if p.body.file != nil {
				continue
			}
			p.body.ref.Segment, p.body.ref.Offset = seg.number, at+recordHeaderBytes
			b.place(i, seg.number, at+recordHeaderBytes)
			g.vectors = append(g.vectors, p.body.buf)
			at += int64(len(p.body.buf))
		}
	}
	err := seg.file.WriteVectors(g.vectors, seg.end)
	if err == nil {
		began := time.Now()
		err = seg.file.Sync()
		s.metrics.bodySync.Observe(time.Since(began).Seconds())
	}
	if err != nil {
		s.abandonSegment(err)
		return diskFault(err, op)
	}
	seg.end = at
	g.segment = seg.number
	s.ledger.addSegment(seg.number, g)
	return nil
}

// roomInSegment makes sure that a segment with room for n bytes is open.
func (s *Store) roomInSegment(n int64) error {
	if s.segment != nil && s.segment.end+n <= s.segment.size {
		return nil
	}
	s.sealSegment()
	size := max(min(s.limits().SegmentBytes, maxSegmentBytes), minSegmentBytes, n)
	if space, err := s.fs.Space(s.bodyDir); err == nil {
		// A nearly full disk gets small segments, so that opening one does not
		// itself cross the high-water mark.
		spare := (space.FreeBytes - s.limits().MinFreeBytes) / tailSpareDivisor
		size = max(min(size, spare), minSegmentBytes, n)
	}
	number := s.nextFile.Add(1)
	path := s.segmentPath(number)
	f, err := s.fs.Create(path)
	if err != nil {
		return err
	}
	err = f.Allocate(0, size)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = s.fs.SyncDir(s.bodyDir)
	}
	if err != nil {
		_ = f.Close() // it holds nothing
		if rerr := s.fs.Remove(path); rerr != nil {
			s.log.Warn("cannot remove an unused segment; the next start sweeps it", "file", path, "error", rerr)
		}
		return err
	}
	s.segment = &segment{number: number, file: f, size: size}
	s.ledger.open(number, size)
	return nil
}

// sealSegment ends the current segment and gives its unused tail back.
func (s *Store) sealSegment() {
	seg := s.segment
	if seg == nil {
		return
	}
	s.segment = nil
	if err := seg.file.Truncate(seg.end); err != nil {
		s.log.Warn("cannot give back the unused end of a segment", "segment", seg.number, "error", err)
	}
	_ = seg.file.Close() // every record in it is synced already
	s.ledger.seal(seg.number, seg.end)
	s.wakeReclaim()
}

// abandonSegment leaves a segment whose last write or sync failed. What was
// synced before stays readable; what is allocated behind it would be held by the
// slowest mail in it, one segment for each failure.
func (s *Store) abandonSegment(cause error) {
	seg := s.segment
	s.segment = nil
	if err := seg.file.Truncate(seg.end); err != nil {
		s.log.Warn("cannot give back the unused end of a segment that failed; the next start does", "segment", seg.number, "error", err)
	}
	_ = seg.file.Close() // the error that counts is the one that brought us here
	s.ledger.seal(seg.number, seg.end)
	s.metrics.abandoned.Inc()
	s.log.Error("a body segment failed and is not written to again", "segment", seg.number, "error", cause)
}

// diskFailed turns health bad for a while. The next message after it tries the
// disk again with a new file.
func (s *Store) diskFailed(err error) {
	s.diskError.Store(&diskTrouble{err: err, until: time.Now().Add(diskRetryAfter)})
	s.metrics.diskErrors.Inc()
}

type diskTrouble struct {
	err   error
	until time.Time
}

// diskHealth returns the disk's last error for as long as it counts.
func (s *Store) diskHealth() error {
	t := s.diskError.Load()
	if t == nil {
		return nil
	}
	if time.Now().After(t.until) {
		s.diskError.CompareAndSwap(t, nil)
		return nil
	}
	return &fault.Error{Kind: fault.KindOf(t.err), Op: "store.Admit", Public: "the disk does not take messages at the moment: " + fault.Public(t.err), Cause: t.err}
}
