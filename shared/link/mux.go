package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
)

// Where UDP is blocked a session runs over TLS on TCP, and its streams share
// the connection by a small multiplexer. A mux frame is a kind (u8), a stream
// (u32), a length (u32) and so many bytes. Streams that the client opened have
// odd numbers. Each direction of a stream has a window, so that a stream nobody
// reads holds up itself alone; data goes out in short frames, so that a short
// message waits for one frame of another stream at most.
const (
	muxHeadBytes     = 9
	muxMaxData       = 16 << 10  // bytes of one data frame: one TLS record
	muxWindow        = 256 << 10 // bytes that may be sent and not read yet, per stream
	muxWriteTimeout  = 30 * time.Second
	muxCloseTimeout  = time.Second // for the peer to read why we close
	muxMaxCloseBytes = 4 + maxCloseTextBytes
)

// The kinds of mux frames. Numbers are append-only.
const (
	muxData   = 1 // bytes of a stream; the first one opens it
	muxClose  = 2 // the sender neither writes nor reads the stream any more
	muxCredit = 3 // the receiver has read so many bytes (u32)
	muxPing   = 4 // the sender is alive
	muxEnd    = 5 // the session is over: code (u32) and text
)

// muxSession is Session over TLS on TCP.
type muxSession struct {
	conn    *tls.Conn
	client  bool
	accept  chan *muxStream
	done    chan struct{}
	opening sync.Mutex // held while a stream is announced: numbers rise on the wire

	writing sync.Mutex // of conn
	out     []byte

	mu       sync.Mutex
	streams  map[uint32]*muxStream
	peers    int // streams of the map that the peer opened
	nextID   uint32
	lastPeer uint32 // highest number of the peer's
	dying    bool   // writing failed: the reader looks for the reason
	err      error
}

// newMuxSession starts a session on a connection whose handshake is done.
func newMuxSession(conn *tls.Conn, client bool) *muxSession {
	s := &muxSession{
		conn: conn, client: client, accept: make(chan *muxStream, maxStreams), done: make(chan struct{}),
		streams: make(map[uint32]*muxStream), nextID: 2,
	}
	if client {
		s.nextID = 1
	}
	go s.read()
	go s.keepAlive()
	return s
}

func (s *muxSession) OpenStream(context.Context) (Stream, error) {
	s.opening.Lock()
	defer s.opening.Unlock()
	stream, err := s.newStream()
	if err != nil {
		return nil, err
	}
	if err := s.write(muxData, stream.id, nil); err != nil {
		return nil, err
	}
	return stream, nil
}

// newStream makes a stream of ours.
func (s *muxSession) newStream() (*muxStream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	if len(s.streams)-s.peers >= maxStreams {
		return nil, fault.New(fault.Exhausted, "link.OpenStream", "%d streams are open with %s", maxStreams, s.RemoteAddr())
	}
	stream := newMuxStream(s, s.nextID)
	s.streams[s.nextID] = stream
	s.nextID += 2
	return stream, nil
}

