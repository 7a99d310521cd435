package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

const (
	reportEvery   = 5 * time.Second
	sampleEvery   = 500 * time.Millisecond
	expireEvery   = 100 // one message of so many expires soon
	finalTimeout  = 3 * time.Minute
	drainTimeout  = 5 * time.Minute  // for each million of recipients
	drained       = 5 * time.Second  // without any of the backlog: what is left waits
	triedTimeout  = 10 * time.Minute // for each million of recipients
	firstTimeout  = 2 * time.Minute
	rssTargetMiB  = 1024
	metricOverdue = "relais_relay_queue_oldest_overdue_seconds"
	metricExpired = `relais_relay_queue_results_total{state="expired"}`
	metricBounced = `relais_relay_queue_results_total{state="bounced"}`
	metricUnknown = `relais_relay_queue_results_total{state="unknown"}`
	metricInDoubt = "relais_relay_queue_in_doubt_recipients_total"
	metricPurged  = `relais_relay_queue_results_total{state="purged"}`
	purgeTarget   = 60 // seconds for 1,000,000 recipients
)

// policy is the shipped one where it matters for a deep queue; only the retry
// is late enough that the mail that was put off once waits during the run.
func policySections() map[string]string {
	return map[string]string{
		"queue":    "retry = [\"2h\", \"4h\"]\nretry_max = \"4h\"\n",
		"delivery": "sign_dkim = false\nidle_session = \"3s\"\n",
		"storage":  "",
	}
}

// times are how long the phases of a run take.
type times struct {
	settle, prompt, drain time.Duration
	expire                time.Duration // life of the mail that expires
}

// timesFor are shorter for a run that only shows that everything works.
func timesFor(n int) times {
	if n < 50_000 {
		return times{settle: 2 * time.Second, prompt: 3 * time.Second, drain: 4 * time.Second, expire: 8 * time.Second}
	}
	return times{settle: 20 * time.Second, prompt: 15 * time.Second, drain: 30 * time.Second, expire: 30 * time.Second}
}

// bench is a run.
type bench struct {
	o     *options
	times times
	r     *report
	fleet *fleet.Fleet
	relay *fleet.Relay
	world *world
	seen  *seen

	mu       sync.Mutex
	phase    string
	peak     memory // the largest of each
	overdue  float64
	ended    float64 // recipients that ended without delivery, in former processes
	inDoubt  float64 // recipients whose delivery the kill interrupted
	accepted int64
	short    int // mail that expires during the run

	speedSent, promptSent int
	emptySpeed            speed
}

func run(ctx context.Context, o *options, r *report) error {
	cleanUp, err := prepareDir(o)
	if err != nil {
		return err
	}
	finished := false
	b := &bench{o: o, times: timesFor(o.n), r: r, seen: newSeen(o.n), phase: "start"}
	if b.fleet, err = fleet.Start(ctx, fleet.Config{
		Bin: o.bin, Dir: o.dir, Relays: 1, Sources: 4, Seed: 1, Open: true, NoDKIM: true, Policy: policySections(), Log: os.Stderr,
	}); err != nil {
		return err
	}
	defer func() {
		if err := b.fleet.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "stopping:", err)
		}
		if finished && r.sound() {
			cleanUp()
			return
		}
		fmt.Fprintln(os.Stderr, "logs and data are kept in", o.dir)
	}()
	b.relay = b.fleet.Relays[0]
	if b.world, err = newWorld(o.domains, b.fleet.Lab.SMTPPort(), b.seen); err != nil {
		return err
	}
	defer b.world.close()
	if err := b.world.publish(b.fleet.Lab); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		b.watch(ctx)
	}()
	defer func() {
		cancel()
		<-watching
	}()
	err = b.steps(ctx)
	finished = err == nil
	return err
}

