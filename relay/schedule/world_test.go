package schedule

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// world plays the engine, the queue and the providers around a scheduler, in
// virtual time, and checks after every event that no limit is exceeded.
type world struct {
	t        *testing.T
	s        *Scheduler
	rng      *rand.Rand
	now      time.Time
	queues   map[Queue]*worldQueue
	sessions map[Session]*worldSession
	events   []worldEvent
	shapes   map[string]Shape // by provider
	routes   map[mailaddr.Domain]Route
	sent     map[Lane][]time.Time
	opened   map[Lane][]time.Time
	starts   []start // in the order in which messages were started
	done     int
	failRate float64
}

type worldQueue struct {
	key     Key
	waiting int
	due     time.Time
}

type start struct {
	queue Queue
	lane  Lane
}

type worldSession struct {
	lane     Lane
	site     string
	messages int
	open     bool
}

type worldEvent struct {
	at time.Time
	do func()
}

func newWorld(t *testing.T, seed uint64, limits Limits) *world {
	return &world{
		t: t, s: New(limits), rng: rand.New(rand.NewPCG(seed, 2)), now: time.Unix(1_800_000_000, 0),
		queues: map[Queue]*worldQueue{}, sessions: map[Session]*worldSession{},
		shapes: map[string]Shape{}, routes: map[mailaddr.Domain]Route{},
		sent: map[Lane][]time.Time{}, opened: map[Lane][]time.Time{},
	}
}

func (w *world) after(d time.Duration, do func()) {
	w.events = append(w.events, worldEvent{w.now.Add(d), do})
}

// add puts recipients into a queue.
func (w *world) add(n Queue, key Key, count int) {
	q := w.queues[n]
	if q == nil {
		q = &worldQueue{key: key}
		w.queues[n] = q
	}
	q.waiting += count
	if q.due.IsZero() {
		q.due = w.now
	}
	w.head(n)
}

func (w *world) head(n Queue) {
	q := w.queues[n]
	if q.waiting == 0 {
		q.due = time.Time{}
	}
	w.s.SetHead(n, q.key, q.due, q.waiting, w.now)
}

// run plays until nothing happens any more or until limit has passed.
func (w *world) run(limit time.Duration) {
	end := w.now.Add(limit)
	for range 2_000_000 {
		w.pump()
		next, at := -1, w.s.Wake()
		for i, e := range w.events {
			if at.IsZero() || e.at.Before(at) {
				next, at = i, e.at
			}
		}
		if at.IsZero() || at.After(end) {
			w.now = end
			return
		}
		if at.After(w.now) {
			w.now = at
		}
		if next >= 0 {
			e := w.events[next]
			w.events[next] = w.events[len(w.events)-1]
			w.events = w.events[:len(w.events)-1]
			e.do()
		}
		w.check()
	}
	w.t.Fatal("the world does not come to rest: the scheduler polls")
}

func (w *world) pump() {
	for {
		effects := append([]Effect(nil), w.s.Next(w.now)...)
		if len(effects) == 0 {
			return
		}
		for _, f := range effects {
			w.act(f)
		}
		w.check()
	}
}

func (w *world) act(f Effect) {
	switch f.Kind {
	case Resolve:
		w.after(time.Duration(w.rng.IntN(50))*time.Millisecond, func() { w.s.Routed(f.Domain, w.routes[f.Domain], w.now) })
	case Open:
		q := w.queues[f.Queue]
		w.sessions[f.Session] = &worldSession{lane: f.Lane, site: w.routes[q.key.Domain].Site}
		w.opened[f.Lane] = append(w.opened[f.Lane], w.now)
		if !w.start(f.Session, f.Queue) {
			w.end(f.Session)
			return
		}
		w.after(time.Duration(5+w.rng.IntN(40))*time.Millisecond, func() {
			if w.rng.Float64() < w.failRate {
				w.queues[f.Queue].waiting++ // the message goes back
				w.queues[f.Queue].due = w.now
				w.done--
				delete(w.sessions, f.Session)
				w.s.Failed(f.Session, w.now.Add(time.Second))
				w.head(f.Queue)
				return
			}
			w.sessions[f.Session].open = true
			w.s.Opened(f.Session)
			w.finish(f.Session)
		})
	case Dispatch:
		if w.start(f.Session, f.Queue) {
			w.finish(f.Session)
		} else {
			w.proceed(f.Session)
		}
	case Close:
		w.end(f.Session)
	default:
		w.t.Fatalf("unexpected effect %+v", f)
	}
}

