package queue

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// ward is a queue at rest that is damaged and repaired.
type ward struct {
	*fixture
	rng  *rand.Rand
	text map[ids.Message]string
	left map[ids.Recipient]relay.State // open recipients, and how they stand

	box  *store.Store // while the queue is closed
	snap *store.Snapshot
	b    *store.Batch
}

// quickDir is a directory that syncs at once, where there is one with room: nothing
// here is about what a sync does. Without room the kernel ends the process, for the
// index is mapped; containers often have 64 MiB.
func quickDir(t *testing.T) string {
	const shared, room = "/dev/shm", 512 << 20
	var free syscall.Statfs_t
	if err := syscall.Statfs(shared, &free); err != nil || int64(free.Bavail)*free.Bsize < room {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(shared, "relais-fsck-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// newWard fills a queue with random mail in every state and closes it as a
// crash does, with attempts under way.
func newWard(t *testing.T, seed uint64) *ward {
	w := &ward{fixture: newFixtureIn(t, filepath.Join(quickDir(t), "store")), rng: rand.New(rand.NewPCG(seed, 7)), text: map[ids.Message]string{}, left: map[ids.Recipient]relay.State{}}
	w.trusted = func() bool { return false } // nothing expires here
	w.open()
	for i := range 40 {
		w.acceptRandom(i)
	}
	w.clock.Add(time.Second)
	for range 25 {
		w.finishRandom(w.take(1 + w.rng.IntN(3)))
	}
	for range 4 {
		work := w.take(1 + w.rng.IntN(3))
		w.begin(work) // and the relay is killed
	}
	w.acceptRandom(49) // so that one with a file of its own is open, whoever was taken above
	for i := range 3 {
		in := &Inbound{ID: ids.NewMessage(w.clock.Now()), Original: ids.Message{byte(i)}, To: splitAddress("token@bounces.example.com"), ReceivedAt: w.clock.Now()}
		if err := w.q.AcceptInbound(context.Background(), in, w.body("report "+fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	w.close()
	return w
}

func (w *ward) acceptRandom(i int) {
	var to []string
	for n := range 1 + w.rng.IntN(4) {
		to = append(to, fmt.Sprintf("u%d@d%d.example", n, w.rng.IntN(4)))
	}
	env := w.envelope(to...)
	text := fmt.Sprintf("Subject: %d\r\n\r\n%s", i, strings.Repeat("text ", 10+w.rng.IntN(400)))
	if i%10 == 9 {
		text += strings.Repeat("long ", 250_000) // a file of its own
	}
	if err := w.q.Accept(context.Background(), env, w.body(text)); err != nil {
		w.t.Fatal(err)
	}
	w.text[env.ID] = text
	for i := range to {
		w.left[ids.Recipient{Message: env.ID, Index: uint16(i)}] = relay.StateWaiting
	}
}

func (w *ward) finishRandom(work *Work) {
	state, event, next := relay.StateDelivered, outbox.Delivered, time.Time{}
	switch w.rng.IntN(4) {
	case 0:
		state, event, next = relay.StateWaiting, outbox.Deferred, w.clock.Now().Add(time.Duration(1+w.rng.IntN(100))*time.Minute)
	case 1:
		state, event = relay.StateHeld, outbox.Held
	}
	for _, r := range work.Recipients {
		id := ids.Recipient{Message: work.Env.ID, Index: r.Index}
		if w.left[id] = state; state.Final() {
			delete(w.left, id)
		}
	}
	w.finish(work, w.begin(work), all(work, state, event, next))
}

// inspect opens the store alone.
func (w *ward) inspect() {
	w.t.Helper()
	log := slog.New(slog.NewTextHandler(testWriter{w.t}, &slog.HandlerOptions{Level: slog.LevelError + 1}))
	var err error
	w.box, err = store.Open(context.Background(), store.Config{Dir: w.dir, Storage: w.storage, Logger: log, MemTableBytes: 8 << 20, Inspect: true})
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *ward) shut() {
	w.t.Helper()
	if err := w.box.Close(); err != nil {
		w.t.Fatal(err)
	}
}

// fsck opens the queue at rest and checks it.
func (w *ward) fsck(repair bool) (FsckCount, []Finding) {
	w.t.Helper()
	w.inspect()
	defer w.shut()
	return w.look(repair)
}

// look checks the queue that inspect opened.
func (w *ward) look(repair bool) (FsckCount, []Finding) {
	w.t.Helper()
	var found []Finding
	count, err := Fsck(context.Background(), w.box, FsckConfig{
		Bodies: true, Events: true, Repair: repair, Quarantine: w.quarantine(), Now: w.clock.Now, Logger: slog.New(slog.DiscardHandler),
		Report: func(f Finding) { found = append(found, f) },
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return count, found
}

func (w *ward) quarantine() string { return filepath.Join(filepath.Dir(w.dir), "quarantine") }

// damage runs f with the store open, and commits what it puts into w.b.
func (w *ward) damage(f func(w *ward)) {
	w.t.Helper()
	w.inspect()
	defer w.shut()
	w.snap, w.b = w.box.Snapshot(), w.box.NewBatch()
	f(w)
	w.snap.Close()
	if err := w.box.Commit(context.Background(), w.b); err != nil {
		w.t.Fatal(err)
	}
}

// pick returns a random record of a space that suits.
func (w *ward) pick(space byte, suits func(key, value []byte) bool) (key, value []byte) {
	w.t.Helper()
	n := 0
	err := w.snap.Iterate([]byte{space}, nil, false, func(k, v []byte) bool {
		if suits == nil || suits(k, v) {
			if n++; w.rng.IntN(n) == 0 {
				key, value = bytes.Clone(k), bytes.Clone(v)
			}
		}
		return true
	})
	if err != nil || n == 0 {
		w.t.Fatalf("nothing in space %c suits: %v", space, err)
	}
	return key, value
}

// envelopeOf picks a message with open recipients.
func (w *ward) envelopeOf(suits func(ref relay.BodyRef) bool) (key, value []byte, id ids.Message, ref relay.BodyRef) {
	key, value = w.pick(store.SpaceMessage, func(k, v []byte) bool {
		id, _ := store.ParseMessageKey(k)
		r, _ := store.ParseRef(v[1:])
		open := false
		for rcpt := range w.left {
			open = open || rcpt.Message == id
		}
		return open && (suits == nil || suits(r))
	})
	id, _ = store.ParseMessageKey(key)
	ref, _ = store.ParseRef(value[1:])
	return key, value, id, ref
}

func inSegment(r relay.BodyRef) bool { return r.Kind == relay.BodySegment }
func inFile(r relay.BodyRef) bool    { return r.Kind == relay.BodyFile }

// takeBackAll ends what is on its way to other relays: they have not got it.
func (w *ward) takeBackAll() {
	w.t.Helper()
	for _, parcels := range w.q.Resumed() {
		if err := w.q.TakeBack(parcels); err != nil {
			w.t.Fatal(err)
		}
	}
}

// deliverAll delivers whatever the repaired queue gives, over a week.
func (w *ward) deliverAll() map[ids.Recipient]bool {
	w.t.Helper()
	w.open()
	defer w.close()
	w.takeBackAll()
	got := map[ids.Recipient]bool{}
	for range 100 {
		w.loaded()
		w.q.Queues(func(info QueueInfo) bool {
			for {
				work, ok := takeLoaded(w.q, info.Number, w.clock.Now(), 10)
				if !ok {
					return true
				}
				text, err := w.st.ReadBody(work.Env.Body, nil)
				if err != nil || string(text) != w.text[work.Env.ID] {
					w.t.Errorf("the body of %s: %d bytes, %v", work.Env.ID, len(text), err)
				}
				for _, r := range work.Recipients {
					id := ids.Recipient{Message: work.Env.ID, Index: r.Index}
					if got[id] {
						w.t.Errorf("%v is delivered twice", id)
					}
					got[id] = true
				}
				w.delivered(work, w.begin(work))
			}
		})
		w.clock.Add(30 * time.Minute)
	}
	return got
}

// check says whether everything that was not damaged beyond repair went out.
func (w *ward) check() {
	w.t.Helper()
	got := w.deliverAll()
	for id, state := range w.left {
		if want := state == relay.StateWaiting; got[id] != want {
			w.t.Errorf("%v was %v before the damage, delivered: %v", id, state, got[id])
		}
	}
	for id := range got {
		if _, ok := w.left[id]; !ok {
			w.t.Errorf("%v was delivered, and was final or is in quarantine", id)
		}
	}
}

// checkQuarantine says whether every message that was moved aside is there
// with its text, as far as that could be read.
func (w *ward) checkQuarantine(before map[ids.Message]bool) {
	w.t.Helper()
	aside := map[ids.Message]Quarantined{}
	err := ListQuarantine(w.quarantine(), func(q Quarantined) {
		if id, err := ids.ParseMessage(q.Message); err == nil {
			aside[id] = q
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	for id := range before {
		if slices.ContainsFunc(slices.Collect(maps.Keys(w.left)), func(r ids.Recipient) bool { return r.Message == id }) {
			continue
		}
		q, ok := aside[id]
		switch {
		case !ok:
			w.t.Errorf("%s is neither in the queue nor in quarantine", id)
		case q.Reason == EnvelopeDamaged || q.Whole:
			text, err := os.ReadFile(filepath.Join(w.quarantine(), q.Body))
			if err != nil || string(text) != w.text[id] || !q.Whole {
				w.t.Errorf("the text of %s is not in quarantine: %d bytes of %d, %v", id, len(text), len(w.text[id]), err)
			}
		}
	}
}

// allWhole reports whether the text of every message in quarantine is whole.
func (w *ward) allWhole() bool {
	w.t.Helper()
	whole := true
	if err := ListQuarantine(w.quarantine(), func(q Quarantined) { whole = whole && q.Whole }); err != nil {
		w.t.Fatal(err)
	}
	return whole
}

func (w *ward) openMessages() map[ids.Message]bool {
	out := map[ids.Message]bool{}
	for r := range w.left {
		out[r.Message] = true
	}
	return out
}

func TestFsckFindsNothingInASoundQueue(t *testing.T) {
	for seed := range uint64(2) {
		w := newWard(t, seed)
		count, found := w.fsck(false)
		if !count.Clean || len(found) > 0 {
			t.Errorf("a queue after a crash: %+v", found)
		}
		if int(count.Recipients) != len(w.left) || count.InDoubt != 4 || count.Inbound != 3 {
			t.Errorf("counted %+v, %d recipients are open", count, len(w.left))
		}
		w.check()
		if count, found := w.fsck(false); !count.Clean || count.Waiting != 0 {
			t.Errorf("after delivery: %+v %+v", count, found)
		}
	}
}

func TestFsckFindsAndRepairsEachDamage(t *testing.T) {
	for i, d := range slices.Concat(damages, subtleDamages) {
		t.Run(strings.ReplaceAll(d.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			w := newWard(t, uint64(100+i))
			before := w.openMessages()
			w.damage(d.do)
			w.inspect()
			count, found := w.look(false)
			if count.Found[d.kind]+count.Notes[d.kind] == 0 {
				t.Fatalf("not found: %+v", found)
			}
			note := d.kind == MessageDone || d.kind == HeldExtra || d.kind == FileUnreferenced
			if count.Clean != note {
				t.Errorf("clean: %v", count.Clean)
			}
			w.repaired()
			if d.kind != MessageDone {
				w.checkQuarantine(before)
			}
			if strings.HasPrefix(d.name, "body reference") && !w.allWhole() {
				t.Error("the text is in another file than the record says, and was not found there")
			}
			w.check()
		})
	}
}

// repaired repairs the queue that inspect opened, and closes it.
func (w *ward) repaired() {
	w.t.Helper()
	defer w.shut()
	if count, found := w.look(true); !count.Clean || count.Repaired == 0 {
		w.t.Fatalf("repair: %+v %+v", count, found)
	}
	if count, found := w.look(false); len(found) > 0 || !count.Clean {
		w.t.Errorf("a second run finds %+v", found)
	}
}

// TestFsckRepairsDamageOfManyKindsAtOnce breaks a queue in several ways at once.
func TestFsckRepairsDamageOfManyKindsAtOnce(t *testing.T) {
	for seed := range uint64(4) {
		w := newWard(t, 500+seed)
		before := w.openMessages()
		kinds := map[Damage]bool{}
		for range 8 {
			d := damages[w.rng.IntN(len(damages))]
			if kinds[d.kind] || d.kind == MessageDone {
				continue
			}
			kinds[d.kind] = true
			w.damage(d.do)
		}
		w.inspect()
		w.repaired()
		w.checkQuarantine(before)
		w.check()
		if count, found := w.fsck(false); !count.Clean {
			t.Errorf("after delivery: %+v %+v", count, found)
		}
	}
}

// TestTheCheckAfterAStartSaysWhatIsWrong damages a queue and starts it.
func TestTheCheckAfterAStartSaysWhatIsWrong(t *testing.T) {
	w := newWard(t, 900)
	for _, damaged := range []bool{false, true} {
		if damaged {
			w.damage(func(w *ward) {
				key, _ := w.pick(store.SpaceWaiting, nil)
				w.b.Delete(key)
				key, _ = w.pick(store.SpaceHeld, nil)
				w.b.Delete(key)
			})
		}
		w.open()
		metrics := prometheus.NewRegistry()
		check, err := w.q.CheckInBackground(metrics)
		if err != nil {
			t.Fatal(err)
		}
		w.accept("new@d0.example") // it goes on meanwhile
		<-check.Done()
		want := ""
		if damaged {
			want = "the records of the queue disagree in 2 places (held-missing 1, waiting-missing 1): stop the relay, run relais-relay queue fsck --repair, start it again"
		}
		if got := check.Problem(); got != want {
			t.Errorf("damaged %v: %q", damaged, got)
		}
		if n := testutil.CollectAndCount(check.damage); (n == 2) != damaged {
			t.Errorf("damaged %v: %d metrics", damaged, n)
		}
		w.close()
	}
}
