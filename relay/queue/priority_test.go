package queue

import (
	"context"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/policy"
)

func TestStoredStreams(t *testing.T) {
	for _, tt := range []struct {
		stored, stream string
		priority       int
	}{
		{"news", "news", 50},
		{"", "", 50},
		{"news;priority=80", "news", 80},
		{";priority=0", "", 0},
		{"a;b;priority=100", "a;b", 100},
		{"news;priority=101", "news;priority=101", 50},
		{"news;priority=", "news;priority=", 50},
		{"news;priority=-1", "news;priority=-1", 50},
		{"news;Priority=1", "news;Priority=1", 50},
		{"news;", "news;", 50},
	} {
		stream, p := parseStream([]byte(tt.stored))
		if stream != tt.stream || p.Number() != tt.priority {
			t.Errorf("%q is %q with %d", tt.stored, stream, p.Number())
		}
		_, _, n := protowire.ConsumeTag(putStream(nil, 1, stream, p))
		b, _ := protowire.ConsumeBytes(putStream(nil, 1, stream, p)[max(n, 0):])
		if len(b) > 0 && string(b) != tt.stored {
			t.Errorf("%q is stored again as %q", tt.stored, b)
		}
	}
}

// TestPrioritySurvivesARestart: mail of another priority waits in a work queue of
// its own, before a restart and after it, and a check finds all in order.
func TestPrioritySurvivesARestart(t *testing.T) {
	f := newFixture(t).open()
	f.accept("a@one.example")
	env := f.envelope("b@one.example")
	env.Priority = policy.PriorityOf(80)
	if err := f.q.Accept(context.Background(), env, f.body("urgent")); err != nil {
		t.Fatal(err)
	}
	check := func() (urgent Number) {
		t.Helper()
		f.loaded()
		keys := map[policy.Priority]Number{}
		f.q.Queues(func(info QueueInfo) bool {
			if info.InMemory == 1 && info.Key.Stream == "default" {
				keys[info.Key.Priority] = info.Number
			}
			return true
		})
		if len(keys) != 2 || keys[0] == 0 {
			t.Fatalf("work queues by priority: %v", keys)
		}
		if n, ok := f.q.Find(env, 0); !ok || n != keys[policy.PriorityOf(80)] {
			t.Errorf("the urgent mail is found in %d, %v", n, ok)
		}
		return keys[policy.PriorityOf(80)]
	}
	check()
	f.reopen()
	urgent := check()
	found, _, err := f.q.List(Filter{Priority: &PriorityRange{Least: policy.PriorityOf(60), Most: policy.PriorityOf(100)}}, 10)
	if err != nil || len(found) != 1 || found[0].Env.ID != env.ID {
		t.Errorf("listed by priority: %+v, %v", found, err)
	}
	count, err := Fsck(context.Background(), f.st, FsckConfig{Live: true, Now: f.clock.Now, Logger: f.log(), Report: func(f Finding) { t.Errorf("%+v", f) }})
	if err != nil || !count.Clean || count.Waiting != 2 {
		t.Errorf("a check says %+v, %v", count, err)
	}
	w, ok := takeLoaded(f.q, urgent, f.clock.Now(), 1)
	if !ok || w.Env.ID != env.ID || w.Env.Priority.Number() != 80 {
		t.Fatalf("took %+v, %v", w, ok)
	}
	f.delivered(w, f.begin(w))
	f.delivered(f.take(1), nil)
	f.empty()
}

// TestEarlierReleasesAgreeWithThemselves: what a release without priorities reads
// of an envelope and of its work queue is one and the same stream, so that it
// looks for waiting keys where they are.
func TestEarlierReleasesAgreeWithThemselves(t *testing.T) {
	f := newFixture(t).open()
	env := f.envelope("b@one.example")
	env.Priority = policy.PriorityOf(0)
	if err := f.q.Accept(context.Background(), env, nil); err != nil {
		t.Fatal(err)
	}
	n, _ := f.q.Find(env, 0)
	read := func(key []byte, skip int, want protowire.Number) (text string) {
		t.Helper()
		value, err := f.st.Get(key, nil)
		if err == nil {
			err = fields(value[skip:], func(n protowire.Number, _ uint64, b []byte) {
				if n == want {
					text = string(b)
				}
			})
		}
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	inEnvelope := read(store.AppendMessageKey(nil, env.ID), 1+store.RefBytes, envStream)
	inQueue := read(store.AppendQueueKey(nil, uint32(n)), 1, qStream)
	if inEnvelope != inQueue || inQueue != "default;priority=0" {
		t.Errorf("the envelope says %q, the work queue %q", inEnvelope, inQueue)
	}
}
