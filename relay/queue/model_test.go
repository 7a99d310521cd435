package queue

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sort"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// modelRecipient is a recipient as the model sees it.
type modelRecipient struct {
	msg     ids.Message
	index   uint16
	domain  string
	urgent  bool
	due     int64
	state   relay.State
	owned   bool
	journal bool
	doubts  int
	rule    ids.Hold // that holds it
}

// model is the queue as a plain map, which is what the real one must equal.
type model struct {
	f          *fixture
	recipients map[ids.Recipient]*modelRecipient
	envelopes  map[ids.Message]*relay.Envelope
	works      []*Work
	events     int
	rules      map[string]ids.Hold // by the domain that they hold
	lives      int                 // crashes and moves so far
}

func (m *model) open(id ids.Message) (n int) {
	for _, r := range m.recipients {
		if r.msg == id && !r.state.Final() {
			n++
		}
	}
	return n
}

// due returns what is due in a domain, in the order in which it must come.
func (m *model) due(domain string, urgent bool, now int64) (out []*modelRecipient) {
	for _, r := range m.recipients {
		if r.domain == domain && r.urgent == urgent && r.state == relay.StateWaiting && !r.owned && r.due <= now {
			out = append(out, r)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := pos{out[i].due, out[i].msg, out[i].index}, pos{out[j].due, out[j].msg, out[j].index}
		return a.less(b)
	})
	return out
}

func (m *model) accept(t *rapid.T) {
	var to []string
	for range rapid.IntRange(1, 5).Draw(t, "recipients") {
		to = append(to, fmt.Sprintf("u%d@d%d.example", len(to), rapid.IntRange(0, 3).Draw(t, "domain")))
	}
	env := m.f.envelope(to...)
	env.ExpiresAt = env.AcceptedAt.Add(time.Duration(rapid.IntRange(60, 7200).Draw(t, "lifetime")) * time.Second)
	if rapid.Bool().Draw(t, "later") {
		env.NotBefore = env.AcceptedAt.Add(time.Duration(rapid.IntRange(1, 600).Draw(t, "notBefore")) * time.Second)
	}
	urgent := rapid.Bool().Draw(t, "urgent")
	if urgent {
		env.Priority = policy.PriorityOf(90)
	}
	if err := m.f.q.Accept(context.Background(), env, m.f.body("text of "+env.ID.String())); err != nil {
		t.Fatal(err)
	}
	due := env.AcceptedAt
	if !env.NotBefore.IsZero() {
		due = env.NotBefore
	}
	m.envelopes[env.ID] = env
	m.events += len(to)
	for i, r := range env.Recipients {
		id := ids.Recipient{Message: env.ID, Index: uint16(i)}
		m.recipients[id] = &modelRecipient{msg: env.ID, index: uint16(i), domain: string(r.Address.Domain), urgent: urgent, due: due.UnixMilli(), state: relay.StateWaiting}
		m.holdAtOnce(m.recipients[id])
	}
}

// take compares what the queue gives with what must be due.
func (m *model) take(t *rapid.T) {
	domain := fmt.Sprintf("d%d.example", rapid.IntRange(0, 3).Draw(t, "domain"))
	urgent := rapid.Bool().Draw(t, "urgent")
	most := rapid.IntRange(1, 4).Draw(t, "most")
	m.f.loaded()
	now := m.f.clock.Now()
	want := m.due(domain, urgent, now.UnixMilli())
	number, known := m.number(domain, urgent)
	var w *Work
	ok := false
	if known {
		m.f.until("the head of the queue", func() bool {
			settled := m.f.settled(number)
			w, ok = takeLoaded(m.f.q, number, now, most)
			return ok || settled
		})
	}
	if len(want) == 0 {
		if ok {
			t.Fatalf("took %s, but nothing is due in %s", w.Env.ID, domain)
		}
		return
	}
	if !ok {
		t.Fatalf("%d recipients are due in %s, but none was given", len(want), domain)
	}
	for i, got := range w.Recipients {
		if i >= len(want) || want[i].msg != w.Env.ID || want[i].index != got.Index || want[i].due != want[0].due {
			t.Fatalf("recipient %d of the work is %s %d, which is not next", i, w.Env.ID, got.Index)
		}
		want[i].owned = true
	}
	if n := len(w.Recipients); n < most && n < len(want) && want[n].msg == w.Env.ID && want[n].due == want[0].due {
		// A window may end inside a message; the rest must then come at once.
		m.f.q.mu.Lock()
		fromDisk := !m.f.q.byNumber[number].complete
		m.f.q.mu.Unlock()
		if !fromDisk {
			t.Fatalf("only %d of the recipients that are due together were given", n)
		}
	}
	m.checkBody(t, w)
	m.works = append(m.works, w)
}

