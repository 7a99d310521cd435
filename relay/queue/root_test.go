package queue

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// loopDisk is a small ext4 file system of its own in a file.
type loopDisk struct {
	t           *testing.T
	image, path string
	mounted     bool
}

// newLoopDisk needs root, for mount(8); these are the only tests that do.
func newLoopDisk(t *testing.T, mebibytes int64) *loopDisk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatalf("this test mounts a file system of its own and needs root: sudo -E go test ./relay/queue -run %s", t.Name())
	}
	dir := t.TempDir()
	d := &loopDisk{t: t, image: filepath.Join(dir, "image"), path: filepath.Join(dir, "disk")}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, mebibytes<<20); err != nil {
		t.Fatal(err)
	}
	d.run("mkfs.ext4", "-q", "-m", "0", d.image)
	d.mount()
	t.Cleanup(d.unmount)
	return d
}

func (d *loopDisk) run(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

func (d *loopDisk) mount() {
	d.t.Helper()
	d.run("mount", "-o", "loop", d.image, d.path)
	d.mounted = true
}

func (d *loopDisk) unmount() {
	if d.mounted {
		d.mounted = false
		d.run("umount", d.path)
	}
}

// cutPower drops everything that is not synced, mapped files included.
func (d *loopDisk) cutPower() {
	d.t.Helper()
	const (
		shutdown   = 0x8004587d // FS_IOC_SHUTDOWN
		noLogFlush = 2
	)
	f, err := os.Open(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush); err != nil {
		d.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		d.t.Fatal(err)
	}
}

func TestNothingAcknowledgedIsLostInAPowerCut(t *testing.T) {
	disk := newLoopDisk(t, 600)
	dir := filepath.Join(disk.path, "relay")
	accepted, tried, done := map[string]int{}, map[string]int{}, map[string]int{}
	for i := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashChild+"="+dir)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, began := bufio.NewScanner(stdout), time.Time{}
		cut := make(chan struct{}) // closed when the power is cut, and the disk let go
		for lines.Scan() {
			what, id, ok := strings.Cut(lines.Text(), " ")
			if !ok || len(id) != 30 {
				continue
			}
			switch what {
			case "A":
				accepted[id] = 2
			case "T":
				tried[id]++
			case "D":
				done[id]++
			}
			if began.IsZero() {
				began = time.Now()
				time.AfterFunc(time.Duration(200+150*i)*time.Millisecond, func() {
					defer close(cut)
					disk.cutPower()
					_ = cmd.Process.Kill()
				})
			}
		}
		_ = cmd.Wait() // it was killed, or died of its disk
		if began.IsZero() {
			t.Fatal("the child accepted nothing")
		}
		<-cut // it may have died of its disk before
		disk.unmount()
		disk.mount()
		checkRecords(t, dir)
	}
	f := newFixtureIn(t, dir)
	f.clock.now = time.Now()
	f.open()
	checkSurvivors(t, f, accepted, tried, done)
	f.close()
}

// fill takes every free block of the disk for one file, in a few calls: a
// writer that is slow, or paused for half a second on a busy machine, would
// also get what the store gives up meanwhile, which is another story.
func (d *loopDisk) fill(name string) {
	d.t.Helper()
	f, err := os.Create(name)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	var at int64
	for size := int64(1 << 30); size >= 4096; {
		err := unix.Fallocate(int(f.Fd()), 0, at, size)
		switch {
		case err == nil:
			at += size
		case errors.Is(err, unix.ENOSPC):
			size /= 2
		default:
			d.t.Fatal(err)
		}
	}
}

func TestAFullDiskRefusesMailInTimeAndLosesNothing(t *testing.T) {
	disk := newLoopDisk(t, 256)
	f := newFixtureIn(t, filepath.Join(disk.path, "relay"))
	f.storage.MinFreeBytes, f.storage.ReserveBytes, f.storage.SegmentBytes = 24<<20, 48<<20, 4<<20
	f.open()
	defer f.close()
	kept := map[ids.Message]bool{}
	text := strings.Repeat("x", 20_000)
	store := func(i int) error {
		if err := f.st.Admit(int64(len(text))); err != nil {
			return err
		}
		env := f.envelope(fmt.Sprintf("u@d%d.example", i%50))
		err := f.q.Accept(context.Background(), env, f.body(text))
		if err == nil {
			kept[env.ID] = true
		}
		return err
	}
	for i := range 500 {
		if err := store(i); err != nil {
			t.Fatal(err)
		}
	}
	filler := filepath.Join(disk.path, "filler")
	disk.fill(filler)
	f.mustRefuse(t, store)
	// Deliveries go on and are recorded, long enough to rotate the index's logs.
	for i := 0; len(kept) > 100 || i < 8_000; i++ {
		w := f.take(1)
		if len(kept) > 100 && i%15 == 0 {
			f.delivered(w, f.begin(w))
			delete(kept, w.Env.ID)
			continue
		}
		results := all(w, relay.StateWaiting, outbox.Deferred, f.clock.Now())
		results[0].State.LastReply.Text = strings.Repeat("y", 600)
		f.q.Finish(w, nil, results, nil, func(err error) {
			if err != nil {
				t.Error(err)
			}
		})
	}
	if err := store(0); !fault.Is(err, fault.NoSpace) {
		t.Errorf("accepted on a full disk: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	limit := time.Now().Add(20 * time.Second)
	for err := store(0); err != nil; err = store(0) {
		if time.Now().After(limit) {
			t.Fatalf("acceptance did not come back: %v, %+v", err, f.st.Stats())
		}
	}
	f.reopen()
	for id := range kept {
		info, err := f.q.Show(id)
		if err != nil {
			t.Fatalf("%s is lost: %v", id, err)
		}
		if body, err := f.st.ReadBody(info.Env.Body, nil); err != nil || string(body) != text {
			t.Fatalf("the body of %s: %v", id, err)
		}
	}
}

// mustRefuse waits until mail is refused for want of space, and by nothing else.
func (f *fixture) mustRefuse(t *testing.T, accept func(int) error) {
	t.Helper()
	for i := range 100_000 {
		err := accept(i)
		if fault.Is(err, fault.NoSpace) {
			return
		}
		if err != nil {
			t.Fatalf("refused for another reason: %v", err)
		}
	}
	t.Fatal("mail is accepted although the disk is full")
}
