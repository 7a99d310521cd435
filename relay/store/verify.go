package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

// IndexDamage is a place in a file of the index that is not as it was written.
type IndexDamage struct {
	File   string // its name in the index folder
	Detail string
}

func (d IndexDamage) String() string { return d.File + ": " + d.Detail }

// manifestHead begins Badger's manifest: its name, and the versions of ours and of its.
const manifestHead = "Bdgr\x00\x00\x00\x08"

// maxDamageNamed bounds the places that an error names.
const maxDamageNamed = 3

// indexFiles is what the files of the index are found to be before Badger sees
// them. Badger would end the process at a damaged table, and take what is missing
// from a damaged log or manifest for never written, and remove it.
type indexFiles struct {
	dir      string
	manifest bool              // is damaged
	named    map[uint64]bool   // tables that the manifest made, false: and removed
	levels   map[uint64]uint32 // of tables
	last     uint64            // highest number that the manifest ever named
	orphans  map[string]uint64 // newer tables that the manifest does not know, by their first key
	damage   []IndexDamage
}

// verifyIndex reads every byte of the index and compares its checksums. What is
// damaged would lose or double mail without a word, so the store does not open with
// it and changes nothing; unless folder is given, to keep damaged files in.
func (s *Store) verifyIndex(folder string) error {
	x, err := examineIndex(s.indexDir)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "store.Open", "the queue's index in %s cannot be read", s.indexDir)
	}
	if len(x.damage) == 0 {
		return nil
	}
	var named []string
	for _, d := range x.damage {
		s.log.Error("a file of the queue's index is damaged", "file", filepath.Join(s.indexDir, d.File), "detail", d.Detail)
		if len(named) < maxDamageNamed {
			named = append(named, d.String())
		}
	}
	if folder != "" {
		return s.salvageIndex(x, folder)
	}
	if more := len(x.damage) - len(named); more > 0 {
		named = append(named, fmt.Sprintf("and %d more", more))
	}
	return fault.New(fault.Invalid, "store.Open",
		"the queue's index in %s is damaged and nothing of it was changed: %s. Keep a copy of the folder, check the disk, and run relais-relay queue fsck --repair", s.indexDir, strings.Join(named, "; "))
}

func examineIndex(dir string) (*indexFiles, error) {
	x := &indexFiles{dir: dir, named: map[uint64]bool{}, levels: map[uint64]uint32{}, orphans: map[string]uint64{}}
	for _, read := range []func() error{x.readOthers, x.readManifest, x.readTables, x.readLogs} {
		if err := read(); err != nil {
			return nil, err
		}
	}
	for _, number := range slices.Sorted(maps.Values(x.orphans)) {
		x.found(table.IDToFilename(number), "%s does not know it, and what it holds is nowhere else", badger.ManifestFilename)
	}
	return x, nil
}

func (x *indexFiles) found(file, detail string, args ...any) {
	x.damage = append(x.damage, IndexDamage{File: file, Detail: fmt.Sprintf(detail, args...)})
}

