package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

// Salvaged says what of the index was damaged when the store was opened, if
// Config.Salvage allowed it to go on.
func (s *Store) Salvaged() []IndexDamage { return s.salvaged }

// salvage keeps a copy of each damaged file in a folder and leaves of the file what
// can be read. Whoever opens the store like this compares all records afterwards:
// what is lost may be a record, or the word that it was removed.
func (s *Store) salvage(x *indexFiles, folder string) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	names := map[string]bool{badger.ManifestFilename: true}
	for _, d := range x.damage {
		names[d.File] = true
	}
	for name := range names {
		if err := keepCopy(filepath.Join(x.dir, name), folder); err != nil {
			return err
		}
	}
	if err := s.fs.SyncDir(folder); err != nil {
		return err
	}
	for _, d := range x.damage {
		path := filepath.Join(x.dir, d.File)
		var err error
		switch filepath.Ext(d.File) {
		case ".sst": // or whole, and unknown to the manifest
			if number, _ := table.ParseFileID(d.File); x.named[number] {
				err = s.salvageTable(x, path)
			}
		case ".mem":
			err = s.salvageLog(path)
		case "", ".vlog": // the manifest is written again below; the others hold nothing
			if d.File != badger.ManifestFilename {
				err = os.Remove(path)
			}
		}
		if err != nil {
			return err
		}
	}
	if err := s.rewriteManifest(x); err != nil {
		return err
	}
	s.salvaged = x.damage
	return nil
}

// keepCopy copies a file into a folder, under a name of its own.
func keepCopy(path, folder string) error {
	from, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // that is the damage
	}
	if err != nil {
		return err
	}
	defer from.Close()
	for n := 1; ; n++ {
		to, err := os.OpenFile(filepath.Join(folder, fmt.Sprintf("%s.%d", filepath.Base(path), n)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		_, err = io.Copy(to, from)
		return errors.Join(err, to.Sync(), to.Close())
	}
}

// replaceFile puts data into the place of a file at once.
func (s *Store) replaceFile(path string, data []byte) error {
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	return s.fs.SyncDir(filepath.Dir(path))
}

// salvageTable writes a table again from its blocks whose checksum is right. They
// are found without the index, which may be what is damaged.
func (s *Store) salvageTable(x *indexFiles, path string) error {
	number, _ := table.ParseFileID(path)
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	opt := indexOptions(x.dir, s.memTableBytes, s.log)
	b := table.NewTableBuilder(table.Options{TableSize: uint64(len(data)) + 1, BlockSize: opt.BlockSize, BloomFalsePositive: opt.BloomFalsePositive})
	defer b.Close()
	var last []byte
	foundBlocks(data, func(entries []byte) {
		eachEntry(entries, func(key, value []byte) bool {
			if last == nil || y.CompareKeys(key, last) > 0 {
				var v y.ValueStruct
				v.Decode(value)
				b.Add(key, v, 0)
				last = append(last[:0], key...)
			}
			return true
		})
	})
	if x.named[number] = !b.Empty(); b.Empty() {
		return nil // Badger removes what the manifest does not name
	}
	return s.replaceFile(path, b.Finish())
}

// maxBlockEnds bounds how many places behind a block's beginning are tried for its end.
const maxBlockEnds = 64

// foundBlocks calls f for the blocks of a table that are whole. A block begins where
// another ends, and ends behind the length of its checksum.
func foundBlocks(data []byte, f func(entries []byte)) {
	ends := []int{0}
	for at := 12; at <= len(data); at++ {
		if n := binary.BigEndian.Uint32(data[at-4:]); n > 0 && n <= maxChecksumBytes {
			ends = append(ends, at)
		}
	}
	for i := 0; i < len(ends); i++ {
		for j := i + 1; j < len(ends) && j <= i+maxBlockEnds; j++ {
			if entries, ok := blockEntries(data[ends[i]:ends[j]]); ok && saneBlock(entries) {
				f(entries)
				i = j - 1
				break
			}
		}
	}
}

// saneBlock says whether entries can be taken apart.
func saneBlock(entries []byte) bool {
	rest := len(entries) - 4
	n := int64(binary.BigEndian.Uint32(entries[rest:]))
	if n == 0 || 4*n > int64(rest) {
		return false
	}
	first := binary.NativeEndian.Uint32(entries[rest-4*int(n):])
	return first == 0
}

// salvageLog writes a log again from the entries that are whole. One transaction
// may be left with a part of its entries.
func (s *Store) salvageLog(path string) error {
	data, _, err := readLog(path)
	if err != nil {
		return err
	}
	out, version := make([]byte, logHeaderBytes, len(data)+64), uint64(0)
	end := func(next uint64) {
		if version != 0 && version != next {
			out = appendLogEntry(out, logBitEnd, y.KeyWithTs(logEndKey, version), strconv.AppendUint(nil, version, 10))
		}
		version = next
	}
	for at := logHeaderBytes; at+1 < len(data); {
		e, ok := foundEntry(data, at)
		if !ok {
			at++
			continue
		}
		if e.meta&logBitEnd == 0 {
			end(e.version())
			out = append(out, data[at:e.end]...)
		}
		at = e.end
	}
	end(0)
	return s.replaceFile(path, out)
}

// logEndKey is the key of the entry that ends a transaction.
var logEndKey = []byte("!badger!txn")

func appendLogEntry(b []byte, meta byte, key, value []byte) []byte {
	from := len(b)
	b = append(b, meta, 0)
	b = binary.AppendUvarint(b, uint64(len(key)))
	b = binary.AppendUvarint(b, uint64(len(value)))
	b = append(b, 0) // never expires
	b = append(append(b, key...), value...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[from:], castagnoli))
}

