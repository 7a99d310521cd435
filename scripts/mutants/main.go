// Command mutants shows that the simulator would notice a broken rule. It breaks
// one rule of shared/lease or shared/warmup at a time, in a copy that only the
// compiler sees (go test -overlay), and runs the simulator: the scenario that is
// named for the rule must fail, and so must random worlds. It exits 0 only if all
// are caught.
//
// A rule is broken by exact replacement of text. When the text is gone the mutant
// says so and fails: it has to be brought up to date with the code.
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
	"strings"
	"time"
)

const pkg = "./shared/sim"

func main() {
	seeds := flag.Int("seeds", 300, "random worlds in which a mutant must be caught; 0: scenarios only")
	only := flag.String("only", "", "run only mutants whose name matches this expression")
	flag.Parse()
	match, err := regexp.Compile(*only)
	if err != nil {
		fatal(err)
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		fatal(err)
	}
	caught, ran := 0, 0
	for _, m := range mutants {
		if !match.MatchString(m.name) {
			continue
		}
		ran++
		start := time.Now()
		how, err := m.run(dir, *seeds)
		if err != nil {
			fmt.Printf("MISSED  %-40s %v\n", m.name, err)
			continue
		}
		caught++
		fmt.Printf("caught  %-40s %s (%v)\n", m.name, how, time.Since(start).Round(100*time.Millisecond))
	}
	_ = os.RemoveAll(dir) // the system cleans up what is left
	fmt.Printf("mutants caught %d/%d\n", caught, ran)
	if caught < ran || ran == 0 {
		os.Exit(1)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "mutants:", err)
	os.Exit(2)
}

// run builds the simulator with the rule broken and returns how that was noticed.
func (m *mutant) run(dir string, seeds int) (string, error) {
	overlay, err := m.overlay(dir)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "sim.test")
	if out, err := exec.Command("go", "test", "-c", "-overlay", overlay, "-o", binary, pkg).CombinedOutput(); err != nil {
		return "", fmt.Errorf("does not build: %s", out)
	}
	began := time.Now()
	if err := fails(binary, "-test.run", "^"+m.scenario+"$"); err != nil {
		return "", fmt.Errorf("%s: %w", m.scenario, err)
	}
	how := fmt.Sprintf("by %s in %v", m.scenario, time.Since(began).Round(10*time.Millisecond))
	if seeds == 0 {
		return how, nil
	}
	began = time.Now()
	if err := fails(binary, "-test.run", "^TestSeeds$", "-seeds", fmt.Sprint(seeds), "-stop", "1"); err != nil {
		return "", fmt.Errorf("%s, but not by random worlds: %w", how, err)
	}
	return fmt.Sprintf("%s, by random worlds in %v", how, time.Since(began).Round(10*time.Millisecond)), nil
}

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
// panic, does not count.
func fails(binary string, args ...string) error {
	cmd := exec.Command(binary, append(args, "-test.timeout", "20m")...)
	cmd.Dir = filepath.Dir(binary)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil && strings.Contains(string(out), "no tests to run"):
		return errors.New("there is no such test")
	case err == nil:
		return errors.New("passes all the same")
	case !errors.As(err, &exit):
		return err
	case strings.Contains(string(out), "panic:"):
		return fmt.Errorf("panics: %s", out[:min(len(out), 2000)])
	case !strings.Contains(string(out), "--- FAIL"):
		return fmt.Errorf("fails in another way: %s", out[:min(len(out), 2000)])
	}
	return nil
}
