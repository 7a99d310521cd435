// Command agentsim holds the sessions of many relays in one process, to measure
// what a cluster of control servers bears: each is the agent of a relay with a
// data directory of its own, and nothing of a relay besides. It joins them with
// one token, keeps them linked until its standard input ends, and prints one
// line of JSON for each thing that happens to one of them.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
)

const (
	maxAgents    = 1000
	maxJoining   = 8 // at once
	watchPeriod  = 10 * time.Millisecond
	joinTimeout  = 2 * time.Minute // for all
	joinPause    = time.Second     // while the cluster has no leader that could let anybody join
	freeBytes    = 1 << 40         // what the reports say of the queue's disk
	maxNameBytes = 32
)

// happening is one line of the output.
type happening struct {
	AtNanos  int64  `json:"at_ns"` // CLOCK_MONOTONIC, which all processes of the machine share
	Agent    int    `json:"agent"` // counted from 0
	What     string `json:"what"`  // "joined", "linked", "lost" or "applied"
	Server   string `json:"server,omitempty"`
	Revision uint64 `json:"revision,omitempty"` // "applied": of the view in use, acknowledged at that moment
	Problem  string `json:"problem,omitempty"`  // "lost": why
}

// printer writes happenings, one at a time.
type printer struct {
	mu  sync.Mutex
	out *json.Encoder
}

func (p *printer) print(h happening) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return err
	}
	h.AtNanos = now.Nano()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Encode(h)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "agentsim:", err)
		os.Exit(1)
	}
}

func run() error {
	dir := flag.String("dir", "", "directory for the data directories of all agents")
	n := flag.Int("n", 100, "number of agents")
	token := flag.String("token", "", "join token with a use for each agent")
	prefix := flag.String("name", "sim", "beginning of the nodes' names")
	flag.Parse()
	if *dir == "" || *token == "" || *n < 1 || *n > maxAgents || len(*prefix) > maxNameBytes || flag.NArg() == 0 {
		return fmt.Errorf("usage: agentsim -dir DIR -token rl1.… -n 1..%d ADDRESS…", maxAgents)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { // whoever started this wants its end
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	out := &printer{out: json.NewEncoder(os.Stdout)}
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	joining, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	group, joining := errgroup.WithContext(joining)
	group.SetLimit(maxJoining)
	name := func(i int) string { return fmt.Sprintf("%s-%03d", *prefix, i) }
	for i := range *n {
		group.Go(func() error {
			err := join(joining, agent.JoinOptions{
				Token: *token, Servers: flag.Args(), Dir: filepath.Join(*dir, name(i)), Name: name(i),
				Version: buildinfo.Get().Version, Logger: log.With("agent", i),
			})
			if err != nil {
				return fmt.Errorf("%s: %w", name(i), err)
			}
			return out.print(happening{Agent: i, What: "joined"})
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	working, ctx := errgroup.WithContext(ctx)
	for i := range *n {
		working.Go(func() error { return hold(ctx, out, i, filepath.Join(*dir, name(i)), log.With("agent", i)) })
	}
	return working.Wait()
}

// join joins as operators are told to: again, while no server can say yes or no. A
// cluster may choose a leader anew at any time, sooner on a machine that is busy with
// the joins of many.
func join(ctx context.Context, options agent.JoinOptions) error {
	for {
		_, err := agent.Join(ctx, options)
		if kind := fault.KindOf(err); err == nil || kind != fault.Unavailable && kind != fault.Timeout {
			return err
		}
		options.Logger.Warn("joining again", "error", err)
		select {
		case <-time.After(joinPause):
		case <-ctx.Done():
			return err
		}
	}
}

// hold keeps the link of one agent until ctx ends.
func hold(ctx context.Context, out *printer, i int, dir string, log *slog.Logger) error {
	a, err := agent.Open(agent.Options{
		Dir: dir, Version: buildinfo.Get().Version, Logger: log, Registerer: prometheus.NewRegistry(),
		LocalAddresses: func() []netip.Addr { return nil },
		Load:           func() agent.Load { return agent.Load{FreeBytes: freeBytes} },
	})
	if err != nil {
		return err
	}
	var running sync.WaitGroup
	running.Go(func() { _ = a.Run(ctx) }) // documented to return nil
	defer func() {
		running.Wait()
		if err := a.Close(); err != nil {
			log.Error("closing", "error", err)
		}
	}()
	return watch(ctx, out, i, a)
}

// watch prints what happens to one agent.
func watch(ctx context.Context, out *printer, i int, a *agent.Agent) error {
	views := a.Subscribe()
	tick := time.NewTicker(watchPeriod)
	defer tick.Stop()
	var before agent.Health
	for {
		applied := false
		select {
		case <-views:
			applied = true
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		now := a.Health()
		if applied {
			if err := out.print(happening{Agent: i, What: "applied", Revision: now.Revision}); err != nil {
				return err
			}
		}
		switch {
		case now.Evicted:
			return fault.New(fault.Denied, "agentsim.watch", "agent %d was evicted", i)
		case now.Connected && (!before.Connected || now.Server != before.Server):
			if err := out.print(happening{Agent: i, What: "linked", Server: now.Server}); err != nil {
				return err
			}
		case !now.Connected && before.Connected:
			if err := out.print(happening{Agent: i, What: "lost", Server: before.Server, Problem: strings.TrimSpace(now.Problem)}); err != nil {
				return err
			}
		}
		before = now
	}
}
