package telemetry

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// notifyTimeout bounds the wait for a service manager that does not read.
const notifyTimeout = time.Second

// Supervisor is the service manager that started this process and waits to
// hear how it stands: systemd with Type=notify, or whatever else speaks the
// protocol of sd_notify(3). What it cannot be told is logged: the work goes on.
type Supervisor struct {
	log      *slog.Logger
	socket   string
	watchdog time.Duration
}

// NewSupervisor reads the environment that a service manager gives: its socket
// in NOTIFY_SOCKET, the patience of its watchdog in WATCHDOG_USEC, and in
// WATCHDOG_PID whom that is for. Without them it is nobody, who hears nothing.
func NewSupervisor(getenv func(string) string, logger *slog.Logger) Supervisor {
	s := Supervisor{log: logger, socket: getenv("NOTIFY_SOCKET")}
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return s
	}
	if usec, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 {
		s.watchdog = time.Duration(usec) * time.Microsecond
	}
	return s
}

// Ready says that the process has started, or has read its files again, and
// what it does, in a line that "systemctl status" shows.
func (s Supervisor) Ready(status string) {
	s.tell("READY=1", "STATUS="+status)
}

// Stopping says that the process finishes what is in flight and ends.
func (s Supervisor) Stopping() {
	s.tell("STOPPING=1", "STATUS=finishing what is in flight")
}

// Reloading says that files are read again; Ready ends it.
func (s Supervisor) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		s.log.Warn("the monotonic clock cannot be read", "error", err)
		return
	}
	s.tell("RELOADING=1", "MONOTONIC_USEC="+strconv.FormatInt(now.Nano()/int64(time.Microsecond), 10))
}

// KeepAlive tells the watchdog three times in its patience that the process
// works, until the context ends. Each time alive is called first and must
// return: a process whose parts wait for each other for ever keeps it from
// returning, and is then ended and started again by the service manager.
// Without a watchdog it returns at once.
func (s Supervisor) KeepAlive(ctx context.Context, alive func()) {
	if s.watchdog == 0 {
		return
	}
	tick := time.NewTicker(s.watchdog / 3)
	defer tick.Stop()
	for {
		alive()
		s.tell("WATCHDOG=1")
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s Supervisor) tell(lines ...string) {
	if err := s.send(lines...); err != nil {
		s.log.Warn("the service manager was not told how this process stands", "said", lines[0], "error", err)
	}
}

// send writes one datagram of VARIABLE=value lines. Without a service manager
// it does nothing.
func (s Supervisor) send(lines ...string) error {
	if s.socket == "" {
		return nil
	}
	const op = "telemetry.Supervisor"
	// A name that begins with @ is in the abstract name space, unix(7).
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "the service manager does not listen on %s", s.socket)
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(notifyTimeout)); err != nil {
		return err
	}
	_, err = conn.Write([]byte(strings.Join(lines, "\n")))
	return fault.Wrap(err, fault.Unavailable, op, "the service manager does not read its socket")
}
