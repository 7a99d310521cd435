package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// crashSessions bounds the sessions of the relay under test: at most one
// message per session can be in flight when it dies.
const crashSessions = 40

var crashPolicy = map[string]string{
	"delivery": fmt.Sprintf(`connect_timeout = "3s"
host_backoff = "1s"
min_dns_ttl = "1s"
idle_session = "3s"
max_sessions = %d
sign_dkim = false
`, crashSessions),
}

// crashAfter bounds how many mails of a round are accepted before the moment of its
// crash is drawn: a machine that is too slow to take any by then would show nothing.
const crashAfter = 20

// TestKilledRelayLosesNothing kills a relay with SIGKILL at twenty random
// moments under load.
func TestKilledRelayLosesNothing(t *testing.T) {
	const kills = 20
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 4, Policy: crashPolicy})
	r := f.Relays[0]
	rng := rand.New(rand.NewPCG(11, 1))
	var submitted []fleet.Submitted
	enough := 0
	for round := range kills {
		after, wait := 1+rng.IntN(crashAfter), time.Duration(rng.IntN(400))*time.Millisecond
		enough += after
		submitted = append(submitted, submitUnderFire(t, f, round, after, func() {
			<-time.After(wait)
			r.Kill()
		})...)
		checkQueue(t, r)
		if err := f.Restart(within(t, time.Minute), r); err != nil {
			t.Fatal(err)
		}
	}
	a := settle(t, f, submitted)
	rep := f.Lab.Report()
	t.Logf("%d answered 250, %d of them arrived, %d arrived twice, after %d kills", a.accepted, a.delivered, rep.Duplicated, kills)
	if a.delivered != a.accepted {
		t.Errorf("%d messages ended without arriving, at providers that take everything", a.accepted-a.delivered)
	}
	if a.accepted < enough {
		t.Errorf("only %d messages were accepted, the kills waited for %d", a.accepted, enough)
	}
	if rep.Duplicated > kills*crashSessions {
		t.Errorf("%d duplicates, at most the %d in flight at each of %d kills are allowed", rep.Duplicated, crashSessions, kills)
	}
}

// checkQueue checks the records of a relay that does not run.
func checkQueue(t *testing.T, r *fleet.Relay) {
	t.Helper()
	if out, err := command(t, filepath.Join(binaries, "relais-relay"), "queue", "fsck", "--bodies", "--data", r.Dir); err != nil {
		t.Errorf("the records of the queue disagree after a crash: %v\n%s", err, out)
	}
}

// Of submitUnderFire.
const (
	fireTimeout = 2 * time.Minute        // for the mails before the fire
	lastReplies = 500 * time.Millisecond // in which clients read what the relay said before its end
)

// submitUnderFire submits a batch, and has fire end the relay once so many of it were
// accepted; what it could not hand over is the client's, not ours.
func submitUnderFire(t *testing.T, f *fleet.Fleet, round, after int, fire func()) []fleet.Submitted {
	t.Helper()
	to := make([]string, 1200)
	for i := range to {
		to[i] = fmt.Sprintf("accept-%d-%d@boutique-%02d.test", round, i, 1+i%40)
	}
	ctx, cancel := context.WithTimeout(t.Context(), fireTimeout)
	defer cancel()
	var accepted atomic.Int64
	var once sync.Once
	over := make(chan struct{})
	begin := func() {
		once.Do(func() {
			go func() {
				defer close(over)
				fire()
				time.AfterFunc(lastReplies, cancel)
			}()
		})
	}
	submitted, err := f.Submit(ctx, fleet.Stream{Recipients: to, Size: 4000, Connections: 20, Tag: fmt.Sprint("fire", round), Done: func(r *lab.Result) {
		if r.State == lab.StateAccepted && accepted.Add(1) == int64(after) {
			begin()
		}
	}})
	begin() // if fewer were accepted, which is said at the end
	<-over
	if n := countState(submitted, lab.StateAccepted); n < after {
		t.Logf("round %d: %d mails were accepted: %v", round, n, err)
	}
	return submitted
}

// disk is a small filesystem of its own on a loop device.
type disk struct {
	t           *testing.T
	image, path string
}

func newDisk(t *testing.T, bytes int64, options ...string) *disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("mounting a disk image needs root: run the end-to-end tests as root")
	}
	mkfs := need(t, "mkfs.ext4")
	dir, err := os.MkdirTemp("", "relais-disk-")
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, image: filepath.Join(dir, "image"), path: filepath.Join(dir, "mnt")}
	t.Cleanup(func() {
		d.unmount()
		_ = os.RemoveAll(dir)
	})
	file, err := os.Create(d.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := command(t, mkfs, append([]string{"-q", "-F", d.image}, options...)...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		t.Fatal(err)
	}
	d.mount()
	return d
}

// mount mounts the image, by a loop device that it has for itself until it is
// unmounted. mount -o loop would take the one of before, and with it a file system
// that was stopped, as long as that is mounted in the namespace of another program.
func (d *disk) mount() {
	d.t.Helper()
	losetup := need(d.t, "losetup")
	device, err := command(d.t, losetup, "--find", "--show", d.image)
	if err != nil {
		d.t.Fatalf("%v\n%s", err, device)
	}
	device = strings.TrimSpace(device)
	out, err := command(d.t, "mount", device, d.path)
	if off, err := command(d.t, losetup, "--detach", device); err != nil { // when it is not mounted any more
		d.t.Errorf("%v\n%s", err, off)
	}
	if err != nil {
		d.t.Fatalf("%v\n%s", err, out)
	}
}

