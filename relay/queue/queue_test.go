package queue

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
)

func TestMessageLivesUntilItsLastRecipientIsFinal(t *testing.T) {
	f := newFixture(t).open()
	env := f.accept("a@one.example", "b@one.example", "c@two.example")
	if w := f.take(10); len(w.Recipients)+0 == 0 || w.Env.ID != env.ID {
		t.Fatalf("took %+v", w)
	} else {
		f.delivered(w, f.begin(w))
	}
	info, err := f.q.Show(env.ID)
	if err != nil {
		t.Fatal(err)
	}
	final := 0
	for _, s := range info.States {
		if s.State.Final() {
			final++
		}
	}
	if final != 1 && final != 2 {
		t.Fatalf("%d recipients are final", final)
	}
	w := f.take(10)
	f.finish(w, f.begin(w), all(w, relay.StateBounced, outbox.Bounced, time.Time{}))
	f.empty()
	if _, err := f.q.Show(env.ID); err == nil {
		t.Error("the message is still shown")
	}
	s := f.q.Summary()
	if s.Waiting != 0 || s.InFlight != 0 || s.InMemory != 0 || s.Messages != 0 {
		t.Errorf("left in memory: %+v", s)
	}
}
