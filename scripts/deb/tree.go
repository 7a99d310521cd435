package main

import (
	"bytes"
	"compress/gzip"
	"crypto/md5" // what dpkg asks for
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// tree is the content of a package while it is gathered. The first error is
// kept and ends the rest.
type tree struct {
	root string
	at   time.Time
	err  error
}

func (t *tree) path(name string) string { return filepath.Join(t.root, name) }

// note passes a text on and keeps the error that came with it.
func (t *tree) note(text string, err error) string {
	if t.err == nil {
		t.err = err
	}
	return text
}

func (t *tree) keep(text []byte, err error) string { return t.note(string(text), err) }

func (t *tree) write(name string, mode fs.FileMode, text string) {
	if t.err == nil {
		t.err = os.MkdirAll(filepath.Dir(t.path(name)), 0o755)
	}
	if t.err == nil {
		t.err = os.WriteFile(t.path(name), []byte(text), mode)
	}
}

func (t *tree) directory(name string) {
	if t.err == nil {
		t.err = os.MkdirAll(t.path(name), 0o755)
	}
}

// compress writes without name and time, which would differ from build to build.
func (t *tree) compress(name, text string) {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err == nil {
		_, err = w.Write([]byte(text))
	}
	if err == nil {
		err = w.Close()
	}
	t.note("", err)
	t.write(name, 0o644, out.String())
}

// walk visits the files that will be installed, in order of name.
func (t *tree) walk(visit func(name string, info fs.FileInfo)) {
	t.note("", filepath.WalkDir(t.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			visit(strings.TrimPrefix(path, t.root+"/"), info)
		}
		return err
	}))
}

// sums is the list of checksums by which dpkg --verify finds damage.
func (t *tree) sums() string {
	var out strings.Builder
	t.walk(func(name string, _ fs.FileInfo) {
		if strings.HasPrefix(name, "etc/") {
			return // the operator's to change
		}
		sum := md5.Sum([]byte(t.keep(os.ReadFile(t.path(name)))))
		out.WriteString(hex.EncodeToString(sum[:]) + "  " + name + "\n")
	})
	return out.String()
}

// kib is the size when installed.
func (t *tree) kib() int64 {
	var total int64
	t.walk(func(_ string, info fs.FileInfo) { total += (info.Size() + 1023) / 1024 })
	return total
}

// seal gives every file and directory one time and the same rights whatever
// the umask.
func (t *tree) seal() error {
	return filepath.WalkDir(t.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if d.IsDir() || info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
		return os.Chtimes(path, t.at, t.at)
	})
}
