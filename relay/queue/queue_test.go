package queue

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

func TestMessageLivesUntilItsLastRecipientIsFinal(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept("a@one.example", "b@one.example", "c@two.example")
	w := f.take(10)
	if w.Env.ID != env.ID {
		t.Fatalf("took %+v", w)
	}
	first := len(w.Recipients)
	f.delivered(w, f.begin(w))
	info, err := f.q.Show(env.ID)
	if err != nil {
		t.Fatal(err)
	}
	final := 0
	for _, s := range info.States {
		if s.State == relay.StateDelivered {
			final++
		}
	}
	if final != first || first == 3 {
		t.Fatalf("%d recipients are final, %d were delivered", final, first)
	}
	w = f.take(10)
	f.finish(w, f.begin(w), all(w, relay.StateBounced, outbox.Bounced, time.Time{}))
	f.empty()
	if _, err := f.q.Show(env.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("a finished message is shown: %v", err)
	}
	if s := f.q.Summary(); s.Waiting != 0 || s.InFlight != 0 || s.InMemory != 0 || s.Messages != 0 || s.DeadlinesKnown != 0 {
		t.Errorf("left in memory: %+v", s)
	}
}

func TestRetriedMailComesBackWithItsStateAfterARestart(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept("a@one.example")
	w := f.take(1)
	results := all(w, relay.StateWaiting, outbox.Deferred, f.clock.Now().Add(time.Hour))
	results[0].State.LastReply = relay.Reply{Code: 451, Enhanced: "4.7.1", Text: "greylisted"}
	results[0].State.LastClass = "greylist"
	f.finish(w, f.begin(w), results)
	f.reopen()
	f.loaded()
	f.q.Queues(func(info QueueInfo) bool {
		if head, ok := f.q.Head(info.Number); !ok || !head.Due.Equal(results[0].State.Next) {
			t.Errorf("due at %v, %v", head.Due, ok)
		}
		if _, ok := takeLoaded(f.q, info.Number, f.clock.Now(), 1); ok {
			t.Error("taken before it was due")
		}
		return true
	})
	f.clock.Add(time.Hour)
	w = f.take(1)
	s := w.Recipients[0].State
	if w.Env.ID != env.ID || s.Attempts != 1 || s.LastReply.Code != 451 || s.LastReply.Text != "greylisted" || s.LastClass != "greylist" {
		t.Errorf("came back as %+v", s)
	}
	f.delivered(w, f.begin(w))
	f.empty()
}

