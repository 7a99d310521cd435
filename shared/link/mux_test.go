package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

// tlsPair returns two ends of a TLS connection.
func tlsPair(t *testing.T) (client, server *tls.Conn) {
	t.Helper()
	ca := pkitest.New(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan *tls.Conn, 1)
	go func() {
		socket, err := listener.Accept()
		if err != nil {
			t.Error(err)
		}
		conn := tls.Server(socket, pki.OpenServerConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), alpnOpen))
		if err := conn.Handshake(); err != nil {
			t.Error(err)
		}
		accepted <- conn
	}()
	conn, err := tls.Dial("tcp", listener.Addr().String(), pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen))
	if err != nil {
		t.Fatal(err)
	}
	return conn, <-accepted
}

// muxPair returns two ends of a session over TCP.
func muxPair(t *testing.T) (client, server *muxSession) {
	t.Helper()
	near, far := tlsPair(t)
	client, server = newMuxSession(near, true), newMuxSession(far, false)
	t.Cleanup(func() {
		client.Close(CodeDone, "")
		server.Close(CodeDone, "")
	})
	return client, server
}

// streamPair returns both ends of one stream.
func streamPair(t *testing.T, a, b *muxSession) (mine, theirs Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	mine, err := a.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if theirs, err = b.AcceptStream(ctx); err != nil {
		t.Fatal(err)
	}
	return mine, theirs
}

func TestSessionOverTCP(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	d := dialer(t, 0)
	config := pki.ClientConfig(ca.Node(pki.RoleRelay, pkitest.NewNode()), pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, alpnNode)
	session, err := d.dialTCP(context.Background(), s.address, netip.MustParseAddrPort(s.address), config)
	if err != nil {
		t.Fatal(err)
	}
	if session.Protocol() != alpnNode || session.Transport() != "tcp" || session.RemoteAddr().String() != s.address {
		t.Errorf("%s over %s to %s", session.Protocol(), session.Transport(), session.RemoteAddr())
	}
	if identity, err := PeerIdentity(session); err != nil || identity.Cluster != ca.Cluster {
		t.Errorf("peer %v, %v", identity, err)
	}
	for i := range 3 * maxStreams {
		if answer, err := say(t, session, "hello"); err != nil || answer != "hello" {
			t.Fatalf("stream %d: %q, %v", i, answer, err)
		}
	}
	if _, err := say(t, session, "bye"); err == nil {
		t.Error("the server closed, but the stream ended well")
	}
	<-session.Done()
	if closed, ok := ClosedByPeer(session.Err()); !ok || closed.Code != CodeDenied || closed.Text != "you asked for it" {
		t.Errorf("closed with %v", session.Err())
	}
}

func TestRefusalsOverTCP(t *testing.T) {
	ca, other := pkitest.New(t), pkitest.New(t)
	s := startServer(t, ca, 0)
	d, target := dialer(t, 0), netip.MustParseAddrPort(s.address)
	_, err := d.dialTCP(context.Background(), s.address, target, pki.PinnedClientConfig([]pki.Pin{other.Pin()}, alpnOpen))
	var pin *pki.PinError
	if !fault.Is(err, fault.Denied) || !errors.As(err, &pin) {
		t.Errorf("wrong pin: %v", err)
	}
	if _, err := d.dialTCP(context.Background(), s.address, target, pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, "none/1")); !fault.Is(err, fault.Denied) {
		t.Errorf("unknown protocol: %v", err)
	}
	wrongRole := pki.ClientConfig(ca.Node(pki.RoleControl, pkitest.NewNode()), pki.Peer{Cluster: ca.Cluster, Role: pki.RoleControl}, alpnNode)
	session, err := d.dialTCP(context.Background(), s.address, target, wrongRole)
	if err == nil {
		_, err = say(t, session, "hello")
		<-session.Done()
		err = errors.Join(session.Err(), err)
	}
	if !fault.Is(err, fault.Denied) {
		t.Errorf("wrong role: %v", err)
	}
	if s.served.Load() != 0 {
		t.Errorf("%d sessions were served", s.served.Load())
	}
}

// blockedUDP forwards TCP to address and swallows UDP at the same port.
func blockedUDP(t *testing.T, address string) string {
	t.Helper()
	socket, tcp, err := bind(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := tcp.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				running.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					_, _ = pair[0].Close(), pair[1].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		_, _ = socket.Close(), tcp.Close()
		running.Wait()
	})
	return tcp.Addr().String()
}

func TestFallsBackToTCPAndRemembers(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	address := blockedUDP(t, s.address)
	d := dialer(t, 0)
	config := pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen)
	for _, remembers := range []bool{false, true} {
		if got := d.prefersTCP(netip.MustParseAddrPort(address)); got != remembers {
			t.Errorf("the dialer remembers that TCP had to be used: %t, want %t", got, remembers)
		}
		session, err := d.Dial(context.Background(), address, config)
		if err != nil {
			t.Fatal(err)
		}
		if session.Transport() != "tcp" {
			t.Errorf("connected over %s", session.Transport())
		}
		if answer, err := say(t, session, "hello"); err != nil || answer != "hello" {
			t.Errorf("%q, %v", answer, err)
		}
		session.Close(CodeDone, "")
	}
	session, err := d.Dial(context.Background(), s.address, config)
	if err != nil || session.Transport() != "quic" {
		t.Errorf("another server over %v, %v", session, err)
	}
}

