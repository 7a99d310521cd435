package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
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

// shown says whether a crash test is over: it has its number of rounds and, on a slow
// machine, more of them until so much was accepted that the test shows something.
func shown(done, rounds int, submitted []fleet.Submitted, enough int) bool {
	return done >= 4*rounds || done >= rounds && countState(submitted, lab.StateAccepted) >= enough
}

// TestKilledRelayLosesNothing kills a relay with SIGKILL at twenty random
// moments under load.
func TestKilledRelayLosesNothing(t *testing.T) {
	const rounds, enough = 20, 200
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 4, Policy: crashPolicy})
	r := f.Relays[0]
	rng := rand.New(rand.NewPCG(11, 1))
	var submitted []fleet.Submitted
	kills := 0
	for ; !shown(kills, rounds, submitted, enough); kills++ {
		wait := time.Duration(20+rng.IntN(400)) * time.Millisecond
		dead := make(chan struct{})
		submitted = append(submitted, submitUnderFire(t, f, kills, func() {
			time.AfterFunc(wait, func() { r.Kill(); close(dead) })
		})...)
		<-dead
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
		t.Errorf("only %d messages were accepted: the test shows little", a.accepted)
	}
	if rep.Duplicated > int64(kills*crashSessions) {
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

// submitUnderFire submits a batch while fire ends the relay; what it could not
// hand over is the client's, not ours.
func submitUnderFire(t *testing.T, f *fleet.Fleet, round int, fire func()) []fleet.Submitted {
	t.Helper()
	to := make([]string, 1200)
	for i := range to {
		to[i] = fmt.Sprintf("accept-%d-%d@boutique-%02d.test", round, i, 1+i%40)
	}
	fire()
	submitted, err := f.Submit(within(t, 1500*time.Millisecond), fleet.Stream{Recipients: to, Size: 4000, Connections: 20, Tag: fmt.Sprint("fire", round)})
	if err != nil && len(submitted) == 0 {
		t.Logf("round %d: %v", round, err)
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
	const rounds, enough = 5, 50
	d := newDisk(t, 1<<30)
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 4, Policy: diskPolicy(64 << 20), Dirs: map[int]string{0: filepath.Join(d.path, "relay")}})
	r := f.Relays[0]
	rng := rand.New(rand.NewPCG(12, 1))
	var submitted []fleet.Submitted
	cuts := 0
	for ; !shown(cuts, rounds, submitted, enough); cuts++ {
		wait := time.Duration(50+rng.IntN(400)) * time.Millisecond
		cut := make(chan error, 1)
		submitted = append(submitted, submitUnderFire(t, f, cuts, func() {
			time.AfterFunc(wait, func() {
				err := d.stop()
				r.Kill()
				cut <- err
			})
		})...)
		if err := <-cut; err != nil {
			t.Fatal(err)
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
		t.Errorf("only %d messages were accepted: the test shows little", a.accepted)
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
	// cat writes until there is no space left, which is its error and our aim.
	out, err := command(t, "sh", "-c", "cat /dev/zero > "+filler)
	if err == nil {
		t.Fatalf("the disk does not fill up: %s", out)
	}
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
