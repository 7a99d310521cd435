package queue

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

var exportedFrom = ExportHeader{Export: ids.Message{9}, Cluster: ids.Cluster{1}, Node: ids.Node{2}, CreatedAt: time.UnixMilli(1_800_000_000_000).UTC()}

func (f *fixture) export() ([]byte, ExportCount) {
	f.t.Helper()
	var b bytes.Buffer
	count, err := f.q.Export(&b, exportedFrom, func(ExportCount) {}, func(id ids.Message, err error) { f.t.Errorf("%s: %v", id, err) })
	if err != nil {
		f.t.Fatal(err)
	}
	return b.Bytes(), count
}

func (f *fixture) importFrom(b []byte) (ImportCount, error) {
	return f.q.Import(context.Background(), bytes.NewReader(b), f.ledgers(), func(ImportCount) {})
}

// ledgers is the folder that remembers imports.
func (f *fixture) ledgers() string {
	return filepath.Join(f.dir, "..", filepath.Base(f.dir)+"-imports")
}

// content is what the queue holds of a message, body included.
func (f *fixture) content(id ids.Message) string {
	f.t.Helper()
	info, err := f.q.Show(id)
	if err != nil {
		return err.Error()
	}
	body, err := f.st.ReadBody(info.Env.Body, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	env := *info.Env
	env.Body = relay.BodyRef{Length: env.Body.Length, HeaderBytes: env.Body.HeaderBytes, BodyHash: env.Body.BodyHash, CRC32C: env.Body.CRC32C}
	states := ""
	for _, s := range info.States {
		held := s.Held
		s.Held = nil
		states += fmt.Sprintf("%+v %+v\n", s, held)
	}
	return fmt.Sprintf("%+v\n%s\n%s", env, states, body)
}

// mixed fills a queue with mail in every state and returns the ids.
func (f *fixture) mixed() (out []ids.Message) {
	f.t.Helper()
	// Two recipients of one message go different ways, a third waits as it came.
	first := f.accept("a@one.example", "b@one.example", "c@two.example")
	w := f.takeFrom("one.example")
	a := f.begin(w)
	results := all(w, relay.StateDelivered, outbox.Delivered, time.Time{})
	results[1].State.State, results[1].State.Next, results[1].Event = relay.StateWaiting, f.clock.Now().Add(time.Hour), outbox.Deferred
	results[1].State.LastReply = relay.Reply{Code: 451, Enhanced: "4.7.1", Text: "greylisted"}
	f.finish(w, a, results)
	// One is held, one is in doubt, one has a body of its own file.
	held := f.accept("h@three.example")
	w = f.takeFrom("three.example")
	f.finish(w, nil, all(w, relay.StateHeld, outbox.Held, time.Time{}))
	doubt := f.accept("d@four.example")
	f.begin(f.takeFrom("four.example"))
	large := f.envelope("l@five.example")
	if err := f.q.Accept(context.Background(), large, f.body(strings.Repeat("0123456789abcde\n", 80_000))); err != nil {
		f.t.Fatal(err)
	}
	return []ids.Message{first.ID, held.ID, doubt.ID, large.ID}
}

func (f *fixture) takeFrom(domain string) *Work {
	f.t.Helper()
	var w *Work
	f.until("work for "+domain, func() bool {
		f.q.Queues(func(info QueueInfo) bool {
			if string(info.Key.Domain) != domain {
				return true
			}
			w, _ = takeLoaded(f.q, info.Number, f.clock.Now(), 10)
			return w == nil
		})
		return w != nil
	})
	return w
}

// TestExportImport moves a queue to another relay: the same ids, states and
// bodies arrive, once, and are delivered from there.
func TestExportImport(t *testing.T) {
	from := newFixture(t).open()
	moved := from.mixed()
	from.reopen() // as a relay that stopped: what was in flight is in doubt now
	b, count := from.export()
	if count.Messages != 4 || count.Recipients != 5 || count.Damaged != 0 {
		t.Errorf("exported %+v", count)
	}
	h, checked, err := CheckExport(bytes.NewReader(b))
	if err != nil || h != exportedFrom || checked != count {
		t.Errorf("checked %+v %+v, %v", h, checked, err)
	}

	to := newFixture(t).open()
	own := to.accept("own@one.example")
	to.clock.Add(time.Second)
	got, err := to.importFrom(b)
	if err != nil || got.Imported != 4 || got.Known != 0 || got.Bytes != count.Bytes {
		t.Fatalf("imported %+v, %v", got, err)
	}
	same := func(when string) {
		t.Helper()
		for _, id := range moved {
			if a, b := from.content(id), to.content(id); a != b {
				t.Errorf("%s: %s was\n%.2000s\nis\n%.2000s", when, id, a, b)
			}
		}
	}
	same("after the import")
	if again, err := to.importFrom(b); err != nil || again.Imported != 0 || again.Known != 4 {
		t.Errorf("imported again: %+v, %v", again, err)
	}
	to.reopen()
	to.loaded()
	same("after a restart")

	// All but what is held goes out; after that an import adds nothing either.
	to.clock.Add(2 * time.Hour)
	for delivered := 0; delivered < 5; {
		w := to.take(10)
		delivered += len(w.Recipients)
		to.delivered(w, to.begin(w))
	}
	if again, err := to.importFrom(b); err != nil || again.Imported != 0 {
		t.Errorf("imported after delivery: %+v, %v", again, err)
	}
	for _, id := range append(moved, own.ID) {
		_, err := to.q.Show(id)
		if held := id == moved[1]; held != (err == nil) {
			t.Errorf("%s: %v", id, err)
		}
	}
	to.counted()
	if s := to.q.Summary(); s.Waiting != 0 || s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// TestImportGoesOn: an import that broke off in the middle is repeated.
func TestImportGoesOn(t *testing.T) {
	from := newFixture(t).open()
	for i := range 10 {
		from.accept(fmt.Sprintf("u%d@one.example", i))
	}
	b, _ := from.export()
	to := newFixture(t).open()
	first, err := to.importFrom(b[:len(b)*2/3])
	if !fault.Is(err, fault.Invalid) || first.Imported == 0 || first.Imported == 10 {
		t.Fatalf("from a part: %+v, %v", first, err)
	}
	w := to.take(1)
	to.delivered(w, to.begin(w)) // before the rest arrives
	rest, err := to.importFrom(b)
	if err != nil || rest.Known != first.Imported || rest.Imported != 10-first.Imported {
		t.Errorf("first %+v, then %+v, %v", first, rest, err)
	}
	if s := to.q.Summary(); s.Waiting != 9 {
		t.Errorf("%d wait, want 9", s.Waiting)
	}
}

// TestImportGoesOnWithoutItsLedger: a power cut took what the ledger had not on
// stable storage; what was imported and delivered by then is known all the same.
func TestImportGoesOnWithoutItsLedger(t *testing.T) {
	from := newFixture(t).open()
	for i := range 4 {
		from.accept(fmt.Sprintf("u%d@one.example", i))
	}
	b, _ := from.export()
	to := newFixture(t).open()
	if got, err := to.importFrom(b); err != nil || got.Imported != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	for range 3 {
		w := to.take(1)
		to.delivered(w, to.begin(w))
	}
	if err := os.RemoveAll(to.ledgers()); err != nil {
		t.Fatal(err)
	}
	to.reopen()
	if got, err := to.importFrom(b); err != nil || got.Imported != 0 || got.Known != 4 {
		t.Errorf("without the ledger: %+v, %v", got, err)
	}
	to.counted()
	if s := to.q.Summary(); s.Waiting != 1 {
		t.Errorf("%d wait, want 1", s.Waiting)
	}
	to.clock.Add(24*time.Hour + takenMargin + time.Second)
	if err := to.q.ForgetOverdue(to.clock.Now()); err != nil {
		t.Fatal(err)
	}
	to.q.transfers.mu.Lock()
	defer to.q.transfers.mu.Unlock()
	if n := to.q.transfers.taken[exportedFrom.Node]; n != 0 {
		t.Errorf("%d messages are remembered a day after their deadline", n)
	}
}

// TestImportOfThePast: mail whose deadline passed on the dead relay's disk
// arrives, and is due to expire at once, so that its sender is told.
func TestImportOfThePast(t *testing.T) {
	from := newFixture(t).open()
	env := from.accept("late@one.example")
	b, _ := from.export()
	to := newFixture(t).open()
	to.clock.Add(48 * time.Hour)
	if got, err := to.importFrom(b); err != nil || got.Imported != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	var expired []*Work
	to.until("the deadline", func() bool {
		expired = to.q.PopExpired(to.clock.Now(), 10)
		return len(expired) > 0
	})
	w := expired[0]
	if w.Env.ID != env.ID {
		t.Errorf("%s expired", w.Env.ID)
	}
	to.finish(w, nil, all(w, relay.StateExpired, outbox.Expired, time.Time{}))
	to.empty()
}

// TestDamagedExportIsRefused cuts an export everywhere and flips bits in it.
func TestDamagedExportIsRefused(t *testing.T) {
	from := newFixture(t).open()
	from.accept("a@one.example", "b@two.example")
	b, _ := from.export()
	check := func(what string, b []byte) {
		t.Helper()
		if _, _, err := CheckExport(bytes.NewReader(b)); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := range b {
		check(fmt.Sprintf("cut at %d", n), b[:n])
	}
	for at := range b {
		c := bytes.Clone(b)
		c[at] ^= 16
		check(fmt.Sprintf("bit at %d", at), c)
	}
}
