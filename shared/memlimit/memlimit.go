// Package memlimit keeps a program within the memory of its control group. The
// Go runtime does not look at that limit by itself: its heap grows until the
// kernel ends the process, although a collection would have found the room.
package memlimit

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"math"
	"path"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// sharePercent of the group's memory is for what the runtime manages. The rest
// is for stacks of C, page tables, socket buffers and pages of mapped files.
const sharePercent = 90

// Apply gives the runtime 90 % of the smallest limit that the process's control
// groups set, whether by memory.max or by memory.high, and says so. GOMEMLIMIT
// in the environment comes first. Root is the root of the file system. Without
// a limit, or when none can be read, the runtime stays unbounded.
func Apply(root fs.FS, getenv func(string) string, logger *slog.Logger) {
	if text := getenv("GOMEMLIMIT"); text != "" {
		logger.Info("memory is limited by the environment", "GOMEMLIMIT", text)
		return
	}
	limit, err := Group(root)
	if err != nil {
		logger.Warn("the memory limit of the control group cannot be read; set GOMEMLIMIT if there is one", "error", err)
		return
	}
	if limit == math.MaxInt64 {
		return
	}
	share := limit / 100 * sharePercent
	debug.SetMemoryLimit(share)
	logger.Info("memory is limited by the control group", "group_bytes", limit, "limit_bytes", share)
}

// Group returns the smallest memory limit of the process's control group and
// those above it that can be seen, in bytes; math.MaxInt64 when there is none.
// Both versions of cgroups(7) are read.
func Group(root fs.FS) (int64, error) {
	const op = "memlimit.Group"
	groups, err := fs.ReadFile(root, "proc/self/cgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return math.MaxInt64, nil // a kernel without control groups
	}
	if err != nil {
		return 0, fault.Wrap(err, fault.Internal, op, "/proc/self/cgroup cannot be read")
	}
	mounts, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil {
		return 0, fault.Wrap(err, fault.Internal, op, "/proc/self/mountinfo cannot be read")
	}
	least := int64(math.MaxInt64)
	for _, h := range hierarchies(mounts) {
		group, ok := h.group(groups)
		if !ok {
			continue
		}
		for {
			for _, file := range h.files() {
				limit, err := read(root, path.Join(h.mount, group, file))
				if err != nil {
					return 0, err
				}
				least = min(least, limit)
			}
			if group == "." {
				break
			}
			group = path.Dir(group)
		}
	}
	return least, nil
}

// hierarchy is a mounted tree of control groups that may limit memory.
type hierarchy struct {
	unified bool   // version 2
	root    string // the group that is mounted
	mount   string // where, relative to the root of the file system
}

// hierarchies finds them in the lines of proc_pid_mountinfo(5).
func hierarchies(mountinfo []byte) []hierarchy {
	var out []hierarchy
	lines := bufio.NewScanner(bytes.NewReader(mountinfo))
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		where, what := strings.Fields(before), strings.Fields(after)
		if !ok || len(where) < 5 || len(what) < 3 {
			continue
		}
		unified := what[0] == "cgroup2"
		if unified || what[0] == "cgroup" && hasWord(what[2], "memory") {
			out = append(out, hierarchy{unified, unescape(where[3]), strings.TrimPrefix(unescape(where[4]), "/")})
		}
	}
	return out
}

// group finds the process's group below the mount, from lines of cgroups(7):
// "0::/a/b" for version 2, "4:memory:/a/b" for version 1. A group outside what
// is mounted counts as the mounted one: nothing above that can be seen.
func (h hierarchy) group(cgroup []byte) (below string, ok bool) {
	for line := range strings.Lines(string(cgroup)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || h.unified != (f[0] == "0" && f[1] == "") || !h.unified && !hasWord(f[1], "memory") {
			continue
		}
		rest, inside := strings.CutPrefix(f[2], strings.TrimSuffix(h.root, "/")+"/")
		if !inside || strings.HasPrefix(rest, "..") || rest == "" {
			return ".", true
		}
		return path.Clean(rest), true
	}
	return "", false
}

func (h hierarchy) files() []string {
	if h.unified {
		return []string{"memory.max", "memory.high"}
	}
	return []string{"memory.limit_in_bytes"}
}

// unlimited is from where on version 1 means no limit: it writes the largest
// number of pages.
const unlimited = math.MaxInt64 / 2

// read returns the limit in a file; a group without the file sets none.
func read(root fs.FS, name string) (int64, error) {
	const op = "memlimit.Group"
	text, err := fs.ReadFile(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return math.MaxInt64, nil
	}
	if err != nil {
		return 0, fault.Wrap(err, fault.Internal, op, "/%s cannot be read", name)
	}
	value := strings.TrimSpace(string(text))
	if value == "max" {
		return math.MaxInt64, nil
	}
	limit, err := strconv.ParseInt(value, 10, 64)
	if err != nil || limit < 0 {
		return 0, fault.New(fault.Internal, op, "/%s holds %q, want a number of bytes", name, value)
	}
	if limit == 0 || limit >= unlimited {
		return math.MaxInt64, nil
	}
	return limit, nil
}

func hasWord(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

// unescape turns the octal escapes of mountinfo back into what they stand for.
func unescape(text string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(text)
}
