package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRemovingSeesAllMail: what purge goes by when it decides whether to delete the
// queue counts held mail as well as mail that waits, and takes what cannot be
// counted for mail.
func TestRemovingSeesAllMail(t *testing.T) {
	script, err := os.ReadFile(filepath.Join("files", "prerm.relay"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		summary string // what the program prints
		fails   bool
		want    string // what is noted; empty: that nothing waits
	}{
		{"nothing", `{"queues":3,"waiting":0,"held":0,"in_flight":0,"counted":true}`, false, ""},
		{"waiting", `{"queues":3,"waiting":12,"held":0,"in_flight":0,"counted":true}`, false, "12\n"},
		{"held", `{"queues":3,"waiting":0,"held":5,"in_flight":0,"counted":true}`, false, "5\n"},
		{"both", `{"queues":3,"waiting":12,"held":5,"in_flight":0,"counted":true}`, false, "17\n"},
		{"of another release", `{"queues":3,"waiting":0}`, false, "an unknown number of\n"},
		{"not counted", "", true, "an unknown number of\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			state, bin := t.TempDir(), t.TempDir()
			if err := os.Mkdir(filepath.Join(state, "store"), 0o700); err != nil {
				t.Fatal(err)
			}
			status := "0"
			if tc.fails {
				status = "1"
			}
			fake := "#!/bin/sh\nprintf '%s\\n' '" + tc.summary + "'\nexit " + status + "\n"
			if err := os.WriteFile(filepath.Join(bin, "runuser"), []byte(fake), 0o755); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("sh", "-e", "-c", strings.ReplaceAll(string(script), "@STATE@", state), "prerm", "remove")
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			got, err := os.ReadFile(filepath.Join(state, "mail-waits"))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			if string(got) != tc.want {
				t.Errorf("noted is %q, want %q", got, tc.want)
			}
		})
	}
}
