package link

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	resolveTimeout     = 5 * time.Second
	maxAddressesByName = 4 // of one host name that are tried
)

// DialerConfig configures a Dialer.
type DialerConfig struct {
	Local    netip.Addr    // address to connect from; zero: the kernel chooses
	ResetKey [32]byte      // from the node's key (RFC 9000 section 10.3)
	Timeout  time.Duration // for one address; 0: DefaultDialTimeout
}

// Dialer opens sessions to servers, all from one UDP socket of its own.
type Dialer struct {
	transport *quic.Transport
	socket    *net.UDPConn
	timeout   time.Duration
}

// NewDialer opens the socket.
func NewDialer(config DialerConfig) (*Dialer, error) {
	local := &net.UDPAddr{}
	if config.Local.IsValid() {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(config.Local, 0))
	}
	socket, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "link.NewDialer", "cannot open a UDP socket on %s", local.IP)
	}
	key := quic.StatelessResetKey(config.ResetKey)
	timeout := config.Timeout
	if timeout == 0 {
		timeout = DefaultDialTimeout
	}
	return &Dialer{transport: &quic.Transport{Conn: socket, StatelessResetKey: &key}, socket: socket, timeout: timeout}, nil
}

// Dial opens a session to address, "host:port". When it returns, the server has
// passed the checks of the TLS configuration; whether the server accepts our
// certificate shows with the first exchange (RFC 8446 section 4.4.2.4).
func (d *Dialer) Dial(ctx context.Context, address string, config *tls.Config) (Session, error) {
	targets, err := resolve(ctx, address)
	if err != nil {
		return nil, err
	}
	for _, target := range targets {
		var session Session
		if session, err = d.dialOne(ctx, address, target, config); err == nil || ctx.Err() != nil {
			return session, err
		}
	}
	return nil, err
}

func (d *Dialer) dialOne(ctx context.Context, name string, target netip.AddrPort, config *tls.Config) (Session, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.transport.Dial(ctx, net.UDPAddrFromAddrPort(target), config, quicConfig(d.timeout))
	if err != nil {
		return nil, explain(err, "link.Dial", name, d.timeout.String())
	}
	return quicSession{conn}, nil
}

// Close ends every session of the dialer and closes its socket.
func (d *Dialer) Close() error {
	err := d.transport.Close()
	if closeErr := d.socket.Close(); err == nil {
		err = closeErr
	}
	return fault.Wrap(err, fault.Internal, "link.Dialer.Close", "cannot close the UDP socket")
}

// CheckAddress reports whether address is of the form "host:port".
func CheckAddress(address string) error {
	_, _, err := splitAddress(address)
	return err
}

func splitAddress(address string) (host string, port uint16, err error) {
	const op = "link.splitAddress"
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, &fault.Error{Kind: fault.Invalid, Op: op, Field: "address", Public: strconv.Quote(address) + " is not of the form host:port, such as control1.example.com:7443", Cause: err}
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || host == "" {
		return "", 0, fault.Field(op, "address", "%q needs a host and a port from 1 to 65535", address)
	}
	return host, uint16(n), nil
}

func resolve(ctx context.Context, address string) ([]netip.AddrPort, error) {
	host, port, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(ip, port)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "link.resolve", "the host name %s does not resolve: give an address, or mend DNS", host)
	}
	ips = ips[:min(len(ips), maxAddressesByName)]
	targets := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		targets = append(targets, netip.AddrPortFrom(ip.Unmap(), port))
	}
	return targets, nil
}
