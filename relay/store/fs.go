package store

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// FileSystem is the part of the operating system that body files and the
// ballast go through. Tests replace it to make a disk fail at a chosen moment.
type FileSystem interface {
	Create(path string) (File, error) // fails if it exists
	Open(path string) (File, error)
	Remove(path string) error
	SyncDir(dir string) error
	Space(dir string) (Space, error)
}

// File is an open body file.
type File interface {
	io.ReaderAt
	io.Closer
	// WriteVectors writes the buffers one behind the other at offset.
	WriteVectors(buffers [][]byte, offset int64) error
	// Sync makes the contents durable (fdatasync).
	Sync() error
	// Allocate reserves blocks for the range and extends the file over it.
	Allocate(offset, length int64) error
	// Punch gives the blocks of the range back; it reads as zeros afterwards.
	Punch(offset, length int64) error
	Truncate(size int64) error
	// Stat returns the size and the bytes of disk it occupies.
	Stat() (size, allocated int64, err error)
}

// Space is what a file system has left for an ordinary process.
type Space struct {
	FreeBytes  int64
	FreeInodes int64
	NoInodes   bool // the file system does not count inodes
	ReadOnly   bool
}

// OS returns the operating system's file system.
func OS() FileSystem { return osFS{} }

type osFS struct{}

func (osFS) Create(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f}, nil
}

func (osFS) Open(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f}, nil
}

func (osFS) Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (osFS) SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func (osFS) Space(dir string) (Space, error) {
	var st unix.Statfs_t
	if err := ignoreInterrupts(func() error { return unix.Statfs(dir, &st) }); err != nil {
		return Space{}, err
	}
	return Space{
		FreeBytes:  int64(st.Bavail) * st.Bsize,
		FreeInodes: int64(st.Ffree),
		NoInodes:   st.Files == 0, // btrfs and other file systems make inodes as they go
		ReadOnly:   st.Flags&unix.ST_RDONLY != 0,
	}, nil
}

type osFile struct{ f *os.File }

func (o *osFile) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }
func (o *osFile) Close() error                            { return o.f.Close() }
func (o *osFile) Truncate(size int64) error               { return o.f.Truncate(size) }

// maxVectors is the most buffers that one pwritev call takes (IOV_MAX).
const maxVectors = 1024

func (o *osFile) WriteVectors(buffers [][]byte, offset int64) error {
	for len(buffers) > 0 {
		part := buffers[:min(len(buffers), maxVectors)]
		n, err := unix.Pwritev(int(o.f.Fd()), part, offset)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		offset += int64(n)
		for n > 0 && n >= len(buffers[0]) {
			n -= len(buffers[0])
			buffers = buffers[1:]
		}
		if n > 0 { // the rest of a buffer that was written in part goes by itself
			rest := buffers[0][n:]
			if _, err := o.f.WriteAt(rest, offset); err != nil {
				return err
			}
			offset += int64(len(rest))
			buffers = buffers[1:]
		}
		for len(buffers) > 0 && len(buffers[0]) == 0 {
			buffers = buffers[1:]
		}
	}
	return nil
}

func (o *osFile) Sync() error {
	return ignoreInterrupts(func() error { return unix.Fdatasync(int(o.f.Fd())) })
}

func (o *osFile) Allocate(offset, length int64) error {
	return ignoreInterrupts(func() error { return unix.Fallocate(int(o.f.Fd()), 0, offset, length) })
}

func (o *osFile) Punch(offset, length int64) error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	return ignoreInterrupts(func() error { return unix.Fallocate(int(o.f.Fd()), mode, offset, length) })
}

func (o *osFile) Stat() (size, allocated int64, err error) {
	var st unix.Stat_t
	if err := ignoreInterrupts(func() error { return unix.Fstat(int(o.f.Fd()), &st) }); err != nil {
		return 0, 0, err
	}
	return st.Size, st.Blocks * 512, nil // POSIX: blocks are counted in units of 512 bytes
}

func ignoreInterrupts(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
