package brake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// telling is a world that keeps events.
func telling(t *testing.T, brakes ...policy.Brake) *world {
	w := newWorld(t, brakes...)
	w.k.cfg.Events = func(context.Context, []outbox.Event) error { return nil }
	return w
}

// told returns the events since the last call, by type.
func (w *world) told() (out []outbox.Event, types string) {
	w.k.mu.Lock()
	defer w.k.mu.Unlock()
	out, w.k.events = w.k.events, nil
	for i := range out {
		types += " " + out[i].Type.String()
	}
	return out, strings.TrimSpace(types)
}

// TestEventsSayWhyALaneWasSlowedDown: the way of a lane down and back, with what the
// host said, is in the events; single steps are not.
func TestEventsSayWhyALaneWasSlowedDown(t *testing.T) {
	w := telling(t)
	a, _ := w.session(sourceA, "google", tenant, "gmail.example")
	for range 100 {
		w.send(a, relay.Delivered, ok)
	}
	if _, types := w.told(); types != "" {
		t.Fatalf("nothing happened: %s", types)
	}
	for range 3 {
		w.send(a, relay.Deferred, slower)
	}
	events, types := w.told()
	if types != "slowed" {
		t.Fatalf("slowed down: %s", types)
	}
	g := w.only()
	e := events[0]
	if e.Source != sourceA || e.Provider != "google" || e.Pool != pool || e.Class != "throttled" || e.Reply.Text != "421 4.7.28 an unusual rate of mail" ||
		e.PerHour != int64(g.Messages.Max) || e.Conns != 1 || !e.Next.After(e.At) || e.At.Before(start) || e.StartedAt.IsZero() {
		t.Errorf("%+v", e)
	}
	for range 6 { // it climbs
		w.send(a, relay.Delivered, ok)
		w.now = w.now.Add(10 * time.Second)
		w.k.look()
	}
	if _, types := w.told(); types != "" {
		t.Errorf("of steps up: %s", types)
	}
	for w.only().Messages.Max > int(e.PerHour)/3 {
		w.send(a, relay.Deferred, slower)
		if w.now = w.now.Add(5 * time.Second); w.now.Sub(start) > time.Hour {
			t.Fatalf("it is not slowed down: %+v", w.gates)
		}
	}
	if events, types := w.told(); len(events) == 0 || strings.Trim(types, "slowed ") != "" || len(events) > 3 {
		t.Errorf("of halves: %s", types)
	}
	for range 3 {
		w.send(a, relay.Failed, no)
	}
	events, types = w.told()
	if types != "stopped" || events[0].Class != "ip-block" || !events[0].Next.Equal(w.only().Until) {
		t.Fatalf("blocked: %s %+v", types, events)
	}
	w.k.Closed(w.now, a)
	w.now = events[0].Next.Add(time.Second)
	w.k.look()
	if _, types := w.told(); types != "probed" {
		t.Errorf("after the hold: %s", types)
	}
	w.view(policy.Brake{ID: ids.Brake{7}, Source: sourceA, Provider: "google", Released: w.now, Node: own})
	events, types = w.told()
	if types != "restored" || events[0].PerHour != 0 || !events[0].Next.IsZero() {
		t.Errorf("freed: %s %+v", types, events)
	}
}

// TestEventsSayWhichBrakesApplied: brakes that begin, change and end have an event
// each; those that the view on disk has at the start have none.
func TestEventsSayWhichBrakesApplied(t *testing.T) {
	old := policy.Brake{ID: ids.Brake{7}, Provider: "yahoo", Cause: "complaints", Owner: "anna", CreatedAt: start}
	w := telling(t, old)
	w.k.Changed()
	w.k.look()
	if _, types := w.told(); types != "" {
		t.Fatalf("at the start: %s", types)
	}
	slow := policy.Brake{ID: ids.Brake{8}, Provider: "google", Tenant: tenant, Domain: "gmail.example", Percent: 25, Cause: "a ticket", Owner: "bob", CreatedAt: start, Until: start.Add(time.Hour)}
	w.view(old, slow)
	events, types := w.told()
	if types != "braked" {
		t.Fatalf("set: %s", types)
	}
	if e := events[0]; e.Brake != slow.ID || e.Provider != "google" || e.Tenant != tenant || e.Address != "gmail.example" || e.Class != "slow" || e.Actor != "bob" ||
		!strings.Contains(e.Reply.Text, "25 %") || !strings.Contains(e.Reply.Text, "a ticket") || !e.Next.Equal(slow.Until) {
		t.Errorf("%+v", e)
	}
	slow.Percent = 0
	w.view(slow)
	events, types = w.told()
	if types != "braked unbraked" || events[0].Class != "hold" || events[0].Brake != slow.ID || events[1].Brake != old.ID {
		t.Errorf("changed: %s %+v", types, events)
	}
	w.now = slow.Until.Add(policy.BrakeGrace + time.Second)
	w.k.look()
	if events, types = w.told(); types != "unbraked" || events[0].Brake != slow.ID {
		t.Errorf("over: %s %+v", types, events)
	}
}

// TestEventsDoNotWaitForADiskThatFails: what cannot be kept is logged, what there is no
// room for is counted, and what is left at the end is kept.
func TestEventsDoNotWaitForADiskThatFails(t *testing.T) {
	w := newWorld(t)
	var log strings.Builder
	w.k.cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	kept, failed := 0, errors.New("the disk is read-only")
	w.k.cfg.Events = func(_ context.Context, events []outbox.Event) error {
		kept += len(events)
		return failed
	}
	add := func(n int) {
		w.k.mu.Lock()
		defer w.k.mu.Unlock()
		for range n {
			w.k.tellEvent(outbox.Event{Type: outbox.Slowed})
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	add(maxEvents + 3)
	w.k.keepEvents(ended)
	if text := log.String(); kept != maxEvents || !strings.Contains(text, "events=3") || !strings.Contains(text, "read-only") || !strings.Contains(text, fmt.Sprintf("events=%d", maxEvents)) {
		t.Errorf("%d were kept: %s", kept, text)
	}
	failed = nil
	add(2)
	w.k.keepEvents(ended)
	if kept != maxEvents+2 || len(w.k.events) != 0 {
		t.Errorf("%d were kept, %d are left", kept, len(w.k.events))
	}
}
