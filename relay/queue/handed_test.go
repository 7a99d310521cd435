package queue

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
)

// TestRulesHoldWhatIsHandedOver: mail of another relay is held as new mail is, with
// its states; what is held or final already stays as it is.
func TestRulesHoldWhatIsHandedOver(t *testing.T) {
	w := newWay(t)
	rule := w.taker.put(Match{Domain: "one.example"})
	fresh := w.giver.accept("a@one.example", "b@two.example")
	tried := w.giver.accept("c@one.example", "d@one.example", "e@one.example")
	work := w.giver.takeFrom("one.example")
	if work.Env.ID != tried.ID { // both are due at once, and go by their ids
		other := work
		work = w.giver.takeFrom("one.example")
		w.giver.q.Return(other)
	}
	results := all(work, relay.StateDelivered, outbox.Delivered, time.Time{})
	results[1].State.State, results[1].State.Next, results[1].Event = relay.StateWaiting, w.giver.clock.Now().Add(time.Hour), outbox.Deferred
	results[1].State.Attempts = 3
	results[2].State.State, results[2].Event = relay.StateHeld, outbox.Held
	w.giver.finish(work, nil, results)
	w.claim()
	w.offer()
	w.write()
	w.receive()
	w.end()

	check := func() {
		t.Helper()
		info, err := w.taker.q.Show(fresh.ID)
		if err != nil || info.States[0].State != relay.StateHeld || info.States[0].Held == nil || info.States[0].Held.Rule != rule || info.States[1].State != relay.StateWaiting {
			t.Fatalf("fresh mail: %+v %v", info, err)
		}
		info, err = w.taker.q.Show(tried.ID)
		if err != nil || info.States[0].State != relay.StateDelivered || info.States[1].State != relay.StateHeld || info.States[1].Held.Rule != rule || info.States[1].Attempts != 3 {
			t.Fatalf("mail that was tried: %+v %v", info, err)
		}
		if s := info.States[2]; s.State != relay.StateHeld || s.Held != nil && s.Held.Rule == rule {
			t.Fatalf("mail held by hand: %+v", s)
		}
		if h := w.taker.q.Holds(); len(h) != 1 || h[0].Held != 2 || w.taker.index(rule) != 2 {
			t.Fatalf("%+v, %d in the index", h, w.taker.index(rule))
		}
	}
	check()
	if n := w.taker.events()[outbox.Held]; n != 2 {
		t.Errorf("%d events say so", n)
	}
	w.taker.reopen()
	for limit := time.Now().Add(30 * time.Second); !w.taker.q.Summary().Counted; {
		if err := w.taker.st.Barrier(func() {}); err != nil || time.Now().After(limit) {
			t.Fatalf("what is held is not counted: %v", err)
		}
	}
	check()
	w.taker.remove(rule)
	if got := w.taker.states(); got[relay.StateWaiting] != 3 || got[relay.StateHeld] != 1 {
		t.Errorf("after the rule: %v", got)
	}
	count, err := Fsck(t.Context(), w.taker.st, FsckConfig{Live: true, Now: w.taker.clock.Now, Logger: w.taker.log(), Report: func(f Finding) { t.Errorf("%+v", f) }})
	if err != nil || count.Messages != 2 {
		t.Errorf("%+v %v", count, err)
	}
}

// TestExportOfOpenOffers: what was offered to another relay when the last run ended
// is exported in doubt. The relay that has it knows it, and any other one takes it.
func TestExportOfOpenOffers(t *testing.T) {
	w := newWay(t)
	told := 0
	w.giver.tell = func(*relay.Envelope, []Result) []Mail { told++; return nil }
	w.giver.undecided = true
	w.giver.reopen()
	took, missed := w.giver.accept("a@one.example"), w.giver.accept("b@two.example")
	third := newFixture(t).open()
	for round := range 3 {
		w.claim()
		w.offer()
		if round == 0 {
			for i, p := range w.parcels {
				if p.Env.ID == took.ID {
					w.parcels = w.parcels[i : i+1]
					break
				}
			}
			w.write()
			w.receive() // of one message, and the answer is lost
		}
		w.giver.reopen()
		if err := w.giver.q.EndOffers(); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	header := ExportHeader{Export: ids.Message{8}, Node: giverNode}
	count, err := w.giver.q.Export(&b, header, func(ExportCount) {}, func(id ids.Message, err error) { t.Errorf("%s: %v", id, err) })
	if err != nil {
		t.Fatal(err)
	}
	if count.Messages != 2 || count.Recipients != 2 || count.InDoubt != 2 {
		t.Fatalf("%+v", count)
	}
	if _, checked, err := CheckExport(bytes.NewReader(b.Bytes())); err != nil || checked != count {
		t.Errorf("%+v %v", checked, err)
	}
	info, err := w.giver.q.Show(missed.ID)
	if err != nil || info.States[0].InDoubt != 3 || info.States[0].State != relay.StateWaiting || !strings.Contains(info.States[0].LastReply.Text, takerNode.String()) {
		t.Errorf("%+v %v", info, err)
	}
	if told > 0 {
		t.Errorf("the senders were told %d times of an end that there was not", told)
	}

	// The taker delivers what it took; then it imports.
	work := w.taker.takeFrom("one.example")
	w.taker.finish(work, nil, all(work, relay.StateDelivered, outbox.Delivered, time.Time{}))
	if got, err := w.taker.importFrom(b.Bytes()); err != nil || got.Imported != 1 || got.Known != 1 {
		t.Errorf("the taker: %+v %v", got, err)
	}
	if got, err := third.importFrom(b.Bytes()); err != nil || got.Imported != 2 {
		t.Errorf("another relay: %+v %v", got, err)
	}
}