// readOthers looks at the two kinds of files that hold nothing here, and that Badger
// does not open the index without: no value is long enough for a value log, and
// nothing is encrypted.
func (x *indexFiles) readOthers() error {
	registry, err := os.ReadFile(filepath.Join(x.dir, badger.KeyRegistryFileName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	const random, text = 16, "Hello Badger"
	if err == nil && (len(registry) != random+len(text) || string(registry[random:]) != text) {
		x.found(badger.KeyRegistryFileName, "it is not what was written; it holds nothing")
	}
	logs, err := filepath.Glob(filepath.Join(x.dir, "*.vlog"))
	if err != nil {
		return err
	}
	for _, path := range logs {
		data, _, err := readLog(path)
		if err != nil {
			return err
		}
		if len(bytes.Trim(data[:min(len(data), 8)], "\x00")) > 0 { // the number of a key
			x.found(filepath.Base(path), "it is not what was written; it holds nothing")
		}
	}
	return nil
}

// readManifest reads which tables there are. A last record that is not whole is
// what a crash leaves; were it more, tables would be unknown or missing.
func (x *indexFiles) readManifest() error {
	data, err := os.ReadFile(filepath.Join(x.dir, badger.ManifestFilename))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	const head = 8
	if !bytes.HasPrefix(data, []byte(manifestHead)) {
		x.manifest = true
		x.found(badger.ManifestFilename, "its head is wrong")
		return nil
	}
	for at := len(manifestHead); at+head <= len(data); {
		length := int(binary.BigEndian.Uint32(data[at:]))
		if length > len(data) {
			x.manifest = true
		}
		if length > len(data)-at-head {
			break
		}
		record := data[at+head : at+head+length]
		var set pb.ManifestChangeSet
		if crc32.Checksum(record, castagnoli) != binary.BigEndian.Uint32(data[at+4:]) || proto.Unmarshal(record, &set) != nil {
			x.manifest = true
			break
		}
		for _, c := range set.Changes {
			x.named[c.Id] = c.Op == pb.ManifestChange_CREATE
			x.last, x.levels[c.Id] = max(x.last, c.Id), c.Level
		}
		at += head + length
	}
	if x.manifest {
		x.found(badger.ManifestFilename, "the checksum of a record is wrong")
	}
	return nil
}

// readTables reads all of every table. One that the manifest does not know, and that
// is newer than all it ever knew, is left by a crash before the manifest named it:
// then what it was made of is still there, its first record among it.
func (x *indexFiles) readTables() error {
	paths, err := filepath.Glob(filepath.Join(x.dir, "*.sst"))
	if err != nil {
		return err
	}
	there := map[uint64]bool{}
	for _, path := range paths {
		number, ok := table.ParseFileID(path)
		if there[number] = ok; !ok || x.named[number] {
			continue
		}
		if _, removed := x.named[number]; removed || number <= x.last || x.manifest {
			continue // a crash kept it from being removed
		}
		t, err := openTable(path)
		if errors.Is(err, errNotWhole) {
			continue // a crash came while it was written
		}
		if err != nil {
			return err
		}
		x.orphans[string(t.blocks[0].first)] = number
		t.close()
	}
	for _, number := range slices.Sorted(maps.Keys(x.named)) {
		switch {
		case !x.named[number]:
		case !there[number]:
			x.found(table.IDToFilename(number), "the file is missing")
		default:
			if err := x.readTable(table.IDToFilename(number)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x *indexFiles) readTable(name string) error {
	t, err := openTable(filepath.Join(x.dir, name))
	if errors.Is(err, errNotWhole) {
		x.found(name, "its index or its end is damaged")
		return nil
	}
	if err != nil {
		return err
	}
	defer t.close()
	for first := range x.orphans {
		has, err := t.has([]byte(first))
		if err != nil {
			return err
		}
		if has {
			delete(x.orphans, first)
		}
	}
	bad, at := 0, int64(0)
	err = t.eachBlock(func(b tableBlock, entries []byte) {
		if entries == nil {
			if bad == 0 {
				at = b.offset
			}
			bad++
		}
	})
	if bad > 0 {
		x.found(name, "the checksum of %d of its %d blocks is wrong, the first at offset %d", bad, len(t.blocks), at)
	}
	return err
}

// readLogs reads the logs of memory tables, the newest first.
func (x *indexFiles) readLogs() error {
	logs, err := memLogs(x.dir)
	if err != nil {
		return err
	}
	slices.SortFunc(logs, func(a, b uint64) int { return cmp.Compare(b, a) })
	visit := func(key []byte) {
		if len(x.orphans) > 0 {
			delete(x.orphans, string(key))
		}
	}
	followed := false
	for _, n := range logs {
		name := memName(n)
		data, size, err := readLog(filepath.Join(x.dir, name))
		if err != nil {
			return err
		}
		if size == 0 {
			continue // made ahead of time
		}
		tail := scanLog(data, size, followed, visit)
		if tail.damage != "" {
			x.found(name, "%s, at offset %d", tail.damage, tail.bad)
		}
		followed = followed || tail.transactions > 0
	}
	return nil
}
