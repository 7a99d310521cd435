package pki

import (
	"os"
	"path/filepath"

	"github.com/relais-mta/relais/shared/fault"
)

// WriteFile replaces the file at path by data such that a crash at any moment
// leaves the old content or the new, never a mixture: it writes a temporary
// file beside it, syncs, renames, and syncs the directory.
func WriteFile(path string, data []byte, mode os.FileMode) (err error) {
	const op = "pki.WriteFile"
	dir := filepath.Dir(path)
	file, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // created with mode 0600
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "cannot write in %s", dir)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name()) // the first error is the one worth telling
		}
	}()
	if _, err = file.Write(data); err == nil {
		err = file.Chmod(mode)
	}
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "cannot write %s", path)
	}
	return syncDir(dir)
}

// syncDir makes a rename or a new name in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "pki.WriteFile", "cannot open %s", dir)
	}
	err = d.Sync()
	if closeErr := d.Close(); err == nil {
		err = closeErr
	}
	return fault.Wrap(err, fault.Internal, "pki.WriteFile", "cannot sync %s", dir)
}
