package cluster

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// Every command in the log carries a CRC-32C of itself. The write-ahead log has
// sums as well, but looks only at those of its last write, and the verifier
// compares ranges that may have long been applied: a bit that flipped on disk
// would become state.
const (
	sumMagic = "crc1"
	sumBytes = len(sumMagic) + crc32.Size
)

// sumOf returns what goes along with a command. Those of checkpoints belong to
// the verifier.
func sumOf(data []byte) []byte {
	if command.IsCheckpoint(data) {
		return nil
	}
	return binary.BigEndian.AppendUint32([]byte(sumMagic), crc32.Checksum(data, castagnoli))
}

// checkSum returns an error if an entry is not what was written. Entries of
// releases before there were sums have none.
func checkSum(l *raft.Log) error {
	if l.Type != raft.LogCommand || len(l.Extensions) == 0 || command.IsCheckpoint(l.Data) {
		return nil
	}
	if len(l.Extensions) != sumBytes || string(l.Extensions) != string(sumOf(l.Data)) {
		return errors.New("its checksum does not match")
	}
	return nil
}

// GetLog implements raft.LogStore. An entry that is damaged is neither applied
// nor sent to others.
func (m *markedLog) GetLog(index uint64, l *raft.Log) error {
	err := m.read(index, l)
	if fault.Is(err, fault.Invalid) && m.writer.fail != nil {
		m.writer.fail(err)
	}
	return err
}

func (m *markedLog) read(index uint64, l *raft.Log) error {
	err := m.WAL.GetLog(index, l)
	if err == nil {
		err = checkSum(l)
	}
	if err == nil || errors.Is(err, raft.ErrLogNotFound) || errors.Is(err, wal.ErrClosed) {
		return err
	}
	return fault.Wrap(err, fault.Invalid, "cluster.read", "entry %d of the raft log in %s is damaged on this disk, which may be failing: %s", index, m.writer.dir, damagedRemedy)
}

// checkAll reads the whole log, as raft is about to do.
func (m *markedLog) checkAll(last uint64) error {
	first, err := m.FirstIndex()
	if err != nil {
		return err
	}
	for index := max(first, 1); index <= last; index++ {
		if err := m.read(index, new(raft.Log)); err != nil {
			return err
		}
	}
	return nil
}