// start takes one message of the queue for the session.
func (w *world) start(id Session, n Queue) bool {
	q := w.queues[n]
	if q.waiting == 0 {
		w.head(n)
		return false
	}
	if want, got := w.routes[q.key.Domain].Site, w.sessions[id].site; want != got {
		w.t.Fatalf("a message for site %q went to a session of %q", want, got)
	}
	q.waiting--
	w.done++
	w.starts = append(w.starts, start{n, w.sessions[id].lane})
	w.head(n)
	w.s.Started(id)
	ss := w.sessions[id]
	ss.messages++
	w.sent[ss.lane] = append(w.sent[ss.lane], w.now)
	return true
}

func (w *world) finish(id Session) {
	w.after(time.Duration(1+w.rng.IntN(30))*time.Millisecond, func() { w.proceed(id) })
}

func (w *world) proceed(id Session) {
	n, answer := w.s.NextFor(id, w.now)
	switch answer {
	case Work:
		if w.start(id, n) {
			w.finish(id)
		} else {
			w.proceed(id)
		}
	case End:
		w.end(id)
	}
}

func (w *world) end(id Session) {
	delete(w.sessions, id)
	w.s.Ended(id)
}

// check asserts the limits as the providers see them.
func (w *world) check() {
	lanes, relays := map[Lane]int{}, map[string]int{}
	for _, ss := range w.sessions {
		lanes[ss.lane]++
		relays[ss.lane.Provider]++
		if m := w.shapes[ss.lane.Provider].MessagesPerConnection; m > 0 && ss.messages > m {
			w.t.Fatalf("%d messages on one connection, allowed %d", ss.messages, m)
		}
	}
	for l, n := range lanes {
		if m := w.shapes[l.Provider].SourceConnections; m > 0 && n > m {
			w.t.Fatalf("%d connections of one source to %s, allowed %d", n, l.Provider, m)
		}
	}
	for p, n := range relays {
		if m := w.shapes[p].RelayConnections; m > 0 && n > m {
			w.t.Fatalf("%d connections of the relay to %s, allowed %d", n, p, m)
		}
	}
	if m := w.s.limits.MaxSessions; m > 0 && len(w.sessions) > m {
		w.t.Fatalf("%d sessions, allowed %d", len(w.sessions), m)
	}
}

// checkRates asserts limit × window + burst for every window between events.
func (w *world) checkRates() {
	for lane, times := range w.sent {
		checkWindow(w.t, fmt.Sprint("messages on ", lane.Provider), times, w.shapes[lane.Provider].SourceMessageRate)
	}
	for lane, times := range w.opened {
		checkWindow(w.t, fmt.Sprint("connections on ", lane.Provider), times, w.shapes[lane.Provider].SourceConnectionRate)
	}
}

func checkWindow(t *testing.T, what string, times []time.Time, r Rate) {
	t.Helper()
	if r.Max == 0 {
		return
	}
	for i := range times {
		for j := i; j < len(times); j++ {
			span := times[j].Sub(times[i])
			allowed := float64(r.Max)*float64(span)/float64(r.Per) + float64(max(1, r.Burst))
			if n := j - i + 1; float64(n) > allowed+1e-9 {
				t.Fatalf("%s: %d in %v, allowed %.1f", what, n, span, allowed)
			}
		}
	}
}

func testPool(i byte) ids.Pool { return ids.Pool{15: i} }

