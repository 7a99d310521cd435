package store

import (
	"os"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// Reclaim settings. Scanning for holes reads every envelope once, so it has to
// be worth it and must not happen often.
const (
	punchAlignBytes   = 4096
	punchDivisor      = 4        // a segment is punched when at most a quarter of it lives
	minPunchBytes     = 64 << 20 // and when all such segments give back at least this much
	punchInterval     = time.Minute
	punchCostFactor   = 20 // a scan may take at most one part in so many of the time
	maxUnlinkPerRound = 64
)

func (s *Store) wakeReclaim() {
	select {
	case s.reclaimWake <- struct{}{}:
	default:
	}
}

// reclaimLoop counts the bodies found at start, then gives space back as
// bodies die, and looks after the ballast.
func (s *Store) reclaimLoop(snap *Snapshot) {
	defer close(s.reclaimDone)
	if snap != nil {
		s.countBodies(snap)
	}
	ticker := time.NewTicker(ballastInterval)
	defer ticker.Stop()
	nextPunch := time.Now().Add(punchInterval)
	for {
		select {
		case <-s.stop:
			return
		case <-s.reclaimWake:
			if s.freeBytes.Load() < s.lowWater() {
				s.keepBallast()
			}
		case <-ticker.C:
			s.keepBallast()
			s.prepareMemtableSoon.Store(true)
		}
		s.unlinkDead()
		if now := time.Now(); now.After(nextPunch) {
			s.punchSparse()
			nextPunch = time.Now().Add(max(punchInterval, punchCostFactor*time.Since(now)))
		}
	}
}

// findFiles lists the body directory at start. Files that appear later are
// never swept.
func (s *Store) findFiles() error {
	entries, err := os.ReadDir(s.bodyDir)
	if err != nil {
		return err
	}
	var highest uint64
	for _, e := range entries {
		name, kind := e.Name(), relay.BodyNone
		digits, ok := strings.CutSuffix(name, ".seg")
		if ok {
			kind = relay.BodySegment
		} else if digits, ok = strings.CutSuffix(name, ".body"); ok {
			kind = relay.BodyFile
		}
		number, err := strconv.ParseUint(digits, 16, 64)
		if kind == relay.BodyNone || err != nil {
			s.log.Warn("a file in the body directory is not ours and is left alone", "file", name)
			continue
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		s.ledger.found(number, kind, info.Size())
		highest = max(highest, number)
	}
	s.nextFile.Store(highest)
	return nil
}

// countBodies reads the body references of all records as they were at start,
// so that files and segments without a living body can go: those are what a
// crash between body and index left, or an interrupted removal.
func (s *Store) countBodies(snap *Snapshot) {
	defer snap.Close()
	missing, unreadable, stopped := 0, 0, false
	for _, space := range []byte{SpaceMessage, SpaceInbound} {
		err := snap.Iterate([]byte{space}, nil, false, func(key, value []byte) bool {
			select {
			case <-s.stop:
				stopped = true
				return false
			default:
			}
			ref, ok := refOf(value)
			if !ok {
				unreadable++
				return true
			}
			if ref.Kind == relay.BodyNone {
				return true
			}
			switch err := s.CheckRef(ref); {
			case fault.Is(err, fault.NotFound):
				missing++
			case err != nil:
				unreadable++
			default:
				s.ledger.scannedBody(ref)
			}
			return true
		})
		if err != nil {
			s.log.Error("cannot count the stored bodies; nothing found at start is removed", "error", err)
			return
		}
	}
	if stopped {
		return
	}
	if missing > 0 {
		s.log.Error("messages whose body file is missing: no file found at start is removed; see relais-relay queue fsck", "messages", missing)
		s.metrics.missingBodies.Set(float64(missing))
	}
	if unreadable > 0 {
		s.log.Error("records with a damaged body reference: no file found at start is removed; see relais-relay queue fsck", "records", unreadable)
	}
	if missing+unreadable > 0 {
		// Their bodies may be in any file, and are all that is left of the mail: of a
		// file that is missing, the number may be what is damaged.
		close(s.scanned)
		return
	}
	for number, end := range s.ledger.tails() {
		s.cutTail(number, end)
	}
	s.ledger.mu.Lock()
	s.ledger.scanned = true
	s.ledger.mu.Unlock()
	close(s.scanned)
	s.wakeReclaim()
}

// refOf reads the body reference behind a value's codec version.
func refOf(value []byte) (relay.BodyRef, bool) {
	if len(value) < 1 {
		return relay.BodyRef{}, false
	}
	return ParseRef(value[1:])
}

func (s *Store) cutTail(number uint64, end int64) {
	f, err := s.fs.Open(s.segmentPath(number))
	if err == nil {
		err = f.Truncate(end)
		_ = f.Close() // the truncation is not worth a retry
	}
	if err != nil {
		s.log.Warn("cannot cut the unused end of a segment", "segment", number, "error", err)
	}
}

func (s *Store) unlinkDead() {
	for {
		dead := s.ledger.takeDead(maxUnlinkPerRound)
		for _, ref := range dead {
			s.handles.forget(ref)
			if err := s.fs.Remove(s.refPath(ref)); err != nil {
				s.log.Warn("cannot remove a body file; the next start tries again", "file", s.refPath(ref), "error", err)
				continue
			}
			s.metrics.unlinked.Inc()
		}
		if len(dead) < maxUnlinkPerRound {
			return
		}
	}
}

type span struct{ from, to int64 }

// punchSparse gives back the dead parts of segments that a few slow messages
// keep alive.
func (s *Store) punchSparse() {
	sparse := s.ledger.sparse(punchDivisor, minPunchBytes)
	if len(sparse) == 0 {
		return
	}
	living := make(map[uint64][]span, len(sparse))
	snap := s.Snapshot()
	defer snap.Close()
	for _, space := range []byte{SpaceMessage, SpaceInbound} {
		err := snap.Iterate([]byte{space}, nil, false, func(_, value []byte) bool {
			if ref, ok := refOf(value); ok && ref.Kind == relay.BodySegment {
				if _, want := sparse[ref.Segment]; want {
					living[ref.Segment] = append(living[ref.Segment], span{ref.Offset - recordHeaderBytes, ref.Offset + ref.Length})
				}
			}
			return true
		})
		if err != nil {
			s.log.Error("cannot read which bodies live; no holes are punched", "error", err)
			return
		}
	}
	for number, end := range sparse {
		punched, err := s.punch(number, living[number], end)
		if err != nil {
			s.log.Warn("cannot punch holes into a segment", "segment", number, "error", err)
		}
		s.ledger.punchedTo(number, punched)
	}
}

// punch frees everything of a sealed segment outside the living spans, which
// can only shrink: nothing is ever added to a sealed segment.
func (s *Store) punch(number uint64, living []span, end int64) (punched int64, err error) {
	f, err := s.fs.Open(s.segmentPath(number))
	if err != nil {
		return 0, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	sort.Slice(living, func(i, j int) bool { return living[i].from < living[j].from })
	living = append(living, span{end, end})
	at := int64(0)
	for _, l := range living {
		from := (at + punchAlignBytes - 1) / punchAlignBytes * punchAlignBytes
		to := l.from / punchAlignBytes * punchAlignBytes
		if to > from {
			if err := f.Punch(from, to-from); err != nil {
				return punched, err
			}
			punched += to - from
		}
		at = max(at, l.to)
	}
	return punched, nil
}
