// Command bench measures Relais beside Postfix, Haraka and a relay that keeps
// nothing, on one machine in one run: the same client, the same name server,
// the same mail exchangers, one system after the other and in rounds. It is
// what `make bench` calls; shared/docs/performance.md tells what it does and
// what came of it.
//
// It runs in a network and a mount namespace of its own, so the systems use the
// ports and the resolv.conf that they use everywhere, and nothing of it is seen
// outside. That takes root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// What is measured: every system with every size.
var (
	allSystems = []string{"postfix", "haraka", "null", "relais", "relais-dkim"}
	allCases   = []testCase{{"1k", 1 << 10}, {"10k", 10 << 10}, {"100k", 100 << 10}}
)

// testCase is a size of messages.
type testCase struct {
	name  string
	bytes int
}

// Defaults and bounds.
const (
	connections  = 50
	domains      = 100
	fullRounds   = 3
	maxRounds    = 20
	fullSeconds  = 8
	quickSeconds = 4
	maxSeconds   = 600
	runTimeout   = 2 * time.Hour
	insideVar    = "RELAIS_BENCH_INSIDE"
	nullArg      = "null-relay"
)

type options struct {
	bin     string
	dir     string
	systems []string
	cases   []testCase
	rounds  int
	seconds int
	doc     string
	profile string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == nullArg {
		if err := nullRelay(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench: null relay:", err)
			os.Exit(1)
		}
		return
	}
	o, err := parse(os.Args[1:], os.Stderr)
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	if os.Getenv(insideVar) == "" {
		os.Exit(enter())
	}
	ok, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// parse reads the flags; make passes variables that are not set as empty.
func parse(args []string, errs io.Writer) (*options, error) {
	o := &options{}
	var systems, cases, rounds, seconds, quick string
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(errs)
	fs.StringVar(&o.bin, "bin", "bin", "directory with the binaries")
	fs.StringVar(&o.dir, "dir", "", "directory for queues and logs, on the disk to be measured (default: a new one in the temporary directory)")
	fs.StringVar(&systems, "systems", "", "systems to measure, with commas (default "+strings.Join(allSystems, ",")+")")
	fs.StringVar(&cases, "cases", "", "sizes of messages, with commas: 1k, 10k, 100k (default all)")
	fs.StringVar(&rounds, "rounds", "", "how often each is measured, 1 to 20; medians are printed (default 3)")
	fs.StringVar(&seconds, "seconds", "", "about how long a system is given mail, 1 to 600 (default 8)")
	fs.StringVar(&quick, "quick", "", "1: one round of 4 seconds each")
	fs.StringVar(&o.doc, "doc", "", "write the results into the generated section of this file")
	fs.StringVar(&o.profile, "profile", "", "write a CPU profile of the relay's measured seconds to this file")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	o.rounds, o.seconds = fullRounds, fullSeconds
	if quick != "" && quick != "0" {
		o.rounds, o.seconds = 1, quickSeconds
	}
	var err error
	if o.rounds, err = number("ROUNDS", rounds, o.rounds, maxRounds); err != nil {
		return nil, err
	}
	if o.seconds, err = number("SECONDS", seconds, o.seconds, maxSeconds); err != nil {
		return nil, err
	}
	if o.systems, err = chosen("SYSTEMS", systems, allSystems); err != nil {
		return nil, err
	}
	var names []string
	for _, c := range allCases {
		names = append(names, c.name)
	}
	if names, err = chosen("CASES", cases, names); err != nil {
		return nil, err
	}
	for _, c := range allCases {
		if slices.Contains(names, c.name) {
			o.cases = append(o.cases, c)
		}
	}
	return o, nil
}

func number(name, text string, fallback, most int) (int, error) {
	if text == "" {
		return fallback, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("%s is %q; write a number from 1 to %d", name, text, most)
	}
	return n, nil
}

// chosen returns the members of all that text names, in all's order.
func chosen(name, text string, all []string) ([]string, error) {
	if text == "" {
		return all, nil
	}
	want := strings.Split(text, ",")
	for _, w := range want {
		if !slices.Contains(all, w) {
			return nil, fmt.Errorf("%s names %q; there are %s", name, w, strings.Join(all, ", "))
		}
	}
	var out []string
	for _, a := range all {
		if slices.Contains(want, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

// enter runs this program again in namespaces of its own, and returns its exit
// code.
func enter() int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: run as root: the systems get a network and a resolv.conf of their own")
		return 2
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVar+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	// The child gets the terminal's signals too, and cleans up; this process
	// only waits, and passes on what was sent to it alone.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func say(text string, args ...any) { fmt.Fprintf(os.Stderr, text+"\n", args...) }

// run measures everything and prints the results.
func run(ctx context.Context, o *options) (good bool, err error) {
	if o.dir == "" {
		if o.dir, err = os.MkdirTemp("", "relais-bench-"); err != nil {
			return false, err
		}
		defer func() {
			if err == nil || ctx.Err() != nil { // what went wrong has to be found in the logs
				_ = os.RemoveAll(o.dir)
			} else {
				say("logs      %s", o.dir)
			}
		}()
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return false, err
	}
	w, err := newWorld(o.dir)
	if err != nil {
		return false, err
	}
	defer w.close()
	r := &report{machine: describeMachine(o.dir), options: o}
	for round := range o.rounds {
		for _, c := range o.cases {
			for _, name := range o.systems {
				began := time.Now()
				cell, err := w.measure(ctx, o, name, c, round)
				if err != nil {
					return false, fmt.Errorf("%s, %s: %w", name, c.name, err)
				}
				say("%d/%d  %-12s %-5s %6d messages: accepted %7.0f/s, delivered %7.0f/s, CPU %6.3f ms (harness %.3f), %5.0f MiB, p50 %7.1f ms, p99 %8.1f ms, lost %d, twice %d  (%.0f s)",
					round+1, o.rounds, name, c.name, cell.Messages, cell.AcceptedPerS, cell.DeliveredPerS, cell.CPU, cell.harness, cell.RSS, cell.P50, cell.P99, cell.Lost, cell.Duplicated, time.Since(began).Seconds())
				r.add(cell)
				if name != "relais-dkim" {
					continue
				}
				if err := r.addBareSigning(); err != nil {
					return false, err
				}
			}
		}
	}
	if err := r.print(os.Stdout); err != nil {
		return false, err
	}
	if o.doc != "" {
		if err := r.document(o.doc); err != nil {
			return false, err
		}
	}
	return r.good(), nil
}