func (b *bench) steps(ctx context.Context) error {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"empty", b.empty}, {"load", b.load}, {"settle", b.settle}, {"backlog", b.backlog},
		{"kill", b.kill}, {"drain", b.drain}, {"purge", b.purge}, {"account", b.account},
	} {
		b.setPhase(step.name)
		if err := step.do(ctx); err != nil {
			return err
		}
		if b.o.profiles != "" && b.relay.Alive() {
			if err := saveProfile(ctx, b.relay.Metrics(), "heap", filepath.Join(b.o.profiles, step.name+".heap")); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) setPhase(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.phase = name
}

// watch samples the relay and says how it goes.
func (b *bench) watch(ctx context.Context) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	var shown time.Time
	var before int64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		m, err := readMemory(b.relay.PID())
		if err != nil {
			continue // between two processes
		}
		b.mu.Lock()
		b.peak.rss, b.peak.peak = max(b.peak.rss, m.rss), max(b.peak.peak, m.peak)
		b.peak.anon, b.peak.file = max(b.peak.anon, m.anon), max(b.peak.file, m.file)
		phase, accepted := b.phase, b.accepted
		b.mu.Unlock()
		since := time.Since(shown)
		if since < reportEvery {
			continue
		}
		shown = time.Now()
		overdue := 0.0
		if got, err := readMetrics(ctx, b.relay.Metrics(), metricOverdue); err == nil {
			overdue = got[metricOverdue]
		}
		b.mu.Lock()
		b.overdue = max(b.overdue, overdue)
		b.mu.Unlock()
		waiting := int64(-1)
		if q, err := b.relay.Queue(ctx); err == nil {
			waiting = q.Waiting
		}
		fmt.Fprintf(os.Stderr, "%-8s %8d accepted, %6.0f a second, %8d waiting, %8d attempts, %7d taken; %5d MiB resident (%d own, %d of files), %6d MiB on disk, overdue %.1f s\n",
			phase, accepted, float64(accepted-before)/min(since, time.Hour).Seconds(), waiting, b.seen.attempts.Load(),
			b.seen.count(backlogMail)+b.seen.count(speedMail)+b.seen.count(promptMail), m.rss/mib, m.anon/mib, m.file/mib, diskUse(b.relay.Dir)/mib, overdue)
		before = accepted
	}
}