func (s *muxSession) AcceptStream(ctx context.Context) (Stream, error) {
	select {
	case stream := <-s.accept:
		return stream, nil
	case <-s.done:
		return nil, s.Err()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *muxSession) Protocol() string { return s.conn.ConnectionState().NegotiatedProtocol }

func (s *muxSession) Transport() string { return "tcp" }

func (s *muxSession) PeerCertificate() *x509.Certificate {
	if certs := s.conn.ConnectionState().PeerCertificates; len(certs) > 0 {
		return certs[0]
	}
	return nil
}

func (s *muxSession) Export(label string, size int) ([]byte, error) {
	state := s.conn.ConnectionState()
	value, err := state.ExportKeyingMaterial(label, nil, size)
	return value, fault.Wrap(err, fault.Internal, "link.Export", "the TLS connection gives no exporter value")
}

func (s *muxSession) LocalAddr() netip.AddrPort { return addrPort(s.conn.LocalAddr()) }

func (s *muxSession) RemoteAddr() netip.AddrPort { return addrPort(s.conn.RemoteAddr()) }

func (s *muxSession) Done() <-chan struct{} { return s.done }

func (s *muxSession) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close tells the peer and ends the session. The socket is closed once the peer
// has had the time to read why: unread bytes of the peer's would make the
// kernel reset the connection and throw our words away.
func (s *muxSession) Close(code Code, text string) {
	text = text[:min(len(text), maxCloseTextBytes)]
	if !s.end(&CloseError{Code: code, Text: text}) {
		return
	}
	_ = s.limitWrites() // one that a dead peer holds up would hold us up, too
	payload := append(binary.BigEndian.AppendUint32(nil, uint32(code)), text...)
	if s.write(muxEnd, 0, payload) == nil {
		_ = s.conn.CloseWrite() // the peer learns it from the frame
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.conn.SetReadDeadline(time.Now().Add(muxCloseTimeout)) // the reader closes the socket
}

// extend gives the peer another idle time, unless the session is over and has a
// shorter one.
func (s *muxSession) extend() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.dying {
		return nil
	}
	return s.conn.SetReadDeadline(time.Now().Add(maxIdleTime))
}

// limitWrites bounds the write that follows, and one under way. What a session
// that is over still has to say gets less time.
func (s *muxSession) limitWrites() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := muxWriteTimeout
	if s.err != nil {
		limit = muxCloseTimeout
	}
	return s.conn.SetWriteDeadline(time.Now().Add(limit))
}

// end records why the session is over, once, and wakes everybody.
func (s *muxSession) end(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return false
	}
	s.err = err
	close(s.done)
	return true
}

// fail ends the session because of the transport.
func (s *muxSession) fail(err error) {
	s.mu.Lock()
	if s.dying && isTimeout(err) {
		err = io.ErrUnexpectedEOF // no reason was found
	}
	s.mu.Unlock()
	s.end(explainTCP(err, "link.Session", s.RemoteAddr().String()))
	_ = s.conn.NetConn().Close() // nothing can be said any more
}

// write sends one mux frame.
func (s *muxSession) write(kind byte, id uint32, payload []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.Err(); err != nil && kind != muxEnd {
		return err // nothing comes after the end
	}
	s.out = append(s.out[:0], kind)
	s.out = binary.BigEndian.AppendUint32(s.out, id)
	s.out = binary.BigEndian.AppendUint32(s.out, uint32(len(payload)))
	s.out = append(s.out, payload...)
	if err := s.limitWrites(); err != nil {
		return s.writeFailed()
	}
	if _, err := s.conn.Write(s.out); err != nil {
		return s.writeFailed()
	}
	return nil
}

// writeFailed ends a session that takes no more bytes. The peer may have said
// why before it closed, so the reader gets a moment to find it.
func (s *muxSession) writeFailed() error {
	s.mu.Lock()
	s.dying = true
	_ = s.conn.SetReadDeadline(time.Now().Add(muxCloseTimeout)) // wakes the reader in any case
	s.mu.Unlock()
	<-s.done
	return s.Err()
}

// keepAlive lets the peer know that we are there.
func (s *muxSession) keepAlive() {
	ticker := time.NewTicker(keepAlivePeriod)
	defer ticker.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-ticker.C:
			if s.write(muxPing, 0, nil) != nil {
				return
			}
		}
	}
}

// read handles the peer's frames until the connection is over, and closes it.
func (s *muxSession) read() {
	defer s.conn.NetConn().Close()
	reader := bufio.NewReaderSize(s.conn, muxMaxData+muxHeadBytes)
	payload := make([]byte, muxMaxData)
	for {
		if err := s.extend(); err != nil {
			s.fail(err)
			return
		}
		var head [muxHeadBytes]byte
		if _, err := io.ReadFull(reader, head[:]); err != nil {
			s.fail(err)
			return
		}
		id, size := binary.BigEndian.Uint32(head[1:]), binary.BigEndian.Uint32(head[5:])
		if size > muxMaxData {
			s.Close(CodeProtocol, "a mux frame is over the limit")
			return
		}
		if _, err := io.ReadFull(reader, payload[:size]); err != nil {
			s.fail(err)
			return
		}
		if head[0] == muxEnd {
			s.ended(payload[:size])
			return
		}
		if problem := s.handle(head[0], id, payload[:size]); problem != "" {
			s.Close(CodeProtocol, problem)
			return
		}
	}
}

