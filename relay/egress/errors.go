package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Cause says why a connection could not be opened.
type Cause uint8

// The causes.
const (
	Other       Cause = iota // none of the others
	Refused                  // the host answered with a reset: nothing listens there
	TimedOut                 // no answer in time
	Unreachable              // the network or a router said no
	NoPorts                  // every local port towards that host is in use
	NoFiles                  // this process or machine has no file descriptors or memory left
	Unusable                 // the source is not assigned here or not present on this host
	Canceled                 // the caller gave up
)

var causeNames = [...]string{"connection failed", "connection refused", "connection timed out", "host unreachable",
	"no free local port", "no file descriptors left", "source address not usable", "canceled"}

// String returns a short phrase for replies and logs.
func (c Cause) String() string {
	if int(c) < len(causeNames) {
		return causeNames[c]
	}
	return "?"
}

// Local reports whether the cause lies on this machine, so that the remote
// host is not to blame.
func (c Cause) Local() bool { return c >= NoPorts }

// DialError is a connection that did not come about.
type DialError struct {
	Cause  Cause
	Source netip.Addr
	Remote netip.AddrPort
	Err    error // of the operating system; nil for Unusable
}

// Error names both ends and the cause.
func (e *DialError) Error() string {
	s := fmt.Sprintf("connect from %s to %s: %s", e.Source, e.Remote, e.Cause)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the operating system's error.
func (e *DialError) Unwrap() error { return e.Err }

// classify finds the cause behind an error of net.Dialer.
func classify(err error) Cause {
	var errno unix.Errno
	if errors.As(err, &errno) {
		switch errno {
		case unix.ECONNREFUSED, unix.ECONNRESET:
			return Refused
		case unix.ETIMEDOUT:
			return TimedOut
		case unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EHOSTDOWN, unix.EACCES, unix.EPERM:
			return Unreachable
		case unix.EADDRNOTAVAIL, unix.EADDRINUSE:
			return NoPorts
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			return NoFiles
		}
	}
	if errors.Is(err, context.Canceled) {
		return Canceled
	}
	var ne net.Error
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout() {
		return TimedOut
	}
	return Other
}
