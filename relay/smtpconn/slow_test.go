package smtpconn

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"log/slog"

	"github.com/emersion/go-smtp"
)

// pipeConn is a net.Pipe end with an address; its peer lives in a bubble.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// inBubble serves one piped connection within a synctest bubble.
func inBubble(t *testing.T, limits Limits, f func(p *peer, s *Server, backend *recorder)) {
	synctest.Test(t, func(t *testing.T) {
		backend := &recorder{entered: make(chan struct{}, 1), gate: make(chan struct{}, 1)}
		s, err := NewServer(Config{
			Name: "test", Hostname: "mx.example", Limits: func() Limits { return limits },
			NewSession: func(c *Conn) smtp.Session { return &recordedSession{backend, c} },
			Logger:     slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- s.Serve(l, OfferSTARTTLS) }()
		ours, theirs := net.Pipe()
		l.conns <- theirs
		p := newPeer(t, ours)
		p.expect("220")
		f(p, s, backend)
		_ = ours.Close()
		if !s.draining.Load() {
			if err := s.Shutdown(context.Background()); err != nil {
				t.Errorf("Shutdown: %v", err)
			}
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// A client that keeps the connection busy with single octets is slower than a
// silent one notices; the rate is judged after 30 s of waiting.
func TestSlowClient(t *testing.T) {
	limits := testLimits()
	limits.MinBytesPerSecond = 10
	limits.CommandTimeout = time.Minute
	inBubble(t, limits, func(p *peer, _ *Server, backend *recorder) {
		p.begin()
		began := time.Now()
		ended := make(chan string, 1)
		go func() { ended <- p.reply() }()
		for range 29 {
			p.send("x")
			<-time.After(time.Second)
		}
		if got := <-ended; got[:9] != "421 4.4.2" {
			t.Errorf("reply %q", got)
		}
		if took := time.Since(began); took != rateWindow {
			t.Errorf("the client was dropped after %v, want %v", took, rateWindow)
		}
	})
}

func TestSlowButSteadyClient(t *testing.T) {
	limits := testLimits()
	limits.MinBytesPerSecond = 10
	limits.CommandTimeout = time.Minute
	inBubble(t, limits, func(p *peer, _ *Server, backend *recorder) {
		p.begin()
		backend.gate <- struct{}{}
		for range 100 {
			p.send("0123456789\r\n")
			<-time.After(time.Second)
		}
		p.send(".\r\n")
		p.expect("250")
	})
}

// Shutdown ends idle sessions at once and waits for a message that is on its
// way to the store.
func TestShutdown(t *testing.T) {
	inBubble(t, testLimits(), func(p *peer, s *Server, _ *recorder) {
		p.do("EHLO c", "250-")
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(context.Background()) }()
		p.expect("421 4.3.2")
		if err := <-done; err != nil {
			t.Errorf("Shutdown of an idle session: %v", err)
		}
	})
	inBubble(t, testLimits(), func(p *peer, s *Server, backend *recorder) {
		p.begin()
		done := make(chan error, 1)
		go func() { done <- s.Shutdown(context.Background()) }()
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("Shutdown did not wait: %v", err)
		default:
		}
		backend.gate <- struct{}{}
		p.send("x\r\n.\r\n")
		p.expect("250 2.0.0")
		p.expect("421 4.3.2")
		if err := <-done; err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if len(backend.got()) != 1 {
			t.Error("the message in flight was lost")
		}
	})
	inBubble(t, testLimits(), func(p *peer, s *Server, _ *recorder) {
		p.begin()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != context.DeadlineExceeded {
			t.Errorf("Shutdown with a stuck client: %v", err)
		}
	})
}