// ended takes the peer's last frame.
func (s *muxSession) ended(payload []byte) {
	if len(payload) < 4 || len(payload) > muxMaxCloseBytes {
		payload = binary.BigEndian.AppendUint32(nil, uint32(CodeProtocol))
	}
	s.end(&CloseError{Code: Code(binary.BigEndian.Uint32(payload)), Text: string(payload[4:]), Remote: true})
}

// handle does what one frame says. It returns what is wrong with it.
func (s *muxSession) handle(kind byte, id uint32, payload []byte) (problem string) {
	switch kind {
	case muxPing:
		return ""
	case muxData, muxClose, muxCredit:
	default:
		return "a mux frame has an unknown kind"
	}
	stream, problem := s.find(kind, id)
	if stream == nil {
		return problem
	}
	switch kind {
	case muxData:
		if !stream.deliver(payload) {
			return "a stream got more than its window"
		}
	case muxClose:
		stream.peerClosed()
	case muxCredit:
		if len(payload) != 4 || !stream.grant(binary.BigEndian.Uint32(payload)) {
			return "a credit frame is wrong"
		}
	}
	return ""
}

// find returns the stream of a frame; nil without a problem for one that is
// closed. Data with the next number of the peer's opens a stream.
func (s *muxSession) find(kind byte, id uint32) (stream *muxStream, problem string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if stream := s.streams[id]; stream != nil {
		return stream, ""
	}
	ours := (id%2 == 1) == s.client
	if id == 0 || ours && id >= s.nextID {
		return nil, "a frame is for a stream that never was"
	}
	if ours || id <= s.lastPeer || kind != muxData {
		return nil, ""
	}
	if s.peers >= maxStreams {
		return nil, "too many streams are open"
	}
	stream = newMuxStream(s, id)
	s.streams[id] = stream
	s.lastPeer = id
	s.peers++
	s.accept <- stream // has room for as many as may be open, see forget
	return stream, ""
}

// forget drops a stream that both ends have closed.
func (s *muxSession) forget(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.streams[id]; !ok {
		return
	}
	delete(s.streams, id)
	if (id%2 == 1) != s.client {
		s.peers--
	}
}

// explainTCP words a failure of a TCP connection.
func explainTCP(err error, op, address string) error {
	var network *net.OpError
	switch {
	case errors.As(err, &network) && network.Op == "remote error": // a TLS alert
		return fault.Wrap(err, fault.Denied, op, "%s refuses our TLS handshake", address)
	case isTimeout(err):
		return fault.Wrap(err, fault.Timeout, op, "%s has been silent for %s", address, maxIdleTime)
	}
	return fault.Wrap(err, fault.Unavailable, op, "the connection with %s broke", address)
}

// explainHandshake words a TLS handshake that failed.
func explainHandshake(err error, op, address string) error {
	var pin *pki.PinError
	var alert *net.OpError
	switch {
	case errors.As(err, &pin):
		return fault.Wrap(err, fault.Denied, op, "the wrong server answers at %s: %s", address, pin)
	case errors.As(err, &alert) && alert.Op == "remote error":
		return fault.Wrap(err, fault.Denied, op, "%s refuses our TLS handshake", address)
	case fault.Is(err, fault.Denied), fault.Is(err, fault.Unauthenticated):
		return fault.Wrap(err, fault.Denied, op, "we refuse the TLS handshake of %s: %s", address, fault.Public(err))
	case isTimeout(err):
		return fault.Wrap(err, fault.Timeout, op, "%s does not finish the TLS handshake on TCP", address)
	}
	return fault.Wrap(err, fault.Unavailable, op, "the TLS handshake with %s on TCP broke", address)
}
