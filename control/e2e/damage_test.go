package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
)

// TestLostAndDamagedData deletes a follower's data, damages the end of its log
// in several ways, and damages the view that a relay keeps.
func TestLostAndDamagedData(t *testing.T) {
	o := startOrdeal(t, startTrio(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true}))
	leads, lost := o.leader()
	if lost == o.servers[0] { // the fleet's own commands need its directory
		lost = o.other(leads, lost)
	}
	o.write(lost, time.Now())
	lost.Kill()
	o.write(leads, time.Now())
	if err := o.Rejoin(within(t, time.Minute), lost); err != nil {
		t.Fatal(err)
	}
	if name := o.missing(lost); name != "" {
		t.Errorf("the server that joined anew lacks %s", name)
	}
	o.waitVoters(3)
	o.survived("deleted data of a follower")

	o.damageLog(lost)
	// The remedy that the message names.
	if err := os.Rename(lost.Dir, lost.Dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := o.Rejoin(within(t, time.Minute), lost); err != nil {
		t.Fatal(err)
	}
	o.waitVoters(3)
	o.survived("damaged log of a follower")
	o.check()

	o.damageView(o.Relays[0])
}

// damageLog damages the end of a follower's log in several ways: each must be
// refused with the remedy.
func (o *ordeal) damageLog(lost *fleet.ControlServer) {
	o.t.Helper()
	o.write(lost, time.Now())
	lost.Kill()
	if err := os.Remove(filepath.Join(lost.Dir, "admin.sock")); err != nil {
		o.t.Fatal(err)
	}
	last := []byte(o.acked[len(o.acked)-1])
	for name, damage := range map[string]func(b []byte, at int) []byte{
		"a flipped bit": func(b []byte, at int) []byte { b[at] ^= 1; return b },
		"zeros":         func(b []byte, at int) []byte { clear(b[at:]); return b },
		"cut off":       func(b []byte, at int) []byte { return b[:at] },
	} {
		was := lost.Dir + ".good"
		if err := os.Rename(lost.Dir, was); err != nil {
			o.t.Fatal(err)
		}
		if err := os.CopyFS(lost.Dir, os.DirFS(was)); err != nil {
			o.t.Fatal(err)
		}
		damaged := 0
		logs, err := filepath.Glob(filepath.Join(lost.Dir, "raft", "log", "*.wal"))
		if err != nil {
			o.t.Fatal(err)
		}
		for _, path := range logs {
			b, err := os.ReadFile(path)
			if err != nil {
				o.t.Fatal(err)
			}
			if at := bytes.LastIndex(b, last); at >= 0 {
				damaged++
				if err := os.WriteFile(path, damage(b, at), 0o600); err != nil {
					o.t.Fatal(err)
				}
			}
		}
		if damaged != 1 {
			o.t.Fatalf("%s: the last change is in %d of %d log files", name, damaged, len(logs))
		}
		o.t.Log(name)
		o.refusesToStart(lost, "move the data directory away and join again")
		if err := os.RemoveAll(lost.Dir); err != nil {
			o.t.Fatal(err)
		}
		if err := os.Rename(was, lost.Dir); err != nil {
			o.t.Fatal(err)
		}
	}
}

// damageView damages the view that a relay keeps: it must get it again.
func (o *ordeal) damageView(r *fleet.Relay) {
	t := o.t
	t.Helper()
	r.Kill()
	view := filepath.Join(r.Dir, "view", "current")
	b, err := os.ReadFile(view)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(view, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := o.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(r.Log)
	if err != nil || !bytes.Contains(log, []byte("is damaged (its checksum does not match): it is not used, the relay waits for control to send the view again")) {
		t.Errorf("the relay does not say that its view is damaged (%v)", err)
	}
	if err := o.WaitApplied(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	after, err := o.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, o.Fleet, 20), Size: flowMailBytes, Connections: 2, Tag: "after"})
	if err != nil {
		t.Fatal(err)
	}
	if a := settle(t, o.Fleet, after); a.delivered != len(after) {
		t.Errorf("%d of %d messages arrived after the view was damaged", a.delivered, len(after))
	}
}

const (
	commitSamples = 400
	maxCommitP50  = 5 * time.Millisecond
)

// TestCommitLatency measures how long three servers on one machine take to
// agree on a change, apart from HTTPS and the checks before it.
func TestCommitLatency(t *testing.T) {
	f := startTrio(t, fleet.Config{Open: true, NoDKIM: true})
	leads, _ := f.leader()
	h := startHistory(t, f, 1, time.Hour) // for its key and client: they pause
	machine := newYardstick(t, h, leads)
	before, samples := commitSeconds(t, f.servers)
	tries := 0
	for range commitSamples {
		h.must(func() bool {
			tries++ // of one that failed nobody knows whether it was made
			return h.ask(http.MethodPost, leads, "/api/v1/tenants", fmt.Sprintf(`{"name":"latency%d"}`, tries))
		})
		machine.measure()
	}
	after, total := commitSeconds(t, f.servers)
	p50 := median(before, after, total-samples)
	limit, sync, request := machine.limit()
	t.Logf("three servers: p50 of %d commits is %s; of a sync %s, of a request that changes nothing %s", total-samples,
		p50.Round(10*time.Microsecond), sync.Round(10*time.Microsecond), request.Round(10*time.Microsecond))
	if total-samples < commitSamples {
		t.Errorf("%d commits were measured, %d were made", total-samples, commitSamples)
	}
	if p50 > limit {
		t.Errorf("p50 of a commit is %s, want less than %s", p50, limit)
	}
}

