// Command benchdeep shows how a relay lives with a deep queue: it fills one
// with mail that nobody takes yet, and measures the relay's memory, how soon
// it delivers after a restart, and what the backlog costs the mail that can be
// delivered. It is what `make bench-deep` calls; shared/docs/performance-deep.md
// tells how to read it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"text/tabwriter"

	"github.com/relais-mta/relais/shared/fault"
)

// Defaults and bounds.
const (
	defaultMessages = 1_000_000
	minMessages     = 1_000
	maxMessages     = 4_000_000
	defaultDomains  = 10_000
	messageBytes    = 2 << 10
	spaceFor        = 1_000_000 // so many messages need minFreeBytes
	minFreeBytes    = 20 << 30
)

type options struct {
	bin, dir string
	n        int
	domains  int
	profiles string
}

func main() {
	o, err := parse()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-deep:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	r := &report{n: o.n}
	err = run(ctx, o, r)
	if err == nil {
		err = r.print()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-deep:", err)
	}
	if err != nil || !r.sound() {
		os.Exit(1)
	}
}

// parse reads the flags; make passes variables that are not set as empty.
func parse() (*options, error) {
	var n, domains string
	o := &options{}
	flag.StringVar(&o.bin, "bin", "bin", "directory with the binaries")
	flag.StringVar(&o.dir, "dir", "", "directory for data and logs (default: a new one in the temporary directory)")
	flag.StringVar(&n, "n", "", "recipients to queue (default 1000000)")
	flag.StringVar(&domains, "domains", "", "domains they belong to (default 10000)")
	flag.StringVar(&o.profiles, "profiles", "", "directory for heap profiles of the relay (default: none are kept)")
	flag.Parse()
	var err error
	if o.n, err = number("N", n, defaultMessages, minMessages, maxMessages); err != nil {
		return nil, err
	}
	o.domains, err = number("DOMAINS", domains, min(defaultDomains, o.n/10), 10, 50_000)
	return o, err
}

func number(name, text string, fallback, least, most int) (int, error) {
	if text == "" {
		return fallback, nil
	}
	v, err := strconv.Atoi(text)
	if err != nil || v < least || v > most {
		return 0, fault.Field("bench-deep", name, "is %q; write a number from %d to %d", text, least, most)
	}
	return v, nil
}

// prepareDir makes the directory of the run, and refuses to fill a disk.
func prepareDir(o *options) (cleanUp func(), err error) {
	parent := o.dir
	if parent == "" {
		parent = os.TempDir()
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, err
	}
	free, err := freeBytes(parent)
	if err != nil {
		return nil, err
	}
	need := int64(float64(minFreeBytes) * float64(o.n) / spaceFor)
	if o.n >= spaceFor {
		need = max(minFreeBytes, need/2)
	}
	if free < need {
		return nil, fault.New(fault.NoSpace, "bench-deep", "%s has %d MiB free and %d recipients need %d MiB: set DIR to a larger file system", parent, free/mib, o.n, need/mib)
	}
	if o.dir, err = os.MkdirTemp(parent, "relais-bench-deep-"); err != nil {
		return nil, err
	}
	dir := o.dir
	return func() { _ = os.RemoveAll(dir) }, nil
}

// figure is one result, a line of JSON on standard output.
type figure struct {
	Figure string  `json:"figure"`
	N      int     `json:"n"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
	Target float64 `json:"target,omitempty"`
	OK     *bool   `json:"ok,omitempty"`
	note   string
}

type report struct {
	n       int
	figures []figure
	lost    bool
}

func (r *report) add(name string, value float64, unit, note string) {
	r.figures = append(r.figures, figure{Figure: name, N: r.n, Value: value, Unit: unit, note: note})
}

// atMost and atLeast add a figure that has a target.
func (r *report) atMost(name string, value, target float64, unit, note string) {
	r.targeted(name, value, target, unit, note, value <= target)
}

func (r *report) atLeast(name string, value, target float64, unit, note string) {
	r.targeted(name, value, target, unit, note, value >= target)
}

func (r *report) targeted(name string, value, target float64, unit, note string, ok bool) {
	r.add(name, value, unit, note)
	f := &r.figures[len(r.figures)-1]
	f.Target, f.OK = target, &ok
}

// sound reports whether no mail was lost or delivered twice.
func (r *report) sound() bool { return !r.lost && len(r.figures) > 0 }

func (r *report) print() error {
	for i := range r.figures {
		line, err := json.Marshal(&r.figures[i])
		if err != nil {
			return err
		}
		fmt.Println(string(line))
	}
	w := tabwriter.NewWriter(os.Stderr, 0, 4, 2, ' ', 0)
	fmt.Fprintf(w, "FIGURE (%d recipients)\tVALUE\tTARGET\t\t\n", r.n)
	for _, f := range r.figures {
		target, verdict := "", ""
		if f.OK != nil {
			target, verdict = strconv.FormatFloat(f.Target, 'f', -1, 64), "missed"
			if *f.OK {
				verdict = "ok"
			}
		}
		fmt.Fprintf(w, "%s\t%.6g %s\t%s\t%s\t%s\n", f.Figure, f.Value, f.Unit, target, verdict, f.note)
	}
	return w.Flush()
}
