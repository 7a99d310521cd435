package engine

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/policy"
)

// Hosts that take no session answer faster than a slow disk takes it down. What
// is not stored yet is bounded by the sessions that policy allows, or a relay
// with thousands of such hosts holds all of their mail in memory and keeps new
// mail waiting for its commits.
func TestFailedSessionsWaitForTheDisk(t *testing.T) {
	const domains, sessions = 12, 4
	w := newWorld(t, nil) // no source: mail stays
	var events []func()
	for i := range domains {
		domain := fmt.Sprintf("dead%d.test", i)
		// Nothing listens there.
		if err := w.lab.AddRecords(domain+". 60 IN MX 10 mx."+domain+".", fmt.Sprintf("mx.%s. 60 IN A 127.0.9.%d", domain, i+1)); err != nil {
			t.Fatal(err)
		}
		env := w.accept(nil, "a@"+domain)
		events = append(events, func() { w.event(env, outbox.Deferred) })
	}
	stalled, goOn := make(chan struct{}), make(chan struct{})
	resume := sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(resume) // or nothing could be closed
	go func() {
		_ = w.store.Barrier(func() { close(stalled); <-goOn }) // the store is open
	}()
	<-stalled
	w.view(func(d *policy.Document) {
		d.Delivery.MaxSessions = sessions
		d.Queue.Retry = []policy.Duration{policy.Duration(time.Hour)}
	}, first)
	inFlight := func() int { return int(w.queue.Summary().InFlight) }
	w.until("sessions that failed", func() bool { return inFlight() >= sessions/2 }) // of hosts that are not proven
	watched := time.After(300 * time.Millisecond)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for most := 0; ; {
		if most = max(most, inFlight()); most > sessions {
			t.Errorf("%d recipients are in flight while the disk is slow, and %d sessions are allowed", most, sessions)
			break
		}
		select {
		case <-tick.C:
			continue
		case <-watched:
		}
		break
	}
	resume()
	for _, happened := range events {
		happened()
	}
}
