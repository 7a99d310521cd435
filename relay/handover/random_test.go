package handover

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
)

var (
	seeds = flag.Int("seeds", 2, "how many random worlds TestRandomWorlds runs")
	seed  = flag.Uint64("seed", 1, "the first world's seed")
)

// chaos is two relays with the same pool, which hand mail over to each other while
// everything goes wrong. It knows what hosts took, which no relay does.
type chaos struct {
	*world
	seed uint64

	mu     sync.Mutex
	mail   map[ids.Message]*fate
	trace  []string
	failed string
	lives  map[*node]*life
	turns  int // of relays' lives, for names of directories
}

// fate is what became of a message.
type fate struct {
	taken   int // by a host
	by      *node
	doubts  int // that were said
	expired int
	unknown int
}

// life is what runs of a relay besides handover: a courier.
type life struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func (c *chaos) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trace = append(c.trace, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (c *chaos) fail(format string, args ...any) {
	c.note("BROKEN: "+format, args...)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == "" {
		c.failed = fmt.Sprintf(format, args...)
	}
}

func (c *chaos) broken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed != ""
}

func (c *chaos) fate(id ids.Message) *fate {
	if c.mail[id] == nil {
		c.mail[id] = &fate{}
	}
	return c.mail[id]
}

// up starts a relay.
func (c *chaos) up(r *node) {
	r.start()
	ctx, cancel := context.WithCancel(context.Background())
	l := &life{cancel: cancel, done: make(chan struct{})}
	c.mu.Lock()
	c.lives[r] = l
	c.mu.Unlock()
	q := r.q
	go func() {
		defer close(l.done)
		c.courier(ctx, r, q)
	}()
}

// crash ends a relay as kill -9 does: the next life has the files as they are now.
func (c *chaos) crash(r *node) {
	c.note("%s crashes", r.name)
	c.turns++
	dir := fmt.Sprintf("%s-%d", r.dir, c.turns)
	synctest.Wait() // everybody waits for time to pass: nobody writes
	if err := copyDir(r.dir, dir); err != nil {
		c.t.Fatal(err)
	}
	c.net.lose(r.addr)
	c.down(r)
	if err := os.RemoveAll(r.dir); err != nil {
		c.t.Fatal(err)
	}
	r.dir = dir
}

// down ends what runs of a relay.
func (c *chaos) down(r *node) {
	c.mu.Lock()
	l := c.lives[r]
	delete(c.lives, r)
	c.mu.Unlock()
	l.cancel()
	<-l.done
	r.stop()
}

// rest waits and reports whether the relay still lives.
func (c *chaos) rest(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// courier delivers a relay's mail, as an engine does.
func (c *chaos) courier(ctx context.Context, r *node, q *queue.Queue) {
	for c.rest(ctx, c.net.between(50*time.Millisecond, 4*time.Second)) {
		for _, w := range q.PopExpired(time.Now(), 10) {
			if !c.ended(ctx, q, w, nil, relay.StateExpired, outbox.Expired, time.Time{}) {
				return
			}
		}
		r.mu.Lock()
		usable := r.usable
		r.mu.Unlock()
		if !usable || c.net.trouble(40) {
			continue
		}
		var numbers []queue.Number
		q.Queues(func(i queue.QueueInfo) bool { numbers = append(numbers, i.Number); return true })
		for _, n := range numbers {
			if w, ok := q.Take(n, time.Now(), 10); ok && q.Load(w) && !c.attempt(ctx, r, q, w) {
				return
			}
		}
	}
}

func (c *chaos) attempt(ctx context.Context, r *node, q *queue.Queue, w *queue.Work) bool {
	a := &relay.Attempt{Message: w.Env.ID, Provider: "example", MX: "mx.example.net", StartedAt: time.Now(), EndedAt: time.Now()}
	wait := make(chan error, 1)
	q.Begin(w, a, func(err error) { wait <- err })
	if err := <-wait; err != nil || !c.rest(ctx, c.net.between(0, 800*time.Millisecond)) {
		return false
	}
	if c.net.trouble(15) {
		return c.ended(ctx, q, w, a, relay.StateWaiting, outbox.Deferred, time.Now().Add(c.net.between(time.Second, time.Minute)))
	}
	c.taken(w.Env.ID, r)
	if !c.rest(ctx, c.net.between(0, 800*time.Millisecond)) {
		return false
	}
	return c.ended(ctx, q, w, a, relay.StateDelivered, outbox.Delivered, time.Time{})
}

// taken books that a host took a message.
func (c *chaos) taken(id ids.Message, r *node) {
	c.note("%s delivers %s", r.name, id)
	c.mu.Lock()
	f := c.fate(id)
	f.taken++
	f.by = r
	c.mu.Unlock()
}

func (c *chaos) ended(ctx context.Context, q *queue.Queue, w *queue.Work, a *relay.Attempt, state relay.State, event outbox.Type, next time.Time) bool {
	var results []queue.Result
	for _, rc := range w.Recipients {
		s := rc.State
		s.State, s.Next = state, next
		results = append(results, queue.Result{Index: rc.Index, State: s, Event: event, Phase: relay.PhaseFinalDot})
	}
	wait := make(chan error, 1)
	q.Finish(w, a, results, nil, func(err error) { wait <- err })
	if err := <-wait; err != nil && ctx.Err() == nil {
		c.fail("an end could not be written: %v", err)
	}
	return ctx.Err() == nil
}

// read books what relays say has become of messages.
func (c *chaos) read(r *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		events, err := r.ob.Read(r.booked, 1<<20)
		if err != nil {
			c.t.Fatal(err)
		}
		if len(events) == 0 {
			return
		}
		for i := range events {
			c.book(&events[i])
		}
		r.booked = events[len(events)-1].Seq
	}
}

