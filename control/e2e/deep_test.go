package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestBenchDeep runs the measurement of a deep queue with a shallow one: it
// must account for every message through a kill and two restarts, and print
// all of its figures. How large they are is of interest at full size only.
func TestBenchDeep(t *testing.T) {
	bench := filepath.Join(t.TempDir(), "benchdeep")
	build := exec.Command("go", "build", "-o", bench, "./scripts/benchdeep")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(within(t, 10*time.Minute), bench, "-bin", binaries, "-dir", t.TempDir(), "-n", "2000", "-domains", "200")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	values := make(map[string]float64)
	for line := range bytes.Lines(stdout.Bytes()) {
		var figure struct {
			Figure string  `json:"figure"`
			Value  float64 `json:"value"`
		}
		if err := json.Unmarshal(line, &figure); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		values[figure.Figure] = figure.Value
	}
	for _, name := range []string{
		"load", "waiting", "rss_peak", "rss_steady", "disk", "restart_to_first_attempt", "restart_to_first_attempt_after_kill",
		"throughput_empty", "throughput", "throughput_share", "cpu", "cpu_empty", "drain", "purge",
	} {
		if values[name] <= 0 {
			t.Errorf("%s is %v", name, values[name])
		}
	}
	for _, name := range []string{"transactional_p99_empty", "transactional_p99", "transactional_p99_draining", "transactional_p99_purging", "oldest_overdue", "lost", "duplicated"} {
		if v, ok := values[name]; !ok || v < 0 {
			t.Errorf("%s is %v", name, v)
		}
	}
	if values["lost"] != 0 || values["duplicated"] != 0 {
		t.Errorf("%v messages lost, %v duplicated", values["lost"], values["duplicated"])
	}
	if t.Failed() {
		t.Logf("%s%s", stdout.Bytes(), stderr.Bytes())
	}
}
