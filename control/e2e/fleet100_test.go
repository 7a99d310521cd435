package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// What a hundred sessions may cost on two cores.
const (
	simulated       = 100
	simulatedPuts   = 5
	acknowledgedIn  = 2 * time.Second  // at p99
	reconnectedIn   = 10 * time.Second // all, after the leader's end
	memoryKilobytes = 1 << 20          // of all servers and of the program with the sessions
)

// monotonic is the clock that all processes of the machine share.
func monotonic(t *testing.T) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// simulation is the program that holds the sessions of many relays, and what it
// told of them.
type simulation struct {
	t   *testing.T
	cmd *exec.Cmd

	mu      sync.Mutex
	joined  int
	server  map[int]string        // that an agent is linked to; empty: to none
	linked  map[int]time.Duration // when
	lost    map[int]time.Duration // when it noticed last that a link had ended
	applied map[int][]appliedAt   // views, oldest first
	ended   chan struct{}         // closed when it said the last word
}

type appliedAt struct {
	revision uint64
	at       time.Duration
}

func simulate(t *testing.T, token string, servers ...string) *simulation {
	t.Helper()
	s := &simulation{t: t, server: map[int]string{}, linked: map[int]time.Duration{}, lost: map[int]time.Duration{}, applied: map[int][]appliedAt{}, ended: make(chan struct{})}
	s.cmd = exec.Command(filepath.Join(binaries, "agentsim"), append([]string{"-dir", inMemory(t), "-n", strconv.Itoa(simulated), "-token", token}, servers...)...)
	log, err := os.Create(filepath.Join(t.TempDir(), "agentsim.log"))
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stderr = log
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go s.read(bufio.NewScanner(out))
	t.Cleanup(func() {
		_ = in.Close() // so that it ends
		late := time.AfterFunc(30*time.Second, func() { _ = s.cmd.Process.Kill() })
		<-s.ended
		late.Stop()
		if err := s.cmd.Wait(); err != nil {
			t.Errorf("the program with the sessions: %v", err)
		}
		_ = log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("the end of what the sessions say:\n%s", text[max(0, len(text)-4000):])
		}
	})
	return s
}

// inMemory returns a directory that no disk has to sync, where the machine has one:
// relays have a disk each, and a hundred of them would wait for the only one here.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "relais-e2e-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (s *simulation) read(lines *bufio.Scanner) {
	defer close(s.ended)
	for lines.Scan() {
		var h struct {
			At       int64 `json:"at_ns"`
			Agent    int
			What     string
			Server   string
			Revision uint64
		}
		if err := json.Unmarshal(lines.Bytes(), &h); err != nil {
			s.t.Errorf("%v: %s", err, lines.Bytes())
			return
		}
		at := time.Duration(h.At)
		s.mu.Lock()
		switch h.What {
		case "joined":
			s.joined++
		case "linked":
			s.server[h.Agent], s.linked[h.Agent] = h.Server, at
		case "lost":
			s.server[h.Agent], s.lost[h.Agent] = "", at
		case "applied":
			s.applied[h.Agent] = append(s.applied[h.Agent], appliedAt{h.Revision, at})
		}
		s.mu.Unlock()
	}
}

// linkedTo counts the agents that are linked to each server.
func (s *simulation) linkedTo() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]int{}
	for _, server := range s.server {
		if server != "" {
			out[server]++
		}
	}
	return out
}

// appliedSince returns how long after a moment each agent worked with a
// revision, fastest first, for those that do.
func (s *simulation) appliedSince(revision uint64, begin time.Duration) []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []time.Duration
	for _, all := range s.applied {
		if i := slices.IndexFunc(all, func(a appliedAt) bool { return a.revision >= revision }); i >= 0 {
			out = append(out, all[i].at-begin)
		}
	}
	slices.Sort(out)
	return out
}

// peakKilobytes is the most memory that a process had (proc(5), VmHWM).
func peakKilobytes(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// processorTime is what a process has used of all processors together (proc(5)).
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	const perTick = time.Second / 100 // of USER_HZ
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var used time.Duration
	for _, ticks := range fields[11:13] { // utime and stime
		n, err := strconv.Atoi(ticks)
		if err != nil {
			t.Fatal(err)
		}
		used += time.Duration(n) * perTick
	}
	return used
}

// p99 of sorted durations.
func p99(sorted []time.Duration) time.Duration { return sorted[(len(sorted)*99+99)/100-1] }