func (m *model) checkBody(t *rapid.T, w *Work) {
	text, err := m.f.st.ReadBody(w.Env.Body, nil)
	if err != nil || !bytes.Equal(text, []byte("text of "+w.Env.ID.String())) {
		t.Fatalf("body of %s is %q, %v", w.Env.ID, text, err)
	}
}

func (m *model) number(domain string, urgent bool) (n Number, ok bool) {
	m.f.q.Queues(func(info QueueInfo) bool {
		if string(info.Key.Domain) == domain && (info.Key.Priority != 0) == urgent {
			n, ok = info.Number, true
		}
		return !ok
	})
	return n, ok
}

func (m *model) pick(t *rapid.T) *Work {
	if len(m.works) == 0 {
		return nil
	}
	i := rapid.IntRange(0, len(m.works)-1).Draw(t, "work")
	w := m.works[i]
	m.works = slices.Delete(m.works, i, i+1)
	return w
}

func (m *model) recipient(w *Work, i int) *modelRecipient {
	return m.recipients[ids.Recipient{Message: w.Env.ID, Index: w.Recipients[i].Index}]
}

func (m *model) begin(t *rapid.T) {
	w := m.pick(t)
	if w == nil {
		return
	}
	m.f.begin(w)
	for i := range w.Recipients {
		m.recipient(w, i).journal = true
	}
	m.works = append(m.works, w)
}

func (m *model) giveBack(t *rapid.T) {
	w := m.pick(t)
	if w == nil {
		return
	}
	for i := range w.Recipients {
		r := m.recipient(w, i)
		r.owned, r.journal = false, false
	}
	m.f.q.Return(w)
}

func (m *model) finish(t *rapid.T) {
	w := m.pick(t)
	if w == nil {
		return
	}
	now := m.f.clock.Now()
	var results []Result
	for i, rcpt := range w.Recipients {
		r := m.recipient(w, i)
		r.owned, r.journal = false, false
		s := rcpt.State
		s.Attempts++
		res := Result{Index: rcpt.Index, State: s, Event: outbox.Delivered}
		switch rapid.IntRange(0, 4).Draw(t, "outcome") {
		case 0, 1:
			res.State.State = relay.StateDelivered
		case 2:
			res.State.State, res.Event = relay.StateHeld, outbox.Held
		case 3:
			res.State.State, res.Event = relay.StateWaiting, outbox.Deferred
			res.State.Next = now.Add(time.Duration(rapid.IntRange(0, 900).Draw(t, "wait")) * time.Second)
			r.due = res.State.Next.UnixMilli()
		case 4:
			continue // without a result it goes back as it was
		}
		r.state = res.State.State
		r.doubts = int(res.State.InDoubt)
		results = append(results, res)
		m.events++
	}
	m.f.finish(w, m.f.attempt(w), results)
	m.forgetFinal(w.Env.ID)
}

func (m *model) forgetFinal(id ids.Message) {
	if m.open(id) > 0 {
		return
	}
	for i := range m.envelopes[id].Recipients {
		delete(m.recipients, ids.Recipient{Message: id, Index: uint16(i)})
	}
	delete(m.envelopes, id)
}

// expire compares what is past its deadline.
func (m *model) expire(t *rapid.T) {
	now := m.f.clock.Now()
	m.f.loaded()
	want := map[ids.Recipient]bool{}
	for id, r := range m.recipients {
		if !r.state.Final() && !r.owned && !m.envelopes[r.msg].ExpiresAt.After(now) {
			want[id] = true
		}
	}
	for _, w := range m.popExpired(now) {
		var results []Result
		for i, rcpt := range w.Recipients {
			id := ids.Recipient{Message: w.Env.ID, Index: rcpt.Index}
			if !want[id] {
				t.Fatalf("%v expired, but it is not due to", id)
			}
			delete(want, id)
			m.recipient(w, i).state = relay.StateExpired
			s := rcpt.State
			s.State = relay.StateExpired
			results = append(results, Result{Index: rcpt.Index, State: s, Event: outbox.Expired})
			m.events++
		}
		m.f.finish(w, nil, results)
		m.forgetFinal(w.Env.ID)
	}
	for id := range want {
		t.Fatalf("%v is past its deadline and was not given", id)
	}
}