// rewriteManifest names the tables that are there. One whose level is not known goes
// to level 0, whose tables may overlap: what counts is the version of a record.
func (s *Store) rewriteManifest(x *indexFiles) error {
	known := map[uint64]bool{}
	for number, created := range x.named {
		known[number] = created && !x.manifest
	}
	for _, number := range x.orphans {
		known[number] = true
	}
	if x.manifest {
		paths, err := filepath.Glob(filepath.Join(x.dir, "*.sst"))
		if err != nil {
			return err
		}
		for _, path := range paths {
			number, _ := table.ParseFileID(path)
			t, err := openTable(path)
			if errors.Is(err, errNotWhole) {
				continue
			}
			if err != nil {
				return err
			}
			t.close()
			known[number] = true
		}
	}
	var set pb.ManifestChangeSet
	for number, there := range known {
		if there {
			level := x.levels[number]
			if x.manifest {
				level = 0
			}
			set.Changes = append(set.Changes, &pb.ManifestChange{Id: number, Op: pb.ManifestChange_CREATE, Level: level})
		}
	}
	record, err := proto.Marshal(&set)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	out.WriteString(manifestHead)
	out.Write(binary.BigEndian.AppendUint32(nil, uint32(len(record))))
	out.Write(binary.BigEndian.AppendUint32(nil, crc32.Checksum(record, castagnoli)))
	out.Write(record)
	return s.replaceFile(filepath.Join(x.dir, badger.ManifestFilename), out.Bytes())
}

// salvageIndex lets the store open with what can be read of a damaged index.
func (s *Store) salvageIndex(x *indexFiles, folder string) error {
	const op = "store.Open"
	if err := s.salvage(x, folder); err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the damaged index in %s cannot be repaired; copies of its files are in %s", s.indexDir, folder)
	}
	again, err := examineIndex(s.indexDir)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the queue's index in %s cannot be read", s.indexDir)
	}
	if len(again.damage) > 0 {
		return fault.New(fault.Internal, op, "the damaged index in %s could not be repaired (%s); copies of its files are in %s", s.indexDir, again.damage[0], folder)
	}
	return nil
}
