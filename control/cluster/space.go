package cluster

import (
	"errors"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// Space on the disk of the data directory. The log allocates a segment before
// it writes to it, so a disk that another program filled is felt only when the
// next segment is due.
const (
	segmentBytes      = 16 << 20
	minStartFreeBytes = 2 * segmentBytes // less, and the server would soon end again
	lowFreeBytes      = 8 * segmentBytes // less, and an operator is told
)

// freeBytes returns what an unprivileged program may still write to the disk of
// a folder.
func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	for {
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Bavail * uint64(st.Bsize), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}

// checkSpace refuses to open a log that could not be written.
func checkSpace(dir string) error {
	const op = "cluster.checkSpace"
	free, err := freeBytes(dir)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the disk of %s does not answer: replace it, empty the data directory and let this server join again", dir)
	}
	if free < minStartFreeBytes {
		return fault.New(fault.NoSpace, op, "the disk of %s has %d MiB free and the log needs %d MiB: free space. The service then starts by itself", dir, free>>20, minStartFreeBytes>>20)
	}
	return nil
}

// Space returns nil, or that the disk of the data directory is filling up.
func (c *Cluster) Space() error {
	const op = "cluster.Space"
	free, err := freeBytes(c.dir)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the disk of %s does not answer: is it broken?", c.dir)
	}
	if free >= lowFreeBytes {
		return nil
	}
	return fault.New(fault.NoSpace, op, "the disk of %s has %d MiB free: free space before the log cannot grow, which ends this server", c.dir, free>>20)
}

// problem says in a sentence what is wrong with this server, or nothing.
func (c *Cluster) problem() string {
	err := c.Health()
	if err == nil {
		err = c.Space()
	}
	if err == nil {
		return ""
	}
	return fault.Public(err)
}

// writer ends the server at the first write that fails. What a file holds after
// a failed write or sync is not known, so the only safe way on is to read the
// log anew, as a start does; the other servers elect a leader meanwhile.
type writer struct {
	dir  string
	fail func(error) // nil: only report
}

func (w writer) check(err error) error {
	if err == nil || errors.Is(err, wal.ErrClosed) {
		return err
	}
	free, _ := freeBytes(w.dir) // what cannot be told is shown as 0, as on a dead disk
	err = fault.Wrap(err, fault.Unavailable, "cluster.write", "the raft log in %s cannot be written, its disk has %d MiB free: this server ends, the others go on. "+
		"Free space or replace the disk; the service then starts by itself. If the disk was lost, empty the data directory and let this server join again", w.dir, free>>20)
	if w.fail != nil {
		w.fail(err)
	}
	return err
}

// stable keeps term and vote in the log's metadata.
type stable struct {
	*wal.WAL
	writer writer
}

var _ raft.StableStore = stable{}

// Set implements raft.StableStore.
func (s stable) Set(key, value []byte) error { return s.writer.check(s.WAL.Set(key, value)) }

// SetUint64 implements raft.StableStore.
func (s stable) SetUint64(key []byte, value uint64) error {
	return s.writer.check(s.WAL.SetUint64(key, value))
}
