package handover

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
)

// world is a cluster of relays that only hand over, with real stores and real
// connections.
type world struct {
	t      testing.TB
	ca     *pkitest.CA
	relays []*node
	net    *lossy // nil: the real one

	mu       sync.Mutex
	revision uint64
}

// node is one relay of it.
type node struct {
	w      *world
	id     ids.Node
	name   string
	dir    string
	holder *pki.Holder
	addr   string
	starts uint64

	mu       sync.Mutex
	usable   bool
	draining bool
	absent   bool   // not in the view of the others
	booked   uint64 // events of it that a test has counted
	dir2     *policy.Directory
	wrap     func(net.Conn) net.Conn // of connections that it makes; nil: they stay
	slow     func()                  // called when it is asked what is usable; nil: nothing is

	st     *store.Store
	ob     *outbox.Outbox
	q      *queue.Queue
	s      *Service
	l      net.Listener
	cancel context.CancelFunc
	ran    chan struct{}
}

var testPool = ids.Pool{15: 2}

func newWorld(t testing.TB, n int) *world { return newWorldOver(t, n, nil) }

func newWorldOver(t testing.TB, n int, over *lossy) *world {
	w := &world{t: t, ca: pkitest.New(t), revision: 1, net: over}
	dir := ""
	if over == nil {
		dir = t.TempDir()
	} else {
		dir = memoryDir(t)
	}
	for i := range n {
		r := &node{w: w, id: ids.Node{0: byte(i + 1)}, name: fmt.Sprintf("relay%d", i+1), dir: filepath.Join(dir, fmt.Sprint(i)), usable: i > 0}
		r.holder = w.ca.Node(pki.RoleRelay, r.id)
		l, err := w.listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		r.addr, r.l = l.Addr().String(), l
		w.relays = append(w.relays, r)
	}
	w.publish()
	t.Cleanup(func() {
		for _, r := range w.relays {
			r.stop()
		}
	})
	return w
}

func (w *world) listen(address string) (net.Listener, error) {
	if w.net != nil {
		return w.net.listen(address), nil
	}
	return net.Listen("tcp", address)
}

