package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

const (
	connections  = 50      // of throughput
	loadConns    = 200     // of the load, so that a commit has much mail
	loadBatch    = 100_000 // messages of one call, so that results do not pile up
	maxSpeedMail = 30_000
	minSpeedMail = 500
	speedRuns    = 3

	deliverTimeout = 90 * time.Second
	promptRate     = 40 // a second
	promptTick     = 100 * time.Millisecond
	promptTarget   = time.Second // that transactional mail may wait
	domainStride   = 7919        // prime: neighbours in a batch go to different kinds of domains
	bulkHeader     = "X-Relais-Stream: bulk\r\n"
)

// batch is mail to submit; every message must be accepted.
type batch struct {
	class       byte
	first, n    int // numbers of the recipients
	connections int
	headers     string
	domain      func(i int) string
}

// submit sends a batch and returns the results by message, their times counted
// from the start that it returns.
func (b *bench) submit(ctx context.Context, m *batch) (*lab.Sent, error) {
	load := &lab.Load{
		Addr: b.relay.Submissions(), ImplicitTLS: true, TLS: b.fleet.ClientTLS(b.relay), Username: b.fleet.User, Password: b.fleet.Secret,
		Messages: m.n, Connections: m.connections, Size: messageBytes, Overlap: true, Headers: m.headers,
		Tag:  fmt.Sprintf("%c%d", m.class, m.first),
		From: func(int) string { return "news@" + fleet.Domain },
		To: func(i int) string {
			n := m.first + i
			return string(m.class) + strconv.Itoa(n) + "@" + m.domain(n)
		},
		Done: func(_ int, r *lab.Result) {
			if r.State == lab.StateAccepted {
				b.mu.Lock()
				b.accepted++
				b.mu.Unlock()
			}
		},
	}
	sent, err := lab.Send(ctx, load)
	if err != nil {
		return nil, err
	}
	if sent.Accepted != m.n {
		why := ""
		if at := slices.IndexFunc(sent.Results, func(r lab.Result) bool { return r.State != lab.StateAccepted }); at >= 0 {
			why = sent.Results[at].Reply
		}
		return nil, fault.New(fault.Unavailable, "bench-deep", "the relay did not take all mail: %s: %s", sent, why)
	}
	return sent, nil
}

// load fills the queue; one message of a hundred expires while the run goes on.
func (b *bench) load(ctx context.Context) error {
	begun := time.Now()
	next := b.o.n
	for first := 0; first < b.o.n; first += loadBatch {
		n := min(loadBatch, b.o.n-first)
		m := batch{class: backlogMail, first: first, n: n, connections: loadConns, headers: bulkHeader, domain: b.waitingDomain}
		if _, err := b.submit(ctx, &m); err != nil {
			return err
		}
		m.first, m.n, m.headers = next, n/expireEvery, bulkHeader+"X-Relais-Expire: "+b.times.expire.String()+"\r\n"
		if _, err := b.submit(ctx, &m); err != nil {
			return err
		}
		next += m.n
	}
	b.short = next - b.o.n
	took := time.Since(begun).Seconds()
	b.r.atMost("load", took, 15*60*max(1, float64(b.o.n)/spaceFor), "s", fmt.Sprintf("%.0f messages a second, one recipient and %d bytes each", float64(next)/took, messageBytes))
	return nil
}

func (b *bench) waitingDomain(n int) string { return domainName(n * domainStride % b.o.domains) }

// empty measures the relay before there is a backlog.
func (b *bench) empty(ctx context.Context) error {
	// The first messages find the domains' routes; they are not measured.
	if _, err := b.speed(ctx, openDomains); err != nil {
		return err
	}
	if err := b.promptFigure(ctx, "empty", "transactional_p99_empty", b.times.prompt); err != nil {
		return err
	}
	var err error
	if b.emptySpeed, err = b.best(ctx, "empty"); err != nil {
		return err
	}
	b.r.add("throughput_empty", b.emptySpeed.rate, "1/s", "")
	b.r.add("cpu_empty", b.emptySpeed.cpu.Seconds()*1000, "ms", "of the relay for each message")
	return nil
}

// backlog measures it with one.
func (b *bench) backlog(ctx context.Context) error {
	if err := b.promptFigure(ctx, "backlog", "transactional_p99", b.times.prompt); err != nil {
		return err
	}
	got, err := b.best(ctx, "backlog")
	if err != nil {
		return err
	}
	b.r.add("throughput", got.rate, "1/s", "of mail that can be delivered")
	b.r.atLeast("throughput_share", got.rate/b.emptySpeed.rate, 0.8, "", "of the empty queue's")
	b.r.add("cpu", got.cpu.Seconds()*1000, "ms", "of the relay for each message")
	return nil
}

// speed is how fast mail went through the relay.
type speed struct {
	rate float64       // messages a second
	cpu  time.Duration // of the relay for each
}

// best measures the speed a few times and returns the best: what else the
// machine does only ever makes it slower.
func (b *bench) best(ctx context.Context, name string) (best speed, err error) {
	profiled := func() error { return nil }
	for i := range speedRuns {
		if i == speedRuns-1 {
			profiled = b.profileCPU(ctx, name, 3*time.Second)
		}
		got, err := b.speed(ctx, b.speedMail())
		if err != nil {
			return best, err
		}
		if got.rate > best.rate {
			best.rate = got.rate
		}
		if best.cpu == 0 || got.cpu < best.cpu {
			best.cpu = got.cpu
		}
	}
	return best, profiled()
}

