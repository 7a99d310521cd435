package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// onDisk starts a relay whose data directory is on a disk of its own.
func onDisk(t *testing.T, d *disk) (*fleet.Fleet, *fleet.Relay) {
	t.Helper()
	f := start(t, fleet.Config{Open: true, NoDKIM: true, Sources: 2, Policy: diskPolicy(64 << 20), Dirs: map[int]string{0: filepath.Join(d.path, "relay")}})
	return f, f.Relays[0]
}

// mails submits n mails and returns what became of them.
func mails(t *testing.T, f *fleet.Fleet, n int, tag string) []fleet.Submitted {
	t.Helper()
	return mailsFor(t, f, n, tag, time.Minute)
}

// mailsFor gives up after a while what could not be handed over.
func mailsFor(t *testing.T, f *fleet.Fleet, n int, tag string, most time.Duration) []fleet.Submitted {
	t.Helper()
	return mailsUntil(within(t, most), t, f, n, tag)
}

// mailsUntil gives up what could not be handed over until ctx ends.
func mailsUntil(ctx context.Context, t *testing.T, f *fleet.Fleet, n int, tag string) []fleet.Submitted {
	t.Helper()
	to := make([]string, n)
	for i := range to {
		to[i] = fmt.Sprintf("accept-%s-%d@boutique-%02d.test", tag, i, 1+i%40)
	}
	out, err := f.Submit(ctx, fleet.Stream{Recipients: to, Size: 20_000, Connections: 4, Tag: tag})
	if err != nil && len(out) == 0 {
		t.Logf("%s: %v", tag, err)
	}
	return out
}

func countState(s []fleet.Submitted, state lab.State) (n int) {
	for i := range s {
		if s[i].Result.State == state {
			n++
		}
	}
	return n
}

// untilAccepted submits until everything is taken again.
func untilAccepted(t *testing.T, f *fleet.Fleet, all []fleet.Submitted) []fleet.Submitted {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for n := 0; ; n++ {
		again := mailsFor(t, f, 10, fmt.Sprint("again", n), 10*time.Second)
		if all = append(all, again...); countState(again, lab.StateAccepted) == 10 {
			return all
		}
		if time.Now().After(deadline) {
			t.Fatal("acceptance did not come back")
		}
		<-time.After(200 * time.Millisecond)
	}
}

// arrived waits until so many mails have arrived.
func arrived(t *testing.T, f *fleet.Fleet, n int) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for f.Lab.Report().Accepted < int64(n) {
		if time.Now().After(deadline) {
			t.Fatalf("only %d mails arrived", f.Lab.Report().Accepted)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// underFault submits mail, has a fault come once so much has arrived in all, and
// returns what became of the mail until a little later. A relay notices a fault of its
// disk when it writes, so there is mail to submit until the fault is there.
func underFault(t *testing.T, f *fleet.Fleet, n int, fault func()) (under []fleet.Submitted) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var faulty atomic.Bool
	var submitting sync.WaitGroup
	defer submitting.Wait()
	defer stop()
	submitting.Go(func() {
		for round := 0; !faulty.Load() && ctx.Err() == nil; round++ {
			under = append(under, mailsUntil(ctx, t, f, 600, fmt.Sprint("under", round))...)
		}
	})
	arrived(t, f, n)
	fault()
	faulty.Store(true)
	time.AfterFunc(5*time.Second, stop)
	submitting.Wait()
	return under
}

// greeting is the first line that a server says.
func greeting(t *testing.T, addr string) string {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Error(err)
	}
	return line
}

