package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	ticksPerSecond = 100             // of /proc/PID/stat, the same on every Linux: USER_HZ
	memoryInterval = 2 * time.Second // a look at two hundred processes takes the kernel a while
)

// tree returns the processes that descend from the given ones, those included.
// It asks each process for its children and not all processes for their
// parents: others on the machine may be many.
func tree(roots []int) map[int]int64 {
	ticks := make(map[int]int64)
	for todo := slices.Clone(roots); len(todo) > 0; {
		pid := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, seen := ticks[pid]; seen {
			continue
		}
		used, ok := readTicks(pid)
		if !ok {
			continue // it has ended, and its parent has its ticks
		}
		ticks[pid] = used
		dir := filepath.Join("/proc", strconv.Itoa(pid), "task")
		threads, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, t := range threads { // a child belongs to the thread that made it
			for child := range strings.FieldsSeq(read(filepath.Join(dir, t.Name(), "children"))) {
				if n, err := strconv.Atoi(child); err == nil {
					todo = append(todo, n)
				}
			}
		}
	}
	return ticks
}

// readTicks returns the CPU used by a process, and by its children that have
// ended.
func readTicks(pid int) (ticks int64, ok bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, false
	}
	i := bytes.LastIndexByte(text, ')') // the name before it may hold anything
	if i < 0 {
		return 0, false
	}
	f := strings.Fields(string(text[i+1:]))
	if len(f) < 15 {
		return 0, false
	}
	for _, v := range f[11:15] { // utime, stime, cutime, cstime
		n, _ := strconv.ParseInt(v, 10, 64) // the kernel writes numbers
		ticks += n
	}
	return ticks, true
}

// cpuTime returns what a tree has used. A child that ends between two readings
// is counted by its parent.
func cpuTime(roots []int) time.Duration {
	var ticks int64
	for _, used := range tree(roots) {
		ticks += used
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
