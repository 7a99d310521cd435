package main

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of counting the queue of a relay that does not run.
const (
	countTimeout  = 5 * time.Minute
	countInterval = 5 * time.Millisecond
)

// summary counts the queue: the running relay's answer, or, when none runs,
// what its disk holds. With --json it is written already.
func summary(ctx context.Context, o *options) (s admin.Summary, err error) {
	if runs(o.data) {
		return s, ask(ctx, o, "/v1/queue/summary", &s)
	}
	q, err := openOffline(ctx, o.data)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, q.close()) }()
	if s, err = q.count(ctx); err != nil || !o.json {
		return s, err
	}
	return s, json.NewEncoder(os.Stdout).Encode(s)
}

// runs reports whether a relay listens on the data directory's socket. What
// else is wrong with the socket is found out by who asks on it.
func runs(dir string) bool {
	conn, err := net.Dial("unix", filepath.Join(dir, admin.SocketName))
	if err == nil {
		_ = conn.Close()
	}
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED)
}

// count waits until the queue has counted what is on disk.
func (q *offlineQueue) count(ctx context.Context) (admin.Summary, error) {
	ctx, cancel := context.WithTimeout(ctx, countTimeout)
	defer cancel()
	tick := time.NewTicker(countInterval)
	defer tick.Stop()
	for {
		if s := q.Summary(); s.Counted {
			return admin.Summary{
				Queues: s.Queues, Waiting: s.Waiting, Held: s.Held, InFlight: s.InFlight, Counted: true,
				OverdueSecond: s.OldestOverdue.Seconds(), LastEvent: q.outbox.Last(),
			}, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return admin.Summary{}, fault.Wrap(ctx.Err(), fault.Unavailable, "relais-relay.summary", "the queue could not be counted")
		}
	}
}