// TestSilenceShortensTheRace dials where UDP does not get through, after a
// session died without a word: TCP is tried after a quarter of a second.
func TestSilenceShortensTheRace(t *testing.T) {
	ca := pkitest.New(t)
	s := startServer(t, ca, 0)
	address := blockedUDP(t, s.address)
	config := pki.PinnedClientConfig([]pki.Pin{ca.Pin()}, alpnOpen)
	// A handshake may take longer than the head start on a busy machine. It is enough
	// that one did not: without the memory of the silence none can.
	once := func(what string, dialed func(*Dialer) bool) {
		t.Helper()
		for end := time.Now().Add(patience); time.Now().Before(end); {
			d := dialer(t, 0)
			d.NoteSilence()
			if dialed(d) {
				return
			}
		}
		t.Error(what)
	}
	once("where UDP does not get through it takes as long as without a silence", func(d *Dialer) bool {
		start := time.Now()
		session, err := d.Dial(context.Background(), address, config)
		took := time.Since(start)
		if err != nil || session.Transport() != "tcp" || took < hurriedRaceDelay {
			t.Fatalf("%v, %v after %v", session, err, took)
		}
		return took < raceDelay
	})
	once("where UDP gets through, too, TCP is faster", func(d *Dialer) bool {
		session, err := d.Dial(context.Background(), s.address, config)
		if err != nil {
			t.Fatal(err)
		}
		return session.Transport() == "quic"
	})
}

func TestHeadStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, hasty := NewDialer(DialerConfig{}), NewDialer(DialerConfig{Timeout: time.Second})
		check := func(when string, want time.Duration) {
			t.Helper()
			if got := d.headStart(); got != want {
				t.Errorf("%s: %v, want %v", when, got, want)
			}
		}
		check("at first", raceDelay)
		if got := hasty.headStart(); got != time.Second/2 {
			t.Errorf("%v of a second to connect in", got)
		}
		d.NoteSilence()
		check("after a silence", hurriedRaceDelay)
		time.Sleep(silenceMemory - time.Nanosecond)
		check("a minute later", hurriedRaceDelay)
		time.Sleep(time.Nanosecond)
		check("after that", raceDelay)
	})
}

