package memlimit

import (
	"bytes"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"testing/fstest"
)

const (
	v2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
	v1 = "31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" +
		"32 24 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
	hybrid = v1 + "33 24 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)

func tree(cgroup, mountinfo string, files map[string]string) fstest.MapFS {
	root := fstest.MapFS{"proc/self/cgroup": {Data: []byte(cgroup)}, "proc/self/mountinfo": {Data: []byte("1 0 8:1 / / rw - ext4 /dev/sda rw\n" + mountinfo)}}
	for name, text := range files {
		root["sys/fs/cgroup/"+name] = &fstest.MapFile{Data: []byte(text + "\n")}
	}
	return root
}

func TestGroup(t *testing.T) {
	const none = int64(math.MaxInt64)
	for _, tc := range []struct {
		name, cgroup, mounts string
		files                map[string]string
		want                 int64
	}{
		{"no limit", "0::/system.slice/a.service\n", v2, map[string]string{"system.slice/a.service/memory.max": "max", "system.slice/a.service/memory.high": "max"}, none},
		{"memory.max", "0::/system.slice/a.service\n", v2, map[string]string{"system.slice/a.service/memory.max": "1000", "system.slice/a.service/memory.high": "max"}, 1000},
		{"memory.high is smaller", "0::/system.slice/a.service\n", v2, map[string]string{"system.slice/a.service/memory.max": "1000", "system.slice/a.service/memory.high": "800"}, 800},
		{"a slice above", "0::/system.slice/a.service\n", v2, map[string]string{"system.slice/memory.max": "500", "system.slice/a.service/memory.max": "1000"}, 500},
		{"a container's own root", "0::/\n", v2, map[string]string{"memory.max": "700"}, 700},
		{"a group outside the name space", "0::/../other\n", v2, map[string]string{"memory.max": "700"}, 700},
		{"a group that is mounted by itself", "0::/docker/abc/sub\n", "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", map[string]string{"memory.max": "900", "sub/memory.max": "max"}, 900},
		{"a group beside the mounted one", "0::/docker/abcdef\n", "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", map[string]string{"memory.max": "900", "def/memory.max": "1"}, 900},
		{"version 1", "4:memory:/box\n1:cpu:/\n", v1, map[string]string{"memory/box/memory.limit_in_bytes": "600", "memory/memory.limit_in_bytes": "9223372036854771712"}, 600},
		{"version 1 without limit", "4:memory:/box\n", v1, map[string]string{"memory/box/memory.limit_in_bytes": "9223372036854771712"}, none},
		{"version 1, joint controllers", "4:cpu,memory:/box\n", "32 24 0:28 / /sys/fs/cgroup/cpu,memory rw - cgroup cgroup rw,cpu,memory\n", map[string]string{"cpu,memory/box/memory.limit_in_bytes": "600"}, 600},
		{"both versions, memory in 1", "4:memory:/box\n0::/box\n", hybrid, map[string]string{"memory/box/memory.limit_in_bytes": "600"}, 600},
		{"nothing mounted", "0::/a\n", "", nil, none},
		{"a name with a blank", "0::/a\n", `30 24 0:26 / /sys/fs/c\040group rw - cgroup2 cgroup2 rw` + "\n", nil, none},
		{"lines that are cut off", "nonsense\n0:\n", "30 24 - \n- cgroup2\n", nil, none},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, err := Group(tree(tc.cgroup, tc.mounts, tc.files)); err != nil || got != tc.want {
				t.Errorf("Group() = %d, %v; want %d", got, err, tc.want)
			}
		})
	}
	if got, err := Group(fstest.MapFS{}); err != nil || got != none {
		t.Errorf("without control groups: %d, %v", got, err)
	}
	for _, bad := range []string{"", "-5", "12 MB"} {
		if got, err := Group(tree("0::/\n", v2, map[string]string{"memory.max": bad})); err == nil || !strings.Contains(err.Error(), "memory.max") {
			t.Errorf("memory.max of %q: %d, %v; want an error that names the file", bad, got, err)
		}
	}
	blank := tree("0::/a\n", `30 24 0:26 / /sys/fs/c\040group rw - cgroup2 cgroup2 rw`+"\n", nil)
	blank["sys/fs/c group/a/memory.max"] = &fstest.MapFile{Data: []byte("77\n")}
	if got, err := Group(blank); err != nil || got != 77 {
		t.Errorf("a mount with a blank in its name: %d, %v; want 77", got, err)
	}
}

// What this machine says can be read.
func TestGroupHere(t *testing.T) {
	if limit, err := Group(os.DirFS("/")); err != nil || limit <= 0 {
		t.Errorf("Group() = %d, %v", limit, err)
	}
}

func TestApply(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	const gib = 1 << 30
	limited := tree("0::/\n", v2, map[string]string{"memory.max": "1073741824"})
	for _, tc := range []struct {
		name, env string
		root      fs.FS
		want      int64
		says      string
	}{
		{"limit", "", limited, gib / 100 * 90, "limit_bytes=966367620"},
		{"environment first", "2GiB", limited, math.MaxInt64, "GOMEMLIMIT=2GiB"},
		{"none", "", tree("0::/\n", v2, nil), math.MaxInt64, ""},
		{"unreadable", "", tree("0::/\n", v2, map[string]string{"memory.max": "?"}), math.MaxInt64, "memory.max"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			debug.SetMemoryLimit(math.MaxInt64)
			var log bytes.Buffer
			Apply(tc.root, func(string) string { return tc.env }, slog.New(slog.NewTextHandler(&log, nil)))
			if got := debug.SetMemoryLimit(-1); got != tc.want {
				t.Errorf("the limit is %d, want %d", got, tc.want)
			}
			if (tc.says == "") != (log.Len() == 0) || !strings.Contains(log.String(), tc.says) {
				t.Errorf("logged %q, want %q in it", log.String(), tc.says)
			}
		})
	}
}
