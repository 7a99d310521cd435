package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	mib             = 1 << 20
	metricsTimeout  = 10 * time.Second
	maxMetricsBytes = 4 << 20
)

// memory is what the kernel says about a process, in bytes (proc_pid_status(5)).
type memory struct{ rss, peak, anon, file int64 }

func readMemory(pid int) (m memory, err error) {
	const op = "benchdeep.readMemory"
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, fault.Wrap(err, fault.Unavailable, op, "process %d does not run", pid)
	}
	defer f.Close()
	fields := map[string]*int64{"VmRSS:": &m.rss, "VmHWM:": &m.peak, "RssAnon:": &m.anon, "RssFile:": &m.file}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || fields[words[0]] == nil {
			continue
		}
		kib, err := strconv.ParseInt(words[1], 10, 64)
		if err != nil {
			return m, fault.Wrap(err, fault.Internal, op, "/proc/%d/status says %q", pid, lines.Text())
		}
		*fields[words[0]] = kib << 10
	}
	return m, lines.Err()
}

// diskUse sums the blocks of the files below dir.
func diskUse(dir string) (bytes int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // files come and go while the relay runs
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				bytes += st.Blocks * 512
			}
		}
		return nil
	})
	return bytes
}

// freeBytes is the room on the file system of dir.
func freeBytes(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, fault.Wrap(err, fault.Unavailable, "benchdeep.freeBytes", "the free space of %s cannot be read", dir)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// readMetrics returns the samples of a relay whose names are wanted, labels
// included.
func readMetrics(ctx context.Context, base string, wanted ...string) (map[string]float64, error) {
	const op = "benchdeep.readMetrics"
	ctx, cancel := context.WithTimeout(ctx, metricsTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "the relay shows no metrics")
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxMetricsBytes))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "the relay broke off its metrics")
	}
	found := make(map[string]float64)
	for line := range bytes.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimSpace(string(line)), " ")
		if !ok {
			continue
		}
		for _, w := range wanted {
			if name == w {
				if found[name], err = strconv.ParseFloat(value, 64); err != nil {
					return nil, fault.Wrap(err, fault.Internal, op, "the metric %s is %q", name, value)
				}
			}
		}
	}
	return found, nil
}

// readCPU returns the processor time that a process has used
// (proc_pid_stat(5)).
func readCPU(pid int) (time.Duration, error) {
	const op, ticks, fieldsBehindName, userTime = "benchdeep.readCPU", 100, 13, 11
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fault.Wrap(err, fault.Unavailable, op, "process %d does not run", pid)
	}
	_, rest, ok := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < fieldsBehindName {
		return 0, fault.New(fault.Internal, op, "/proc/%d/stat is not understood", pid)
	}
	var sum int64
	for _, f := range fields[userTime:fieldsBehindName] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fault.Wrap(err, fault.Internal, op, "/proc/%d/stat is not understood", pid)
		}
		sum += n
	}
	return time.Duration(sum) * time.Second / ticks, nil
}

// saveProfile keeps a profile of the relay for whoever asks what the memory or
// the time is.
func saveProfile(ctx context.Context, base, kind, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/debug/pprof/"+kind, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "benchdeep.saveProfile", "the relay gives no profile")
	}
	defer resp.Body.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if _, err = io.Copy(f, io.LimitReader(resp.Body, 64<<20)); err != nil {
		_ = f.Close() // the profile is of no use
		return err
	}
	return f.Close()
}

// peakOf returns the most memory that a process had that has ended
// (getrusage(2)).
func peakOf(p *os.ProcessState) (int64, bool) {
	usage, ok := p.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0, false
	}
	return usage.Maxrss << 10, true
}
