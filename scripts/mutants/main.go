// Command mutants shows that the simulator would notice a broken rule. It breaks
// one rule of shared/lease, shared/warmup or shared/ownership at a time, in a copy
// that only the compiler sees (go test -overlay), and runs the simulator: the
// scenario that is named for the rule must fail, and so must random worlds, of which
// the first that breaks a promise is the last. It exits 0 only if all are caught.
//
// A rule is broken by exact replacement of text. When the text is gone the mutant
// says so and fails: it has to be brought up to date with the code.
//
// Several mutants are tried at once. The compiler's cache keeps what it made of
// each, so a second run only links. The simulator is built without its second layer,
// with the real Raft, which takes no part (tag noraft).
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"
)

const pkg = "./shared/sim"

func main() {
	seeds := flag.Int("seeds", 300, "random worlds in which a mutant must be caught; 0: scenarios only")
	only := flag.String("only", "", "run only mutants whose name matches this expression")
	jobs := flag.Int("jobs", runtime.GOMAXPROCS(0), "how many mutants to try at once")
	flag.Parse()
	match, err := regexp.Compile(*only)
	if err != nil {
		fatal(err)
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		fatal(err)
	}
	began := time.Now()
	caught, ran := tryAll(dir, match, *seeds, max(*jobs, 1))
	_ = os.RemoveAll(dir) // the system cleans up what is left
	fmt.Printf("%v\nmutants caught %d/%d\n", time.Since(began).Round(time.Second), caught, ran)
	if caught < ran || ran == 0 {
		os.Exit(1)
	}
}

// tryAll tries mutants, some at once, and prints what becomes of each.
func tryAll(dir string, match *regexp.Regexp, seeds, jobs int) (caught, ran int) {
	todo := make(chan *mutant)
	go func() {
		defer close(todo)
		for i := range mutants {
			if match.MatchString(mutants[i].name) {
				todo <- &mutants[i]
			}
		}
	}()
	var mu sync.Mutex
	var working sync.WaitGroup
	for job := range jobs {
		working.Go(func() {
			own := filepath.Join(dir, fmt.Sprint(job))
			for m := range todo {
				start := time.Now()
				how, err := m.run(own, seeds)
				mu.Lock()
				if ran++; err != nil {
					fmt.Printf("MISSED  %-52s %v\n", m.name, err)
				} else {
					caught++
					fmt.Printf("caught  %-52s %s (%v)\n", m.name, how, time.Since(start).Round(100*time.Millisecond))
				}
				mu.Unlock()
			}
		})
	}
	working.Wait()
	return caught, ran
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "mutants:", err)
	os.Exit(2)
}

// run builds the simulator with the rule broken and returns how that was noticed.
func (m *mutant) run(dir string, seeds int) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	overlay, err := m.overlay(dir)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "sim.test")
	build := exec.Command("go", "test", "-c", "-tags", "noraft", "-ldflags", "-s -w", "-overlay", overlay, "-o", binary, pkg)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("does not build: %s", out)
	}
	began := time.Now()
	if _, err := fails(binary, "-test.run", "^"+m.scenario+"$"); err != nil {
		return "", fmt.Errorf("%s: %w", m.scenario, err)
	}
	how := fmt.Sprintf("by %s in %v", m.scenario, time.Since(began).Round(10*time.Millisecond))
	if seeds == 0 {
		return how, nil
	}
	began = time.Now()
	out, err := fails(binary, "-test.v", "-test.run", "^TestSeeds$", "-seeds", fmt.Sprint(seeds), "-stop", "1")
	if err != nil {
		return "", fmt.Errorf("%s, but not by random worlds: %w", how, err)
	}
	played := "some"
	if m := ranSeeds.FindSubmatch(out); m != nil {
		played = string(m[1])
	}
	return fmt.Sprintf("%s, by random worlds in %v after %s", how, time.Since(began).Round(10*time.Millisecond), played), nil
}

var ranSeeds = regexp.MustCompile(`(\d+) seeds from`)

// overlay writes the changed file and what tells the compiler of it.
func (m *mutant) overlay(dir string) (string, error) {
	text, err := os.ReadFile(m.file)
	if err != nil {
		return "", err
	}
	if n := bytes.Count(text, []byte(m.old)); n != 1 {
		return "", fmt.Errorf("%s holds %q %d times, not once: bring the mutant up to date", m.file, m.old, n)
	}
	changed := filepath.Join(dir, "mutant.go")
	if err := os.WriteFile(changed, bytes.Replace(text, []byte(m.old), []byte(m.new), 1), 0o600); err != nil {
		return "", err
	}
	path, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	text, err = json.Marshal(map[string]map[string]string{"Replace": {path: changed}})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, text, 0o600)
}

// fails runs tests that must break a promise: failing for another reason, such as a
// panic, does not count. It returns what they printed.
func fails(binary string, args ...string) ([]byte, error) {
	cmd := exec.Command(binary, append(args, "-test.timeout", "20m")...)
	cmd.Dir = filepath.Dir(binary)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil && strings.Contains(string(out), "no tests to run"):
		return nil, errors.New("there is no such test")
	case err == nil:
		return nil, errors.New("passes all the same")
	case !errors.As(err, &exit):
		return nil, err
	case strings.Contains(string(out), "panic:"):
		return nil, fmt.Errorf("panics: %s", out[:min(len(out), 2000)])
	case !strings.Contains(string(out), "--- FAIL"):
		return nil, fmt.Errorf("fails in another way: %s", out[:min(len(out), 2000)])
	}
	return out, nil
}