// settle waits until the hosts that put mail off have done so with all of it,
// lets the store catch up, and ends the mail that expires: what is measured then
// is a backlog that waits.
func (b *bench) settle(ctx context.Context) error {
	begun, want := time.Now(), int64(b.world.putOff(b.o.n, b.waitingDomain))
	for b.seen.tried.n.Load() < want && time.Since(begun) < b.triedTimeout() {
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	tried := b.seen.tried.n.Load()
	b.r.atLeast("tried_once", float64(tried), float64(want), "recipients", fmt.Sprintf("of the mail that is put off, %.0f s after the load", time.Since(begun).Seconds()))
	if err := sleep(ctx, b.times.settle); err != nil {
		return err
	}
	if err := b.await(ctx, "the mail that expires", func() (bool, error) {
		got, err := readMetrics(ctx, b.relay.Metrics(), metricExpired)
		return got[metricExpired] >= float64(b.short), err
	}); err != nil {
		return err
	}
	m, err := readMemory(b.relay.PID())
	if err != nil {
		return err
	}
	got, err := readMetrics(ctx, b.relay.Metrics(), "go_memstats_heap_inuse_bytes", "go_memstats_heap_idle_bytes", "relais_relay_queue_memory_recipients", "relais_relay_queue_work_queues")
	if err != nil {
		return err
	}
	waiting, err := b.relay.Queue(ctx)
	if err != nil {
		return err
	}
	b.r.atLeast("waiting", float64(waiting.Waiting), float64(b.o.n)*0.98, "recipients", fmt.Sprintf("in %.0f queues, %.0f in memory", got["relais_relay_queue_work_queues"], got["relais_relay_queue_memory_recipients"]))
	b.r.atMost("rss_steady", float64(m.rss)/mib, b.rssTarget(), "MiB", fmt.Sprintf("%d MiB own, %d MiB pages of mapped files", m.anon/mib, m.file/mib))
	b.r.add("heap_inuse", got["go_memstats_heap_inuse_bytes"]/mib, "MiB", "")
	b.r.add("disk", float64(diskUse(b.relay.Dir))/mib, "MiB", "")
	return nil
}

// drainTimeout bounds the wait for the part of the backlog that is due.
func (b *bench) drainTimeout() time.Duration {
	return time.Duration(float64(drainTimeout) * max(1, float64(b.o.n)/spaceFor))
}

// triedTimeout bounds the wait for the first attempts.
func (b *bench) triedTimeout() time.Duration {
	return time.Duration(float64(triedTimeout) * max(1, float64(b.o.n)/spaceFor))
}

func (b *bench) rssTarget() float64 {
	if b.o.n <= 1_000_000 {
		return rssTargetMiB
	}
	return 2 * rssTargetMiB
}

// await waits for a condition, at most finalTimeout.
func (b *bench) await(ctx context.Context, what string, cond func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, finalTimeout)
	defer cancel()
	for {
		ok, err := cond()
		if err != nil || ok {
			return err
		}
		if sleep(ctx, 50*time.Millisecond) != nil {
			return fault.New(fault.Timeout, "bench-deep", "waited %v in vain for %s", finalTimeout, what)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// kill ends the relay without warning, and measures how soon it is at work
// again.
func (b *bench) kill(ctx context.Context) error {
	if err := b.keepCounts(ctx); err != nil {
		return err
	}
	b.relay.Kill()
	tail, err := openTail(b.relay.Log)
	if err != nil {
		return err
	}
	first, ready, err := b.restart(ctx)
	if err != nil {
		return err
	}
	b.r.atMost("restart_to_first_attempt_after_kill", first.Seconds(), 10, "s", fmt.Sprintf("takes mail after %.1f s", ready.Seconds()))
	got, err := readMetrics(ctx, b.relay.Metrics(), metricInDoubt)
	if err != nil {
		return err
	}
	b.inDoubt = got[metricInDoubt]
	if err := b.startCheck(ctx, tail); err != nil {
		return err
	}
	return sleep(ctx, b.times.settle)
}

// restart starts the relay and returns when it made its first attempt and when
// it was ready for new mail.
func (b *bench) restart(ctx context.Context) (first, ready time.Duration, err error) {
	b.seen.arm()
	begun := time.Now()
	if err := b.fleet.Restart(ctx, b.relay); err != nil {
		return 0, 0, err
	}
	ready = time.Since(begun)
	select {
	case at := <-b.seen.first:
		return at.Sub(begun), ready, nil
	case <-time.After(firstTimeout):
		return 0, 0, fault.New(fault.Timeout, "bench-deep", "no attempt within %v of a restart", firstTimeout)
	case <-ctx.Done():
		return 0, 0, context.Cause(ctx)
	}
}

// keepCounts remembers what a process that is about to end has counted.
func (b *bench) keepCounts(ctx context.Context) error {
	got, err := readMetrics(ctx, b.relay.Metrics(), metricExpired, metricBounced, metricUnknown, metricPurged)
	b.ended += got[metricExpired] + got[metricBounced] + got[metricUnknown] + got[metricPurged]
	return err
}

// drain restarts the relay when the hosts take mail again, and measures how
// fast what is due leaves, and new mail beside it.
func (b *bench) drain(ctx context.Context) error {
	if err := b.keepCounts(ctx); err != nil {
		return err
	}
	if err := b.relay.Stop(); err != nil {
		return err
	}
	if err := b.fsck(ctx); err != nil {
		return err
	}
	b.world.openAll()
	first, ready, err := b.restart(ctx)
	if err != nil {
		return err
	}
	b.r.atMost("restart_to_first_attempt", first.Seconds(), 10, "s", fmt.Sprintf("takes mail after %.1f s", ready.Seconds()))
	before, begun := b.seen.count(backlogMail), time.Now()
	if err := b.promptFigure(ctx, "drain", "transactional_p99_draining", b.times.drain); err != nil {
		return err
	}
	// What was tried waits for its retry; the rest leaves.
	for limit := time.Now().Add(b.drainTimeout()); time.Since(b.seen.lastTaken(backlogMail)) < drained && time.Now().Before(limit); {
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	took := b.seen.lastTaken(backlogMail).Sub(begun)
	b.r.add("drain", float64(b.seen.count(backlogMail)-before)/max(took.Seconds(), 1), "1/s", fmt.Sprintf("of the backlog, beside new mail: %d messages in %.0f s", b.seen.count(backlogMail)-before, took.Seconds()))
	return nil
}

// purge removes what is left of the backlog, while transactional mail goes on.
func (b *bench) purge(ctx context.Context) error {
	type result struct {
		out  []byte
		took time.Duration
		err  error
	}
	purged := make(chan result, 1)
	begun := time.Now()
	go func() {
		out, err := exec.CommandContext(ctx, filepath.Join(b.o.bin, "relais-relay"), "queue", "purge", "--stream", "bulk", "--yes", "--json", "--data", b.relay.Dir).Output()
		purged <- result{out, time.Since(begun), err}
	}()
	err := b.promptFigure(ctx, "purge", "transactional_p99_purging", b.times.prompt)
	r := <-purged
	if err != nil {
		return err
	}
	if r.err != nil {
		return fault.Wrap(r.err, fault.Unavailable, "bench-deep", "the backlog could not be purged")
	}
	lines := bytes.Split(bytes.TrimSpace(r.out), []byte("\n"))
	var last struct {
		Done int64 `json:"done"`
	}
	if err := json.Unmarshal(lines[len(lines)-1], &last); err != nil {
		return fault.Wrap(err, fault.Internal, "bench-deep", "the last line of the purge is no JSON")
	}
	b.r.atMost("purge", r.took.Seconds(), purgeTarget*max(1, float64(last.Done)/spaceFor), "s", fmt.Sprintf("%d recipients, %.0f a second, %d lines of progress", last.Done, float64(last.Done)/r.took.Seconds(), len(lines)))
	return nil
}

// account finds out whether every message that was accepted is somewhere.
func (b *bench) account(ctx context.Context) error {
	b.mu.Lock()
	peak, overdue := b.peak, b.overdue
	b.mu.Unlock()
	b.r.atMost("rss_peak", float64(max(peak.rss, peak.peak))/mib, b.rssTarget(), "MiB", fmt.Sprintf("own at most %d MiB, of files at most %d MiB", peak.anon/mib, peak.file/mib))
	b.r.atMost("oldest_overdue", overdue, 1, "s", "the most that any message outlived its deadline")
	// Stopped, the relay has nothing in flight: what is not delivered is on disk.
	if err := b.keepCounts(ctx); err != nil {
		return err
	}
	if err := b.relay.Stop(); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(b.o.bin, "relais-relay"), "queue", "summary", "--json", "--data", b.relay.Dir).Output()
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "bench-deep", "the queue of the stopped relay cannot be counted")
	}
	var left struct {
		Waiting int64 `json:"waiting"`
	}
	if err := json.Unmarshal(out, &left); err != nil {
		return fault.Wrap(err, fault.Internal, "bench-deep", "the summary of the queue is no JSON")
	}
	taken := b.seen.count(backlogMail) + b.seen.count(speedMail) + b.seen.count(promptMail)
	lost := b.accepted - taken - int64(b.ended) - left.Waiting
	if lost < 0 {
		// Of those in doubt, the hosts had some.
		lost = min(0, lost+int64(b.inDoubt))
	}
	b.r.atMost("lost", float64(lost), 0, "messages", fmt.Sprintf("%d accepted, %d delivered, %.0f ended, %d wait; %.0f in doubt after the kill", b.accepted, taken, b.ended, left.Waiting, b.inDoubt))
	b.r.atMost("duplicated", float64(b.seen.duplicates.Load()), 0, "messages", "")
	b.r.lost = lost != 0 || b.seen.duplicates.Load() > 0
	return nil
}
