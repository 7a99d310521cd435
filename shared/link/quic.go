package link

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

// quicConfig is the same at both ends, so that neither waits for what the other
// does not send.
func quicConfig(handshake time.Duration) *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:  handshake,
		MaxIdleTimeout:        maxIdleTime,
		KeepAlivePeriod:       keepAlivePeriod,
		MaxIncomingStreams:    maxStreams,
		MaxIncomingUniStreams: -1, // none: every stream of ours has two directions
		Allow0RTT:             false,
	}
}

// quicSession is Session over QUIC.
type quicSession struct{ conn *quic.Conn }

func (s quicSession) OpenStream(ctx context.Context) (Stream, error) {
	stream, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, s.translate(err, "link.OpenStream")
	}
	return quicStream{stream}, nil
}

func (s quicSession) AcceptStream(ctx context.Context) (Stream, error) {
	stream, err := s.conn.AcceptStream(ctx)
	if err != nil {
		return nil, s.translate(err, "link.AcceptStream")
	}
	return quicStream{stream}, nil
}

func (s quicSession) Protocol() string { return s.conn.ConnectionState().TLS.NegotiatedProtocol }

func (s quicSession) Transport() string { return "quic" }

func (s quicSession) PeerCertificate() *x509.Certificate {
	certs := s.conn.ConnectionState().TLS.PeerCertificates
	if len(certs) == 0 {
		return nil
	}
	return certs[0]
}

func (s quicSession) Export(label string, size int) ([]byte, error) {
	state := s.conn.ConnectionState().TLS
	value, err := state.ExportKeyingMaterial(label, nil, size)
	return value, fault.Wrap(err, fault.Internal, "link.Export", "the TLS connection gives no exporter value")
}

func (s quicSession) LocalAddr() netip.AddrPort { return addrPort(s.conn.LocalAddr()) }

func (s quicSession) RemoteAddr() netip.AddrPort { return addrPort(s.conn.RemoteAddr()) }

func (s quicSession) Done() <-chan struct{} { return s.conn.Context().Done() }

func (s quicSession) Err() error {
	if s.conn.Context().Err() == nil {
		return nil
	}
	return s.translate(context.Cause(s.conn.Context()), "link.Session")
}

func (s quicSession) Close(code Code, text string) {
	if len(text) > maxCloseTextBytes {
		text = text[:maxCloseTextBytes]
	}
	_ = s.conn.CloseWithError(quic.ApplicationErrorCode(code), text) // the session is over either way
}

// translate turns errors of QUIC into ours: a close on purpose keeps its code,
// all else is the connection's failure.
func (s quicSession) translate(err error, op string) error {
	var closed *quic.ApplicationError
	if errors.As(err, &closed) {
		return &CloseError{Code: Code(closed.ErrorCode), Text: closed.ErrorMessage, Remote: closed.Remote}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return explain(err, op, s.RemoteAddr().String(), "")
}

// explain words a failure of the transport towards address. With a non-empty
// waited it failed before the session stood.
func explain(err error, op, address, waited string) error {
	var transport *quic.TransportError
	var idle *quic.IdleTimeoutError
	var reset *quic.StatelessResetError
	var pin *pki.PinError
	switch {
	case errors.As(err, &pin):
		return fault.Wrap(err, fault.Denied, op, "the wrong server answers at %s: %s", address, pin)
	case errors.As(err, &reset):
		return fault.Wrap(err, fault.Unavailable, op, "%s was restarted", address)
	case errors.As(err, &idle) && waited == "":
		return fault.Wrap(err, fault.Timeout, op, "%s has been silent for %s", address, maxIdleTime)
	case isTimeout(err) && waited != "":
		return fault.Wrap(err, fault.Timeout, op, "no answer from %s on UDP within %s: is the server running there, and does every firewall between let UDP through?", address, waited)
	case errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError():
		return fault.Wrap(err, fault.Denied, op, "%s refuses our TLS handshake", address)
	case errors.As(err, &transport) && !transport.Remote && transport.ErrorCode.IsCryptoError():
		return fault.Wrap(err, fault.Denied, op, "we refuse the TLS handshake of %s: %s", address, fault.Public(err))
	case errors.As(err, &transport) && transport.ErrorCode == quic.ConnectionRefused:
		return fault.Wrap(err, fault.Unavailable, op, "%s takes no connections now", address)
	}
	return fault.Wrap(err, fault.Unavailable, op, "the connection with %s broke", address)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

func addrPort(address net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := address.(type) {
	case *net.UDPAddr:
		ap = a.AddrPort()
	case *net.TCPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// quicStream is Stream over QUIC.
type quicStream struct{ *quic.Stream }

// Close ends both directions. QUIC's own Close ends only the sending one; the
// stream would then count against maxStreams until the peer ends the other.
func (s quicStream) Close() error {
	s.CancelRead(0)
	return s.Stream.Close()
}

func (s quicStream) SetPriority(p Priority) { s.Stream.SetPriority(int8(p), true) }
