package schedule

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
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
	events   worldEvents
	seq      int
	shapes   map[string]Shape // by provider
	routes   map[mailaddr.Domain]Route
	sent     map[Lane][]time.Time
	opened   map[Lane][]time.Time
	starts   []start // in the order in which messages were started
	done     int
	failRate float64
	takes    map[string]time.Duration // how long a message takes at a site; else random
	dials    map[string]time.Duration // how long opening a session takes at a site; else random
	onStart  func(Queue)
	onCheck  func()
	allowed  int // sessions that may still be there
	checks   int
	began    time.Time
	limits   Limits
}

type worldQueue struct {
	key     Key
	waiting int
	due     time.Time
	only    *Lane // pinned to it
}

type start struct {
	queue Queue
	lane  Lane
	at    time.Time
}

type worldSession struct {
	lane     Lane
	queue    Queue // that it was opened for
	site     string
	messages int
	began    time.Time // the last one
	open     bool
}

type worldEvent struct {
	at  time.Time
	seq int
	do  func()
}

type worldEvents []worldEvent

func (e worldEvents) Len() int      { return len(e) }
func (e worldEvents) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e worldEvents) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e *worldEvents) Push(x any) { *e = append(*e, x.(worldEvent)) }
func (e *worldEvents) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	*e = (*e)[:last]
	return x
}

func newWorld(t *testing.T, seed uint64, limits Limits) *world {
	return &world{
		t: t, s: New(limits), rng: rand.New(rand.NewPCG(seed, 2)), now: time.Unix(1_800_000_000, 0),
		queues: map[Queue]*worldQueue{}, sessions: map[Session]*worldSession{},
		shapes: map[string]Shape{}, routes: map[mailaddr.Domain]Route{},
		sent: map[Lane][]time.Time{}, opened: map[Lane][]time.Time{},
		takes: map[string]time.Duration{}, dials: map[string]time.Duration{}, limits: limits,
	}
}

func (w *world) after(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.events, worldEvent{w.now.Add(d), w.seq, do})
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
	if q.only != nil {
		w.s.SetPinnedHead(n, q.key, *q.only, q.due, q.waiting, w.now)
		return
	}
	w.s.SetHead(n, q.key, q.due, q.waiting, w.now)
}

