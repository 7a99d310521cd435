package main

import (
	"testing"

	"github.com/relais-mta/relais/relay/agent"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
)

// TestLoadTellsAllThatTheQueueHolds: by it a relay that drains counts as empty, and
// its addresses go to others.
func TestLoadTellsAllThatTheQueueHolds(t *testing.T) {
	disk := store.Stats{LiveBodyBytes: 5, FreeBytes: 6}
	for name, tc := range map[string]struct {
		summary queue.Summary
		want    agent.Load
	}{
		"all":                {queue.Summary{Waiting: 1, InFlight: 2, Held: 3, Counted: true}, agent.Load{WaitingRecipients: 1, InFlightRecipients: 2, HeldRecipients: 3}},
		"held only":          {queue.Summary{Held: 4, Counted: true}, agent.Load{HeldRecipients: 4}},
		"not counted yet":    {queue.Summary{}, agent.Load{WaitingRecipients: 1}},
		"counted in part":    {queue.Summary{Waiting: -7, Held: -3}, agent.Load{WaitingRecipients: 1}},
		"nothing is left":    {queue.Summary{Counted: true}, agent.Load{}},
		"more than was seen": {queue.Summary{Waiting: 9}, agent.Load{WaitingRecipients: 9}},
	} {
		got := loadOf(tc.summary, disk)
		if got.WaitingRecipients != tc.want.WaitingRecipients || got.InFlightRecipients != tc.want.InFlightRecipients || got.HeldRecipients != tc.want.HeldRecipients {
			t.Errorf("%s: waiting %d, in flight %d, held %d", name, got.WaitingRecipients, got.InFlightRecipients, got.HeldRecipients)
		}
		if got.QueueBytes != 5 || got.FreeBytes != 6 {
			t.Errorf("%s: %d bytes, %d free", name, got.QueueBytes, got.FreeBytes)
		}
	}
}
