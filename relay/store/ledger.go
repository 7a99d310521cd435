package store

import (
	"sync"

	"github.com/relais-mta/relais/relay"
)

// ledger counts the living bodies of every file, so that a file is unlinked
// exactly when nothing refers to it.
type ledger struct {
	mu        sync.Mutex
	files     map[uint64]*fileUse
	scanned   bool // the bodies that were there at start are counted
	liveBytes int64
	deadBytes int64
}

// fileUse is what is known about one file in the body directory.
type fileUse struct {
	kind      relay.BodyKind
	live      int64 // bodies that a record refers to, may be negative before the scan is through
	liveBytes int64
	end       int64 // bytes used
	maxEnd    int64 // end of the last living body, of a segment found at start
	sealed    bool
	old       bool // found at start, its bodies are counted by the scan
	punched   int64
	pending   int // groups with bodies in it that readers of the index do not see yet
}

func newLedger() *ledger { return &ledger{files: make(map[uint64]*fileUse)} }

// found records a file that was there at start.
func (l *ledger) found(number uint64, kind relay.BodyKind, size int64) {
	l.files[number] = &fileUse{kind: kind, end: size, sealed: true, old: true}
}

func (l *ledger) open(number uint64, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.files[number] = &fileUse{kind: relay.BodySegment, end: size}
}

func (l *ledger) seal(number uint64, end int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u := l.files[number]; u != nil {
		u.sealed, u.end = true, end
	}
}

// addSegment counts the bodies that a group put into a segment.
func (l *ledger) addSegment(number uint64, g *group) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u := l.files[number]
	u.pending++
	for _, b := range g.batches {
		for _, p := range b.bodies {
			if p.body.file == nil {
				u.live++
				u.liveBytes += p.body.ref.Length
				l.liveBytes += p.body.ref.Length
			}
		}
	}
}

// landed notes that a group with bodies in a segment is in the index, or will
// never be.
func (l *ledger) landed(number uint64) {
	if number == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if u := l.files[number]; u != nil {
		u.pending--
	}
}

func (l *ledger) addFile(ref relay.BodyRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.files[ref.Segment] = &fileUse{kind: relay.BodyFile, live: 1, liveBytes: ref.Length, end: ref.Length, sealed: true}
	l.liveBytes += ref.Length
}

// forget takes back addFile of a body that was not committed.
func (l *ledger) forget(ref relay.BodyRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.files, ref.Segment)
	l.liveBytes -= ref.Length
}

// scannedBody counts a living body that the start-up scan met.
func (l *ledger) scannedBody(ref relay.BodyRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u := l.files[ref.Segment]; u != nil && u.old {
		u.live++
		u.liveBytes += ref.Length
		u.maxEnd = max(u.maxEnd, ref.Offset+ref.Length)
		l.liveBytes += ref.Length
	}
}

func (l *ledger) drop(refs []relay.BodyRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ref := range refs {
		if u := l.files[ref.Segment]; u != nil {
			u.live--
			u.liveBytes -= ref.Length
			l.liveBytes -= ref.Length
			l.deadBytes += ref.Length
		}
	}
}

// takeDead removes and returns up to limit files that nothing refers to.
func (l *ledger) takeDead(limit int) []relay.BodyRef {
	l.mu.Lock()
	defer l.mu.Unlock()
	var dead []relay.BodyRef
	for number, u := range l.files {
		if u.sealed && u.live <= 0 && (l.scanned || !u.old) {
			dead = append(dead, relay.BodyRef{Kind: u.kind, Segment: number, Length: u.end})
			l.deadBytes -= max(u.end-u.punched, 0)
			delete(l.files, number)
			if len(dead) == limit {
				break
			}
		}
	}
	l.deadBytes = max(l.deadBytes, 0)
	return dead
}

// tails returns the segments found at start whose allocated end holds nothing
// that lives, with the place where they may be cut.
func (l *ledger) tails() map[uint64]int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	cut := make(map[uint64]int64)
	for number, u := range l.files {
		if u.old && u.kind == relay.BodySegment && u.maxEnd < u.end && u.live > 0 {
			cut[number] = u.maxEnd
			u.end = u.maxEnd
		}
	}
	return cut
}

// sparse returns the sealed segments of which at most one part in divisor
// lives, if together they would give back at least minBytes. A snapshot taken
// afterwards has all that lives in them.
func (l *ledger) sparse(divisor, minBytes int64) map[uint64]int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.scanned {
		return nil
	}
	found, gain := make(map[uint64]int64), int64(0)
	for number, u := range l.files {
		occupied := u.end - u.punched
		if u.kind == relay.BodySegment && u.sealed && u.pending == 0 && u.live > 0 && u.liveBytes*divisor <= occupied {
			found[number] = u.end
			gain += occupied - u.liveBytes
		}
	}
	if gain < minBytes {
		return nil
	}
	return found
}

func (l *ledger) punchedTo(number uint64, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u := l.files[number]; u != nil {
		l.deadBytes = max(l.deadBytes-(bytes-u.punched), 0)
		u.punched = bytes
	}
}

func (l *ledger) totals() (files int, live, dead int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.files), l.liveBytes, l.deadBytes
}
