// Package link connects nodes: authenticated sessions of several streams over
// QUIC or, where UDP does not get through, over TLS on TCP. It hides the
// transport behind Session and Stream, so that callers speak of peers and
// streams only, and it is the one package that knows QUIC.
package link

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	keepAlivePeriod = 10 * time.Second // middleboxes forget UDP flows after 15 to 30 s
	maxIdleTime     = 30 * time.Second // a silent peer is gone after this
	// DefaultDialTimeout bounds one attempt to reach one address.
	DefaultDialTimeout = 5 * time.Second
	maxStreams         = 64  // that a peer may have open in one session
	maxCloseTextBytes  = 256 // of the words that go with a close
)

// Session is a connection to one authenticated peer. Its methods are safe for
// concurrent use.
type Session interface {
	// OpenStream opens a stream. The peer learns of it with the first byte
	// written at the latest.
	OpenStream(ctx context.Context) (Stream, error)
	// AcceptStream waits for a stream of the peer's.
	AcceptStream(ctx context.Context) (Stream, error)
	// Protocol is the application protocol agreed on (ALPN).
	Protocol() string
	// Transport is "quic" or "tcp".
	Transport() string
	// PeerCertificate is the verified leaf of the peer, nil if it has none.
	PeerCertificate() *x509.Certificate
	// Export derives a value that both ends of this TLS connection and nobody
	// else know (RFC 8446 section 7.5).
	Export(label string, size int) ([]byte, error)
	LocalAddr() netip.AddrPort
	RemoteAddr() netip.AddrPort
	// Done is closed when the session has ended, whatever the reason.
	Done() <-chan struct{}
	// Err says why the session ended, nil before that. A close by the peer is a
	// *CloseError.
	Err() error
	// Close ends the session and all its streams at once and tells the peer why.
	Close(code Code, text string)
}

// Stream is an ordered flow of bytes in both directions. Reads and writes may
// go on at the same time.
type Stream interface {
	io.Reader
	io.Writer
	// Close ends both directions: what was written still arrives, what the peer
	// still sends is thrown away.
	Close() error
	SetDeadline(t time.Time) error
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
	// SetPriority orders the streams of a session when bandwidth is short.
	SetPriority(p Priority)
}

// Priority of a stream.
type Priority uint8

// The priorities.
const (
	PriorityControl Priority = 1 // short messages that others wait for
	PriorityView    Priority = 3
	PriorityUpload  Priority = 5
)

// Code says why a session was closed. Numbers are append-only.
type Code uint32

// The codes.
const (
	CodeDone     Code = 0 // everything was said
	CodeStopping Code = 1 // the node is stopping; another server may serve
	CodeDenied   Code = 2 // the node may not connect (any more)
	CodeProtocol Code = 3 // the peer broke the protocol
	CodeBusy     Code = 4 // too many sessions
	CodeReplaced Code = 5 // the same node opened another session
	CodeRefresh  Code = 6 // the certificate is to be checked anew: connect again
	CodeInternal Code = 7 // a failure of the closing side
	CodeEvicted  Code = 8 // the node was evicted from the cluster for good
	CodePending  Code = 9 // an operator has to accept the node first
)

var codeNames = [...]string{"done", "stopping", "denied", "protocol", "busy", "replaced", "refresh", "internal", "evicted", "pending"}

// String returns the name of the code.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code(%d)", uint32(c))
}

// CloseError says that a session was closed on purpose.
type CloseError struct {
	Code   Code
	Text   string // in the closer's words
	Remote bool   // the peer closed it
}

// Error says who closed and why.
func (e *CloseError) Error() string {
	who := "we closed the session"
	if e.Remote {
		who = "the peer closed the session"
	}
	if e.Text == "" {
		return fmt.Sprintf("%s (%s)", who, e.Code)
	}
	return fmt.Sprintf("%s (%s): %s", who, e.Code, e.Text)
}

// ClosedByPeer returns the close error if the peer ended the session on purpose.
func ClosedByPeer(err error) (*CloseError, bool) {
	var closed *CloseError
	if errors.As(err, &closed) && closed.Remote {
		return closed, true
	}
	return nil, false
}

// PeerIdentity returns who the peer of a session is.
func PeerIdentity(s Session) (pki.Identity, error) {
	cert := s.PeerCertificate()
	if cert == nil {
		return pki.Identity{}, fault.New(fault.Unauthenticated, "link.PeerIdentity", "the peer has no certificate")
	}
	return pki.CertIdentity(cert)
}