// must repeats what no server can do while there is no leader: on a busy machine one
// may step down that was not heard in time.
func (h *history) must(ask func() bool) {
	h.t.Helper()
	eventually(h.t, time.Minute, "a server's answer", ask)
}

// ask asks a server for what is right, and reports whether it did that.
func (h *history) ask(method string, s *fleet.ControlServer, path, body string) bool {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), method, "https://"+s.API()+path, strings.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+h.key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.web.Do(req) // within touchTimeout
	if err != nil {
		h.t.Log(err)
		return false
	}
	defer resp.Body.Close()
	var row struct{ Name, Detail string }
	err = json.NewDecoder(resp.Body).Decode(&row)
	switch {
	case err == nil && row.Name != "":
		return true
	case err == nil && resp.StatusCode != http.StatusServiceUnavailable:
		h.t.Fatalf("%s %s: %s: %s", method, path, resp.Status, row.Detail)
	}
	h.t.Logf("%s %s: %s: %s (%v)", method, path, resp.Status, row.Detail, err)
	return false
}

// yardstick measures what the machine takes, beside the commits, for the two things
// that a commit is made of.
type yardstick struct {
	t               *testing.T
	h               *history
	server          *fleet.ControlServer
	file            *os.File
	syncs, requests []time.Duration
}

func newYardstick(t *testing.T, h *history, server *fleet.ControlServer) *yardstick {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "synced"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return &yardstick{t: t, h: h, server: server, file: file}
}

func (y *yardstick) measure() {
	y.t.Helper()
	begin := time.Now()
	_, err := y.file.Write(make([]byte, 1024))
	if err == nil {
		err = y.file.Sync()
	}
	if err != nil {
		y.t.Fatal(err)
	}
	synced := time.Now()
	y.h.must(func() bool { return y.h.ask(http.MethodGet, y.server, "/api/v1/tenants/register0", "") })
	y.syncs, y.requests = append(y.syncs, synced.Sub(begin)), append(y.requests, time.Since(synced))
}

// limit returns how long a commit may take, and the medians that this is made of.
// The leader syncs, asks two servers, and one of them syncs and answers: two
// requests, since the other is asked on the same processors, and three syncs of the
// same disk. A machine for which half as much again is more than maxCommitP50 is
// slower than those that this is said of.
func (y *yardstick) limit() (limit, sync, request time.Duration) {
	slices.Sort(y.syncs)
	slices.Sort(y.requests)
	sync, request = y.syncs[len(y.syncs)/2], y.requests[len(y.requests)/2]
	return max(maxCommitP50, (3*sync+2*request)*3/2), sync, request
}

// bucket is one of a histogram: how many samples were at most so long.
type bucket struct {
	limit float64
	count uint64
}

// commitSeconds reads the histograms of commits from the servers' metrics, and adds
// them up: each is of the commits that its server made as the leader.
func commitSeconds(t *testing.T, servers []*fleet.ControlServer) (sum []bucket, count uint64) {
	t.Helper()
	for _, s := range servers {
		out, n := commitSecondsOf(t, s)
		if count += n; sum == nil {
			sum = out
			continue
		}
		for i := range sum {
			if sum[i].limit != out[i].limit {
				t.Fatalf("%s has other buckets", s.Name)
			}
			sum[i].count += out[i].count
		}
	}
	return sum, count
}

func commitSecondsOf(t *testing.T, s *fleet.ControlServer) (out []bucket, count uint64) {
	t.Helper()
	resp, err := http.Get(s.Metrics() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	const name = "relais_control_raft_commit_seconds"
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		var b bucket
		if text, ok := strings.CutPrefix(lines.Text(), name+`_bucket{le="`); ok {
			if _, err := fmt.Sscanf(strings.Replace(text, `"}`, "", 1), "%g %d", &b.limit, &b.count); err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			out = append(out, b)
		} else if text, ok := strings.CutPrefix(lines.Text(), name+"_count "); ok {
			if count, err = strconv.ParseUint(text, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	if lines.Err() != nil || len(out) == 0 {
		t.Fatalf("the metric %s is missing (%v)", name, lines.Err())
	}
	return out, count
}

// median estimates the middle of the samples between two readings, as
// histogram_quantile does: evenly within a bucket.
func median(before, after []bucket, samples uint64) time.Duration {
	lower, below := 0.0, 0.0
	for i, b := range after {
		n := float64(b.count - before[i].count)
		if half := float64(samples) / 2; n >= half && n > below {
			return time.Duration((lower + (b.limit-lower)*(half-below)/(n-below)) * float64(time.Second))
		}
		lower, below = b.limit, n
	}
	return time.Hour
}