// popExpired takes all there is, waiting for deadlines to be read from disk.
func (m *model) popExpired(now time.Time) (out []*Work) {
	for {
		m.f.loaded()
		got := m.f.q.PopExpired(now, 10)
		out = append(out, got...)
		m.f.q.mu.Lock()
		d := m.f.q.deadlines
		more := d.win.len() > 0 && d.win.first().due <= now.UnixMilli() || d.win.len() == 0 && !d.complete
		m.f.q.mu.Unlock()
		if !more {
			return out
		}
	}
}

// restart ends the process's view of the queue; owned work that was journalled
// is in doubt then.
func (m *model) restart(t *rapid.T) {
	m.works = nil
	m.f.reopen()
	now := m.f.clock.Now()
	touched := map[ids.Message]bool{}
	for _, r := range m.recipients {
		r.owned = false
		if !r.journal {
			continue
		}
		r.journal = false
		m.events++
		touched[r.msg] = true
		r.doubts++
		next := now.Add(m.f.policy.InDoubtRetry.D())
		if deadline := m.envelopes[r.msg].ExpiresAt; !next.Before(deadline) {
			next = deadline.Add(-lastTryMargin)
		}
		if r.doubts > 1 || next.Before(now) {
			r.state = relay.StateUnknown
			continue
		}
		r.state, r.due = relay.StateWaiting, next.UnixMilli()
	}
	for id := range touched {
		m.forgetFinal(id)
	}
}

// check compares everything that can be seen.
func (m *model) check(t *rapid.T) {
	f := m.f
	f.loaded()
	for id, env := range m.envelopes {
		info, err := f.q.Show(id)
		if err != nil {
			t.Fatalf("%s is gone: %v", id, err)
		}
		for i := range env.Recipients {
			r := m.recipients[ids.Recipient{Message: id, Index: uint16(i)}]
			s := info.States[i]
			if s.State != r.state || s.State == relay.StateWaiting && s.Next.UnixMilli() != r.due {
				t.Fatalf("recipient %d of %s is %v at %v, want %v at %d", i, id, s.State, s.Next.UnixMilli(), r.state, r.due)
			}
		}
	}
	list, _, err := f.q.List(Filter{}, 10_000)
	if err != nil || len(list) != len(m.envelopes) {
		t.Fatalf("%d messages are listed, %v, want %d", len(list), err, len(m.envelopes))
	}
	if last := f.ob.Last(); last != uint64(m.events) {
		t.Fatalf("%d events were written, want %d", last, m.events)
	}
	var waiting, owned int64
	for _, r := range m.recipients {
		if r.owned {
			owned++
		}
		if r.state == relay.StateWaiting {
			waiting++
		}
	}
	if f.q.damaged.any.Load() {
		t.Fatalf("records are said to be damaged: %q, %d messages", f.q.damaged.others(), f.q.damaged.asides())
	}
	s := f.q.Summary()
	if s.InFlight != owned || s.Counted && s.Waiting != waiting {
		t.Fatalf("summary %+v, want %d in flight and %d waiting", s, owned, waiting)
	}
	m.checkCounts(t, s)
}

// settled reports that the queue's head is in memory.
func (f *fixture) settled(n Number) bool {
	f.q.mu.Lock()
	defer f.q.mu.Unlock()
	wq := f.q.byNumber[n]
	return wq == nil || wq.win.len() > 0 || wq.complete
}

func TestQueueEqualsItsModel(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) { runModel(t, r, defaultSizes) })
}

// With next to no memory every window is cut and read again all the time.
func TestQueueEqualsItsModelWithHardlyAnyMemory(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		runModel(t, r, sizes{minMemory: 4, minPage: 2, maxPage: 3, maxDeadlines: 4, floorEvery: 2})
	})
}

func runModel(outer *testing.T, t *rapid.T, sz sizes) {
	f := newFixtureIn(t, filepath.Join(quickDir(outer), "store"))
	defer f.close()
	f.sizes = sz
	f.policy.MaxMemoryRecipients = sz.minMemory
	f.open()
	m := &model{f: f, recipients: map[ids.Recipient]*modelRecipient{}, envelopes: map[ids.Message]*relay.Envelope{}, rules: map[string]ids.Hold{}}
	t.Repeat(map[string]func(*rapid.T){
		"accept":  m.accept,
		"accept2": m.accept,
		"take":    m.take,
		"take2":   m.take,
		"begin":   m.begin,
		"finish":  m.finish,
		"finish2": m.finish,
		"return":  m.giveBack,
		"expire":  m.expire,
		"rule":    m.rule,
		"operate": m.operate,
		"restart": m.restart,
		"crash":   m.crash,
		"move":    m.move,
		"pass": func(t *rapid.T) {
			f.clock.Add(time.Duration(rapid.IntRange(1, 900).Draw(t, "seconds")) * time.Second)
		},
		"": m.check,
	})
}
