package cluster

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/relais-mta/relais/shared/fault"
)

// markedLog remembers in a file beside the log how far the log has got. The
// write-ahead log takes damage in its last entries for a write that was cut
// off, and drops them: right after a power cut, when they were acknowledged to
// nobody, and a silent loss of acknowledged entries otherwise. A log that ends
// before its mark is therefore refused.
//
// The mark is written after the entries are on stable storage and not synced
// itself, so after a power cut it may be too low, never too high.
type markedLog struct {
	*wal.WAL
	file   *os.File
	writer writer
}

var _ raft.MonotonicLogStore = (*markedLog)(nil)

const (
	markFile  = "log.mark"
	markBytes = 12 // index u64, CRC-32C of it u32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openMarked wraps the log and refuses one that lost its tail.
func openMarked(base string, w *wal.WAL, toDisk writer) (*markedLog, error) {
	const op = "cluster.openStores"
	path := filepath.Join(base, markFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "%s cannot be opened", path)
	}
	m := &markedLog{WAL: w, file: f, writer: toDisk}
	last, err := w.LastIndex()
	if err != nil {
		return nil, fault.Wrap(closeAfter(f, err), fault.Internal, op, "the raft log in %s cannot be read", base)
	}
	if reached := m.get(); reached > last {
		err := fault.New(fault.Invalid, op, "the raft log in %s ends at entry %d and had reached %d: its tail is damaged, and starting would forget changes that were acknowledged. "+
			"In a cluster of several servers move the data directory away and join again; with one server restore the last backup, or give up what is missing with `relais-control recover`", base, last, reached)
		return nil, closeAfter(f, err)
	}
	if err := m.checkAll(last); err != nil {
		return nil, closeAfter(f, err)
	}
	return m, nil
}

// get returns the mark, 0 if there is none or a power cut left half of one.
func (m *markedLog) get() uint64 {
	var b [markBytes]byte
	if n, err := m.file.ReadAt(b[:], 0); n != len(b) || err != nil {
		return 0
	}
	if crc32.Checksum(b[:8], castagnoli) != binary.BigEndian.Uint32(b[8:]) {
		return 0
	}
	return binary.BigEndian.Uint64(b[:])
}

func (m *markedLog) set(index uint64) error {
	var b [markBytes]byte
	binary.BigEndian.PutUint64(b[:], index)
	binary.BigEndian.PutUint32(b[8:], crc32.Checksum(b[:8], castagnoli))
	_, err := m.file.WriteAt(b[:], 0)
	return err
}

// StoreLog implements raft.LogStore.
func (m *markedLog) StoreLog(l *raft.Log) error { return m.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (m *markedLog) StoreLogs(logs []*raft.Log) error {
	if err := m.WAL.StoreLogs(logs); err != nil || len(logs) == 0 {
		return m.writer.check(err)
	}
	return m.writer.check(m.set(logs[len(logs)-1].Index))
}

// DeleteRange implements raft.LogStore. A mark that goes back must be there
// before the entries go.
func (m *markedLog) DeleteRange(from, to uint64) error {
	firstIndex, err := m.FirstIndex()
	if err != nil {
		return err
	}
	last, err := m.LastIndex()
	if err != nil {
		return err
	}
	if to >= last {
		mark := from - min(from, 1)
		if from <= firstIndex {
			mark = 0 // nothing is left, and what comes next may begin anywhere
		}
		if err := errors.Join(m.set(mark), m.file.Sync()); err != nil {
			return m.writer.check(err)
		}
	}
	return m.writer.check(m.WAL.DeleteRange(from, to))
}

// Close closes log and mark.
func (m *markedLog) Close() error { return errors.Join(m.WAL.Close(), m.file.Close()) }

// forgetMark accepts a log that lost its tail.
func forgetMark(dir string) error {
	err := os.Remove(filepath.Join(dir, raftDir, markFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fault.Wrap(err, fault.Internal, "cluster.Recover", "the mark of the raft log in %s cannot be removed", dir)
}
