package queue

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var giverNode, takerNode = ids.Node{1}, ids.Node{2}

// way hands mail over from one real queue to another, step by step.
type way struct {
	t            *testing.T
	giver, taker *fixture
	parcels      []*Parcel
	stream       []byte
	answers      map[Transfer]error
	moved        []*Parcel
	forgot       []Transfer
}

func newWay(t *testing.T) *way {
	dir := t.TempDir()
	w := &way{t: t, giver: newFixtureIn(t, filepath.Join(dir, "giver")), taker: newFixtureIn(t, filepath.Join(dir, "taker"))}
	w.giver.open()
	w.taker.open()
	t.Cleanup(func() { w.giver.close(); w.taker.close() })
	return w
}

func anything(*relay.Envelope) bool { return true }

func (f *fixture) numbers() (out []Number) {
	f.q.Queues(func(i QueueInfo) bool { out = append(out, i.Number); return true })
	return out
}

func (w *way) claim() {
	w.t.Helper()
	parcels, _, err := w.giver.q.Claim(w.giver.numbers(), true, 100, anything)
	if err != nil {
		w.t.Fatal(err)
	}
	w.parcels = parcels
}

func (w *way) offer() {
	w.t.Helper()
	if err := w.giver.q.Offer(takerNode, w.parcels); err != nil {
		w.t.Fatal(err)
	}
}

