package handover

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// lossy is a network in memory that is slow, breaks connections and is cut: each end
// learns of that at another time, and what was on its way may still arrive. It is
// for bubbles of testing/synctest.
type lossy struct {
	mu        sync.Mutex
	rng       *rand.Rand
	calm      bool
	cutUntil  time.Time
	muted     map[string]time.Time // who reaches nobody, until when
	next      int
	listeners map[string]*lossyListener
	conns     map[*lossyConn]struct{}
	carrying  sync.WaitGroup
}

func newLossy(seed uint64) *lossy {
	return &lossy{rng: rand.New(rand.NewPCG(seed, 7445)), listeners: make(map[string]*lossyListener), muted: make(map[string]time.Time), conns: make(map[*lossyConn]struct{})}
}

// between returns a time from a to b.
func (n *lossy) between(a, b time.Duration) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return a + time.Duration(n.rng.Int64N(int64(b-a)+1))
}

func (n *lossy) intN(most int) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rng.IntN(most)
}

func (n *lossy) chance(percent int) bool { return n.intN(100) < percent }

// trouble is a chance that is none when all is well.
func (n *lossy) trouble(percent int) bool {
	yes := n.chance(percent)
	n.mu.Lock()
	defer n.mu.Unlock()
	return yes && !n.calm
}

func (n *lossy) isCut() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cutUntil.After(time.Now())
}

type lossyAddr string

func (a lossyAddr) Network() string { return "lossy" }
func (a lossyAddr) String() string  { return string(a) }

type lossyListener struct {
	n    *lossy
	addr lossyAddr
	in   chan net.Conn
	done chan struct{}
	once sync.Once
}

func (n *lossy) listen(address string) *lossyListener {
	n.mu.Lock()
	defer n.mu.Unlock()
	if address == "127.0.0.1:0" {
		n.next++
		address = fmt.Sprintf("127.0.0.1:%d", 40_000+n.next)
	}
	l := &lossyListener{n: n, addr: lossyAddr(address), in: make(chan net.Conn), done: make(chan struct{})}
	n.listeners[address] = l
	return l
}

func (l *lossyListener) Addr() net.Addr { return l.addr }

func (l *lossyListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.in:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *lossyListener) Close() error {
	l.once.Do(func() { close(l.done) })
	l.n.mu.Lock()
	defer l.n.mu.Unlock()
	if l.n.listeners[string(l.addr)] == l {
		delete(l.n.listeners, string(l.addr))
	}
	return nil
}

var errNoRoute = errors.New("nobody answers")

func (n *lossy) dial(ctx context.Context, from, address string) (net.Conn, error) {
	select {
	case <-time.After(n.between(time.Millisecond, 40*time.Millisecond)):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	n.mu.Lock()
	l, muted := n.listeners[address], n.muted[from].After(time.Now())
	n.mu.Unlock()
	if l == nil || muted || n.isCut() || n.trouble(5) {
		return nil, errNoRoute
	}
	a, b := n.pair(from, address)
	select {
	case l.in <- b:
		return a, nil
	case <-l.done:
	case <-ctx.Done():
	}
	a.die(false)
	b.die(false)
	return nil, errNoRoute
}

// lossyConn is one end of a connection.
type lossyConn struct {
	net.Conn // reads, and their deadlines
	n        *lossy
	owner    string // the relay whose end it is
	to       net.Conn
	stop     chan struct{}
	once     sync.Once
	more     chan struct{}

	mu     sync.Mutex
	queue  [][]byte
	arrive bool // what is on its way when the end dies arrives
}

// pair returns the ends of a connection.
func (n *lossy) pair(a, b string) (*lossyConn, *lossyConn) {
	ends := [2]*lossyConn{}
	for i, owner := range []string{a, b} {
		ends[i] = &lossyConn{n: n, owner: owner, stop: make(chan struct{}), more: make(chan struct{}, 1)}
	}
	for i := range ends {
		far, near := net.Pipe()
		ends[i].to, ends[1-i].Conn = far, near
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range ends {
		n.conns[c] = struct{}{}
		n.carrying.Go(c.carry)
	}
	return ends[0], ends[1]
}

func (c *lossyConn) Write(p []byte) (int, error) {
	select {
	case <-c.stop:
		return 0, net.ErrClosed
	default:
	}
	c.mu.Lock()
	c.queue = append(c.queue, slices.Clone(p))
	c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	if c.n.trouble(2) {
		c.die(c.n.chance(70)) // the write looked well
	}
	return len(p), nil
}

// die ends the connection for its owner. The other end hears of it later.
func (c *lossyConn) die(arrive bool) {
	c.once.Do(func() {
		c.mu.Lock()
		c.arrive = arrive
		c.mu.Unlock()
		close(c.stop)
	})
	_ = c.Conn.Close()
}

func (c *lossyConn) Close() error                     { c.die(true); return nil }
func (c *lossyConn) SetWriteDeadline(time.Time) error { return nil }
func (c *lossyConn) SetDeadline(t time.Time) error    { return c.SetReadDeadline(t) }
func (c *lossyConn) LocalAddr() net.Addr              { return lossyAddr(c.owner) }
func (c *lossyConn) RemoteAddr() net.Addr             { return lossyAddr("the other end of " + c.owner) }

func (c *lossyConn) take() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.queue
	c.queue = nil
	return out
}

// carry brings what is written to the other end.
func (c *lossyConn) carry() {
	defer func() {
		_ = c.to.Close()
		c.n.mu.Lock()
		delete(c.n.conns, c)
		c.n.mu.Unlock()
	}()
	for ended := false; !ended; {
		select {
		case <-c.more:
		case <-c.stop:
			ended = true
		}
		for _, p := range c.take() {
			c.wait()
			c.mu.Lock()
			lost := ended && !c.arrive
			c.mu.Unlock()
			if lost {
				break
			}
			if _, err := c.to.Write(p); err != nil {
				c.die(false) // the other end has gone: that is heard here in the end
				return
			}
		}
	}
	if c.n.trouble(50) { // nothing tells the other end
		<-time.After(c.n.between(0, 3*time.Minute))
	}
}

// wait is how long something is on its way.
func (c *lossyConn) wait() {
	delay := c.n.between(0, 30*time.Millisecond)
	if c.n.trouble(4) {
		delay = c.n.between(0, 90*time.Second)
	}
	<-time.After(delay)
	for c.n.isCut() {
		<-time.After(time.Second)
	}
}

// lose breaks connections: those of one relay, or all.
func (n *lossy) lose(owner string) {
	n.mu.Lock()
	var found []*lossyConn
	for c := range n.conns {
		if owner == "" || c.owner == owner {
			found = append(found, c)
		}
	}
	n.mu.Unlock()
	for _, c := range found {
		c.die(n.chance(60))
	}
}

// cut lets nothing through for a while.
func (n *lossy) cut(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cutUntil = time.Now().Add(d)
}

// mute lets no connections of one relay come about for a while.
func (n *lossy) mute(owner string, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.muted[owner] = time.Now().Add(d)
}

func (n *lossy) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.muted)
	n.calm, n.cutUntil = true, time.Time{}
}