func (c *chaos) book(e *outbox.Event) {
	switch f := c.fate(e.Message); e.Type {
	case outbox.InDoubt:
		f.doubts++
	case outbox.Unknown:
		f.doubts++
		f.unknown++
	case outbox.Expired:
		f.expired++
	}
}

// check holds the world against what was promised: a message is with one relay, or
// in doubt and said to be so; what a host took goes nowhere else.
func (c *chaos) check() {
	synctest.Wait()
	owners := make(map[ids.Message][]*node)
	for _, r := range c.relays {
		if c.lives[r] == nil {
			continue
		}
		c.read(r)
		for id := range r.holds() {
			if _, giving := r.q.Giving(id); !giving {
				owners[id] = append(owners[id], r)
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, at := range owners {
		f := c.fate(id)
		switch {
		case f.doubts > 0 || c.failed != "":
		case len(at) > 1:
			c.failed = fmt.Sprintf("message %s is with both relays", id)
		case f.taken > 0 && at[0] != f.by:
			c.failed = fmt.Sprintf("message %s, which %s delivered, is with %s", id, f.by.name, at[0].name)
		case f.taken > 1:
			c.failed = fmt.Sprintf("message %s was delivered twice", id)
		}
	}
}

// step does something to somebody.
func (c *chaos) step() {
	r := c.relays[c.net.intN(len(c.relays))]
	up := c.lives[r] != nil
	switch what := c.net.intN(20); {
	case what < 3 && up:
		for range c.net.intN(6) + 1 {
			c.accept(r)
		}
	case what < 5 && up:
		c.crash(r)
	case !up:
		c.note("%s starts", r.name)
		c.up(r)
	case what < 6:
		c.note("connections break")
		c.net.lose("")
	case what < 7:
		d := c.net.between(0, 4*time.Minute)
		c.note("the network is cut for %v", d)
		c.net.cut(d)
	case what < 8:
		draining := c.net.chance(50)
		c.note("%s drains: %v", r.name, draining)
		r.set(func() { r.draining = draining })
		c.publish()
	case what < 10:
		r.set(func() { r.absent = false })
		c.publish()
	default:
		c.swing(r)
	}
}

// swing has a relay give mail, and something come between.
func (c *chaos) swing(giver *node) {
	taker := c.other(giver)
	c.source(taker, giver)
	for range c.net.intN(12) + 3 {
		c.accept(giver)
	}
	<-time.After(c.net.between(0, 1500*time.Millisecond))
	if c.net.chance(40) {
		d := c.net.between(0, 2*time.Minute)
		c.note("%s reaches nobody for %v", giver.name, d)
		c.net.mute(giver.addr, d)
	}
	if c.net.chance(60) {
		c.note("connections of %s break", giver.name)
		c.net.lose(giver.addr)
	}
	switch c.net.intN(6) {
	case 0:
		if c.crash(giver); c.net.chance(70) {
			c.up(giver)
		}
	case 1:
		if c.lives[taker] != nil {
			c.crash(taker)
			c.up(taker)
		}
	case 2, 3:
		c.source(giver, taker)
	case 4:
		c.note("%s is put out of the cluster", taker.name)
		taker.set(func() { taker.absent = true })
		c.publish()
	}
}

func (c *chaos) other(r *node) *node {
	if c.relays[0] == r {
		return c.relays[1]
	}
	return c.relays[0]
}

// source moves the pool's source.
func (c *chaos) source(to, from *node) {
	c.note("the source is at %s", to.name)
	to.set(func() { to.usable, to.draining, to.absent = true, false, false })
	from.set(func() { from.usable = false })
	c.publish()
}

// accept takes a message at a relay.
func (c *chaos) accept(r *node) {
	env := r.envelope(c.net.intN(100))
	env.ExpiresAt = env.AcceptedAt.Add(24 * time.Hour)
	if c.net.chance(10) {
		env.ExpiresAt = env.AcceptedAt.Add(c.net.between(20*time.Second, 5*time.Minute))
	}
	body := r.st.NewBody()
	_, _ = body.Write(bytes.Repeat([]byte("x"), c.net.intN(20_000))) // its error is kept for Seal
	if err := body.Seal(0, [32]byte{1}); err != nil {
		c.t.Fatal(err)
	}
	if err := r.q.Accept(context.Background(), env, body); err != nil {
		c.t.Fatal(err)
	}
	c.note("%s accepts %s", r.name, env.ID)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fate(env.ID)
}

// calm ends all troubles: the first relay gives, the second has the pool's source.
func (c *chaos) calm() {
	c.note("all is well")
	c.net.heal()
	for i, r := range c.relays {
		r.set(func() { r.usable, r.draining, r.absent = i == 1, false, false })
		if c.lives[r] == nil {
			c.up(r)
		}
	}
	c.publish()
	for end := time.Now().Add(72 * time.Hour); time.Now().Before(end) && !c.broken(); {
		<-time.After(time.Minute)
		c.check()
		left := 0
		for _, r := range c.relays {
			left += len(r.holds()) + len(r.q.Owing())
		}
		if left == 0 {
			return
		}
	}
	for _, r := range c.relays {
		if n := len(r.holds()); n > 0 && !c.broken() {
			c.fail("%d messages stay with %s: %s", n, r.name, r.s.Problem())
		}
	}
}

// judge holds the fate of every message against what was promised.
func (c *chaos) judge() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, f := range c.mail {
		switch {
		case c.failed != "":
		case f.taken == 0 && f.unknown == 0 && f.expired == 0:
			c.failed = fmt.Sprintf("message %s is lost", id)
		case f.taken > 1+f.doubts:
			c.failed = fmt.Sprintf("message %s was delivered %d times, and %d times in doubt", id, f.taken, f.doubts)
		case f.taken > 0 && f.expired > 0 && f.doubts == 0:
			c.failed = fmt.Sprintf("message %s was delivered and told to have expired", id)
		}
	}
}

// play runs the world of a seed.
func play(t *testing.T, seed uint64) (c *chaos) {
	dropPools()
	defer dropPools()
	synctest.Test(t, func(t *testing.T) {
		c = &chaos{world: newWorldOver(t, 2, newLossy(seed)), seed: seed, mail: make(map[ids.Message]*fate), lives: make(map[*node]*life)}
		for _, r := range c.relays {
			r.usable = c.net.chance(50)
			r.slow = func() {
				if !c.net.trouble(4) {
					return
				}
				if c.net.chance(60) { // whoever waits for it gives up
					c.net.lose(c.other(r).addr)
				}
				<-time.After(c.net.between(0, 90*time.Second))
			}
			c.up(r)
		}
		for range 60 {
			pause := c.net.between(0, 3*time.Second)
			if c.net.chance(15) {
				pause = c.net.between(0, 2*time.Minute)
			}
			<-time.After(pause)
			c.step()
			if c.check(); c.broken() {
				break
			}
		}
		if !c.broken() {
			c.calm()
		}
		c.net.heal()
		for _, r := range c.relays {
			if c.lives[r] != nil {
				c.down(r)
			}
		}
		c.net.carrying.Wait()
		c.judge()
	})
	return c
}

// dropPools empties the pools of the process: a channel that the store keeps in one
// belongs to the bubble in which it was made.
func dropPools() {
	runtime.GC()
	runtime.GC() // what one leaves is a victim of the next
}

// TestRandomWorlds has relays give each other mail while they crash, connections
// break in the middle, come late or are half open, disks and policies take their time,
// sources come and go, and relays leave the cluster. Every message is with one relay
// or in doubt and said to be so, hosts get it once and once more for each doubt at
// most, and none is lost.
func TestRandomWorlds(t *testing.T) {
	messages, taken, doubts := 0, 0, 0
	for n := *seed; n < *seed+uint64(*seeds); n++ {
		c := play(t, n)
		if c.failed != "" {
			tail := c.trace[max(0, len(c.trace)-60):]
			for _, line := range tail {
				t.Log(line)
			}
			t.Fatalf("seed %d: %s", n, c.failed)
		}
		for _, f := range c.mail {
			messages++
			taken += f.taken
			doubts += f.doubts
		}
	}
	t.Logf("%d worlds from seed %d: %d messages, delivered %d times, %d times in doubt", *seeds, *seed, messages, taken, doubts)
}

// memoryDir returns a directory in memory, if the machine has such with room: these
// worlds are about processes that are killed, whose files stay whatever the disk does.
// One takes 80 MiB, and without room the kernel ends the process, for the stores' indexes
// are mapped; containers often have 64 MiB.
func memoryDir(t testing.TB) string {
	const shared, room = "/dev/shm", 512 << 20
	var free syscall.Statfs_t
	if err := syscall.Statfs(shared, &free); err != nil || int64(free.Bavail)*free.Bsize < room {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(shared, "relais-handover-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// copyDir copies a data directory in which nobody writes, holes and all.
func copyDir(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		return copySparse(path, filepath.Join(to, rel))
	})
}

func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	piece, zeros := make([]byte, 64<<10), make([]byte, 64<<10)
	size := int64(0)
	for {
		n, err := in.ReadAt(piece, size)
		if n > 0 && !bytes.Equal(piece[:n], zeros[:n]) {
			if _, err := out.WriteAt(piece[:n], size); err != nil {
				return err
			}
		}
		if size += int64(n); err == io.EOF {
			return out.Truncate(size)
		} else if err != nil {
			return err
		}
	}
}
