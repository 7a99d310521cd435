package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var testLimits = policy.Storage{MinFreeBytes: 1 << 20, MinFreeInodes: 1, ReserveBytes: 1 << 20, SegmentBytes: 1 << 20}

func testConfig(dir string) Config {
	return Config{Dir: dir, Storage: testLimits, Logger: slog.New(slog.DiscardHandler), MemTableBytes: 8 << 20}
}

func openTest(t *testing.T, cfg Config) *Store {
	t.Helper()
	s, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newID() ids.Message { return ids.NewMessage(time.Now()) }

// put stores a body under a message key.
func put(s *Store, id ids.Message, text []byte) (relay.BodyRef, error) {
	body := s.NewBody()
	defer body.Discard()
	if _, err := body.Write(text); err != nil {
		return relay.BodyRef{}, err
	}
	if err := body.Seal(0, [32]byte{}); err != nil {
		return relay.BodyRef{}, err
	}
	b := s.NewBatch()
	if err := b.SetWithBody(AppendMessageKey(nil, id), AppendRef([]byte{1}, body.Ref()), 1, id, body); err != nil {
		b.Abandon()
		return relay.BodyRef{}, err
	}
	err := s.Commit(context.Background(), b)
	return body.Ref(), err
}

func mustPut(t *testing.T, s *Store, text []byte) (ids.Message, relay.BodyRef) {
	t.Helper()
	id := newID()
	ref, err := put(s, id, text)
	if err != nil {
		t.Fatal(err)
	}
	return id, ref
}

func drop(t *testing.T, s *Store, id ids.Message, ref relay.BodyRef) {
	t.Helper()
	b := s.NewBatch()
	b.Delete(AppendMessageKey(nil, id))
	b.DropBody(ref)
	if err := s.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for a condition that another goroutine of the store brings
// about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(2 * time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited too long for %s", what)
		}
	}
}

