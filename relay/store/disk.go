package store

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// How long a disk may take before it counts as failed.
const (
	stallLimit    = 10 * time.Second // for one write with its sync: then no mail is accepted until it has answered
	readOnlyLimit = time.Minute      // read-only: then the files are let go, so that the file system can be repaired
)

// Refusable marks a batch that may be answered with an error while the disk
// takes nothing: somebody keeps the mail and tries again. Other batches wait,
// since what they record has happened already.
func (b *Batch) Refusable() { b.refusable = true }

// Failed is closed when the index failed. Nothing is written from then on, and
// the store must not be closed, because closing writes too: the process has to
// begin anew, once Usable says that the disk is well.
func (s *Store) Failed() <-chan struct{} { return s.failedNow }

// Usable says whether the disk of a data directory, which nobody has open,
// takes a store again: the directory is there, and what is written can be read.
func Usable(dir string) error {
	const op = "store.Usable"
	indexDir := filepath.Join(dir, "index")
	if _, err := os.Stat(filepath.Join(indexDir, "MANIFEST")); err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the store is not there")
	}
	for _, d := range []string{indexDir, filepath.Join(dir, "bodies")} {
		if err := tryDisk(filepath.Join(d, "probe")); err != nil {
			return diskFault(err, op)
		}
	}
	return nil
}

const probeBytes = 64 << 10

func tryDisk(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	f, err := osFS{}.Create(path)
	if err != nil {
		return err
	}
	want := make([]byte, probeBytes)
	for i := range want {
		want[i] = byte(i * 7)
	}
	err = f.Allocate(0, probeBytes)
	if err == nil {
		err = f.WriteVectors([][]byte{want}, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if rerr := os.Remove(path); err == nil {
		err = rerr
	}
	if err == nil {
		err = osFS{}.SyncDir(filepath.Dir(path))
	}
	return err
}

// stalled says whether a write has been under way for too long. A failing disk
// often hangs before it says so.
func (s *Store) stalled() error {
	for _, since := range []int64{s.commitSince.Load(), s.bodySince.Load()} {
		if since == 0 {
			continue
		}
		if took := time.Since(time.Unix(0, since)); took > stallLimit {
			return fault.New(fault.Unavailable, "store.Admit", "the disk has not answered a write for %d s", int(took.Seconds()))
		}
	}
	return nil
}

// mustWait says why nothing can be committed now; nil: it can.
func (s *Store) mustWait() error {
	if s.readOnly.Load() {
		return fault.New(fault.Unavailable, "store.Commit", "the data directory's file system is read-only")
	}
	if s.freeBytes.Load() < s.hardMark() {
		return fault.New(fault.NoSpace, "store.Commit", "the disk is full")
	}
	return nil
}

// awaitDisk is called before each commit. On a disk that is all but full it
// gives up ballast; when that is gone too, or the file system is read-only, it
// waits, because a commit that waits loses nothing and a process that dies
// does. Refusable batches are answered meanwhile. It gives up when the store
// closes, or the file system stays read-only.
func (s *Store) awaitDisk(g *group) error {
	began := time.Now()
	for told := false; ; {
		s.measureSpace(true)
		why := s.mustWait()
		if why != nil && fault.Is(why, fault.NoSpace) {
			s.keepBallast()
			why = s.mustWait()
		}
		if why == nil {
			if told {
				s.log.Warn("the disk takes writes again: the queue goes on")
			}
			return nil
		}
		if fault.Is(why, fault.Unavailable) || s.ballastBytes.Load() == 0 {
			if !told {
				told = true
				s.log.Error("the queue waits for the disk", "error", why, "free_bytes", s.freeBytes.Load(), "needed_bytes", s.hardMark())
			}
			s.refuse(g, why)
			s.refuseQueued(why)
		}
		if fault.Is(why, fault.Unavailable) && time.Since(began) > readOnlyLimit {
			return s.fail(fmt.Errorf("the file system was read-only for %s", readOnlyLimit))
		}
		s.submitLock.Lock()
		closing := s.closing
		s.submitLock.Unlock()
		if closing {
			return fault.Wrap(why, fault.KindOf(why), "store.Commit", "the relay is shutting down and the disk takes no writes")
		}
		s.pauseCommits(why)
	}
}

// pauseCommits waits a moment. The group that comes next is not left in
// ignorance: its refusable batches are answered as well.
func (s *Store) pauseCommits(why error) {
	select {
	case next, ok := <-s.groups:
		if !ok {
			s.groupsDone = true // the store is closing: the loop around this finds out
			return
		}
		s.refuse(next, why)
		s.ahead = append(s.ahead, next)
	case <-time.After(spaceInterval):
	}
}

// refuse answers the refusable batches of a group, and takes them out.
func (s *Store) refuse(g *group, why error) {
	kept := g.batches[:0]
	for _, b := range g.batches {
		if !b.refusable {
			kept = append(kept, b)
			continue
		}
		result := b.err
		if result == nil {
			result = why
			for _, p := range b.bodies {
				if p.body.file != nil {
					s.ledger.forget(p.body.ref)
				} else {
					s.ledger.drop([]relay.BodyRef{p.body.ref})
				}
			}
		}
		done := b.done
		b.release()
		done(result)
	}
	clear(g.batches[len(kept):])
	g.batches = kept
}

// refuseQueued answers the refusable batches that wait for a group.
func (s *Store) refuseQueued(why error) {
	var refused []*Batch
	s.submitLock.Lock()
	kept := s.queued[:0]
	for _, b := range s.queued {
		if b.refusable {
			refused = append(refused, b)
			s.queuedBytes -= b.indexBytes() + b.bodyBytes
		} else {
			kept = append(kept, b)
		}
	}
	clear(s.queued[len(kept):])
	s.queued = kept
	if len(refused) > 0 {
		close(s.room)
		s.room = make(chan struct{})
	}
	s.submitLock.Unlock()
	for _, b := range refused {
		done := b.done
		b.release()
		done(why)
	}
}

// stillMounted asks whether the file system is alive. One that is shut down (by
// an error, or by FS_IOC_SHUTDOWN) while a sync is under way can end that sync
// without an error although the extents it wrote to stay marked as unwritten,
// and read as zeros later; and the next write through a map kills the process.
// It refuses to open files from the moment it is shut down, so an open that
// works now proves that the sync before it was a whole one. It costs some
// microseconds for a group.
func (s *Store) stillMounted() error {
	fd, err := unix.Open(s.lockPath(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd) // nothing was written
		return nil
	}
	if err == unix.EIO { //nolint:errorlint // unix.Open returns the plain number
		return err
	}
	return nil // out of descriptors, say: that is not about the disk
}
