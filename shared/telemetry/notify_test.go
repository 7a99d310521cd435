package telemetry

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// manager listens as a service manager does.
func manager(t *testing.T, name string) func() string {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

func environment(pairs ...string) func(string) string {
	return func(name string) string {
		for _, p := range pairs {
			if value, ok := strings.CutPrefix(p, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

func TestSupervisorHears(t *testing.T) {
	abstract := "@relais-test-" + strconv.Itoa(os.Getpid())
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), abstract} {
		heard := manager(t, name)
		s := NewSupervisor(environment("NOTIFY_SOCKET="+name), slog.New(slog.DiscardHandler))
		for _, tc := range []struct {
			tell func()
			want string
		}{
			{func() { s.Ready("delivers mail") }, "READY=1\nSTATUS=delivers mail"},
			{s.Reloading, "RELOADING=1\nMONOTONIC_USEC="},
			{s.Stopping, "STOPPING=1\nSTATUS="},
		} {
			tc.tell()
			if got := heard(); !strings.HasPrefix(got, tc.want) {
				t.Errorf("on %s: got %q, want %q", name, got, tc.want)
			}
		}
	}
}

func TestNobodyHears(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	s := NewSupervisor(environment(), logger)
	s.Ready("")
	s.KeepAlive(t.Context(), func() { t.Error("asked without a watchdog") })
	if log.Len() > 0 {
		t.Errorf("without a service manager: %s", &log)
	}
	NewSupervisor(environment("NOTIFY_SOCKET=/nonexistent/socket"), logger).Ready("")
	if !strings.Contains(log.String(), "/nonexistent/socket") {
		t.Errorf("a socket that is not there is not logged: %q", &log)
	}
}

func TestKeepAlive(t *testing.T) {
	name := filepath.Join(t.TempDir(), "notify")
	heard := manager(t, name)
	env := []string{"NOTIFY_SOCKET=" + name, "WATCHDOG_USEC=3000"}
	logger := slog.New(slog.DiscardHandler)
	if s := NewSupervisor(environment(append(env, "WATCHDOG_PID=1")...), logger); s.watchdog != 0 {
		t.Error("a watchdog that waits for another process is taken for ours")
	}
	s := NewSupervisor(environment(append(env, "WATCHDOG_PID="+strconv.Itoa(os.Getpid()))...), logger)
	ctx, cancel := context.WithCancel(t.Context())
	done, asked := make(chan struct{}), make(chan struct{})
	go func() {
		s.KeepAlive(ctx, func() { asked <- struct{}{} })
		close(done)
	}()
	for range 3 {
		<-asked
		if got := heard(); got != "WATCHDOG=1" {
			t.Errorf("got %q", got)
		}
	}
	cancel()
	for {
		select {
		case <-done:
			return
		case <-asked: // a beat that was due before the end
		}
	}
}
