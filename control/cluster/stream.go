package cluster

import (
	"crypto/tls"
	"net"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/shared/fault"
)

// Stream carries raft over TLS on TCP. Who the peer is and whether it may speak
// raft at all is decided by the two TLS configurations.
type Stream struct {
	net.Listener
	advertise address
	dial      *tls.Config
}

var _ raft.StreamLayer = (*Stream)(nil)

// address is the name peers know this server by, which need not be the address
// the listener is bound to.
type address string

// Network implements net.Addr.
func (address) Network() string { return "tcp" }

// String implements net.Addr.
func (a address) String() string { return string(a) }

// Listen binds the raft port. advertise is the host:port that peers dial.
func Listen(bind, advertise string, serve, dial *tls.Config) (*Stream, error) {
	l, err := tls.Listen("tcp", bind, serve)
	if err != nil {
		e := fault.New(fault.Unavailable, "cluster.Listen", "%s cannot be bound: is another server using it?", bind)
		e.Field, e.Cause = "listen.raft", err
		return nil, e
	}
	return &Stream{Listener: l, advertise: address(advertise), dial: dial}, nil
}

// Addr implements net.Listener with the advertised address.
func (s *Stream) Addr() net.Addr { return s.advertise }

// Dial implements raft.StreamLayer.
func (s *Stream) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: timeout}, "tcp", string(to), s.dial)
}
