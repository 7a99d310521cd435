package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sort"

	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/y"
	"google.golang.org/protobuf/proto"
)

// tableFile is one of Badger's tables, read as a file. Badger maps its tables and
// trusts them: a wrong byte ends the process, or ends an iteration as if nothing
// followed.
//
// Layout: blocks, one behind the other, then the index, its length, its checksum
// and the checksum's length. A block is entries, their offsets and number, its
// checksum and the checksum's length.
type tableFile struct {
	f      *os.File
	blocks []tableBlock
}

type tableBlock struct {
	first          []byte // its first key
	offset, length int64
}

// A checksum is a message of two numbers; maxTableIndexBytes is beyond any table's.
const (
	maxChecksumBytes   = 64
	maxTableIndexBytes = 64 << 20
	tableReadBytes     = 256 << 10
)

var errNotWhole = errors.New("its parts do not fit together")

// openTable reads the index of a table. It returns errNotWhole for a file that is
// damaged or was not written to its end.
func openTable(path string) (*tableFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	t := &tableFile{f: f}
	if err := t.readIndex(); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *tableFile) close() { _ = t.f.Close() } // only read from

func (t *tableFile) readIndex() error {
	info, err := t.f.Stat()
	if err != nil {
		return err
	}
	end := info.Size()
	take := func(n, most int64) ([]byte, error) {
		if n < 0 || n > most || n > end {
			return nil, errNotWhole
		}
		end -= n
		b := make([]byte, n)
		_, err := t.f.ReadAt(b, end)
		return b, err
	}
	takeSized := func(most int64) ([]byte, error) {
		size, err := take(4, 4)
		if err != nil {
			return nil, err
		}
		return take(int64(binary.BigEndian.Uint32(size)), most)
	}
	sum, err := takeSized(maxChecksumBytes)
	if err != nil {
		return err
	}
	raw, err := takeSized(maxTableIndexBytes)
	if err != nil {
		return err
	}
	// A table that was not written yet may be all zeros, which is the checksum of nothing.
	if len(sum) == 0 || len(raw) == 0 || !checksumFits(raw, sum) {
		return errNotWhole
	}
	index, at := fb.GetRootAsTableIndex(raw, 0), int64(0)
	t.blocks = make([]tableBlock, index.OffsetsLength())
	for i := range t.blocks {
		var block fb.BlockOffset
		index.Offsets(&block, i)
		t.blocks[i] = tableBlock{first: block.KeyBytes(), offset: at, length: int64(block.Len())}
		if int64(block.Offset()) != at || len(t.blocks[i].first) <= 8 {
			return errNotWhole
		}
		at += int64(block.Len())
	}
	if at != end || at == 0 {
		return errNotWhole
	}
	return nil
}

// checksumFits compares data with a stored checksum.
func checksumFits(data, stored []byte) bool {
	sum := &pb.Checksum{}
	if proto.Unmarshal(stored, sum) != nil || sum.Algo != pb.Checksum_CRC32C && sum.Algo != pb.Checksum_XXHash64 {
		return false
	}
	return y.VerifyChecksum(data, sum) == nil
}

// eachBlock calls f for each block in order, with its entries, nil if its checksum
// is wrong. They are valid during the call only.
func (t *tableFile) eachBlock(f func(b tableBlock, entries []byte)) error {
	r := bufio.NewReaderSize(io.NewSectionReader(t.f, 0, 1<<62), tableReadBytes)
	var buf []byte
	for _, b := range t.blocks {
		if int64(cap(buf)) < b.length {
			buf = make([]byte, b.length)
		}
		buf = buf[:b.length]
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		entries, _ := blockEntries(buf)
		f(b, entries)
	}
	return nil
}

// blockEntries takes the checksum off a block and compares it.
func blockEntries(block []byte) ([]byte, bool) {
	end := len(block) - 4
	if end < 4 {
		return nil, false
	}
	size := int64(binary.BigEndian.Uint32(block[end:]))
	if size > maxChecksumBytes || size > int64(end-4) {
		return nil, false
	}
	data := block[:end-int(size)]
	if !checksumFits(data, block[end-int(size):end]) {
		return nil, false
	}
	return data, true
}

// eachEntry calls f for the entries of a block whose checksum is right, until it
// returns false. The key is valid during the call only.
func eachEntry(entries []byte, f func(key, value []byte) bool) {
	n := int(binary.BigEndian.Uint32(entries[len(entries)-4:]))
	ends := entries[len(entries)-4-4*n : len(entries)-4]
	entries = entries[:len(entries)-len(ends)-4]
	const head = 4 // how much of the key is that of the first entry, and how long the rest is
	var base, key []byte
	for i := range n {
		end := len(entries)
		if i+1 < n {
			end = int(binary.NativeEndian.Uint32(ends[4*(i+1):]))
		}
		e := entries[binary.NativeEndian.Uint32(ends[4*i:]):end]
		shared, rest := int(binary.NativeEndian.Uint16(e)), int(binary.NativeEndian.Uint16(e[2:]))
		if i == 0 {
			base = e[head : head+rest]
		}
		key = append(append(key[:0], base[:shared]...), e[head:head+rest]...)
		if !f(key, e[head+rest:]) {
			return
		}
	}
}

// has says whether the table holds exactly this key, version included.
func (t *tableFile) has(key []byte) (found bool, err error) {
	i := sort.Search(len(t.blocks), func(i int) bool { return y.CompareKeys(t.blocks[i].first, key) > 0 }) - 1
	if i < 0 {
		return false, nil
	}
	block := make([]byte, t.blocks[i].length)
	if _, err := t.f.ReadAt(block, t.blocks[i].offset); err != nil {
		return false, err
	}
	entries, ok := blockEntries(block)
	if !ok {
		return false, nil
	}
	eachEntry(entries, func(k, _ []byte) bool {
		found = bytes.Equal(k, key)
		return !found
	})
	return found, nil
}
