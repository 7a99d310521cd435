package cluster

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
)

// unpack writes an archive of a server's raft folder. The log is allocated
// ahead of its use, so blocks of zeros become holes.
func unpack(t *testing.T, archive, dir string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := tar.NewReader(z)
	for {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.Clean("/"+h.Name))
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(path, 0o700); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := writeSparse(path, files, h.Size); err != nil {
			t.Fatal(err)
		}
	}
}

func writeSparse(path string, r io.Reader, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	block, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); at < size; {
		n, err := io.ReadFull(r, block[:min(int64(len(block)), size-at)])
		if err != nil {
			return errors.Join(err, f.Close())
		}
		if !bytes.Equal(block[:n], zeros[:n]) {
			if _, err := f.WriteAt(block[:n], at); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		at += int64(n)
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// TestDirectoryOfVersion1 opens the log and the snapshot that a program of
// version 1 of the commands wrote: they lead to the state they led to then, the
// cluster works at its old version until that is raised, and goes on from there.
func TestDirectoryOfVersion1(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	unpack(t, filepath.Join("testdata", "version1.tar.gz"), dir)
	c := open(t, dir)
	r := c.state.Read()
	const want = "982627befc7508da9f96caec7f624043a261673d3080e0a4caefb0df2b17deee"
	if got := fmt.Sprintf("%x", r.Hash()); got != want || r.Index() != 58 {
		t.Errorf("state hash %s at index %d, was %s at 58", got, r.Index(), want)
	}
	if r.Cluster().FSMVersion != 1 || len(r.Tenants()) != 49 || r.PoolByName("default") == nil {
		t.Errorf("version %d, %d tenants", r.Cluster().FSMVersion, len(r.Tenants()))
	}
	// As during an upgrade: what the old release knows is still logged so that it
	// can go back, and what it does not know is not.
	if _, err := c.Propose(t.Context(), tenantPut(100, "during")); err != nil {
		t.Error(err)
	}
	begin := &command.ClusterRecover{Generation: 2, Cause: "recover", Server: serverRecord(2)}
	if _, err := c.Propose(t.Context(), begin); err == nil {
		t.Error("a command of version 2 was logged for servers of version 1")
	}
	if _, err := c.Propose(t.Context(), &command.FSMVersionSet{Version: uint32(command.FSMVersion)}); err != nil {
		t.Fatal(err)
	}
	if res, err := c.Propose(t.Context(), begin); err != nil || res.Row.(*control.Cluster).Generation != 2 {
		t.Errorf("%+v, %v", res, err)
	}
	hash := c.state.Read().Hash()
	closeNow(t, c)
	c = open(t, dir)
	defer closeNow(t, c)
	if got := c.state.Read(); got.Hash() != hash || got.TenantByName("during") == nil {
		t.Error("after a restart the state is another one")
	}
}

// TestDirectoryOfVersion2 opens the log and the snapshot that the release of
// version 2 wrote, with a change to version 2 and a recovery in them.
func TestDirectoryOfVersion2(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	unpack(t, filepath.Join("testdata", "version2.tar.gz"), dir)
	c := open(t, dir)
	r := c.state.Read()
	const want = "ddea0e46d76f643cbe23bf24549e29e3d4423650f18eb2ac82427b7f18911069"
	if got := fmt.Sprintf("%x", r.Hash()); got != want || r.Index() != 55 {
		t.Errorf("state hash %s at index %d, was %s at 55", got, r.Index(), want)
	}
	if r.Cluster().FSMVersion != 2 || r.Cluster().Generation != 2 || len(r.Tenants()) != 41 || r.Recovery() != nil {
		t.Errorf("version %d, generation %d, %d tenants, recovery mode %v", r.Cluster().FSMVersion, r.Cluster().Generation, len(r.Tenants()), r.Recovery())
	}
	if _, err := c.Propose(t.Context(), &command.CAPrune{}); err == nil {
		t.Error("a command of version 3 was logged for servers of version 2")
	}
	if _, err := c.Propose(t.Context(), &command.FSMVersionSet{Version: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Propose(t.Context(), &command.CAPrune{}); err != nil {
		t.Error(err)
	}
	if err := c.Snapshot(); err != nil {
		t.Error(err)
	}
	hash := c.state.Read().Hash()
	closeNow(t, c)
	c = open(t, dir)
	defer closeNow(t, c)
	if c.state.Read().Hash() != hash {
		t.Error("after a restart the state is another one")
	}
}
