package delivery

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// inline is a host in memory that answers every write at once, so that a
// benchmark measures our side only.
type inline struct {
	replies []byte
	inData  bool
	bytes   int
}

func (c *inline) Write(b []byte) (int, error) {
	c.bytes += len(b)
	switch {
	case c.inData:
		if bytes.HasSuffix(b, []byte("\r\n.\r\n")) {
			c.inData = false
			c.replies = append(c.replies, "250 2.0.0 Ok: queued as 4Xyz12345\r\n"...)
		}
	case bytes.HasSuffix(b, []byte("DATA\r\n")):
		for range bytes.Count(b, []byte{'\n'}) - 1 {
			c.replies = append(c.replies, "250 2.1.5 Ok\r\n"...)
		}
		c.replies = append(c.replies, "354 End data with <CR><LF>.<CR><LF>\r\n"...)
		c.inData = true
	}
	return len(b), nil
}

func (c *inline) Read(b []byte) (int, error) {
	if len(c.replies) == 0 {
		return 0, io.EOF
	}
	n := copy(b, c.replies)
	c.replies = c.replies[:copy(c.replies, c.replies[n:])]
	return n, nil
}

func (*inline) Close() error                     { return nil }
func (*inline) LocalAddr() net.Addr              { return nil }
func (*inline) RemoteAddr() net.Addr             { return nil }
func (*inline) SetDeadline(time.Time) error      { return nil }
func (*inline) SetReadDeadline(time.Time) error  { return nil }
func (*inline) SetWriteDeadline(time.Time) error { return nil }

func benchMessage(size int) []byte {
	var b bytes.Buffer
	b.WriteString("From: a@sender.example\r\nTo: b@example.com\r\nSubject: x\r\n\r\n")
	for b.Len() < size {
		b.WriteString("A line of ordinary text with about seventy-six octets in it, as mail has.\r\n")
	}
	return b.Bytes()
}

func benchTransaction(size int, reader bool) *Transaction {
	tx := transaction(1)
	message := benchMessage(size)
	tx.Content = Content{Bytes: message}
	if reader {
		tx.Content = Content{Reader: bytes.NewReader(message), Length: int64(len(message))}
	}
	tx.Sign = func([]byte) ([]byte, error) { return nil, nil }
	tx.Commit = func() error { return nil }
	return tx
}

// BenchmarkSend is the price of a transaction on our side, without system
// calls.
func BenchmarkSend(b *testing.B) {
	for _, size := range []int{1 << 10, 10 << 10, 100 << 10} {
		for _, reader := range []bool{false, true} {
			name := fmt.Sprintf("%dk/bytes", size>>10)
			if reader {
				name = fmt.Sprintf("%dk/reader", size>>10)
			}
			b.Run(name, func(b *testing.B) {
				p := testPolicy()
				s := newSession(&inline{}, func() *policy.Delivery { return p }, Peer{})
				s.ext = Extensions{Pipelining: true, EightBit: true, Size: true, MaxBytes: 1 << 30}
				tx := benchTransaction(size, reader)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					if out := s.Send(tx); out[0].Status != relay.Delivered {
						b.Fatal(brief(out))
					}
				}
			})
		}
	}
}

// BenchmarkSendLoopback adds the system calls and a simple host on loopback.
func BenchmarkSendLoopback(b *testing.B) {
	p := &peer{}
	_, s := dialPeer(b, p)
	tx := benchTransaction(10<<10, false)
	b.SetBytes(10 << 10)
	b.ReportAllocs()
	for b.Loop() {
		if out := s.Send(tx); out[0].Status != relay.Delivered {
			b.Fatal(brief(out))
		}
		p.seen.mu.Lock()
		p.seen.messages, p.seen.commands = nil, nil
		p.seen.mu.Unlock()
	}
}

// TestSendAllocates guards the hot path: the kept text of the final reply is
// all that a delivered message costs.
func TestSendAllocates(t *testing.T) {
	p := testPolicy()
	s := newSession(&inline{}, func() *policy.Delivery { return p }, Peer{})
	s.ext = Extensions{Pipelining: true, EightBit: true, Size: true}
	tx := benchTransaction(10<<10, false)
	tx.Outcomes = make([]relay.Outcome, 0, 1)
	allocs := testing.AllocsPerRun(200, func() {
		if out := s.Send(tx); out[0].Status != relay.Delivered {
			t.Fatal(brief(out))
		}
	})
	// One more is allowed for a buffer that the pool gave up.
	if allocs > 2 {
		t.Errorf("%v allocations per message, want at most 2", allocs)
	}
}
