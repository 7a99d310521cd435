package link

import (
	"errors"
	"net"

	"github.com/quic-go/quic-go"
)

// HandshakeRefused reports whether err says that the peer did not like our
// certificate, as it does when that ended, or when the CA it is of was dropped.
func HandshakeRefused(err error) bool {
	var transport *quic.TransportError
	var network *net.OpError
	return errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError() ||
		errors.As(err, &network) && network.Op == "remote error" // a TLS alert
}
