package e2e

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// release is a pair of programs.
type release struct {
	bin      string // directory with both
	version  string
	commands uint16 // newest version of the commands it knows; 0: it does not tell
}

// thisRelease is what the tree builds.
func thisRelease(t *testing.T) release {
	t.Helper()
	var v struct {
		Version  string `json:"version"`
		Commands uint16 `json:"commands"`
	}
	out, err := command(t, filepath.Join(binaries, "relais-control"), "version", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	if err != nil || v.Commands == 0 {
		t.Fatalf("the program does not tell its version: %v\n%s", err, out)
	}
	return release{binaries, v.Version, v.Commands}
}

// releaseBefore builds the release before from its source, which
// scripts/previous-release.sh keeps.
func releaseBefore(t *testing.T) release {
	t.Helper()
	archives, err := filepath.Glob(filepath.Join("testdata", "previous", "*.tar.gz"))
	if err != nil || len(archives) != 1 {
		t.Fatalf("testdata/previous holds %q, want the archive of one release: run scripts/previous-release.sh (%v)", archives, err)
	}
	r := release{bin: t.TempDir(), version: strings.TrimSuffix(filepath.Base(archives[0]), ".tar.gz")}
	source := t.TempDir()
	if err := extract(archives[0], source); err != nil {
		t.Fatalf("%s: %v", archives[0], err)
	}
	// Without -trimpath the folder's name would be part of what the cache knows.
	build := exec.CommandContext(t.Context(), "go", "build", "-mod=readonly", "-trimpath", "-ldflags", "-X github.com/relais-mta/relais/shared/buildinfo.version="+r.version,
		"-o", r.bin+string(filepath.Separator), "./relay/cmd/relais-relay", "./control/cmd/relais-control")
	build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("the release before does not build: %v\n%s", err, out)
	}
	return r
}

// extract unpacks an archive of plain files.
func extract(archive, dir string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	for files := tar.NewReader(z); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		path := filepath.Join(dir, filepath.Clean("/"+h.Name))
		text, err := io.ReadAll(files)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o700)
		}
		if err == nil {
			err = os.WriteFile(path, text, 0o600)
		}
		if err != nil {
			return err
		}
	}
}
