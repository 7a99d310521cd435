package queue

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of the check that follows a start.
const (
	startCheckShare  = 4  // it takes at most one part in so many of one processor
	maxStartFindings = 20 // that are logged one by one
)

// StartCheck is the check that follows a start. It runs once, from a snapshot,
// beside the mail.
type StartCheck struct {
	q      *Queue
	damage *prometheus.GaugeVec
	done   chan struct{}
	result atomic.Pointer[FsckCount] // nil: it goes on, or could not be finished
}

// CheckInBackground begins to compare the records of the queue with each other.
// It reads no bodies and repairs nothing, and ends with the queue. A registerer
// that is nil gets no metrics.
func (q *Queue) CheckInBackground(r prometheus.Registerer) (*StartCheck, error) {
	c := &StartCheck{q: q, done: make(chan struct{})}
	c.damage = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "relais_relay_queue_damaged_records", Help: "Records that disagreed with others at the last start, by kind; anything but 0 needs relais-relay queue fsck.",
	}, []string{"kind"})
	if r != nil {
		if err := r.Register(c.damage); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "queue.CheckInBackground", "metrics are registered twice")
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, errClosing
	}
	q.done.Add(1)
	go c.run()
	return c, nil
}

// Done is closed when the check has ended.
func (c *StartCheck) Done() <-chan struct{} { return c.done }

// Problem says what is wrong with the records of the queue, by the check and by what
// the queue met since; empty: nothing that is known.
func (c *StartCheck) Problem() string {
	var found []string
	if count := c.result.Load(); count == nil {
		if others := c.q.damaged.others(); others != "" {
			found = append(found, "records of the queue are damaged ("+others+")")
		}
	} else if !count.Clean {
		parts := make([]string, 0, len(count.Found))
		for _, kind := range slices.Sorted(maps.Keys(count.Found)) {
			parts = append(parts, fmt.Sprintf("%s %d", kind, count.Found[kind]))
		}
		found = append(found, fmt.Sprintf("the records of the queue disagree in %d places (%s)", count.Total(), strings.Join(parts, ", ")))
	}
	if n := c.q.damaged.asides(); n > 0 {
		found = append(found, fmt.Sprintf("%d damaged messages are set aside", n))
	}
	if len(found) == 0 {
		return ""
	}
	return strings.Join(found, "; ") + ": stop the relay, run relais-relay queue fsck --repair, start it again"
}

func (c *StartCheck) run() {
	q := c.q
	defer q.done.Done()
	defer close(c.done)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	rest := func(since time.Time) {
		timer.Reset((startCheckShare - 1) * time.Since(since))
		select {
		case <-timer.C:
		case <-q.stop:
			cancel()
		}
	}
	began, logged := time.Now(), 0
	report := func(f Finding) {
		if logged++; !f.Note && logged <= maxStartFindings {
			q.log.Error("the records of the queue disagree", "kind", f.Kind, "message", f.Message, "recipient", f.Recipient, "queue", f.Queue, "detail", f.Detail)
		}
	}
	count, err := Fsck(ctx, q.st, FsckConfig{Live: true, Now: q.cfg.Now, Logger: q.log, Report: report, Rest: rest})
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		q.log.Error("the queue could not be checked", "error", err)
		return
	}
	for kind, n := range count.Found {
		c.damage.WithLabelValues(string(kind)).Set(float64(n))
	}
	c.result.Store(&count)
	q.log.Info("the queue was checked", "clean", count.Clean, "messages", count.Messages, "recipients", count.Recipients, "seconds", time.Since(began).Seconds())
}
