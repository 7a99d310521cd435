package main

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// talk opens a session with a sink, sends lines and returns the reply to each.
func talk(t *testing.T, at string, lines ...string) []string {
	t.Helper()
	c, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	reply := func() string {
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("no reply: %v", err)
			}
			if line[3] == ' ' {
				return line[:3]
			}
		}
	}
	got := []string{reply()}
	for _, line := range lines {
		if _, err := c.Write([]byte(line + "\r\n")); err != nil {
			t.Fatal(err)
		}
		got = append(got, reply())
	}
	return got
}

func startSink(t *testing.T, m mood) (*seen, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().(*net.TCPAddr).AddrPort()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := newSeen(100)
	hosts := newSinks(s)
	var mood atomic.Int32
	mood.Store(int32(m))
	if err := hosts.listen(netip.AddrPortFrom(at.Addr(), at.Port()), &mood); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.close)
	return s, at.String()
}

func TestSinkTakesAndCountsMail(t *testing.T) {
	s, at := startSink(t, takes)
	message := "Subject: x\r\n\r\n..not the end\r\n" + strings.Repeat("x", 2*maxSinkLine) + "\r\n."
	got := talk(t, at, "EHLO a", "MAIL FROM:<x@y>", "RCPT TO:<b12@d.test>", "DATA", message, "RSET", "DATA",
		"MAIL FROM:<x@y>", "RCPT TO:<b12@d.test>", "DATA", message, "QUIT")
	if text := strings.Join(got, " "); text != "220 250 250 250 354 250 250 503 250 250 354 250 221" {
		t.Errorf("replies %s", text)
	}
	if s.count(backlogMail) != 1 || s.duplicates.Load() != 1 || s.attempts.Load() != 2 {
		t.Errorf("%d taken, %d duplicates, %d attempts; want 1, 1 and 2", s.count(backlogMail), s.duplicates.Load(), s.attempts.Load())
	}
}

func TestSinkPutsOff(t *testing.T) {
	s, at := startSink(t, later)
	got := talk(t, at, "EHLO a", "MAIL FROM:<x@y>", "RCPT TO:<p3@d.test>", "DATA", "QUIT")
	if text := strings.Join(got, " "); text != "220 250 250 452 503 221" {
		t.Errorf("replies %s", text)
	}
	if s.attemptOf(3).IsZero() || s.count(promptMail) != 0 {
		t.Errorf("attempt at %v, %d taken; want an attempt and nothing taken", s.attemptOf(3), s.count(promptMail))
	}
	busySeen, at := startSink(t, busy)
	busySeen.arm()
	if got := talk(t, at); got[0] != "421" {
		t.Errorf("a busy host says %s", got[0])
	}
	select {
	case <-busySeen.first:
	default:
		t.Error("the session was not noted as an attempt")
	}
}

func TestParseLocal(t *testing.T) {
	for _, tc := range []struct {
		local  string
		class  int
		number int
		ok     bool
	}{
		{"b0", 0, 0, true}, {"t17", 1, 17, true}, {"p999999", 2, 999999, true},
		{"", 0, 0, false}, {"b", 0, 0, false}, {"x1", 0, 0, false}, {"b-1", 0, 0, false}, {"b99999999", 0, 0, false},
	} {
		class, number, ok := parseLocal([]byte(tc.local))
		if ok != tc.ok || ok && (class != tc.class || number != tc.number) {
			t.Errorf("parseLocal(%q) = %d, %d, %v", tc.local, class, number, ok)
		}
	}
}

// Every domain has records that name hosts of its mood, and the proportions are
// as described.
func TestWorldOfDomains(t *testing.T) {
	s := newSeen(100)
	w, err := newWorld(1000, 0, s)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	moods, own, hosted, big := make(map[mood]int), 0, 0, 0
	for d := range w.domains {
		rr := w.records(d)
		addr := netip.MustParseAddr(rr[1][strings.LastIndexByte(rr[1], ' ')+1:])
		found := false
		for i := range hostsOfMood {
			found = found || w.host(w.moodOf(d), i) == addr
		}
		if !found {
			t.Fatalf("%s is not a host of mood %d", rr[1], w.moodOf(d))
		}
		moods[w.moodOf(d)]++
		switch {
		case strings.Contains(rr[0], "hosting"):
			hosted++
		case strings.Contains(rr[0], "bigprovider"):
			big++
		default:
			own++
		}
	}
	if moods[busy] != 400 || moods[later] != 600 || own != 500 || hosted != 300 || big != 200 {
		t.Errorf("moods %v, own %d, hosted %d, big %d", moods, own, hosted, big)
	}
}

func TestReadProcess(t *testing.T) {
	m, err := readMemory(os.Getpid())
	if err != nil || m.rss <= 0 || m.peak < m.rss || m.anon <= 0 || m.anon+m.file > m.rss {
		t.Errorf("readMemory() = %+v, %v", m, err)
	}
	first, err := readCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); time.Since(begun) < 20*time.Second; {
		now, err := readCPU(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if now > first {
			return
		}
	}
	t.Error("the processor time does not grow")
}

func TestDirIsRefusedWithoutRoom(t *testing.T) {
	dir := t.TempDir()
	free, err := freeBytes(dir)
	if err != nil {
		t.Fatal(err)
	}
	o := &options{dir: dir, n: int(free/minFreeBytes+1) * 2 * spaceFor}
	if _, err := prepareDir(o); err == nil || !strings.Contains(err.Error(), "DIR") {
		t.Errorf("prepareDir with %d MiB free for %d recipients: %v", free/mib, o.n, err)
	}
	o = &options{dir: dir, n: minMessages}
	cleanUp, err := prepareDir(o)
	if err != nil {
		t.Fatal(err)
	}
	if o.dir == dir {
		t.Error("the run has no directory of its own")
	}
	cleanUp()
	if _, err := os.Stat(o.dir); !os.IsNotExist(err) {
		t.Errorf("the directory of the run is left: %v", err)
	}
}