// mustSay asks a relay's health until it is not ready and gives the reason.
func mustSay(t *testing.T, r *fleet.Relay, want string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	asking := http.Client{Timeout: 5 * time.Second} // a relay that waits for its disk says nothing
	for {
		resp, err := asking.Get(r.Metrics() + "/health")
		said := fmt.Sprint(err)
		if err == nil {
			text, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err == nil && strings.Contains(string(text), want) {
				return
			}
			said = string(text)
		}
		if time.Now().After(deadline) {
			t.Fatalf("health says %s, want %q", said, want)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// mustBeTheSame says that nobody had to start the relay again.
func mustBeTheSame(t *testing.T, r *fleet.Relay, pid int) {
	t.Helper()
	if !r.Alive() || r.PID() != pid {
		t.Errorf("the relay died: process %d is now %d", pid, r.PID())
	}
	if err := r.Stop(); err != nil {
		t.Error(err)
	}
	checkQueue(t, r)
}

// TestReadOnlyDiskAnswers451AndRecovers makes the relay's file system read-only
// while mail comes and goes, by a read-only mount on top of it: what it opens
// from then on is read-only, as with a file system that the kernel made so.
func TestReadOnlyDiskAnswers451AndRecovers(t *testing.T) {
	d := newDisk(t, 1<<30)
	f, r := onDisk(t, d)
	pid := r.PID()
	under := underFault(t, f, 60, d.readOnly)
	mustSay(t, r, "read-only")
	refused := mails(t, f, 20, "refused")
	if n := countState(refused, lab.StateRefused); n != 20 {
		t.Errorf("%d of 20 refused while the disk is read-only", n)
	}
	for i := range refused {
		if refused[i].Result.Code != 451 || !strings.Contains(refused[i].Result.Reply, "4.3.0") {
			t.Errorf("got %d %s, want 451 4.3.0", refused[i].Result.Code, refused[i].Result.Reply)
			break
		}
	}
	if err := unix.Unmount(d.path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	all := untilAccepted(t, f, under)
	a := settle(t, f, all)
	rep := f.Lab.Report()
	t.Logf("%d accepted, %d arrived, %d twice", a.accepted, a.delivered, rep.Duplicated)
	if a.delivered != a.accepted || rep.Duplicated != 0 {
		t.Errorf("%d accepted, %d arrived, %d of them twice", a.accepted, a.delivered, rep.Duplicated)
	}
	mustBeTheSame(t, r, pid)
}

// readOnly lays a read-only view over the disk.
func (d *disk) readOnly() {
	d.t.Helper()
	for _, args := range [][]string{{"--bind", d.path, d.path}, {"-o", "remount,bind,ro", d.path}} {
		if out, err := command(d.t, "mount", args...); err != nil {
			d.t.Fatalf("mount %v: %v\n%s", args, err, out)
		}
	}
}

// TestDeadDiskIsOpenedAgain kills the file system under a running relay, and
// mounts it anew: the relay lets go of it by itself, says why, and goes on.
func TestDeadDiskIsOpenedAgain(t *testing.T) {
	d := newDisk(t, 1<<30)
	f, r := onDisk(t, d)
	pid := r.PID()
	all := mails(t, f, 100, "before")
	all = append(all, underFault(t, f, len(all)+20, d.cutPower)...)
	mustSay(t, r, "the queue's disk or index failed")
	d.unmountSoon()
	mustSay(t, r, "the queue's disk or index failed") // while it waits as well
	if line := greeting(t, r.Submission()); !strings.HasPrefix(line, "421 4.3.0 ") {
		t.Errorf("a relay without a disk greets with %q", line)
	}
	d.mount()
	all = untilAccepted(t, f, all)
	a := settle(t, f, all)
	rep := f.Lab.Report()
	t.Logf("%d accepted, %d arrived, %d twice", a.accepted, a.delivered, rep.Duplicated)
	if a.delivered != a.accepted || rep.Duplicated > crashSessions {
		t.Errorf("%d accepted, %d arrived, %d of them twice", a.accepted, a.delivered, rep.Duplicated)
	}
	mustBeTheSame(t, r, pid)
}

// unmountSoon unmounts the disk as soon as nobody has it open.
func (d *disk) unmountSoon() {
	d.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := unix.Unmount(d.path, 0)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			d.t.Fatalf("unmount: %v", err)
		}
		<-time.After(unmountRetryWait)
	}
}

// TestDiskWithoutInodesAnswers452AndRecovers lets another process take all
// inodes.
func TestDiskWithoutInodesAnswers452AndRecovers(t *testing.T) {
	d := newDisk(t, 1<<30, "-N", "1500")
	f, r := onDisk(t, d)
	pid := r.PID()
	all := mails(t, f, 30, "before")
	dir := filepath.Join(d.path, "many")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint(n)), nil, 0o600)
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	mustSay(t, r, "inodes")
	full := mails(t, f, 20, "full")
	if n := countState(full, lab.StateRefused); n != 20 {
		t.Errorf("%d of 20 refused without inodes", n)
	} else if full[0].Result.Code != 452 {
		t.Errorf("got %d %s, want 452", full[0].Result.Code, full[0].Result.Reply)
	}
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	settle(t, f, untilAccepted(t, f, all))
	mustBeTheSame(t, r, pid)
}

// TestSilentDiskAnswers451AndRecovers freezes the file system: a disk that
// hangs says nothing, and its syncs do not come back.
func TestSilentDiskAnswers451AndRecovers(t *testing.T) {
	d := newDisk(t, 1<<30)
	f, r := onDisk(t, d)
	pid := r.PID()
	freeze := func(how string) {
		if out, err := command(t, "fsfreeze", how, d.path); err != nil {
			t.Fatalf("fsfreeze %s: %v\n%s", how, err, out)
		}
	}
	all := mails(t, f, 30, "before")
	// What is under way would be written to the index, which is mapped: a goroutine that
	// waits for the disk there keeps the collector of garbage waiting, and all others with
	// it. Of mail that comes the body is written first, by calls.
	if err := f.WaitEmpty(within(t, 2*time.Minute), nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var under []fleet.Submitted
	freeze("-f")
	// A process that writes to a frozen file system cannot even be killed.
	thawed := false
	t.Cleanup(func() {
		if !thawed {
			_ = exec.Command("fsfreeze", "-u", d.path).Run()
		}
	})
	wg.Go(func() { under = mails(t, f, 8, "under") })
	mustSay(t, r, "has not answered a write")
	refused := mails(t, f, 8, "refused")
	for i := range refused {
		if refused[i].Result.Code != 451 {
			t.Errorf("got %d %s, want 451", refused[i].Result.Code, refused[i].Result.Reply)
			break
		}
	}
	freeze("-u")
	thawed = true
	wg.Wait()
	all = append(all, under...)
	settle(t, f, untilAccepted(t, f, all))
	mustBeTheSame(t, r, pid)
	log, err := os.ReadFile(r.Log)
	if err != nil || bytes.Contains(log, []byte("panic")) {
		t.Errorf("the log of the relay: %v", err)
	}
}