func TestInDoubtIsRetriedOnceThenUnknown(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept("a@one.example")
	f.begin(f.take(1))
	f.reopen() // without Finish: as after a crash
	info, err := f.q.Show(env.ID)
	if err != nil || info.States[0].InDoubt != 1 || !info.States[0].Next.Equal(f.clock.Now().Add(time.Hour)) {
		t.Fatalf("after the first: %+v, %v", info, err)
	}
	f.reopen()
	if again, err := f.q.Show(env.ID); err != nil || again.States[0].InDoubt != 1 {
		t.Fatalf("a restart without an attempt counted: %+v, %v", again, err)
	}
	f.clock.Add(time.Hour)
	f.begin(f.take(1))
	f.reopen()
	if _, err := f.q.Show(env.ID); !fault.Is(err, fault.NotFound) {
		t.Fatalf("after the second: %v", err)
	}
	f.empty()
	events, err := f.ob.Read(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	var types []string
	for _, e := range events {
		types = append(types, e.Type.String())
	}
	if got := strings.Join(types, " "); got != "accepted in-doubt unknown" {
		t.Errorf("events: %s", got)
	}
}

func TestDeadlinesFireInEveryStateButNotOnAWrongClock(t *testing.T) {
	f := newFixture(t)
	var wrong atomic.Bool
	f.trusted = func() bool { return !wrong.Load() }
	f.open()
	f.loaded() // or deadlines are being read
	for range 3 {
		f.accept("a@one.example")
	}
	held := f.take(1)
	f.finish(held, nil, all(held, relay.StateHeld, outbox.Held, time.Time{}))
	flying := f.take(1)
	f.clock.Add(25 * time.Hour)
	wrong.Store(true)
	if got := f.q.PopExpired(f.clock.Now(), 10); got != nil {
		t.Fatalf("%d messages expired by a clock that is not trusted", len(got))
	}
	wrong.Store(false)
	got := f.q.PopExpired(f.clock.Now(), 10)
	if len(got) != 2 {
		t.Fatalf("%d pieces of expired work, want the held and the waiting one", len(got))
	}
	for _, w := range got {
		if w.Env.ID == flying.Env.ID {
			t.Error("a recipient in flight expired")
		}
		f.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
	}
	f.q.Return(flying)
	if got = f.q.PopExpired(f.clock.Now(), 10); len(got) != 1 || got[0].Env.ID != flying.Env.ID {
		t.Fatalf("what came back after its deadline did not expire: %v", got)
	}
	f.finish(got[0], nil, all(got[0], relay.StateExpired, outbox.Expired, time.Time{}))
	f.empty()
}

func TestFinishQueuesTheDSNInItsOwnTransaction(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example")
	w := f.take(1)
	dsn := f.envelope("sender@example.com")
	dsn.Internal = true
	f.finish(w, f.begin(w), all(w, relay.StateBounced, outbox.Bounced, time.Time{}), Mail{Env: dsn, Body: f.body("a notice")})
	w = f.take(1)
	if w.Env.ID != dsn.ID || !w.Env.Internal {
		t.Fatalf("took %+v", w.Env)
	}
	if text, err := f.st.ReadBody(w.Env.Body, nil); err != nil || string(text) != "a notice" {
		t.Errorf("body %q, %v", text, err)
	}
	f.delivered(w, f.begin(w))
	f.empty()
}

func TestBadMailIsRefused(t *testing.T) {
	f := newFixture(t).open()
	for name, change := range map[string]func(*relay.Envelope){
		"no id":               func(e *relay.Envelope) { e.ID = ids.Message{} },
		"no recipient":        func(e *relay.Envelope) { e.Recipients = nil },
		"too many recipients": func(e *relay.Envelope) { e.Recipients = make([]relay.Recipient, MaxRecipients+1) },
		"no lifetime":         func(e *relay.Envelope) { e.ExpiresAt = e.AcceptedAt },
		"long expired": func(e *relay.Envelope) {
			e.AcceptedAt, e.ExpiresAt = e.AcceptedAt.Add(-48*time.Hour), e.AcceptedAt.Add(-24*time.Hour)
		},
	} {
		env := f.envelope("a@one.example")
		change(env)
		if err := f.q.Accept(context.Background(), env, f.body("x")); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	f.empty()
}

func TestALargeMessageFitsOneTransaction(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept(numbered("user%d@one.example", 2000)...)
	taken := 0
	for taken < 2000 {
		w := f.take(1500)
		taken += len(w.Recipients)
		f.delivered(w, f.begin(w))
	}
	f.empty()
	if _, err := f.q.Show(env.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("still there: %v", err)
	}
}

func TestInboundIsStoredAndBounded(t *testing.T) {
	f := newFixture(t).open()
	in := &Inbound{ID: ids.NewMessage(f.clock.Now()), Original: ids.NewMessage(f.clock.Now()), PerRecipient: true, Index: 3, ReceivedAt: f.clock.Now(), To: splitAddress("b+x@return.example")}
	if err := f.q.AcceptInbound(context.Background(), in, f.body("a bounce")); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	value, err := f.st.Get(store.AppendInboundKey(nil, in.ID), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseInbound(in.ID, value); err != nil || got != *in {
		t.Fatalf("stored is %+v, %v, want %+v", got, err, *in)
	}
	kept := f.q.Summary().InboundBytes
	big := &Inbound{ID: ids.NewMessage(f.clock.Now())}
	if err := f.q.AcceptInbound(context.Background(), big, f.body(strings.Repeat("x", 1<<20))); !fault.Is(err, fault.NoSpace) {
		t.Errorf("more than max_stored_bytes: %v", err)
	}
	if s := f.q.Summary(); s.InboundBytes != kept || kept < in.Body.Length {
		t.Errorf("%d inbound bytes are counted, %d before the refusal", s.InboundBytes, kept)
	}
}

func TestAFailedDiskRefusesMailAndKeepsWhatIsRecorded(t *testing.T) {
	f := newFixture(t)
	disk := &failingFS{FileSystem: store.OS()}
	f.fs = disk
	f.open()
	env := f.accept("a@one.example", "b@two.example")
	first, second := f.take(1), f.take(1)
	disk.failSync.Store(true)
	if err := f.q.Accept(context.Background(), f.envelope("c@one.example"), f.body("x")); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("accepted on a disk that does not sync: %v", err)
	}
	if err := f.st.Health(); err == nil {
		t.Error("health is good although the disk failed")
	}
	// The first end carries a DSN whose body fails, the second one has none:
	// they may share a transaction, and the message must outlive it.
	dsn := f.envelope("sender@example.com")
	wait := make(chan error, 2)
	hold := make(chan struct{})
	go func() { _ = f.st.Barrier(func() { <-hold }) }()
	body := f.body("a notice")
	f.q.Finish(first, nil, all(first, relay.StateBounced, outbox.Bounced, time.Time{}), []Mail{{Env: dsn, Body: body}}, func(err error) { wait <- err })
	f.q.Finish(second, nil, all(second, relay.StateDelivered, outbox.Delivered, time.Time{}), nil, func(err error) { wait <- err })
	close(hold)
	one, two := <-wait, <-wait
	if !fault.Is(errors.Join(one, two), fault.Unavailable) || one != nil && two != nil {
		t.Fatalf("ends: %v, %v; want the one with a body to fail", one, two)
	}
	disk.failSync.Store(false)
	if _, err := f.q.Show(env.ID); err != nil {
		t.Fatalf("the message went with the end that was not recorded: %v", err)
	}
	f.finish(first, nil, all(first, relay.StateBounced, outbox.Bounced, time.Time{}), Mail{Env: dsn, Body: body})
	w := f.take(1)
	if w.Env.ID != dsn.ID {
		t.Fatalf("took %s, want the DSN", w.Env.ID)
	}
	f.delivered(w, nil)
	f.empty()
}

// failingFS makes body files fail on demand.
type failingFS struct {
	store.FileSystem
	failSync atomic.Bool
}

func (d *failingFS) Create(path string) (store.File, error) {
	f, err := d.FileSystem.Create(path)
	return &failingFile{File: f, fs: d}, err
}

type failingFile struct {
	store.File
	fs *failingFS
}

var errDisk = errors.New("input/output error")

func (f *failingFile) Sync() error {
	if f.fs.failSync.Load() {
		return errDisk
	}
	return f.File.Sync()
}
