package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAJoinGoesOnWhereOneWasKilled: what a join leaves behind when it is killed
// is no reason to refuse the next; other files are.
func TestAJoinGoesOnWhereOneWasKilled(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]bool{
		".cli.toml.156765043": false, ".server.toml.7": false, ".ca.pem.12": false, "cli.toml": false, "control.toml": false,
		".cli.toml.bak": true, ".bashrc": true, "backup": true,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := (&joiner{paths: paths{dir}}).claim()
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), name) {
			t.Errorf("with %s: %v", name, err)
		}
		_, left := os.Stat(filepath.Join(dir, name))
		if removed := os.IsNotExist(left); removed != strings.Contains("0123456789", name[len(name)-1:]) {
			t.Errorf("%s: %v", name, left)
		}
	}
}
