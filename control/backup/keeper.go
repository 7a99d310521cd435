package backup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	// Every is how often the leader keeps a backup.
	Every = time.Hour
	// maxKept is how many of them stay: two days, if something changes each hour.
	maxKept = 48
	// late is when health says that the last good backup is old.
	late = 3 * Every
	// retryAfter is how soon a backup that failed is tried again.
	retryAfter = 5 * time.Minute

	suffix = ".relais-backup"
)

// Options configure a Keeper.
type Options struct {
	Dir        string // where the hourly ones are kept; made when needed
	State      *state.Store
	KEK        pki.Key
	Version    string // of this program
	Leads      func() bool
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Keeper makes backups: on demand, and one an hour while this server leads.
type Keeper struct {
	o        Options
	taken    prometheus.Counter
	failures prometheus.Counter
	lastGood atomic.Int64 // Unix seconds
	started  time.Time
	failure  atomic.Pointer[string]
}

// NewKeeper returns the keeper of a server.
func NewKeeper(o Options) *Keeper {
	k := &Keeper{o: o, started: time.Now(),
		taken:    prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_control_backups_total", Help: "Backups written and verified."}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_control_backup_failures_total", Help: "Backups that could not be written or did not verify."}),
	}
	o.Registerer.MustRegister(k.taken, k.failures, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_control_backup_last_seconds", Help: "Unix time of the newest verified backup of this server; 0: none yet."}, func() float64 { return float64(k.lastGood.Load()) }))
	if newest, _ := k.newest(); newest != nil {
		k.lastGood.Store(newest.ModTime().Unix())
	}
	return k
}

// Take writes a backup of now into a file without a name, verifies it, and
// returns it at its beginning. Closing it frees its space.
func (k *Keeper) Take(context.Context) (io.ReadCloser, Manifest, error) {
	const op = "backup.Take"
	f, m, err := k.write()
	if err != nil {
		return nil, Manifest{}, err
	}
	err = os.Remove(f.Name())
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		_ = f.Close()
		return nil, Manifest{}, fault.Wrap(err, fault.Internal, op, "the backup cannot be read back")
	}
	return f, m, nil
}

// write makes a verified, synced file with a temporary name.
func (k *Keeper) write() (f *os.File, m Manifest, err error) {
	const op = "backup.Keeper"
	defer func() {
		if err != nil {
			k.failures.Inc()
			if f != nil {
				_ = f.Close()
				_ = os.Remove(f.Name()) // the first error is the one to show
			}
			f = nil
			return
		}
		k.taken.Inc()
		k.lastGood.Store(time.Now().Unix())
	}()
	if err := os.MkdirAll(k.o.Dir, 0o700); err != nil {
		return nil, m, fault.Wrap(err, fault.Internal, op, "the folder %s cannot be made", k.o.Dir)
	}
	if f, err = os.CreateTemp(k.o.Dir, ".new-*"); err != nil { // mode 0600
		return nil, m, fault.Wrap(err, fault.Internal, op, "no file can be made in %s", k.o.Dir)
	}
	w := bufio.NewWriterSize(f, 256<<10)
	if m, err = Write(w, k.o.State.Read(), k.o.KEK, k.o.Version, time.Now()); err != nil {
		return f, m, err
	}
	if err = w.Flush(); err == nil {
		err = f.Sync()
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return f, m, unwritable(err)
	}
	a, err := Open(bufio.NewReaderSize(f, 256<<10))
	if err != nil {
		return f, m, err
	}
	_, err = a.Restore(k.o.KEK)
	return f, m, err
}

// Run keeps a backup every hour while this server leads, until the context
// ends. Nothing is written while nothing changes.
func (k *Keeper) Run(ctx context.Context) {
	timer := time.NewTimer(k.wait(time.Now()))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		next := Every
		if k.o.Leads() {
			if err := k.Keep(); err != nil {
				next = retryAfter
			}
		} else {
			next = retryAfter
		}
		timer.Reset(next)
	}
}

// wait is the time until the next backup is due; a server that just started
// leads, or does not, within the first minute.
func (k *Keeper) wait(now time.Time) time.Duration {
	if newest, _ := k.newest(); newest != nil {
		return max(time.Minute, newest.ModTime().Add(Every).Sub(now))
	}
	return time.Minute
}

// Keep writes one of the hourly backups now, unless the newest one has the same
// index, and removes the oldest beyond maxKept.
func (k *Keeper) Keep() error {
	index := k.o.State.Read().Index()
	if newest, name := k.newest(); newest != nil && strings.HasSuffix(name, fmt.Sprintf("-%d%s", index, suffix)) {
		k.lastGood.Store(time.Now().Unix()) // it holds all there is
		k.failure.Store(nil)
		return nil
	}
	f, m, err := k.write()
	if err == nil {
		name := fmt.Sprintf("%s-%d%s", m.CreatedAt.Format("20060102T150405Z"), m.Index, suffix)
		err = errors.Join(os.Rename(f.Name(), filepath.Join(k.o.Dir, name)), f.Close(), syncDir(k.o.Dir))
	}
	if err != nil {
		text := fault.Public(err)
		k.failure.Store(&text)
		k.o.Logger.Error("no backup was kept", "error", err)
		return err
	}
	k.failure.Store(nil)
	k.o.Logger.Info("backup kept", "index", m.Index, "state_bytes", m.StateBytes, "dir", k.o.Dir)
	k.prune()
	return nil
}

// Health returns nil, or why the backups are not good.
func (k *Keeper) Health() error {
	if !k.o.Leads() {
		return nil
	}
	if why := k.failure.Load(); why != nil {
		return fault.New(fault.Unavailable, "backup.Health", "the last backup failed: %s", *why)
	}
	if last := max(k.lastGood.Load(), k.started.Unix()); time.Since(time.Unix(last, 0)) > late {
		return fault.New(fault.Unavailable, "backup.Health", "the last good backup is of %s", time.Unix(last, 0).UTC().Format(time.RFC3339))
	}
	return nil
}

// names returns the kept backups, oldest first: their names begin with the time.
func (k *Keeper) names() []string {
	entries, err := os.ReadDir(k.o.Dir)
	if err != nil {
		return nil // there is none yet, or writing will say what is wrong
	}
	var out []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) && e.Type().IsRegular() {
			out = append(out, e.Name())
		}
	}
	slices.Sort(out)
	return out
}

func (k *Keeper) newest() (fs.FileInfo, string) {
	names := k.names()
	if len(names) == 0 {
		return nil, ""
	}
	last := names[len(names)-1]
	info, err := os.Stat(filepath.Join(k.o.Dir, last))
	if err != nil {
		return nil, ""
	}
	return info, last
}

func (k *Keeper) prune() {
	names := k.names()
	for len(names) > maxKept {
		if err := os.Remove(filepath.Join(k.o.Dir, names[0])); err != nil {
			k.o.Logger.Warn("an old backup was not removed", "error", err)
		}
		names = names[1:]
	}
	// What a crash left behind.
	stale, err := filepath.Glob(filepath.Join(k.o.Dir, ".new-*"))
	if err != nil {
		return
	}
	for _, name := range stale {
		if info, err := os.Stat(name); err == nil && time.Since(info.ModTime()) > Every {
			_ = os.Remove(name) // the next pass tries again
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