// TestMuxCloseIsNotHeldUp closes a session whose peer reads nothing any more,
// while a write waits for it.
func TestMuxCloseIsNotHeldUp(t *testing.T) {
	near, far := tlsPair(t)
	defer far.Close()
	client := newMuxSession(near, true)
	var written atomic.Int64
	var writing sync.WaitGroup
	var streams [maxStreams]Stream // windows enough to fill the kernel's buffers
	for i := range streams {
		var err error
		if streams[i], err = client.OpenStream(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	for _, stream := range streams {
		writing.Go(func() {
			for chunk := make([]byte, muxMaxData); ; written.Add(1) {
				if _, err := stream.Write(chunk); err != nil {
					return
				}
			}
		})
	}
	for last := int64(-1); last != written.Load(); { // until nothing moves
		last = written.Load()
		select {
		case <-client.Done():
			t.Fatal(client.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
	if written.Load() >= maxStreams*muxWindow/muxMaxData {
		t.Fatal("the kernel took all that the windows let through")
	}
	start := time.Now()
	client.Close(CodeDone, "")
	writing.Wait()
	if took := time.Since(start); took > muxWriteTimeout/2 { // muxCloseTimeout; who waits for the writes waits for muxWriteTimeout from their beginning
		t.Errorf("closing took %v", took)
	}
}

func TestBothBlocked(t *testing.T) {
	silent, err := net.ListenPacket("udp", netip.AddrPortFrom(alone, 0).String()) // and nothing on TCP
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, err = dialer(t, 200*time.Millisecond).Dial(context.Background(), silent.LocalAddr().String(), pki.PinnedClientConfig(nil, alpnOpen))
	if !fault.Is(err, fault.Timeout) || !strings.Contains(fault.Public(err), "let UDP through") || !strings.Contains(fault.Public(err), "takes no TCP connections") {
		t.Errorf("got %v", err)
	}
}

func TestMuxCarriesMuchBothWays(t *testing.T) {
	client, server := muxPair(t)
	mine, theirs := streamPair(t, client, server)
	data := bytes.Repeat([]byte("0123456789abcdef"), 8<<20/16)
	var running sync.WaitGroup
	for _, end := range []Stream{mine, theirs} {
		running.Go(func() {
			if n, err := end.Write(data); err != nil || n != len(data) {
				t.Errorf("wrote %d, %v", n, err)
			}
		})
		running.Go(func() {
			got := make([]byte, len(data))
			if _, err := io.ReadFull(end, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read something else, %v", err)
			}
		})
	}
	running.Wait()
}

func TestMuxUnreadStreamHoldsUpItselfAlone(t *testing.T) {
	client, server := muxPair(t)
	stuck, _ := streamPair(t, client, server)
	if n, err := stuck.Write(make([]byte, muxWindow)); err != nil {
		t.Fatalf("wrote %d of its window to a stream that nobody reads, %v", n, err)
	}
	if err := stuck.SetWriteDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := stuck.Write(make([]byte, muxWindow)); !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 {
		t.Errorf("wrote %d beyond the window of a stream that nobody reads, %v", n, err)
	}
	mine, theirs := streamPair(t, client, server)
	if _, err := io.WriteString(mine, "hello"); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 5)
	if _, err := io.ReadFull(theirs, buffer); err != nil || string(buffer) != "hello" {
		t.Errorf("%q, %v", buffer, err)
	}
}

func TestMuxCloseDeliversWhatWasWritten(t *testing.T) {
	client, server := muxPair(t)
	mine, theirs := streamPair(t, client, server)
	if _, err := io.WriteString(mine, "last words"); err != nil {
		t.Fatal(err)
	}
	if err := mine.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(theirs); err != nil || string(got) != "last words" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := theirs.Write([]byte("x")); err == nil {
		t.Error("a stream that the peer closed takes more")
	}
	if _, err := mine.Read(make([]byte, 1)); err == nil {
		t.Error("a closed stream is read")
	}
	if err := theirs.Close(); err != nil {
		t.Fatal(err)
	}
	ticker, deadline := time.NewTicker(time.Millisecond), time.After(patience)
	defer ticker.Stop()
	for forgotten := false; !forgotten; {
		select {
		case <-deadline:
			t.Fatal("the stream is never forgotten")
		case <-ticker.C:
			client.mu.Lock()
			forgotten = len(client.streams) == 0
			client.mu.Unlock()
		}
	}
}

func TestMuxDeadlines(t *testing.T) {
	client, server := muxPair(t)
	mine, theirs := streamPair(t, client, server)
	if err := mine.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("past: %v", err)
	}
	if err := mine.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := mine.Read(make([]byte, 1))
		read <- err
	}()
	if err := mine.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil { // while it waits, or before
		t.Fatal(err)
	}
	if err := <-read; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("set while waiting: %v", err)
	}
	if err := mine.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(theirs, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := mine.Read(make([]byte, 1)); err != nil {
		t.Errorf("after the deadline was removed: %v", err)
	}
}

func TestMuxStreamsAreBounded(t *testing.T) {
	client, _ := muxPair(t)
	for i := range maxStreams {
		if _, err := client.OpenStream(context.Background()); err != nil {
			t.Fatalf("stream %d: %v", i+1, err)
		}
	}
	if _, err := client.OpenStream(context.Background()); !fault.Is(err, fault.Exhausted) {
		t.Errorf("one more: %v", err)
	}
}

func TestMuxRefusesBadFrames(t *testing.T) {
	frame := func(kind byte, id uint32, payload ...byte) []byte {
		b := binary.BigEndian.AppendUint32([]byte{kind}, id)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(payload))), payload...)
	}
	credit := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	tooMuch := frame(muxData, 1)
	for range muxWindow/muxMaxData + 1 {
		tooMuch = append(tooMuch, frame(muxData, 1, make([]byte, muxMaxData)...)...)
	}
	var tooMany []byte
	for i := range uint32(maxStreams + 1) {
		tooMany = append(tooMany, frame(muxData, 2*i+1)...)
	}
	for name, c := range map[string]struct {
		raw  []byte
		want string
	}{
		"unknown kind":     {frame(99, 1), "unknown kind"},
		"stream 0":         {frame(muxData, 0, 'x'), "never was"},
		"our own number":   {frame(muxData, 2, 'x'), "never was"},
		"long frame":       {[]byte{muxData, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}, "over the limit"},
		"over the window":  {tooMuch, "more than its window"},
		"free credit":      {append(frame(muxData, 1), frame(muxCredit, 1, credit(1)...)...), "credit frame is wrong"},
		"short credit":     {append(frame(muxData, 1), frame(muxCredit, 1, 1)...), "credit frame is wrong"},
		"too many streams": {tooMany, "too many streams"},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := muxPair(t)
			client.writing.Lock()
			_, err := client.conn.Write(c.raw)
			client.writing.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			<-client.Done()
			if closed, ok := ClosedByPeer(client.Err()); !ok || closed.Code != CodeProtocol || !strings.Contains(closed.Text, c.want) {
				t.Errorf("ended with %v", client.Err())
			}
			if server.Err() == nil {
				t.Error("the server goes on")
			}
		})
	}
}

func TestMuxLostConnection(t *testing.T) {
	client, server := muxPair(t)
	_, theirs := streamPair(t, client, server)
	read := make(chan error, 1)
	go func() {
		_, err := theirs.Read(make([]byte, 1))
		read <- err
	}()
	if err := client.conn.NetConn().Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; !fault.Is(err, fault.Unavailable) {
		t.Errorf("the reader got %v", err)
	}
	<-server.Done()
	if _, ok := ClosedByPeer(server.Err()); ok {
		t.Errorf("a broken connection passes for a close: %v", server.Err())
	}
}