func (w *way) write() {
	w.t.Helper()
	var b bytes.Buffer
	pw := w.giver.q.NewParcelWriter(&b)
	for _, p := range w.parcels {
		if err := w.giver.q.Check(p); err != nil {
			w.t.Fatal(err)
		}
		if err := pw.Write(p); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := pw.Flush(); err != nil {
		w.t.Fatal(err)
	}
	w.stream = b.Bytes()
}

// receive has the taker read the stream and waits for its answers.
func (w *way) receive() {
	w.t.Helper()
	w.answers = w.receiveAs(giverNode, len(w.parcels), func(*relay.Envelope) error { return nil })
}

func (w *way) receiveAs(from ids.Node, n int, accept func(*relay.Envelope) error) map[Transfer]error {
	w.t.Helper()
	type answer struct {
		tr  Transfer
		err error
	}
	got := make(chan answer, n)
	r := NewParcelReader(bytes.NewReader(w.stream))
	for range n {
		err := w.taker.q.Receive(r, Giver{Node: from, Revision: 7, Accept: accept}, func(tr Transfer, err error) { got <- answer{tr, err} })
		if err != nil {
			w.t.Fatal(err)
		}
	}
	out := make(map[Transfer]error)
	for range n {
		a := <-got
		out[a.tr] = a.err
	}
	return out
}

func (w *way) end() {
	w.t.Helper()
	var back []*Parcel
	w.moved = nil
	for _, p := range w.parcels {
		if err, answered := w.answers[p.Transfer()]; answered && err == nil {
			w.moved = append(w.moved, p)
		} else {
			back = append(back, p)
		}
	}
	if err := w.giver.q.Moved(w.moved); err != nil {
		w.t.Fatal(err)
	}
	if err := w.giver.q.TakeBack(back); err != nil {
		w.t.Fatal(err)
	}
	w.parcels = nil
}

func (w *way) forget() {
	w.t.Helper()
	w.forgot = w.giver.q.Owed(takerNode, 100)
	if err := w.taker.q.Forget(giverNode, w.forgot); err != nil {
		w.t.Fatal(err)
	}
}

func (w *way) settle() { w.giver.q.Settled(takerNode, w.forgot) }

// recover does what a giver does when it is linked to the taker again.
func (w *way) recover() {
	w.t.Helper()
	w.parcels = append(w.parcels, w.giver.q.Resumed()[takerNode]...)
	w.answers = map[Transfer]error{}
	for _, p := range w.parcels {
		has, err := w.taker.q.Has(giverNode, []Transfer{p.Transfer()})
		if err != nil {
			w.t.Fatal(err)
		}
		if has[0] {
			w.answers[p.Transfer()] = nil
		}
	}
	w.end()
	w.forget()
	w.settle()
}

func (w *way) steps() []func() {
	return []func(){w.claim, w.offer, w.write, w.receive, w.end, w.forget, w.settle}
}

// nothing checks that no trace of mail that went away is left.
func (f *fixture) nothing() {
	f.t.Helper()
	if err := f.st.Barrier(func() {}); err != nil {
		f.t.Fatal(err)
	}
	f.empty()
	snap := f.st.Snapshot()
	defer snap.Close()
	for _, space := range []byte{store.SpaceGiven, store.SpaceTaken} {
		if err := snap.Iterate([]byte{space}, nil, true, func(k, _ []byte) bool {
			f.t.Errorf("left on disk: %c %x", k[0], k[1:])
			return true
		}); err != nil {
			f.t.Fatal(err)
		}
	}
}

// unhanded is content without what tells of the way.
func (f *fixture) unhanded(id ids.Message) string {
	f.t.Helper()
	text := f.content(id)
	at := strings.Index(text, " Hops:")
	if at < 0 {
		return text
	}
	return text[:at] + text[strings.Index(text, "\n"):]
}

// TestHandoverCarriesEverything hands over mail in every state: what the taker
// has is what the giver had, and nothing is left where it came from.
func TestHandoverCarriesEverything(t *testing.T) {
	w := newWay(t)
	all := w.giver.mixed()
	w.giver.reopen() // so that the journalled attempt is in doubt
	w.giver.loaded()
	want := make(map[ids.Message]string)
	for _, id := range all {
		want[id] = w.giver.unhanded(id)
	}
	for _, step := range w.steps() {
		step()
	}
	if len(w.moved) != len(all) {
		t.Fatalf("%d moved, want %d", len(w.moved), len(all))
	}
	if s := w.taker.q.Summary(); s.Held != 1 {
		t.Errorf("the taker holds %d recipients, want 1", s.Held)
	}
	for _, id := range all {
		if got := w.taker.unhanded(id); got != want[id] {
			t.Errorf("%s: got\n%s\nwant\n%s", id, got, want[id])
		}
		info, err := w.taker.q.Show(id)
		if err != nil || info.Env.Hops != 1 || info.Env.HandedFrom != giverNode || info.Env.HandedAt != 7 {
			t.Errorf("%s: %+v, %v", id, info.Env, err)
		}
	}
	w.giver.reopen()
	w.giver.nothing()
	w.taker.reopen()
	w.taker.loaded()
	for _, id := range all {
		if got := w.taker.unhanded(id); got != want[id] {
			t.Errorf("after a restart, %s: got\n%s\nwant\n%s", id, got, want[id])
		}
	}
}

// TestHandoverSurvivesCrashes ends either side, or both, after each step of a
// hand-over, and lets the giver ask what became of it: afterwards every message
// is with exactly one of them, whole, and nothing else is left.
func TestHandoverSurvivesCrashes(t *testing.T) {
	for at := range newWay(t).steps() {
		for _, who := range []string{"giver", "taker", "both"} {
			t.Run(fmt.Sprintf("%s after step %d", who, at), func(t *testing.T) {
				t.Parallel()
				w := newWay(t)
				one, two := w.giver.accept("a@one.example"), w.giver.accept("b@one.example", "c@two.example")
				want := map[ids.Message]string{one.ID: w.giver.unhanded(one.ID), two.ID: w.giver.unhanded(two.ID)}
				for i, step := range w.steps() {
					step()
					if i == at {
						break
					}
				}
				if who != "giver" {
					w.taker.reopen()
				}
				if who != "taker" {
					w.giver.reopen()
					w.parcels = nil
				}
				w.recover()
				// What came back goes again.
				for _, step := range w.steps() {
					step()
				}
				for id, text := range want {
					if got := w.taker.unhanded(id); got != text {
						t.Errorf("%s: got\n%s\nwant\n%s", id, got, text)
					}
				}
				w.giver.nothing()
				for range 3 {
					work := w.taker.take(1)
					w.taker.delivered(work, w.taker.begin(work))
				}
				w.taker.nothing()
			})
		}
	}
}

// TestHandoverIsTakenOnce sends the same parcels again, at once and after the
// taker has delivered them: they are answered as known and are not there twice.
func TestHandoverIsTakenOnce(t *testing.T) {
	w := newWay(t)
	w.giver.accept("a@one.example")
	w.claim()
	w.offer()
	w.write()
	w.receive()
	w.receive()
	work := w.taker.take(1)
	w.taker.delivered(work, w.taker.begin(work))
	w.taker.reopen()
	w.receive()
	for tr, err := range w.answers {
		if err != nil {
			t.Errorf("%s: %v", tr.Message, err)
		}
	}
	if s := w.taker.q.Summary(); s.Waiting != 0 {
		t.Errorf("%d recipients wait with the taker", s.Waiting)
	}
	w.end()
	w.forget()
	w.settle()
	w.giver.nothing()
	w.taker.nothing()
}

// TestHandoverGoesTheSameWayAgain takes mail back from the relay that it was
// handed to, and hands it over anew: a memory of the first time must not answer
// for the second.
func TestHandoverGoesTheSameWayAgain(t *testing.T) {
	w := newWay(t)
	env := w.giver.accept("a@one.example")
	w.claim()
	w.offer()
	w.write()
	w.receive()
	w.end() // the taker is not told that it may forget

	back := &way{t: t, giver: w.taker, taker: w.giver}
	back.claim()
	if err := back.giver.q.Offer(giverNode, back.parcels); err != nil {
		t.Fatal(err)
	}
	back.write()
	back.answers = back.receiveAs(takerNode, 1, func(*relay.Envelope) error { return nil })
	back.end()
	if n := len(back.moved); n != 1 {
		t.Fatalf("%d of 1 went back: %v", n, back.answers)
	}

	for _, step := range w.steps() {
		step()
	}
	info, err := w.taker.q.Show(env.ID)
	if err != nil || info.Env.Hops != 3 {
		t.Fatalf("after three ways it is not with the taker: %+v, %v", info, err)
	}
}

// TestHandoverWaitsForItsOwnEnd offers mail back while the first way has no end
// yet on the side that gave it: it is refused until that side knows.
func TestHandoverWaitsForItsOwnEnd(t *testing.T) {
	w := newWay(t)
	w.giver.accept("a@one.example")
	w.claim()
	w.offer()
	w.write()
	w.receive()
	w.giver.reopen()

	back := &way{t: t, giver: w.taker, taker: w.giver}
	back.claim()
	if err := back.giver.q.Offer(giverNode, back.parcels); err != nil {
		t.Fatal(err)
	}
	back.write()
	back.answers = back.receiveAs(takerNode, 1, func(*relay.Envelope) error { return nil })
	for tr, err := range back.answers {
		if !fault.Is(err, fault.Conflict) {
			t.Errorf("%s: %v, want a conflict", tr.Message, err)
		}
	}
	back.end()
	w.recover()
	back.claim()
	if err := back.giver.q.Offer(giverNode, back.parcels); err != nil {
		t.Fatal(err)
	}
	back.write()
	back.answers = back.receiveAs(takerNode, 1, func(*relay.Envelope) error { return nil })
	back.end()
	if len(back.moved) != 1 {
		t.Errorf("once the giver knew, it went back %d times: %v", len(back.moved), back.answers)
	}
}

// TestHandoverRefuses names what a relay does not take.
func TestHandoverRefuses(t *testing.T) {
	w := newWay(t)
	env := w.giver.accept("a@one.example")
	w.claim()
	w.offer()
	w.write()
	no := fault.New(fault.Denied, "test", "no source")
	for tr, err := range w.receiveAs(giverNode, 1, func(*relay.Envelope) error { return no }) {
		if fault.Public(err) != "no source" || tr.Message != env.ID {
			t.Errorf("%v %v", tr, err)
		}
	}
	w.taker.clock.Add(25 * time.Hour)
	for _, err := range w.receiveAs(giverNode, 1, func(*relay.Envelope) error { return nil }) {
		if err == nil || !strings.Contains(fault.Public(err), "past its deadline") {
			t.Errorf("late: %v", err)
		}
	}
	w.taker.clock.Add(-25 * time.Hour)
	w.parcels[0].Env.Hops = MaxHops
	w.write()
	for _, err := range w.receiveAs(giverNode, 1, func(*relay.Envelope) error { return nil }) {
		if err == nil || !strings.Contains(fault.Public(err), "from relay to relay 16 times") {
			t.Errorf("too far: %v", err)
		}
	}
	w.parcels[0].Env.Hops = 0
	w.write()
	w.stream[len(w.stream)-10] ^= 1
	r := NewParcelReader(bytes.NewReader(w.stream))
	if err := w.taker.q.Receive(r, Giver{Node: giverNode, Accept: func(*relay.Envelope) error { return nil }}, func(Transfer, error) { t.Error("answered") }); !fault.Is(err, fault.Invalid) {
		t.Errorf("a damaged stream: %v", err)
	}
	w.taker.nothing()
}

// TestHandoverLeavesWhatIsTried claims a message of which one recipient is
// being tried: it stays whole. Afterwards it goes, and what was delivered stays
// delivered.
func TestHandoverLeavesWhatIsTried(t *testing.T) {
	w := newWay(t)
	env := w.giver.accept("a@one.example", "b@two.example")
	work := w.giver.takeFrom("one.example")
	if w.claim(); len(w.parcels) != 0 {
		t.Fatalf("%d parcels while a recipient is tried", len(w.parcels))
	}
	w.giver.delivered(work, w.giver.begin(work))
	for _, step := range w.steps() {
		step()
	}
	info, err := w.taker.q.Show(env.ID)
	if err != nil || info.States[0].State != relay.StateDelivered || info.States[1].State != relay.StateWaiting {
		t.Fatalf("%+v %v", info, err)
	}
	w.giver.nothing()
	left := w.taker.take(5)
	if len(left.Recipients) != 1 || left.Recipients[0].Index != 1 {
		t.Errorf("the taker tries %+v", left.Recipients)
	}
}

// TestHandoverToARelayThatIsGone takes mail back that a relay may have, which
// nobody can ask any more: it is in doubt, and at its second doubt it ends as
// unknown, which its sender is told.
func TestHandoverToARelayThatIsGone(t *testing.T) {
	w := newWay(t)
	told := 0
	w.giver.tell = func(_ *relay.Envelope, ended []Result) []Mail {
		told++
		ended[0].Told = outbox.DSN
		return nil
	}
	w.giver.reopen()
	env := w.giver.accept("a@one.example")
	for round := 1; round <= 2; round++ {
		w.claim()
		w.offer()
		w.parcels = nil
		w.giver.reopen()
		if err := w.giver.q.TakeBackInDoubt(w.giver.q.Resumed()[takerNode], "it was put out of the cluster"); err != nil {
			t.Fatal(err)
		}
		w.giver.reopen()
		info, err := w.giver.q.Show(env.ID)
		if round == 1 && (err != nil || info.States[0].InDoubt != 1 || info.States[0].State != relay.StateWaiting) {
			t.Fatalf("%+v %v", info, err)
		}
		if round == 2 && !fault.Is(err, fault.NotFound) {
			t.Fatalf("%+v %v", info, err)
		}
	}
	if told != 1 {
		t.Errorf("the sender was told %d times", told)
	}
	w.giver.nothing()
}

// TestTakenMailIsForgottenInTheEnd lets a giver vanish: what is remembered of its
// mail goes a day after the mail's deadline.
func TestTakenMailIsForgottenInTheEnd(t *testing.T) {
	w := newWay(t)
	w.giver.accept("a@one.example")
	w.claim()
	w.offer()
	w.write()
	w.receive()
	tr := []Transfer{w.parcels[0].Transfer()}
	for _, after := range []time.Duration{47 * time.Hour, 49 * time.Hour} {
		if err := w.taker.q.ForgetOverdue(w.taker.clock.Now().Add(after)); err != nil {
			t.Fatal(err)
		}
		has, err := w.taker.q.Has(giverNode, tr)
		if err != nil || !slices.Equal(has, []bool{after < 48*time.Hour}) {
			t.Errorf("after %s: %v %v", after, has, err)
		}
	}
}
