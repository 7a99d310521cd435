package schedule

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

// TestRoomOfARateIsNotForWhoAsksFirst: when a rate has room again and a session
// asks before anybody was woken, the room is still that of the tenant or pool
// whose turn it is.
func TestRoomOfARateIsNotForWhoAsksFirst(t *testing.T) {
	slow := Rate{Max: 1, Per: time.Second, Burst: 1}
	for name, c := range map[string]struct {
		shape Shape
		pools [2]byte
	}{
		"of a source, between tenants": {Shape{SourceMessageRate: slow}, [2]byte{1, 1}},
		"of the relay, between pools":  {Shape{RelayMessageRate: slow}, [2]byte{1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			s, now := New(Limits{MaxResolvesInFlight: 2}), time.Unix(1_800_000_000, 0)
			keys := [2]Key{testKey(1, policy.Bulk, "a.test"), testKey(2, policy.Bulk, "b.test")}
			for i := range keys {
				keys[i].Pool = testPool(c.pools[i])
				s.SetPool(keys[i].Pool, []Source{{ID: [16]byte{15: c.pools[i]}, Weight: 1}})
				s.SetHead(Queue(i), keys[i], now, 1000, now)
			}
			s.Next(now)
			for i := range keys {
				s.Routed(keys[i].Domain, Route{Provider: "p", Site: string(keys[i].Domain), Shape: c.shape, Expires: now.Add(time.Hour)}, now)
			}
			// Each gets a session, and asks on while the rate is used up.
			var ids [2]Session
			for range 10 {
				for _, f := range s.Next(now) {
					switch f.Kind {
					case Open:
						ids[f.Queue] = f.Session
						s.Opened(f.Session)
						s.Started(f.Session)
					case Dispatch:
						s.Started(f.Session)
					}
					if _, answer := s.NextFor(f.Session, now); answer != Park {
						t.Fatalf("%+v was answered with %d while the rate is used up", f, answer)
					}
				}
				now = s.Wake()
			}
			if ids[0] == 0 || ids[1] == 0 {
				t.Fatal("not both have a session")
			}
			// One is busy, the other waits and has its turn.
			var busy Effect
			for range 10 {
				if effects := s.Next(now); len(effects) == 1 && effects[0].Kind == Dispatch {
					busy = effects[0]
					break
				}
				now = s.Wake()
			}
			if busy.Session == 0 {
				t.Fatal("no session got work")
			}
			s.Started(busy.Session)
			now = now.Add(time.Second) // there is room, and nobody was woken
			if n, answer := s.NextFor(busy.Session, now); answer != Park {
				t.Fatalf("the session that asked first was answered with %d, queue %d", answer, n)
			}
			if effects := s.Next(now); len(effects) != 1 || effects[0].Kind != Dispatch || effects[0].Session == busy.Session {
				t.Errorf("the room went to %+v, not to the other session", effects)
			}
		})
	}
}