func (d *disk) unmount() { _ = unix.Unmount(d.path, 0) }

// Numbers of the ioctl that stops a filesystem (linux/fs.h, ext4 and XFS).
const (
	fsIOCShutdown    = 0x8004587d // _IOR('X', 125, __u32)
	shutdownNoFlush  = 2          // drop the journal and everything unsynced
	unmountAttempts  = 50
	unmountRetryWait = 100 * time.Millisecond
)

// cutPower is stop in the test's own goroutine.
func (d *disk) cutPower() {
	d.t.Helper()
	if err := d.stop(); err != nil {
		d.t.Fatal(err)
	}
}

// stop stops the filesystem so that exactly what was not synced is lost.
func (d *disk) stop() error {
	dir, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), fsIOCShutdown, shutdownNoFlush); err != nil {
		return fmt.Errorf("the filesystem cannot be stopped: %w", err)
	}
	return nil
}

// replug mounts the disk again, as after a reboot.
func (d *disk) replug() {
	d.t.Helper()
	for range unmountAttempts {
		err := unix.Unmount(d.path, 0)
		if err == nil {
			d.mount()
			return
		}
		if err != syscall.EBUSY {
			d.t.Fatalf("unmount: %v", err)
		}
		<-time.After(unmountRetryWait)
	}
	d.t.Fatal("the disk stays busy")
}

// diskPolicy fits a relay on a small disk.
func diskPolicy(minFree int64) map[string]string {
	p := map[string]string{
		"storage": fmt.Sprintf("min_free_bytes = %d\nmin_free_inodes = 100\nreserve_bytes = 33554432\nsegment_bytes = 16777216\nmax_outbox_bytes = 67108864\n", minFree),
	}
	for name, text := range crashPolicy {
		p[name] = text
	}
	return p
}

// TestPowerCutLosesNothing cuts the power of the relay's disk during
// acceptance, several times.
func TestPowerCutLosesNothing(t *testing.T) {
	const cuts = 5
	d := newDisk(t, 1<<30)
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 4, Policy: diskPolicy(64 << 20), Dirs: map[int]string{0: filepath.Join(d.path, "relay")}})
	r := f.Relays[0]
	rng := rand.New(rand.NewPCG(12, 1))
	var submitted []fleet.Submitted
	enough := 0
	for round := range cuts {
		after, wait := 1+rng.IntN(crashAfter), time.Duration(rng.IntN(400))*time.Millisecond
		enough += after
		var cut error
		submitted = append(submitted, submitUnderFire(t, f, round, after, func() {
			<-time.After(wait)
			cut = d.stop()
			r.Kill()
		})...)
		if cut != nil {
			t.Fatal(cut)
		}
		d.replug()
		checkQueue(t, r)
		if err := f.Restart(within(t, time.Minute), r); err != nil {
			t.Fatal(err)
		}
	}
	a := settle(t, f, submitted)
	t.Logf("%d answered 250, %d of them arrived, %d arrived twice, after %d power cuts", a.accepted, a.delivered, f.Lab.Report().Duplicated, cuts)
	if a.delivered != a.accepted {
		t.Errorf("%d messages ended without arriving, at providers that take everything", a.accepted-a.delivered)
	}
	if a.accepted < enough {
		t.Errorf("only %d messages were accepted, the cuts waited for %d", a.accepted, enough)
	}
	if err := r.Stop(); err != nil {
		t.Error(err)
	}
}

// TestFullDiskAnswers452AndRecovers lets another process fill the relay's disk.
func TestFullDiskAnswers452AndRecovers(t *testing.T) {
	d := newDisk(t, 1<<30)
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 2, Policy: diskPolicy(64 << 20), Dirs: map[int]string{0: filepath.Join(d.path, "relay")}})
	r := f.Relays[0]
	submit := func(tag string) (out []fleet.Submitted) {
		to := make([]string, 30)
		for i := range to {
			to[i] = fmt.Sprintf("accept-%s-%d@boutique-%02d.test", tag, i, 1+i%40)
		}
		out, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 20_000, Connections: 4, Tag: tag})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	count := func(s []fleet.Submitted, state lab.State) (n int) {
		for i := range s {
			if s[i].Result.State == state {
				n++
			}
		}
		return n
	}
	all := submit("before")
	if n := count(all, lab.StateAccepted); n != 30 {
		t.Fatalf("%d of 30 accepted before the disk is full", n)
	}
	filler := filepath.Join(d.path, "filler")
	d.fill(filler)
	// Free space is measured ten times a second: before it was, a mail fits still.
	mustSay(t, r, "left for mail")
	full := submit("full")
	if n := count(full, lab.StateRefused); n != 30 {
		t.Errorf("%d of 30 refused while the disk is full", n)
	}
	for i := range full {
		if full[i].Result.Code != 452 {
			t.Errorf("got %d %s, want 452", full[i].Result.Code, full[i].Result.Reply)
			break
		}
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		again := submit(fmt.Sprint("again", time.Now().UnixNano()))
		all = append(all, again...)
		if count(again, lab.StateAccepted) == 30 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("acceptance did not come back after the space did")
		}
	}
	settle(t, f, all)
	if !r.Alive() {
		t.Error("the relay died")
	}
	if err := r.Stop(); err != nil {
		t.Error(err)
	}
}
