package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// target is where a running system takes mail, and what it is made of.
type target struct {
	addr         string
	user, secret string
	pids         []int  // the roots of its process tree
	policy       string // what is worth telling of its configuration
	pprof        string // URL of a CPU profile, if it offers one
}

// system is a mail server that can be measured.
type system interface {
	start(ctx context.Context, w *world, dir string) (target, error)
	stop() error
}

func newSystem(name string, o *options) system {
	switch name {
	case "postfix":
		return &postfixSystem{}
	case "haraka":
		return &harakaSystem{}
	case "null":
		return &nullSystem{}
	case "relais":
		return &relaisSystem{bin: o.bin}
	default:
		return &relaisSystem{bin: o.bin, dkim: true}
	}
}

// result is one line of the results: a system, a size of messages.
type result struct {
	System        string  `json:"system"`
	Case          string  `json:"case"`
	AcceptedPerS  float64 `json:"accepted_per_s"`
	DeliveredPerS float64 `json:"delivered_per_s"`
	CPU           float64 `json:"cpu_ms_per_msg"`
	RSS           float64 `json:"rss_mib"`
	P50           float64 `json:"p50_ms"`
	P99           float64 `json:"p99_ms"`
	Lost          int     `json:"lost"`
	Duplicated    int     `json:"duplicated"`
	Messages      int     `json:"messages"`
	policy        string
	harness       float64 // CPU of client, mail exchangers and name server, ms a message
}

// Bounds of a measurement.
const (
	warmMessages   = 500
	minMessages    = 1000
	maxMessages    = 60000
	drainTimeout   = 4 * time.Minute
	measureTimeout = 8 * time.Minute

	// What a system puts off until the last mail has left is its work too.
	settleTime    = 500 * time.Millisecond // in which a system that has settled
	settledTime   = 20 * time.Millisecond  // uses no more CPU than this
	settleTimeout = 15 * time.Second
)

// measure starts a system, warms it up, measures it and stops it.
func (w *world) measure(ctx context.Context, o *options, name string, c testCase, round int) (cell *result, err error) {
	ctx, cancel := context.WithTimeout(ctx, measureTimeout)
	defer cancel()
	dir := filepath.Join(w.dir, fmt.Sprintf("%s-%s-%d", name, c.name, round+1))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	s := newSystem(name, o)
	t, err := s.start(ctx, w, dir)
	defer func() {
		stopped := s.stop()
		if err == nil && stopped == nil {
			err = os.RemoveAll(dir)
		}
		if err == nil {
			err = stopped
		}
	}()
	if err != nil {
		return nil, err
	}
	k, err := dial(ctx, t)
	if err != nil {
		return nil, err
	}
	defer k.close()
	began := time.Now()
	if warm, err := w.phase(ctx, k, warmMessages, c.bytes); err != nil || warm.Lost > 0 {
		return nil, fmt.Errorf("warming up: %w", orLost(err, warm))
	}
	// What a system can do decides how much it gets, so that every one works
	// for about the same time, and its queue is drained within the bounds.
	rate := warmMessages / time.Since(began).Seconds()
	messages := min(max(int(rate*float64(o.seconds)), minMessages), maxMessages)
	profiled := saveProfile(ctx, o, t)
	stopPeak := peak(t.pids)
	before, own := cpuTime(t.pids), ownTime()
	cell, err = w.phase(ctx, k, messages, c.bytes)
	if err != nil {
		stopPeak()
		return nil, err
	}
	settle(ctx, t.pids)
	cell.CPU = float64((cpuTime(t.pids) - before).Microseconds()) / 1000 / float64(messages)
	cell.harness = float64((ownTime() - own).Microseconds()) / 1000 / float64(messages)
	cell.RSS = float64(stopPeak()) / (1 << 20)
	cell.System, cell.Case, cell.Messages, cell.policy = name, c.name, messages, t.policy
	return cell, profiled()
}

func orLost(err error, r *result) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("%d mails are lost", r.Lost)
}

// ownTime is the CPU time of this process.
func ownTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0 // never on Linux
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// settle waits until a system has nothing more to do.
func settle(ctx context.Context, pids []int) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for before := cpuTime(pids); ; {
		select {
		case <-time.After(settleTime):
		case <-ctx.Done():
			return
		}
		now := cpuTime(pids)
		if now-before <= settledTime {
			return
		}
		before = now
	}
}

// phase submits messages and waits until the last one has been delivered.
func (w *world) phase(ctx context.Context, k *client, messages, size int) (*result, error) {
	w.runs++
	base := time.Now()
	a := w.sink.expect(w.runs, messages, base)
	s, err := k.send(ctx, w.runs, messages, size, base)
	if err != nil {
		return nil, err
	}
	if n := s.refused.Load(); n > 0 {
		return nil, fmt.Errorf("%d messages were refused, the first with %q", n, s.why)
	}
	timeout := time.NewTimer(drainTimeout)
	defer timeout.Stop()
	select {
	case <-a.done:
	case <-timeout.C: // what is not there yet counts as lost
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return evaluate(s, a, messages), nil
}

// evaluate compares what was accepted with what has arrived.
func evaluate(s *sent, a *arrivals, messages int) *result {
	r := &result{Duplicated: int(a.extra.Load())}
	var firstAccept, lastAccept, lastArrival int64
	waits := make([]float64, 0, messages)
	for i := range messages {
		accepted, arrived := s.at[i], a.at[i]
		if firstAccept == 0 || accepted < firstAccept {
			firstAccept = accepted
		}
		lastAccept = max(lastAccept, accepted)
		if arrived == 0 {
			r.Lost++
			continue
		}
		lastArrival = max(lastArrival, arrived)
		waits = append(waits, max(float64(arrived-accepted)/1e6, 0)) // a relay that keeps nothing delivers first
	}
	r.AcceptedPerS = float64(messages) / (time.Duration(lastAccept) - s.began).Seconds()
	r.DeliveredPerS = float64(len(waits)) / max(time.Duration(lastArrival-firstAccept).Seconds(), 1e-9)
	slices.Sort(waits)
	r.P50, r.P99 = percentile(waits, 50), percentile(waits, 99)
	return r
}

// percentile of sorted values.
func percentile(sorted []float64, p int) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)*p/100, len(sorted)-1)]
}

// saveProfile fetches a CPU profile beside the measurement, when that is
// wanted. The function it returns waits for it.
func saveProfile(ctx context.Context, o *options, t target) func() error {
	if o.profile == "" || t.pprof == "" {
		return func() error { return nil }
	}
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.pprof+"?seconds="+strconv.Itoa(o.seconds), nil)
		if err != nil {
			failed = err
			return
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			failed = err
			return
		}
		defer resp.Body.Close()
		f, err := os.Create(o.profile)
		if err != nil {
			failed = err
			return
		}
		defer f.Close()
		_, failed = f.ReadFrom(resp.Body)
	})
	return func() error {
		wg.Wait()
		return failed
	}
}
