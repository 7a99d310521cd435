// Command soak crashes a relay again and again, with kill -9 and with power cuts
// that drop what was not synced, at random moments of the life of its mail, and
// checks that nothing answered 250 is lost, that every copy too many had been in
// doubt, and that the records of the queue agree after every crash. It prints
// its progress, and one JSON line last. It needs root, for a disk of its own.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// overTime is what the last account and the end of a run may take.
const overTime = 15 * time.Minute

func main() {
	duration := flag.Duration("duration", 10*time.Minute, "how long to go on")
	seed := flag.Uint64("seed", uint64(time.Now().Unix()), "seed of the moments")
	flag.Parse()
	if err := run(*duration, *seed); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run(duration time.Duration, seed uint64) error {
	dir, err := os.MkdirTemp("", "relais-soak-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	result := filepath.Join(dir, "result.json")
	test := exec.Command("go", "test", "-count=1", "-v", "-timeout", (duration + overTime).String(), "-run", "^TestCrashesAtEveryMoment$", "./control/e2e")
	test.Env = append(os.Environ(), "RELAIS_SOAK="+duration.String(), fmt.Sprint("RELAIS_SOAK_SEED=", seed), "RELAIS_SOAK_RESULT="+result)
	test.Stdout, test.Stderr = os.Stderr, os.Stderr
	failed := test.Run()
	text, err := os.ReadFile(result)
	if err == nil {
		_, err = os.Stdout.Write(bytes.TrimSpace(text))
		fmt.Println()
	}
	if failed != nil {
		return fmt.Errorf("seed %d: %w", seed, failed)
	}
	return err
}
