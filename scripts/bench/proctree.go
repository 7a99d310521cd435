package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	ticksPerSecond = 100 // of /proc/PID/stat, the same on every Linux: USER_HZ
	memoryInterval = 500 * time.Millisecond
)

// tree returns the processes that descend from the given ones, those included.
func tree(roots []int) map[int]procStat {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	all := make(map[int]procStat)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, ok := readStat(pid); ok {
			all[pid] = s
		}
	}
	in := make(map[int]procStat)
	for pid, s := range all {
		for at, hops := pid, 0; at != 0 && hops < len(all); hops++ {
			if contains(roots, at) {
				in[pid] = s
				break
			}
			at = all[at].parent
		}
	}
	return in
}

func contains(list []int, v int) bool {
	for _, l := range list {
		if l == v {
			return true
		}
	}
	return false
}

type procStat struct {
	parent int
	ticks  int64 // CPU used by the process, and by its children that have ended
}

func readStat(pid int) (procStat, bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return procStat{}, false
	}
	i := bytes.LastIndexByte(text, ')') // the name before it may hold anything
	if i < 0 {
		return procStat{}, false
	}
	f := strings.Fields(string(text[i+1:]))
	if len(f) < 15 {
		return procStat{}, false
	}
	s := procStat{}
	s.parent, _ = strconv.Atoi(f[1]) // the kernel writes numbers
	for _, v := range f[11:15] {     // utime, stime, cutime, cstime
		n, _ := strconv.ParseInt(v, 10, 64)
		s.ticks += n
	}
	return s, true
}

// cpuTime returns what a tree has used. A child that ends between two readings
// is counted by its parent.
func cpuTime(roots []int) time.Duration {
	var ticks int64
	for _, s := range tree(roots) {
		ticks += s.ticks
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond
}

// memory returns the resident bytes of a tree; pages that several processes
// share are counted once (PSS).
func memory(roots []int) int64 {
	var kib int64
	for pid := range tree(roots) {
		text := read(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
				n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
				kib += n
			}
		}
	}
	return kib << 10
}

// peak watches the memory of a tree until stopped, and returns the most.
func peak(roots []int) (stop func() int64) {
	done := make(chan struct{})
	var most int64
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(memoryInterval)
		defer tick.Stop()
		for {
			most = max(most, memory(roots))
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	})
	return func() int64 {
		close(done)
		wg.Wait()
		return max(most, memory(roots))
	}
}
