package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/telemetry"
)

// Times of beginning anew after the disk has failed.
const (
	failedGrace   = 5 * time.Second // for attempts and clients in hand
	diskInterval  = time.Second     // between two looks whether the disk is well
	refuseTimeout = 5 * time.Second // for one client that is sent away meanwhile
)

// errDiskFailed ends a node whose index failed. What it holds in memory may
// differ from the disk, and its files keep a dead file system from being
// unmounted, so the program runs itself again (decision 0044).
var errDiskFailed = errors.New("the disk failed")

// diskFailedVariable tells the program that runs itself again what to answer
// until the disk is well.
const diskFailedVariable = "RELAIS_RELAY_DISK_FAILED"

// diskFailed is its value.
type diskFailed struct {
	Why      string           `json:"why"`
	Hostname string           `json:"hostname"`
	SMTP     []netip.AddrPort `json:"smtp"` // listeners that greet in clear
	Metrics  netip.AddrPort   `json:"metrics"`
}

// beginAnew replaces the process by a fresh one with the same process id. It
// returns only if that fails.
func beginAnew(cfg *config.Config, why string) error {
	const op = "relais-relay.beginAnew"
	text, err := json.Marshal(diskFailed{
		Why: why, Hostname: hostname(cfg), Metrics: cfg.Listen.Metrics,
		SMTP: append(append([]netip.AddrPort(nil), cfg.Listen.Submission...), cfg.Listen.Inbound...),
	})
	if err == nil {
		err = syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), diskFailedVariable+"="+string(text)))
	}
	return fault.Wrap(err, fault.Unavailable, op, "the disk failed and the relay cannot begin anew")
}

// awaitDisk returns when the disk takes a store, if this process was begun
// because it had failed. Until then clients and probes are told so, and no file
// of the data directory is open: the file system can be unmounted, repaired and
// mounted.
func awaitDisk(ctx context.Context, dir string) error {
	text := os.Getenv(diskFailedVariable)
	if text == "" {
		return nil
	}
	if err := os.Unsetenv(diskFailedVariable); err != nil {
		return err
	}
	var d diskFailed
	if err := json.Unmarshal([]byte(text), &d); err != nil {
		return fault.Wrap(err, fault.Internal, "relais-relay.awaitDisk", "%s is not what this program sets", diskFailedVariable)
	}
	dir = filepath.Join(dir, "store")
	log := telemetry.NewLogger(os.Stderr, slog.LevelInfo)
	err := store.Usable(dir)
	if err == nil {
		log.Warn("the disk takes writes again: the queue is opened again")
		return nil
	}
	log.Error("the relay waits for its disk; it can be unmounted and repaired", "why", d.Why, "error", err)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	d.serve(ctx, &wg, log)
	tick := time.NewTicker(diskInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return fault.Wrap(ctx.Err(), fault.Unavailable, "relais-relay.awaitDisk", "the relay was stopped while it waited for its disk")
		case <-tick.C:
		}
		if err := store.Usable(dir); err == nil {
			log.Warn("the disk takes writes again: the queue is opened again")
			return nil
		}
	}
}

// serve answers clients and probes until ctx ends.
func (d *diskFailed) serve(ctx context.Context, wg *sync.WaitGroup, log *slog.Logger) {
	health := telemetry.NewHealth(time.Now)
	health.Set("store", telemetry.Critical, "%s", d.Why)
	health.SetReady(false, d.Why)
	if d.Metrics.IsValid() {
		if ln, err := net.Listen("tcp", d.Metrics.String()); err != nil {
			log.Warn("health is not shown while the disk is awaited", "error", err)
		} else {
			wg.Go(func() {
				if err := telemetry.Serve(ctx, ln, telemetry.Handler(telemetry.NewRegistry("relay", health), health, log), log); err != nil {
					log.Warn("health is no longer shown", "error", err)
				}
			})
		}
	}
	supervisor := telemetry.NewSupervisor(os.Getenv, log)
	wg.Go(func() { supervisor.KeepAlive(ctx, func() {}) })
	for _, addr := range d.SMTP {
		ln, err := net.Listen("tcp", addr.String())
		if err != nil {
			log.Warn("clients are not told that the disk failed", "address", addr, "error", err)
			continue
		}
		context.AfterFunc(ctx, func() { _ = ln.Close() })
		wg.Go(func() { d.refuse(ln) })
	}
}

// refuse greets every client with 421 (RFC 5321 section 3.8).
func (d *diskFailed) refuse(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return // the disk is well, or the relay stops
		}
		_ = conn.SetDeadline(time.Now().Add(refuseTimeout))
		_, _ = fmt.Fprintf(conn, "421 4.3.0 %s The disk of this relay has failed, use another one or try again later\r\n", d.Hostname) // it goes either way
		_ = conn.Close()
	}
}

// abandon gives attempts and clients in hand a moment. Nothing of the store is
// closed.
func (n *node) abandon(stopEngine func(), engineDone <-chan struct{}) error {
	n.health.SetReady(false, errDiskFailed.Error())
	stopEngine()
	grace, stop := context.WithTimeout(context.Background(), failedGrace)
	defer stop()
	select {
	case <-engineDone:
	case <-grace.Done():
	}
	n.stopSMTP(grace)
	return errDiskFailed
}