func testKey(tenant byte, kind policy.StreamKind, domain string) Key {
	return Key{Tenant: ids.Tenant{15: tenant}, Kind: kind, Pool: testPool(1), Domain: mailaddr.Domain(domain)}
}

func sources(n int) []Source {
	var out []Source
	for i := range n {
		out = append(out, Source{ID: ids.Source{15: byte(i + 1)}, Weight: 1})
	}
	return out
}

// route makes a domain's route to a provider with a shape.
func (w *world) route(domain, provider, site string, shape Shape) {
	w.shapes[provider] = shape
	w.routes[mailaddr.Domain(domain)] = Route{Provider: provider, Site: site, Shape: shape, Expires: w.now.Add(time.Hour)}
}

func TestRandomWorldsKeepEveryLimitAndLoseNothing(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			w := newWorld(t, seed, Limits{MaxSessions: rng.IntN(40), MaxConnectsInFlight: rng.IntN(6), MaxResolvesInFlight: rng.IntN(4)})
			w.failRate = float64(rng.IntN(3)) * 0.1
			w.s.SetPool(testPool(1), sources(1+rng.IntN(4)))
			for p := range 1 + rng.IntN(4) {
				shape := Shape{SourceConnections: rng.IntN(4), RelayConnections: rng.IntN(6), MessagesPerConnection: rng.IntN(5)}
				if rng.IntN(2) == 0 {
					shape.SourceMessageRate = Rate{Max: 5 + rng.IntN(50), Per: time.Second, Burst: rng.IntN(5)}
				}
				if rng.IntN(2) == 0 {
					shape.SourceConnectionRate = Rate{Max: 2 + rng.IntN(20), Per: time.Second, Burst: rng.IntN(3)}
				}
				for d := range 1 + rng.IntN(5) {
					w.route(fmt.Sprintf("d%d.p%d.test", d, p), fmt.Sprint("p", p), fmt.Sprintf("mx%d.p%d", d%2, p), shape)
				}
			}
			total, n := 0, Queue(0)
			for p := range 4 {
				for d := range 5 {
					domain := fmt.Sprintf("d%d.p%d.test", d, p)
					if _, ok := w.routes[mailaddr.Domain(domain)]; !ok {
						continue
					}
					for tenant := range byte(1 + rng.IntN(3)) {
						n++
						count, number, kind := 1+rng.IntN(60), n, []policy.StreamKind{policy.Transactional, policy.Bulk}[rng.IntN(2)]
						total += count
						w.after(time.Duration(rng.IntN(3000))*time.Millisecond, func() { w.add(number, testKey(tenant, kind, domain), count) })
					}
				}
			}
			w.run(time.Hour)
			if w.done != total {
				t.Fatalf("%d of %d messages were sent; stuck: %s", w.done, total, w.stuck())
			}
			w.checkRates()
		})
	}
}

func (w *world) stuck() (text string) {
	for n, q := range w.queues {
		if q.waiting > 0 {
			text += fmt.Sprintf("queue %d holds %d and waits for %+v; ", n, q.waiting, w.s.Why(n, w.now))
		}
	}
	return text
}

func TestWorldIsDeterministic(t *testing.T) {
	run := func() []start {
		w := newWorld(t, 7, Limits{MaxSessions: 10})
		w.s.SetPool(testPool(1), sources(3))
		for d := range 6 {
			w.route(fmt.Sprintf("d%d.test", d), fmt.Sprint("p", d%2), fmt.Sprint("mx", d), Shape{SourceConnections: 2})
		}
		for n := range Queue(12) {
			w.add(n, testKey(byte(n%3), policy.Bulk, fmt.Sprintf("d%d.test", n%6)), 20)
		}
		w.run(time.Hour)
		return w.starts
	}
	a, b := run(), run()
	if fmt.Sprint(a) != fmt.Sprint(b) {
		t.Error("equal inputs led to different decisions")
	}
}