// TestHundredSessions has three servers serve a hundred relays: a change of the
// policy is with all of them in time, and so are they back with a server that
// has a leader when theirs was killed.
func TestHundredSessions(t *testing.T) {
	f := startTrio(t, fleet.Config{Open: true, NoDKIM: true})
	tok, _ := token(t, f.Fleet, "--uses", strconv.Itoa(simulated))
	var addresses []string
	for _, s := range f.servers {
		addresses = append(addresses, s.Link())
	}
	s := simulate(t, tok, addresses...)
	linked := func(not string) int {
		n := 0
		for server, agents := range s.linkedTo() {
			if server != not {
				n += agents
			}
		}
		return n
	}
	eventually(t, 2*time.Minute, "all are linked", func() bool { return linked("") == simulated })
	t.Logf("linked: %v", s.linkedTo())

	var all []time.Duration
	var theirs time.Duration // of the processors, that the relays used for one change
	for i := range simulatedPuts {
		path := writePolicy(t, "queue", fmt.Sprintf("retry_jitter_percent = %d\n", 20+i))
		used, begin := processorTime(t, s.cmd.Process.Pid), monotonic(t)
		out := ctl(t, f.Fleet, "policy", "put", path)
		told := monotonic(t) - begin
		if want := fmt.Sprintf("applied by %d of %d relays", simulated+1, simulated+1); !strings.Contains(out, want) {
			t.Errorf("put said\n%.1000s", out)
		}
		took := s.waitApplied(policyRevision(t, f.Fleet), begin)
		used = (processorTime(t, s.cmd.Process.Pid) - used) / time.Duration(runtime.NumCPU())
		theirs = max(theirs, used)
		t.Logf("change %d: applied by all after %v, told to the operator after %v; the relays kept the processors for %v", i, took[len(took)-1].Round(time.Millisecond), told.Round(time.Millisecond), used)
		all = append(all, took...)
	}
	slices.Sort(all)
	t.Logf("%d acknowledgements of %d changes: p50 %v, p99 %v, slowest %v", len(all), simulatedPuts, all[len(all)/2].Round(time.Millisecond), p99(all).Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
	// Relays work with processors of their own: here the servers wait for what they need.
	if limit := acknowledgedIn + theirs; p99(all) > limit {
		t.Errorf("a change was acknowledged after %v at p99, want %v", p99(all), limit)
	}

	leads, _ := f.leader()
	kilobytes := map[string]int{leads.Name: peakKilobytes(t, leads.PID())}
	f.loseLeader(s, leads)
	kilobytes["agents"] = peakKilobytes(t, s.cmd.Process.Pid)
	sum := 0
	for _, server := range f.servers {
		if server != leads {
			kilobytes[server.Name] = peakKilobytes(t, server.PID())
		}
	}
	for _, name := range slices.Sorted(maps.Keys(kilobytes)) {
		sum += kilobytes[name]
		t.Logf("%-8s %4d MiB at most", name, kilobytes[name]/1024)
	}
	t.Logf("together %4d MiB", sum/1024)
	if sum > memoryKilobytes {
		t.Errorf("%d KiB of memory, want %d", sum, memoryKilobytes)
	}
}

// loseLeader kills the leader: the sessions that were with it go to the others,
// and a change that the new leader takes reaches all of them.
func (f *trio) loseLeader(s *simulation, leads *fleet.ControlServer) {
	t := f.t
	t.Helper()
	before := s.linkedTo()
	if before[leads.Link()] == 0 {
		t.Fatalf("nobody is linked to the leader at %s: %v", leads.Link(), before)
	}
	var survivor *fleet.ControlServer
	for _, server := range f.servers {
		if server != leads {
			survivor = server
		}
	}
	path := writePolicy(t, "queue", "retry_jitter_percent = 40\n")
	leads.Kill()
	killed := monotonic(t)
	putting := make(chan error, 1)
	go func() { putting <- f.putUntilTaken(survivor, path) }()
	eventually(t, 2*time.Minute, "all are linked to the other servers", func() bool {
		now := s.linkedTo()
		return now[leads.Link()] == 0 && now[f.servers[0].Link()]+now[f.servers[1].Link()]+now[f.servers[2].Link()] == simulated
	})
	if err := <-putting; err != nil {
		t.Fatal(err)
	}
	changed := monotonic(t) - killed
	took := s.waitApplied(policyRevision(t, f.Fleet), killed)
	noticed, linked := s.moved(killed)
	t.Logf("the leader had %d of %v; after its end the last of them noticed after %v and was linked anew after %v; a change was told as done after %v and was with all after %v",
		before[leads.Link()], before, noticed.Round(time.Millisecond), linked.Round(time.Millisecond), changed.Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	t.Logf("linked: %v", s.linkedTo())
	if linked > reconnectedIn {
		t.Errorf("all were linked again after %v, want %v", linked, reconnectedIn)
	}
	if last := took[len(took)-1]; last > reconnectedIn {
		t.Errorf("a change was with all of them after %v, want %v", last, reconnectedIn)
	}
}

// putUntilTaken changes the policy as soon as there is a leader.
func (f *trio) putUntilTaken(at *fleet.ControlServer, path string) (err error) {
	ctx, cancel := context.WithTimeout(f.t.Context(), time.Minute)
	defer cancel()
	for ctx.Err() == nil {
		if _, err = f.CtlAt(ctx, at, "policy", "put", path); err == nil {
			return nil
		}
	}
	return err
}

// moved returns how long after a moment the last agent noticed the end of its
// link, and how long after it the last one was linked again.
func (s *simulation) moved(begin time.Duration) (noticed, linked time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.lost {
		noticed = max(noticed, at-begin)
	}
	for _, at := range s.linked {
		linked = max(linked, at-begin)
	}
	return noticed, linked
}

// waitApplied waits until all agents work with a revision.
func (s *simulation) waitApplied(revision uint64, begin time.Duration) (took []time.Duration) {
	s.t.Helper()
	eventually(s.t, time.Minute, fmt.Sprint("all work with revision ", revision), func() bool {
		took = s.appliedSince(revision, begin)
		return len(took) == simulated
	})
	return took
}