func (r *node) dial(ctx context.Context, address string) (net.Conn, error) {
	if r.w.net != nil {
		return r.w.net.dial(ctx, r.addr, address)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", address)
}

// publish gives every relay a new view.
func (w *world) publish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.revision++
	doc, err := policy.Parse(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range w.relays {
		v := &policy.View{Cluster: w.ca.Cluster, Generation: 1, Revision: w.revision, Node: r.id, Document: doc, Pools: []policy.Pool{{ID: testPool, Name: "main", Kind: policy.PoolShared}}}
		for i, other := range w.relays {
			other.mu.Lock()
			v.Draining = v.Draining || other == r && r.draining
			if !other.absent {
				pin := pki.PinOf(other.holder.Leaf())
				v.Peers = append(v.Peers, policy.Peer{Node: other.id, Name: other.name, KeyPin: pin[:], Address: other.addr, Draining: other.draining})
			}
			if i > 0 || w.net != nil {
				v.Sources = append(v.Sources, policy.Source{ID: ids.Source{byte(i + 1)}, Bind: loopback(i + 1), Public: loopback(i + 1), EHLO: "mx.example", Pool: testPool, Owner: other.id, Epoch: 1})
			}
			other.mu.Unlock()
		}
		d, err := policy.Compile(v)
		if err != nil {
			w.t.Fatal(err)
		}
		r.mu.Lock()
		r.dir2 = d
		s := r.s
		r.mu.Unlock()
		if s != nil {
			s.Changed()
		}
	}
}

func (r *node) log() *slog.Logger { return slog.New(slog.DiscardHandler) }

func (r *node) set(change func()) {
	r.mu.Lock()
	change()
	r.mu.Unlock()
}

func (r *node) isUsable() bool {
	if r.slow != nil {
		r.slow()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.usable
}

func (r *node) open() {
	t := r.w.t
	t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	storage := doc.Storage
	storage.MinFreeBytes, storage.ReserveBytes, storage.SegmentBytes = 1<<20, 1<<20, 16<<20
	if r.st, err = store.Open(context.Background(), store.Config{Dir: r.dir, Storage: storage, Logger: r.log(), MemTableBytes: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	if r.ob, err = outbox.Open(r.st, outbox.Config{MaxBytes: 1 << 30, Logger: r.log()}); err != nil {
		t.Fatal(err)
	}
	notify := func(n queue.Number) {
		r.mu.Lock()
		s := r.s
		r.mu.Unlock()
		if s != nil {
			s.Notify(n)
		}
	}
	if r.q, err = queue.Open(context.Background(), r.st, r.ob, queue.Config{Now: time.Now, Policy: doc.Queue, Logger: r.log(), Strict: true, Notify: notify}); err != nil {
		t.Fatal(err)
	}
}

// start opens the relay's store and lets it give and take.
func (r *node) start() *node {
	t := r.w.t
	t.Helper()
	if r.q == nil {
		r.open()
	}
	r.starts++
	s, err := New(Config{
		Cluster: r.w.ca.Cluster, Node: r.id, Incarnation: r.starts, Queue: r.q, Usable: func(ids.Pool) bool { return r.isUsable() }, Closed: func() string { return "" },
		Directory: func() *policy.Directory { r.mu.Lock(); defer r.mu.Unlock(); return r.dir2 },
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			conn, err := r.dial(ctx, address)
			r.mu.Lock()
			defer r.mu.Unlock()
			if err == nil && r.wrap != nil {
				conn = r.wrap(conn)
			}
			return conn, err
		},
		Holder: r.holder, Now: time.Now, Logger: r.log(), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.l == nil {
		if r.l, err = r.w.listen(r.addr); err != nil {
			t.Fatal(err)
		}
	}
	r.set(func() { r.s = s })
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel, r.ran = cancel, make(chan struct{})
	l := r.l
	go func() {
		defer close(r.ran)
		var both sync.WaitGroup
		both.Go(func() { _ = s.Run(ctx) })
		both.Go(func() { _ = s.Serve(l) })
		both.Wait()
	}()
	return r
}

// stop ends the relay as a crash does for its peers: what it was doing is over.
func (r *node) stop() {
	if r.l != nil {
		_ = r.l.Close()
		r.l = nil
	}
	if r.s != nil {
		r.cancel()
		_ = r.s.Shutdown(context.Background())
		<-r.ran
		r.set(func() { r.s = nil })
	}
	if r.q != nil {
		_ = r.q.Close()
		r.ob.Close()
		_ = r.st.Close()
		r.q = nil
	}
}

func (r *node) envelope(i int) *relay.Envelope {
	now := time.Now()
	env := &relay.Envelope{ID: ids.NewMessage(now), Stream: "default", Kind: policy.Transactional, From: "example.com", Pool: testPool, AcceptedAt: now, ExpiresAt: now.Add(time.Hour),
		Sender: mailaddr.Address{Local: "sender", Domain: "example.com"}}
	env.Tenant[15] = 1
	env.Recipients = []relay.Recipient{{Address: mailaddr.Address{Local: fmt.Sprint("user", i), Domain: mailaddr.Domain(fmt.Sprintf("d%d.example", i%7))}}}
	return env
}

// accept takes n messages, of which every tenth is large.
func (r *node) accept(n int) map[ids.Message]bool {
	r.w.t.Helper()
	out := make(map[ids.Message]bool, n)
	var mu sync.Mutex
	var all sync.WaitGroup
	for part := range 8 {
		all.Go(func() {
			for i := part; i < n; i += 8 {
				size := 2000
				if i%100 == 99 {
					size = 200 << 10
				}
				body := r.st.NewBody()
				_, _ = body.Write([]byte(strings.Repeat("x", size))) // its error is kept for Seal
				env := r.envelope(i)
				if err := body.Seal(0, [32]byte{1}); err != nil {
					r.w.t.Error(err)
				}
				if err := r.q.Accept(context.Background(), env, body); err != nil {
					r.w.t.Error(err)
				}
				mu.Lock()
				out[env.ID] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return out
}

// holds returns the messages that are with a relay.
func (r *node) holds() map[ids.Message]bool {
	r.w.t.Helper()
	out := make(map[ids.Message]bool)
	if err := r.q.Visit(context.Background(), queue.Filter{}, func(env *relay.Envelope, _ uint16, _ *relay.RecipientState) { out[env.ID] = true }, func(int64, int64) {}); err != nil {
		r.w.t.Fatal(err)
	}
	return out
}

// eventually waits for a condition. A giver whose sessions failed a few times may
// rest for one and a half maxBackoff, 45 s, before it tries again.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	limit := time.NewTimer(4 * maxBackoff)
	tick := time.NewTicker(5 * time.Millisecond)
	defer limit.Stop()
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("waited too long for: %s", what)
		}
	}
}

func (r *node) waiting() int {
	s := r.q.Summary()
	if !s.Counted {
		return -1
	}
	return int(s.Waiting + s.Held)
}