// profileCPU begins a profile of the relay, if profiles are kept; what is
// returned waits for it.
func (b *bench) profileCPU(ctx context.Context, name string, d time.Duration) (wait func() error) {
	if b.o.profiles == "" {
		return func() error { return nil }
	}
	done := make(chan error, 1)
	go func() {
		done <- saveProfile(ctx, b.relay.Metrics(), fmt.Sprintf("profile?seconds=%.0f", d.Seconds()), filepath.Join(b.o.profiles, name+".cpu"))
	}()
	return func() error { return <-done }
}

func (b *bench) speedMail() int { return min(max(b.o.n/20, minSpeedMail), maxSpeedMail) }

// speed sends mail as fast as the relay takes it to hosts that take it, and
// returns how many messages a second arrived.
func (b *bench) speed(ctx context.Context, n int) (speed, error) {
	m := batch{class: speedMail, first: b.speedSent, n: n, connections: connections, headers: bulkHeader, domain: openName}
	b.speedSent += n
	before := b.seen.count(speedMail)
	used, err := readCPU(b.relay.PID())
	if err != nil {
		return speed{}, err
	}
	begun := time.Now()
	if _, err := b.submit(ctx, &m); err != nil {
		return speed{}, err
	}
	took, err := b.deliver(ctx, speedMail, b.speedSent)
	if err != nil {
		return speed{}, err
	}
	now, err := readCPU(b.relay.PID())
	return speed{float64(took-before) / b.seen.lastTaken(speedMail).Sub(begun).Seconds(), (now - used) / time.Duration(max(1, took-before))}, err
}

// deliver waits until so many messages of a class were taken, or for
// deliverTimeout, and returns how many were: mail that does not get through is
// a result and not the end of the run.
func (b *bench) deliver(ctx context.Context, class byte, n int) (taken int64, err error) {
	for end := time.Now().Add(deliverTimeout); ; {
		if taken = b.seen.count(class); taken >= int64(n) || time.Now().After(end) {
			return taken, nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return taken, err
		}
	}
}

// waits are how long transactional mail waited for its first attempt.
type waits struct {
	n               int
	p50, p99, most  time.Duration
	slow            int           // over promptTarget
	slowFrom, until time.Duration // when the first and the last of these were accepted, from the start
}

func (w *waits) String() string {
	text := fmt.Sprintf("accepted to first attempt, %d messages, half within %.1f ms, all within %.3f s", w.n, w.p50.Seconds()*1000, w.most.Seconds())
	if w.slow > 0 {
		text += fmt.Sprintf("; %d over %v, %.1f to %.1f s after the start", w.slow, promptTarget, w.slowFrom.Seconds(), w.until.Seconds())
	}
	return text
}

// promptFigure measures transactional mail beside what goes on.
func (b *bench) promptFigure(ctx context.Context, phase, name string, d time.Duration) error {
	profiled := b.profileCPU(ctx, name, d/2)
	w, err := b.prompt(ctx, phase, d)
	if err == nil {
		err = profiled()
	}
	if err == nil {
		b.r.atMost(name, w.p99.Seconds(), promptTarget.Seconds(), "s", w.String())
	}
	return err
}

// prompt sends transactional mail at a steady rate and returns how long it
// waited from its acceptance to its first attempt.
func (b *bench) prompt(ctx context.Context, phase string, d time.Duration) (*waits, error) {
	b.setPhase(phase)
	first := b.promptSent
	var mu sync.Mutex
	var wg sync.WaitGroup
	var failed error
	var accepted []time.Time // by number, less first
	tick := time.NewTicker(promptTick)
	defer tick.Stop()
	begun := time.Now()
	for end := begun.Add(d); time.Now().Before(end); {
		n := int(promptRate * promptTick / time.Second)
		m := batch{class: promptMail, first: b.promptSent, n: n, connections: n, domain: openName}
		b.promptSent += n
		wg.Go(func() {
			sent, err := b.submit(ctx, &m)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			for len(accepted) < m.first+m.n-first {
				accepted = append(accepted, time.Time{})
			}
			for i := range sent.Results {
				accepted[m.first-first+i] = sent.Started.Add(sent.Results[i].Ended)
			}
		})
		select {
		case <-tick.C:
		case <-ctx.Done():
			wg.Wait()
			return nil, context.Cause(ctx)
		}
	}
	wg.Wait()
	if failed != nil {
		return nil, failed
	}
	if _, err := b.deliver(ctx, promptMail, b.promptSent); err != nil {
		return nil, err
	}
	w := &waits{n: len(accepted)}
	took := make([]time.Duration, 0, len(accepted))
	for i, at := range accepted {
		attempt := b.seen.attemptOf(first + i)
		if attempt.IsZero() {
			attempt = time.Now() // it still waits
		}
		// The host may see it before the client has read its 250.
		wait := max(0, attempt.Sub(at))
		took = append(took, wait)
		if wait > promptTarget {
			if w.until = at.Sub(begun); w.slow == 0 {
				w.slowFrom = w.until
			}
			w.slow++
		}
	}
	slices.Sort(took)
	w.p50, w.p99, w.most = took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
	return w, nil
}
