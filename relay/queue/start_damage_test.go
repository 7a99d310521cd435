package queue

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// listener keeps what the log says.
type listener struct {
	tester
	mu    sync.Mutex
	lines []string
}

func (l *listener) Logf(format string, args ...any) {
	l.mu.Lock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
	l.mu.Unlock()
	l.tester.Logf(format, args...)
}

func (l *listener) count(parts ...string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			n++
		}
	}
	return n
}

// ofOneMessage are the damages that keep the message they hit from being delivered.
// All others keep nobody.
var ofOneMessage = []Damage{
	EnvelopeDamaged, StateDamaged, StateExtra, JournalDamaged, WaitingMissing, BodyMissing, BodyRange, BodyDamaged,
}

// deliverMost delivers for some hours what the damaged queue gives, as the engine does:
// mail whose body cannot be read is tried again later.
func (w *ward) deliverMost() map[ids.Recipient]bool {
	w.t.Helper()
	w.takeBackAll()
	w.eventually("the count of what waits", func() bool { return w.q.Summary().Counted })
	got := map[ids.Recipient]bool{}
	for range 10 { // well before the deadline
		for {
			work := w.takeAny()
			if work == nil {
				break
			}
			text, err := w.st.ReadBody(work.Env.Body, nil)
			if err != nil || string(text) != w.text[work.Env.ID] {
				w.finish(work, w.begin(work), all(work, relay.StateWaiting, outbox.Deferred, w.clock.Now().Add(time.Hour)))
				continue
			}
			for _, r := range work.Recipients {
				id := ids.Recipient{Message: work.Env.ID, Index: r.Index}
				if got[id] {
					w.t.Errorf("%v is delivered twice", id)
				}
				if got[id] = true; work.Env.Recipients[r.Index].Address.Domain != work.Key.Domain {
					w.t.Errorf("%v goes to the hosts of %s", id, work.Key.Domain)
				}
			}
			w.delivered(work, w.begin(work))
		}
		w.clock.Add(30 * time.Minute)
	}
	return got
}

// takeAny takes due work of any queue; nil: there is none, and none is being moved
// to its queue.
func (w *ward) takeAny() *Work {
	work := w.takeNow()
	if work == nil {
		w.eventually("mail in a wrong work queue to be moved", func() bool { return w.q.Summary().InFlight == 0 })
		work = w.takeNow()
	}
	return work
}

func (w *ward) takeNow() (work *Work) {
	w.loaded()
	w.q.Queues(func(info QueueInfo) bool {
		for {
			taken, ok := w.q.Take(info.Number, w.clock.Now(), 10)
			if !ok {
				return true
			}
			if w.q.Load(taken) {
				work = taken
				return false
			}
		}
	})
	return work
}

// TestAStartGoesOnWithEachDamage: whatever record is damaged, the queue opens and
// delivers all mail but the message that was hit, nobody twice and nobody to hosts of
// another domain. The log names a message once, health says so, and a repair
// afterwards loses nothing.
func TestAStartGoesOnWithEachDamage(t *testing.T) {
	for i, d := range slices.Concat(damages, subtleDamages) {
		t.Run(strings.ReplaceAll(d.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			w := newWard(t, uint64(3000+i))
			log := &listener{tester: t}
			w.fixture.t = log
			before, waits := w.openMessages(), w.waitingMessages()
			w.damage(d.do)
			w.afterDamage(d.kind, log, before, waits)
		})
	}
}

// waitingMessages are those with a recipient that waits. Nobody reads the others when
// mail is delivered.
func (w *ward) waitingMessages() map[ids.Message]bool {
	out := map[ids.Message]bool{}
	for r, state := range w.left {
		if state == relay.StateWaiting {
			out[r.Message] = true
		}
	}
	return out
}

func (w *ward) afterDamage(kind Damage, log *listener, before, waits map[ids.Message]bool) {
	w.t.Helper()
	for r := range w.left {
		delete(before, r.Message) // what is left cannot be delivered any more
	}
	read := false // whether delivery comes to the message that was hit
	for id := range before {
		read = read || waits[id]
	}
	_, found := w.fsck(false)
	hit := map[ids.Message]bool{}
	for _, f := range found {
		if f.Message != nil {
			hit[*f.Message] = true
		}
	}
	w.open()
	check, err := w.q.CheckInBackground(prometheus.NewRegistry())
	if err != nil {
		w.t.Fatal(err)
	}
	<-check.Done()
	// The start clears the journal, and its check leaves out bodies and events.
	unseen := slices.Contains([]Damage{JournalWithoutMessage, MessageDone, HeldExtra, FileUnreferenced, BodyDamaged, BodyHeader, EventsDamaged}, kind)
	if problem := check.Problem(); (problem == "") != unseen || !unseen && !strings.Contains(problem, string(kind)) {
		w.t.Errorf("health says %q", problem)
	}
	got := w.deliverMost()
	if problem := check.Problem(); kind == EnvelopeDamaged && read && (w.q.Summary().SetAside != 1 || !strings.Contains(problem, "1 damaged messages are set aside")) {
		w.t.Errorf("%d messages are counted as set aside, health says %q", w.q.Summary().SetAside, problem)
	}
	w.close()
	for id, state := range w.left {
		aside := hit[id.Message] && slices.Contains(ofOneMessage, kind)
		if got[id] && state != relay.StateWaiting || !got[id] && state == relay.StateWaiting && !aside {
			w.t.Errorf("%v was %v before the damage, delivered: %v", id, state, got[id])
		}
	}
	for id := range hit {
		if n := log.count("set aside", id.String()); n > 1 {
			w.t.Errorf("the log names %s %d times", id, n)
		}
	}
	for id := range got {
		delete(w.left, id)
	}
	w.inspect()
	if count, found := w.look(true); !count.Clean {
		w.t.Fatalf("repair: %+v %+v", count, found)
	}
	w.shut()
	if kind != MessageDone {
		w.checkQuarantine(before)
	}
	w.check()
}

// TestTheNumberOfALostQueueIsGivenToNoOther: mail of a work queue whose record is
// missing must not be taken for that of the next domain, and sent to its hosts.
func TestTheNumberOfALostQueueIsGivenToNoOther(t *testing.T) {
	f := newFixture(t).open()
	lost := f.accept("a@one.example")
	number, ok := f.q.Find(lost, 0)
	if !ok {
		t.Fatal("there is no work queue")
	}
	b := f.st.NewBatch()
	b.Delete(store.AppendQueueKey(nil, uint32(number)))
	if err := f.st.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	f.accept("b@two.example")
	got := map[mailaddr.Domain]bool{}
	for range 2 {
		w := f.take(10)
		if w.Key.Domain != w.Env.Recipients[0].Address.Domain {
			t.Errorf("mail for %s is in the work queue of %s", w.Env.Recipients[0].Address.Domain, w.Key.Domain)
		}
		got[w.Env.Recipients[0].Address.Domain] = true
		f.delivered(w, f.begin(w))
	}
	if len(got) != 2 {
		t.Errorf("delivered mail of %v", got)
	}
	f.empty()
}