// run plays until nothing happens any more or until limit has passed.
func (w *world) run(limit time.Duration) {
	end := w.now.Add(limit)
	for range 3_000_000 {
		w.pump()
		at, event := w.s.Wake(), false
		if len(w.events) > 0 && (at.IsZero() || w.events[0].at.Before(at)) {
			at, event = w.events[0].at, true
		}
		if at.IsZero() || at.After(end) {
			w.now = end
			return
		}
		if at.After(w.now) {
			// Nothing is due before the time that the scheduler said.
			early := w.now.Add(time.Duration(w.rng.Int64N(int64(at.Sub(w.now)))))
			if effects := w.s.Next(early); len(effects) > 0 {
				w.t.Fatalf("%v before the time to wake: %+v", at.Sub(early), effects)
			}
			w.now = at
		}
		if event {
			heap.Pop(&w.events).(worldEvent).do()
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
		w.sessions[f.Session] = &worldSession{lane: f.Lane, queue: f.Queue, site: w.routes[q.key.Domain].Site}
		w.opened[f.Lane] = append(w.opened[f.Lane], w.now)
		if !w.start(f.Session, f.Queue) {
			w.end(f.Session)
			return
		}
		dial := time.Duration(5+w.rng.IntN(40)) * time.Millisecond
		if d, ok := w.dials[w.sessions[f.Session].site]; ok {
			dial = d
		}
		w.after(dial, func() {
			if w.rng.Float64() < w.failRate {
				w.queues[f.Queue].waiting++ // the message goes back
				w.unsent(f.Session)
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
	if q.only != nil && *q.only != w.sessions[id].lane {
		w.t.Fatalf("work for lane %+v went to %+v", *q.only, w.sessions[id].lane)
	}
	q.waiting--
	w.done++
	w.starts = append(w.starts, start{n, w.sessions[id].lane, w.now})
	if w.onStart != nil {
		w.onStart(n)
	}
	w.head(n)
	w.s.Started(id)
	ss := w.sessions[id]
	ss.messages++
	ss.began = w.now
	w.sent[ss.lane] = append(w.sent[ss.lane], w.now)
	return true
}

// unsent takes back the last message of a session that could not be opened.
func (w *world) unsent(id Session) {
	ss := w.sessions[id]
	sent := w.sent[ss.lane]
	i := slices.IndexFunc(sent, ss.began.Equal)
	w.sent[ss.lane] = slices.Delete(sent, i, i+1)
}

func (w *world) finish(id Session) {
	d := time.Duration(1+w.rng.IntN(30)) * time.Millisecond
	if t, ok := w.takes[w.sessions[id].site]; ok {
		d = t
	}
	w.after(d, func() { w.proceed(id) })
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

// check asserts the limits as the providers see them, in large worlds now and
// then.
func (w *world) check() {
	if w.checks++; len(w.sessions) > 20 && w.checks%len(w.sessions) != 0 {
		return
	}
	if w.onCheck != nil {
		w.onCheck()
	}
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
	if m := w.limits.MaxSessions; m > 0 && len(w.sessions) > m {
		w.t.Fatalf("%d sessions, allowed %d", len(w.sessions), m)
	}
	for p, n := range relays {
		if m := part(w.limits.MaxSessions, w.limits.ProviderShare); m > 0 && n > m {
			w.t.Fatalf("%d sessions to %s, which may have %d of the relay's", n, p, m)
		}
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
	for provider, shape := range w.shapes {
		checkWindow(w.t, "messages of the relay to "+provider, w.ofRelay(w.sent, provider), shape.RelayMessageRate)
		checkWindow(w.t, "connections of the relay to "+provider, w.ofRelay(w.opened, provider), shape.RelayConnectionRate)
	}
}

func (w *world) ofRelay(by map[Lane][]time.Time, provider string) (all []time.Time) {
	for lane, times := range by {
		if lane.Provider == provider {
			all = append(all, times...)
		}
	}
	slices.SortFunc(all, time.Time.Compare)
	return all
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

// randomRate is a rate or none.
func randomRate(rng *rand.Rand, least int) Rate {
	if rng.IntN(2) == 0 {
		return Rate{}
	}
	return Rate{Max: least + rng.IntN(50), Per: time.Second, Burst: rng.IntN(5)}
}

// randomWorld has a few providers with random limits and families, hosts of
// their own or shared, pools with sources of both families, and mail of some
// tenants and streams that comes within three seconds, partly for one lane only.
func randomWorld(t *testing.T, seed uint64) (w *world, total int) {
	rng := rand.New(rand.NewPCG(seed, 1))
	parts := []int{0, 25, 50}
	w = newWorld(t, seed, Limits{
		MaxSessions: rng.IntN(40), MaxConnectsInFlight: rng.IntN(6), MaxResolvesInFlight: rng.IntN(4),
		ProviderShare: parts[rng.IntN(3)], UnprovenShare: parts[rng.IntN(3)], TransactionalReserve: 10 * rng.IntN(10),
	})
	w.failRate = float64(rng.IntN(3)) * 0.1
	w.s.SetShares(func(id ids.Tenant, stream string, _ policy.StreamKind) Share {
		return Share{TenantWeight: 1 + 7*int(id[15]), StreamWeight: len(stream) * 10, Priority: 40 * len(stream)}
	})
	lanes := map[ids.Pool][]Source{}
	for p := range 1 + rng.IntN(2) {
		id := testPool(byte(p + 1))
		for i := range 1 + rng.IntN(4) {
			lanes[id] = append(lanes[id], Source{ID: ids.Source{14: byte(p), 15: byte(i + 1)}, Weight: 1 + rng.IntN(3), IPv6: i > 0 && rng.IntN(3) == 0})
		}
		w.s.SetPool(id, lanes[id])
	}
	n := Queue(0)
	for p := range 1 + rng.IntN(4) {
		provider := fmt.Sprint("p", p)
		shape := Shape{
			SourceConnections: rng.IntN(4), RelayConnections: rng.IntN(6), MessagesPerConnection: rng.IntN(5),
			SourceMessageRate: randomRate(rng, 5), SourceConnectionRate: randomRate(rng, 2),
		}
		if rng.IntN(3) == 0 {
			shape.RelayMessageRate, shape.RelayConnectionRate = randomRate(rng, 5), randomRate(rng, 2)
		}
		families := Families{First: Family(rng.IntN(3))}
		if rng.IntN(4) == 0 {
			families.NoIPv6, families.Refused = true, rng.IntN(2) == 0
		}
		hosts := 1 + rng.IntN(5)
		for d := range 1 + rng.IntN(5) {
			domain := fmt.Sprintf("d%d.p%d.test", d, p)
			w.route(domain, provider, fmt.Sprintf("mx%d.p%d", d%hosts, p), shape)
			r := w.routes[mailaddr.Domain(domain)]
			r.Families = families
			w.routes[mailaddr.Domain(domain)] = r
			for tenant := range byte(1 + rng.IntN(3)) {
				n++
				count, number := 1+rng.IntN(60), n
				key := testKey(tenant, []policy.StreamKind{policy.Transactional, policy.Bulk}[rng.IntN(2)], domain)
				key.Stream, key.Pool = []string{"", "a", "bb"}[rng.IntN(3)], testPool(byte(1+rng.IntN(len(lanes))))
				w.queues[number] = &worldQueue{key: key}
				if src := lanes[key.Pool][0]; rng.IntN(6) == 0 {
					w.queues[number].only = &Lane{Source: src.ID, Provider: provider}
				}
				total += count
				w.after(time.Duration(rng.IntN(3000))*time.Millisecond, func() { w.add(number, key, count) })
			}
		}
	}
	return w, total
}

func TestRandomWorldsKeepEveryLimitAndLoseNothing(t *testing.T) {
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w, total := randomWorld(t, seed)
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
