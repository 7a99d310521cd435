package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay/engine"
)

var lanesNow = time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)

func testLanes() []engine.LaneInfo {
	return []engine.LaneInfo{
		{Source: "192.0.2.1", Provider: "google", Pool: "default", Sessions: 12, InFlight: 9, Waiting: 1200, DeliveredPerSecond: 153.4, DeferredPerSecond: 0.1},
		{Source: "192.0.2.2", Provider: "google", Pool: "default", Sessions: 3, Waiting: 1200, DeliveredPerSecond: 20.25, WaitingSince: lanesNow.Add(-90 * time.Second)},
		{Source: "192.0.2.1", Provider: "orange", Pool: "default", Sessions: 2, InFlight: 2, Waiting: 77, BouncedPerSecond: 3, Hold: "source-connections", WaitingSince: lanesNow.Add(-50 * time.Hour)},
		{Source: "2001:db8::1", Provider: "mx:example.net", Pool: "crème", Waiting: 1, Hold: "backoff", HoldUntil: lanesNow.Add(4*time.Minute + 5*time.Second), WaitingSince: lanesNow.Add(-2 * time.Hour)},
	}
}

func TestRenderLanes(t *testing.T) {
	const want = `SOURCE       PROVIDER        POOL     SESS  SENDING   DUE  DELIV/S  DEFER/S  BOUNCE/S  OLDEST  WAITS FOR
192.0.2.1    google          default    12        9  1200      153      0.1         0       -  -
192.0.2.2    google          default     3        0  1200     20.2        0         0   1m30s  -
192.0.2.1    orange          default     2        2    77        0        0       3.0   2d02h  source-connections
2001:db8::1  mx:example.net  crème       0        0     1        0        0         0   2h00m  backoff, 4m05s
`
	if got := renderLanes(testLanes(), view{sorting: sortSessions, now: lanesNow}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestRenderLanesOnAScreen(t *testing.T) {
	const want = `lanes by waiting
4 lanes, 17 sessions, 11 sending, 1278 due; a second 174 delivered, 0.1 deferred

! the relay does not answer

SOURCE     PROVIDER  POOL     SESS  SENDING   DUE  DELIV/S  DEFER/S  BOUNCE/S  O
192.0.2.1  google    default    12        9  1200      153      0.1         0   
192.0.2.2  google    default     3        0  1200     20.2        0         0   
… and 2 more
`
	if got := renderLanes(testLanes(), view{sorting: sortWaiting, now: lanesNow, width: 80, height: 9, title: "lanes by waiting", problem: "the relay does not answer"}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for height := range 20 {
		page := renderLanes(testLanes(), view{sorting: sortWaiting, now: lanesNow, width: 10, height: height, title: "x"})
		if n := strings.Count(page, "\n"); height >= 6 && n > height {
			t.Errorf("%d lines on a screen of %d", n, height)
		}
		for line := range strings.Lines(page) {
			if n := len([]rune(line)) - 1; n > 10 {
				t.Errorf("a line of %d on a screen of 10", n)
			}
		}
	}
}

func TestLanesAreSorted(t *testing.T) {
	for sorting, want := range map[string]string{
		sortSessions: "google/1 google/2 orange/1 mx:example.net/1", sortWaiting: "google/1 google/2 orange/1 mx:example.net/1",
		sortDelivered: "google/1 google/2 mx:example.net/1 orange/1", sortDeferred: "google/1 google/2 mx:example.net/1 orange/1",
		sortBounced: "orange/1 google/1 google/2 mx:example.net/1", sortOldest: "orange/1 mx:example.net/1 google/2 google/1",
		sortProvider: "google/1 google/2 mx:example.net/1 orange/1",
	} {
		var got []string
		for line := range strings.Lines(renderLanes(testLanes(), view{sorting: sorting, now: lanesNow})) {
			if f := strings.Fields(line); f[0] != "SOURCE" {
				got = append(got, f[1]+"/"+f[0][len(f[0])-1:])
			}
		}
		if fmt.Sprint(got) != "["+want+"]" {
			t.Errorf("%s: %v, want %s", sorting, got, want)
		}
	}
	for key, sorting := range sortKeys {
		if sortings[sorting] == nil || key == 'q' {
			t.Errorf("key %c sorts by %q", key, sorting)
		}
	}
}

// terminal opens a pseudo-terminal and returns both ends.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// The live view obeys its keys, says when the relay is gone, and gives the
// terminal back as it was.
func TestTop(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, slave := terminal(t)
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 12, Col: 120}); err != nil {
		t.Fatal(err)
	}
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	s, ok := openScreen(slave, slave)
	if !ok {
		t.Fatal("a terminal is none")
	}
	reads := 0
	read := func(context.Context) ([]engine.LaneInfo, error) {
		if reads++; reads > 3 {
			return nil, errors.New("nobody answers")
		}
		return testLanes(), nil
	}
	done := make(chan error, 1)
	go func() { done <- runTop(t.Context(), s, read, sortSessions, 50*time.Millisecond) }()
	var shown strings.Builder
	until := func(text string) {
		t.Helper()
		_ = master.SetReadDeadline(time.Now().Add(10 * time.Second))
		for buf := make([]byte, 4096); !strings.Contains(shown.String(), text); {
			n, err := master.Read(buf)
			shown.Write(buf[:n])
			if err != nil {
				t.Fatalf("%v; %q is not in %q", err, text, shown.String())
			}
		}
	}
	press := func(key string) {
		t.Helper()
		if _, err := master.WriteString(key); err != nil {
			t.Fatal(err)
		}
	}
	until(otherPage + hideCursor)
	until("by sessions")
	until("4 lanes, 17 sessions")
	press("o")
	until("by oldest")
	press("xp") // x is no key
	until("by provider")
	until("! nobody answers")
	press("q")
	if err := <-done; err != nil {
		t.Error(err)
	}
	until(showCursor + firstPage)
	if after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || *after != *before {
		t.Errorf("the terminal was %+v and is %+v, %v", before, after, err)
	}
}

func TestNoTerminal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, ok := openScreen(r, w); ok {
		t.Error("a pipe is a terminal")
	}
	_, slave := terminal(t)
	t.Setenv("TERM", "dumb")
	if _, ok := openScreen(slave, slave); ok {
		t.Error("a dumb terminal shows pages")
	}
}
