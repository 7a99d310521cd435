package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// lockedFS says that its file system is read-only.
type lockedFS struct {
	FileSystem
	readOnly atomic.Bool
}

func (d *lockedFS) Space(dir string) (Space, error) {
	s, err := d.FileSystem.Space(dir)
	s.ReadOnly = s.ReadOnly || d.readOnly.Load()
	return s, err
}

// TestAReadOnlyDiskMakesRecordsWaitAndRefusesMail: what happened already is
// recorded when the disk takes writes again, new mail is refused at once.
func TestAReadOnlyDiskMakesRecordsWaitAndRefusesMail(t *testing.T) {
	disk := &lockedFS{FileSystem: OS()}
	cfg := testConfig(t.TempDir())
	cfg.FS = disk
	s := openTest(t, cfg)
	_, before := mustPut(t, s, []byte("before"))
	disk.readOnly.Store(true)
	s.measureSpace(true)
	if err := s.Admit(10); !fault.Is(err, fault.Unavailable) {
		t.Errorf("admitted: %v", err)
	}
	records, refused := make(chan error, 20), make(chan error, 20)
	for i := range 10 {
		b := s.NewBatch()
		b.Set([]byte{'z', byte(i)}, []byte("done"))
		s.CommitAsync(b, func(err error) { records <- err })
		body := s.NewBody()
		if _, err := body.Write([]byte("new mail")); err != nil {
			t.Fatal(err)
		}
		if err := body.Seal(0, [32]byte{}); err != nil {
			t.Fatal(err)
		}
		b = s.NewBatch()
		b.Refusable()
		id := newID()
		if err := b.SetWithBody(AppendMessageKey(nil, id), AppendRef([]byte{1}, body.Ref()), 1, id, body); err != nil {
			t.Fatal(err)
		}
		s.CommitAsync(b, func(err error) {
			body.Discard()
			refused <- err
		})
	}
	for range 10 {
		if err := <-refused; !fault.Is(err, fault.Unavailable) {
			t.Errorf("new mail: %v", err)
		}
	}
	select {
	case err := <-records:
		t.Errorf("a record did not wait: %v", err)
	default:
	}
	disk.readOnly.Store(false)
	for range 10 {
		if err := <-records; err != nil {
			t.Errorf("a record: %v", err)
		}
	}
	mustPut(t, s, []byte("after"))
	if text, err := s.ReadBody(before, nil); err != nil || string(text) != "before" {
		t.Errorf("%q, %v", text, err)
	}
	if live := s.Stats().LiveBodyBytes; live != int64(len("before")+len("after")) {
		t.Errorf("%d bytes of bodies are counted as living", live)
	}
}

func TestADiskThatDoesNotAnswerTakesNoMail(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	for _, since := range []*atomic.Int64{&s.commitSince, &s.bodySince} {
		since.Store(time.Now().Add(-stallLimit - time.Second).UnixNano())
		if err := s.Health(); !fault.Is(err, fault.Unavailable) {
			t.Errorf("healthy: %v", err)
		}
		since.Store(0)
		if err := s.Health(); err != nil {
			t.Errorf("it does not recover: %v", err)
		}
	}
}

// hangingFS has files whose writes do not return, as those of a frozen file
// system, until it is let go.
type hangingFS struct {
	FileSystem
	hanging, letGo chan struct{}
}

func (d *hangingFS) Create(path string) (File, error) {
	f, err := d.FileSystem.Create(path)
	return &hangingFile{File: f, fs: d}, err
}

type hangingFile struct {
	File
	fs *hangingFS
}

func (f *hangingFile) WriteVectors(b [][]byte, off int64) error {
	f.fs.hanging <- struct{}{}
	<-f.fs.letGo
	return f.File.WriteVectors(b, off)
}

// A frozen file system does not take the write, so it never comes to the sync.
func TestADiskThatHangsInAWriteTakesNoMail(t *testing.T) {
	disk := &hangingFS{FileSystem: OS(), hanging: make(chan struct{}, 1), letGo: make(chan struct{})}
	cfg := testConfig(t.TempDir())
	cfg.FS = disk
	s := openTest(t, cfg)
	done := make(chan error, 1)
	go func() {
		_, err := put(s, newID(), []byte("under"))
		done <- err
	}()
	<-disk.hanging
	if began := s.bodySince.Load(); began == 0 || !s.bodySince.CompareAndSwap(began, began-int64(stallLimit)-int64(time.Second)) {
		t.Error("nobody watches the write")
	}
	if err := s.Admit(10); !fault.Is(err, fault.Unavailable) {
		t.Errorf("admitted: %v", err)
	}
	close(disk.letGo)
	if err := <-done; err != nil {
		t.Errorf("the mail under way: %v", err)
	}
	if err := s.Admit(10); err != nil {
		t.Errorf("it does not recover: %v", err)
	}
}

func TestAFailedIndexSaysSoOnce(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	select {
	case <-s.Failed():
		t.Error("failed from the start")
	default:
	}
	for range 2 {
		if err := s.fail(unix.EIO); !errors.Is(err, unix.EIO) {
			t.Errorf("%v", err)
		}
	}
	<-s.Failed()
	b := s.NewBatch()
	b.Set([]byte("z"), nil)
	if err := s.Commit(context.Background(), b); !fault.Is(err, fault.Unavailable) {
		t.Errorf("committed: %v", err)
	}
	if err := s.Health(); !fault.Is(err, fault.Unavailable) {
		t.Errorf("healthy: %v", err)
	}
}

func TestUsableAsksTheDisk(t *testing.T) {
	dir := t.TempDir()
	if err := Usable(dir); !fault.Is(err, fault.Unavailable) {
		t.Errorf("an empty directory: %v", err)
	}
	s, err := Open(context.Background(), testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Usable(dir); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*", "probe")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "bodies")); err != nil {
		t.Fatal(err)
	}
	if err := Usable(dir); err == nil {
		t.Error("usable without a place for bodies")
	}
}