func files(t *testing.T, s *Store, pattern string) int {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(s.bodyDir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

func TestBodiesOfEverySizeSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(context.Background(), testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	type stored struct {
		id   ids.Message
		text []byte
	}
	var all []stored
	sizes := []int{0, 1, 2_000_000}
	for _, b := range bodyBuffers {
		sizes = append(sizes, b.bytes-recordHeaderBytes, b.bytes-recordHeaderBytes+1)
	}
	for _, size := range sizes {
		text := bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
		id, ref := mustPut(t, s, text)
		if want := relay.BodySegment; size > maxBodyMemoryBytes-recordHeaderBytes != (ref.Kind == relay.BodyFile) || ref.Kind == relay.BodyNone {
			t.Errorf("%d bytes are stored as kind %d, want %d", size, ref.Kind, want)
		}
		all = append(all, stored{id, text})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openTest(t, testConfig(dir))
	<-s.Counted()
	for _, want := range all {
		value, err := s.Get(AppendMessageKey(nil, want.id), nil)
		if err != nil {
			t.Fatal(err)
		}
		ref, _ := refOf(value)
		got, err := s.ReadBody(ref, nil)
		if err != nil || !bytes.Equal(got, want.text) {
			t.Errorf("body of %d bytes: %d bytes, %v", len(want.text), len(got), err)
		}
		r, err := s.OpenBody(ref)
		if err != nil {
			t.Fatal(err)
		}
		streamed, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
		if err != nil || !bytes.Equal(streamed, want.text) || r.Verify() != nil || r.Close() != nil {
			t.Errorf("body of %d bytes streams as %d bytes, %v", len(want.text), len(streamed), err)
		}
	}
}

func TestADamagedBodyIsAClearError(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	for _, size := range []int{1000, 200_000, 1_200_000} {
		_, ref := mustPut(t, s, bytes.Repeat([]byte{7}, size))
		f, err := os.OpenFile(s.refPath(ref), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{6}, ref.Offset+500); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		_, err = s.ReadBody(ref, nil)
		var e *fault.Error
		if !errors.As(err, &e) || e.Kind != fault.Internal || e.Temporary() {
			t.Errorf("a flipped bit in %d bytes: %v", size, err)
		}
		r, err := s.OpenBody(ref)
		if err != nil {
			t.Fatal(err)
		}
		if r.Verify() == nil {
			t.Errorf("a flipped bit in %d bytes verifies", size)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestASegmentIsReadableWithoutTheIndex(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	id, ref := mustPut(t, s, []byte("hello"))
	raw, err := os.ReadFile(s.refPath(ref))
	if err != nil {
		t.Fatal(err)
	}
	rec, ok := parseRecordHeader(raw[ref.Offset-recordHeaderBytes:])
	if !ok || rec.Message != id || rec.Length != 5 || rec.CRC32C != ref.CRC32C || string(raw[ref.Offset:ref.Offset+5]) != "hello" {
		t.Errorf("record %+v, %v", rec, ok)
	}
	raw[ref.Offset-recordHeaderBytes+9]++
	if _, ok := parseRecordHeader(raw[ref.Offset-recordHeaderBytes:]); ok {
		t.Error("a damaged header is taken for good")
	}
}

func TestSpaceComesBackWhenBodiesDie(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	text := make([]byte, 60_000)
	var idsOf []ids.Message
	var refs []relay.BodyRef
	for range 60 { // several segments of 1 MiB
		id, ref := mustPut(t, s, text)
		idsOf, refs = append(idsOf, id), append(refs, ref)
	}
	fileID, fileRef := mustPut(t, s, make([]byte, 1_200_000))
	before := files(t, s, "*.seg")
	if before < 3 || files(t, s, "*.body") != 1 {
		t.Fatalf("%d segments, %d files", before, files(t, s, "*.body"))
	}
	for i := range refs {
		drop(t, s, idsOf[i], refs[i])
	}
	drop(t, s, fileID, fileRef)
	eventually(t, "files to be removed", func() bool { return files(t, s, "*.seg") == 1 && files(t, s, "*.body") == 0 })
	if live := s.Stats().LiveBodyBytes; live != 0 {
		t.Errorf("%d bytes are counted as living", live)
	}
}

func TestOneSlowMailDoesNotHoldASegment(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Storage.SegmentBytes = 8 << 20
	s := openTest(t, cfg)
	text := bytes.Repeat([]byte{1}, 60_000)
	var keep relay.BodyRef
	var first uint64
	for i := 0; ; i++ {
		id, ref := mustPut(t, s, text)
		if first == 0 {
			first = ref.Segment
		}
		if ref.Segment != first {
			break
		}
		if i == 50 {
			keep = ref
		} else {
			drop(t, s, id, ref)
		}
	}
	_, before := allocated(t, s.segmentPath(first))
	living := map[uint64][]span{first: {{keep.Offset - recordHeaderBytes, keep.Offset + keep.Length}}}
	sparse := s.ledger.sparse(punchDivisor, 1<<20)
	if _, ok := sparse[first]; !ok {
		t.Fatalf("the segment is not found sparse: %v", sparse)
	}
	if _, err := s.punch(first, living[first], sparse[first]); err != nil {
		t.Fatal(err)
	}
	_, after := allocated(t, s.segmentPath(first))
	if before < 6<<20 || after > 128<<10 {
		t.Errorf("the segment occupied %d bytes and now %d", before, after)
	}
	if got, err := s.ReadBody(keep, nil); err != nil || !bytes.Equal(got, text) {
		t.Errorf("the slow mail was damaged: %v", err)
	}
}

func allocated(t *testing.T, path string) (size, bytes int64) {
	t.Helper()
	f, err := osFS{}.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	size, bytes, err = f.Stat()
	if cerr := f.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	return size, bytes
}

func TestOrphansAreSweptAndLivingBodiesKept(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(context.Background(), testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	_, ref := mustPut(t, s, []byte("alive"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"00000000000000f0.body", "00000000000000f1.seg", "notes.txt"} {
		if err := os.WriteFile(filepath.Join(dir, "bodies", name), make([]byte, 100), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = openTest(t, testConfig(dir))
	_, newer := mustPut(t, s, []byte("new"))
	eventually(t, "orphans to go", func() bool { return files(t, s, "*f0.body")+files(t, s, "*f1.seg") == 0 })
	if files(t, s, "notes.txt") != 1 {
		t.Error("a file that is not ours was removed")
	}
	for _, r := range []relay.BodyRef{ref, newer} {
		if _, err := s.ReadBody(r, nil); err != nil {
			t.Errorf("a living body was swept: %v", err)
		}
	}
}

func TestANewerFormatAndASecondProcessAreRefused(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(context.Background(), testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), testConfig(dir)); !fault.Is(err, fault.Conflict) {
		t.Errorf("opened twice: %v", err)
	}
	value, err := s.Get(keyFormat, nil)
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint32(value, 3)
	b := s.NewBatch()
	b.Set(keyFormat, value)
	if err := s.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open(context.Background(), testConfig(dir))
	const want = "data directory was written by a newer Relais (format 3, this binary reads up to 1)"
	if !fault.Is(err, fault.Invalid) || fault.Public(err) != want {
		t.Errorf("a newer format: %v", err)
	}
}

// brokenFS fails chosen calls.
type brokenFS struct {
	FileSystem
	write, sync, create atomic.Pointer[error]
	free                atomic.Int64 // if not 0
}

func (d *brokenFS) Space(dir string) (Space, error) {
	s, err := d.FileSystem.Space(dir)
	if n := d.free.Load(); n != 0 {
		s.FreeBytes = n
	}
	return s, err
}

func (d *brokenFS) Create(path string) (File, error) {
	if e := d.create.Load(); e != nil {
		return nil, *e
	}
	f, err := d.FileSystem.Create(path)
	return &brokenFile{File: f, fs: d}, err
}

type brokenFile struct {
	File
	fs *brokenFS
}

func (f *brokenFile) WriteVectors(b [][]byte, off int64) error {
	if e := f.fs.write.Load(); e != nil {
		return *e
	}
	return f.File.WriteVectors(b, off)
}

func (f *brokenFile) Sync() error {
	if e := f.fs.sync.Load(); e != nil {
		return *e
	}
	return f.File.Sync()
}

func TestAFailedWriteOrSyncAbandonsTheSegment(t *testing.T) {
	for _, tc := range []struct {
		name string
		fail func(*brokenFS) *atomic.Pointer[error]
		err  error
		kind fault.Kind
	}{
		{"sync", func(d *brokenFS) *atomic.Pointer[error] { return &d.sync }, unix.EIO, fault.Unavailable},
		{"write", func(d *brokenFS) *atomic.Pointer[error] { return &d.write }, unix.EIO, fault.Unavailable},
		{"full", func(d *brokenFS) *atomic.Pointer[error] { return &d.write }, unix.ENOSPC, fault.NoSpace},
	} {
		t.Run(tc.name, func(t *testing.T) {
			disk := &brokenFS{FileSystem: OS()}
			cfg := testConfig(t.TempDir())
			cfg.FS = disk
			s := openTest(t, cfg)
			_, good := mustPut(t, s, []byte("before"))
			for _, size := range []int{100, 200_000, 1_200_000} {
				tc.fail(disk).Store(&tc.err)
				id := newID()
				if _, err := put(s, id, make([]byte, size)); !fault.Is(err, tc.kind) {
					t.Fatalf("%d bytes: %v, want %v", size, err, tc.kind)
				}
				if _, err := s.Get(AppendMessageKey(nil, id), nil); !fault.Is(err, fault.NotFound) {
					t.Errorf("the index was touched: %v", err)
				}
				if err := s.Health(); !fault.Is(err, tc.kind) {
					t.Errorf("health: %v", err)
				}
				tc.fail(disk).Store(nil)
			}
			if info, err := os.Stat(s.segmentPath(good.Segment)); err != nil || info.Size() != good.Offset+good.Length {
				t.Errorf("the segment that failed keeps %d bytes, of which %d are used: %v", info.Size(), good.Offset+good.Length, err)
			}
			_, after := mustPut(t, s, []byte("after"))
			if after.Segment == good.Segment {
				t.Error("a segment was written to after it failed")
			}
			if text, err := s.ReadBody(good, nil); err != nil || string(text) != "before" {
				t.Errorf("what was stored before is %q, %v", text, err)
			}
			s.diskError.Store(&diskTrouble{err: tc.err, until: time.Now().Add(-time.Second)})
			if err := s.Health(); err != nil {
				t.Errorf("health does not come back: %v", err)
			}
		})
	}
}

func TestAdmitRefusesBelowTheHighWaterMarkAndComesBack(t *testing.T) {
	disk := &brokenFS{FileSystem: OS()}
	cfg := testConfig(t.TempDir())
	cfg.FS = disk
	cfg.Storage.MinFreeBytes = 100 << 20
	cfg.Storage.ReserveBytes = 64 << 20
	s := openTest(t, cfg)
	if err := s.Admit(1000); err != nil {
		t.Fatal(err)
	}
	disk.free.Store(150 << 20)
	s.measureSpace(true)
	if err := s.Admit(10 << 20); err != nil {
		t.Fatal(err)
	}
	if err := s.Admit(45 << 20); !fault.Is(err, fault.NoSpace) {
		t.Errorf("more than is left was admitted: %v", err)
	}
	disk.free.Store(1 << 20)
	eventually(t, "the reserve to be given up", func() bool { return s.Stats().ReserveBytes == 0 })
	if err := s.Admit(0); !fault.Is(err, fault.NoSpace) {
		t.Errorf("admitted on a full disk: %v", err)
	}
	disk.free.Store(0)
	eventually(t, "the reserve to be taken again", func() bool { return s.Stats().ReserveBytes == 64<<20 && s.Admit(0) == nil })
	limits := cfg.Storage
	limits.MinFreeInodes = 1 << 60
	s.SetLimits(limits)
	if err := s.Admit(0); !fault.Is(err, fault.NoSpace) && s.Stats().FreeInodes >= 0 {
		t.Errorf("admitted without inodes: %v", err)
	}
}

func TestGroupsKeepTheOrderOfSubmission(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	const n = 2001 // the last batch does not delete
	var order []int
	var done sync.WaitGroup
	done.Add(n)
	for i := range n {
		b := s.NewBatch()
		b.Set([]byte("key"), binary.BigEndian.AppendUint32(nil, uint32(i)))
		if i%3 == 1 {
			b.Delete([]byte("key"))
		}
		s.CommitAsync(b, func(err error) {
			if err != nil {
				t.Error(err)
			}
			order = append(order, i) // callbacks come from one goroutine
			done.Done()
		})
	}
	done.Wait()
	for i, got := range order {
		if got != i {
			t.Fatalf("callback %d is of batch %d", i, got)
		}
	}
	if v, err := s.Get([]byte("key"), nil); err != nil || binary.BigEndian.Uint32(v) != n-1 {
		t.Errorf("the last write is %v, %v", v, err)
	}
	if st := s.Stats(); st.Transactions >= n/2 {
		t.Errorf("%d transactions for %d batches: nothing was grouped", st.Transactions, n)
	}
}

func TestABatchTooLargeIsRefused(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	b := s.NewBatch()
	for i := range s.maxGroupEntries + 1 {
		b.Set(binary.BigEndian.AppendUint32([]byte("z"), uint32(i)), nil)
	}
	if err := s.Commit(context.Background(), b); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a batch of %d keys: %v", s.maxGroupEntries+1, err)
	}
	b = s.NewBatch()
	for i := range s.maxGroupEntries {
		if b.Set(binary.BigEndian.AppendUint32([]byte("z"), uint32(i)), nil); b.indexBytes() > s.maxGroupBytes-64 {
			break
		}
	}
	if err := s.Commit(context.Background(), b); err != nil {
		t.Errorf("the largest batch: %v", err)
	}
}

// TestARecordTooLargeIsRefused: it would go into Badger's value log, of which
// nothing comes back.
func TestARecordTooLargeIsRefused(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.MemTableBytes = defaultMemTableBytes
	s := openTest(t, cfg)
	log := filepath.Join(s.indexDir, "000001.vlog")
	before, err := os.Stat(log)
	if err != nil {
		t.Fatal(err)
	}
	b := s.NewBatch()
	b.Set([]byte("z"), make([]byte, maxValueBytes+1))
	if err := s.Commit(context.Background(), b); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a record of %d bytes: %v", maxValueBytes+1, err)
	}
	b = s.NewBatch()
	b.Set([]byte("z"), make([]byte, maxValueBytes))
	if err := s.Commit(context.Background(), b); err != nil {
		t.Errorf("the largest record: %v", err)
	}
	if after, err := os.Stat(log); err != nil || after.Size() != before.Size() {
		t.Errorf("the value log went from %d to %d bytes: %v", before.Size(), after.Size(), err)
	}
}

func TestCommitAfterCloseIsRefused(t *testing.T) {
	s, err := Open(context.Background(), testConfig(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b := s.NewBatch()
	b.Set([]byte("k"), nil)
	if err := s.Commit(context.Background(), b); !fault.Is(err, fault.Unavailable) {
		t.Errorf("committed after Close: %v", err)
	}
}

// The index's logs must have their blocks before anything is written to them.
func TestLogsOfTheIndexAreAllocatedAheadOfTime(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	value := make([]byte, 100<<10)
	for i := range 400 { // 40 MB: several memory tables
		b := s.NewBatch()
		for j := range 4 {
			b.Set(binary.BigEndian.AppendUint32([]byte{'z', byte(j)}, uint32(i)), value[:25<<10])
		}
		if err := s.Commit(context.Background(), b); err != nil {
			t.Fatal(err)
		}
		logs, err := memLogs(s.indexDir)
		if err != nil {
			t.Fatal(err)
		}
		newest := uint64(0)
		for _, n := range logs {
			newest = max(newest, n)
		}
		for _, n := range []uint64{newest - 1, newest} {
			info, err := os.Stat(s.memPath(n))
			if os.IsNotExist(err) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if blocks := info.Sys().(*syscall.Stat_t).Blocks * 512; blocks < s.walBytes {
				t.Fatalf("log %d occupies %d bytes, want %d", n, blocks, s.walBytes)
			}
		}
	}
	if s.nextMem < 4 {
		t.Errorf("only %d logs were used", s.nextMem)
	}
}
