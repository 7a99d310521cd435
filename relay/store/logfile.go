package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"strconv"

	"github.com/dgraph-io/badger/v4/y"
)

// A memory table's log is a header and transactions, one behind the other, in a
// file that is larger than it will ever need and zero behind them. A transaction
// is entries and one that ends it; all bear its version. Badger replays it up to
// the first entry that is not whole, and cuts off the rest: right after a crash,
// and the loss of everything that follows when a byte in the middle is wrong.
const (
	logHeaderBytes   = 20   // number of the data key, which is 0, and what is random
	logBitTxn        = 0x40 // of meta: in a transaction
	logBitEnd        = 0x80 // of meta: ends a transaction
	maxLogKeyBytes   = 1 << 10
	maxLogBytes      = 1 << 30
	logChunkBytes    = 1 << 20
	minLogEntryBytes = 2 + 3 + 9 + 4
)

// logTail says where the whole transactions of a log end, and how.
type logTail struct {
	transactions int
	end          int    // behind the last whole transaction
	bad          int    // where reading stopped
	damage       string // what is wrong there; empty: nothing that a crash does not leave
}

// readLog reads a log but for the zeros at its end. size is its length with them.
func readLog(path string) (data []byte, size int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	chunk := make([]byte, logChunkBytes)
	for {
		n, err := f.ReadAt(chunk, int64(size))
		if used := len(bytes.TrimRight(chunk[:n], "\x00")); used > 0 {
			data = append(data, make([]byte, size-len(data))...)
			data = append(data, chunk[:used]...)
		}
		size += n
		if errors.Is(err, io.EOF) {
			return data, size, nil
		}
		if err != nil || size > maxLogBytes {
			return nil, 0, errors.Join(err, errNotWhole)
		}
	}
}

type logEntry struct {
	meta       byte
	key, value []byte
	end        int
}

// version is that of the entry's transaction.
func (e *logEntry) version() uint64 {
	if e.meta&logBitEnd != 0 {
		v, _ := strconv.ParseUint(string(e.value), 10, 64) // 0 is no version
		return v
	}
	return y.ParseTs(e.key)
}

// entryBounds reads the head of an entry. Zeros behind data count as there.
func entryBounds(data []byte, at int) (key, value, end int, ok bool) {
	var head [32]byte
	if at < len(data) {
		copy(head[:], data[at:])
	}
	klen, n := binary.Uvarint(head[2:12])
	if n <= 0 || klen <= 8 || klen > maxLogKeyBytes {
		return 0, 0, 0, false
	}
	vlen, m := binary.Uvarint(head[2+n : 12+n])
	if m <= 0 || vlen > 2*valueThreshold || head[2+n+m] != 0 { // nothing expires
		return 0, 0, 0, false
	}
	key = at + 2 + n + m + 1
	value = key + int(klen)
	return key, value, value + int(vlen) + crc32.Size, true
}

// parseLogEntry reads the entry at a place, if there is a whole one.
func parseLogEntry(data []byte, at int) (e logEntry, ok bool) {
	key, value, end, ok := entryBounds(data, at)
	if !ok || end > len(data)+crc32.Size {
		return e, false
	}
	var sum [crc32.Size]byte // its last bytes may be zeros that are not in data
	if end-crc32.Size > len(data) {
		return e, false
	}
	copy(sum[:], data[end-crc32.Size:])
	if crc32.Checksum(data[at:end-crc32.Size], castagnoli) != binary.BigEndian.Uint32(sum[:]) {
		return e, false
	}
	return logEntry{meta: data[at], key: data[key:value], value: data[value : end-crc32.Size], end: end}, true
}

// scanLog reads a log as Badger does, calls visit for each key of a whole
// transaction, and looks at what follows the last one. followed is set when a later
// log has transactions: then this one was synced to its end.
//
// One transaction is under way at a time, and it is synced before the next begins.
// So a crash can only leave one that is not whole, as the last, and lacking what the
// kernel had not written yet: pages that are zero from some place to their end.
func scanLog(data []byte, size int, followed bool, visit func(key []byte)) logTail {
	t := logTail{end: logHeaderBytes}
	if len(data) > 0 && binary.BigEndian.Uint64(append(bytes.Clone(data[:min(len(data), 8)]), make([]byte, 8)...)) != 0 {
		t.damage = "its head is wrong"
		return t
	}
	if size < logHeaderBytes {
		t.damage = "it is cut off"
		return t
	}
	at, version := logHeaderBytes, uint64(0)
	var keys [][]byte
	for {
		e, ok := parseLogEntry(data, at)
		if !ok || e.version() == 0 || version != 0 && e.version() != version || e.meta&logBitEnd != 0 && version == 0 {
			break
		}
		at, version = e.end, e.version()
		if e.meta&logBitEnd == 0 {
			keys = append(keys, e.key)
			continue
		}
		for _, key := range keys {
			visit(key)
		}
		keys, version = keys[:0], 0
		t.transactions++
		t.end = at
	}
	t.bad = at
	t.damage = tailDamage(data, size, at, version, followed)
	return t
}

// tailDamage says what is wrong with a log in which reading stopped at a place,
// within the transaction of a version, or between two (0).
func tailDamage(data []byte, size, at int, version uint64, followed bool) string {
	if at >= len(data) && (version == 0 || size > at && !followed) {
		return ""
	}
	if followed {
		return "it has a later log, and is not whole"
	}
	_, _, end, ok := entryBounds(data, at)
	if size <= at || ok && end > size || !ok && size-at < minLogEntryBytes {
		return "it is cut off"
	}
	next, versions := len(data), map[uint64]bool{}
	if version != 0 {
		versions[version] = true
	}
	for i := at + 1; i+minLogEntryBytes <= len(data) && len(versions) < 2; i++ {
		if e, found := foundEntry(data, i); found {
			versions[e.version()] = true
			next, i = min(next, i), e.end-1
		}
	}
	switch {
	case len(versions) > 1:
		return "whole transactions follow one that is not"
	case unwritten(data, at, next):
		return ""
	case next < len(data) || ok && end <= len(data):
		return "its last transaction is damaged"
	}
	return ""
}

// foundEntry is parseLogEntry for a place where none need begin.
func foundEntry(data []byte, at int) (e logEntry, ok bool) {
	if data[at]&(logBitTxn|logBitEnd) == 0 || data[at+1] != 0 {
		return e, false
	}
	e, ok = parseLogEntry(data, at)
	return e, ok && e.version() != 0
}

// unwritten says whether a range may lack what a crash kept from being written: a
// page that is zero at its end, or a sector that is zero.
func unwritten(data []byte, from, to int) bool {
	const sector, page = 512, 4096
	for at := from; at < to; {
		end := min(at/sector*sector+sector, to)
		if end%page == 0 && data[end-1] == 0 || len(bytes.Trim(data[at:end], "\x00")) == 0 {
			return true
		}
		at = end
	}
	return false
}
