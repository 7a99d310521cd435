package engine

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
)

func settled(states ...relay.State) *settlement {
	s := &settlement{}
	for i, st := range states {
		s.results = append(s.results, queue.Result{Index: uint16(i), State: relay.RecipientState{State: st}})
	}
	return s
}

func TestLaneCounts(t *testing.T) {
	var l laneCounts
	lane := schedule.Lane{Source: ids.Source{1}, Provider: "google"}
	start := time.Unix(1_800_000_000, 0)
	at := func(seconds int) *relay.Attempt {
		return &relay.Attempt{Source: lane.Source, Provider: lane.Provider, EndedAt: start.Add(time.Duration(seconds) * time.Second)}
	}
	look := func(seconds int) (info LaneInfo) {
		l.read(lane, start.Add(time.Duration(seconds)*time.Second), &info)
		return info
	}
	if info := look(0); info != (LaneInfo{}) {
		t.Errorf("nothing is %+v", info)
	}
	l.begin(lane, 3, start)
	if look(0).InFlight != 3 {
		t.Error("nothing is under way")
	}
	l.end(lane, 3)
	for second := range 20 {
		l.count(at(second), settled(relay.StateDelivered, relay.StateDelivered, relay.StateWaiting, relay.StateBounced, relay.StateUnknown))
	}
	if info := look(20); info.InFlight != 0 || info.Delivered != 40 || info.Deferred != 20 || info.Bounced != 40 ||
		info.DeliveredPerSecond != 2 || info.DeferredPerSecond != 1 || info.BouncedPerSecond != 2 {
		t.Errorf("after 20 s: %+v", info)
	}
	if info := look(25); info.DeliveredPerSecond != 1 || info.Delivered != 40 {
		t.Errorf("5 s later: %+v", info)
	}
	if info := look(31); info.DeliveredPerSecond != 0 || info.Delivered != 40 {
		t.Errorf("later: %+v", info)
	}
	l.count(at(40), settled(relay.StateDelivered))
	if info := look(41); info.DeliveredPerSecond != 0.1 {
		t.Errorf("what has passed counts: %+v", info)
	}
	l.count(at(10), settled(relay.StateDelivered)) // the clock went back
	if info := look(41); info.Delivered != 42 || info.DeliveredPerSecond != 0.2 {
		t.Errorf("after the clock went back: %+v", info)
	}
	l.count(&relay.Attempt{EndedAt: start}, settled(relay.StateExpired)) // without a lane
	if len(l.lanes) != 1 {
		t.Errorf("%d lanes are counted", len(l.lanes))
	}
}

func TestLaneCountsAreBounded(t *testing.T) {
	var l laneCounts
	start := time.Unix(1_800_000_000, 0)
	lane := func(i int) schedule.Lane {
		return schedule.Lane{Source: ids.Source{byte(i), byte(i >> 8), 1}, Provider: "google"}
	}
	for i := range maxCountedLanes + 100 {
		l.begin(lane(i), 1, start)
		l.end(lane(i), 1)
	}
	if len(l.lanes) != maxCountedLanes {
		t.Errorf("%d lanes are counted", len(l.lanes))
	}
	// While there are too many, all of them are looked at now and then only.
	for after, want := range []int64{0, 0, laneSweepWait: laneSweepWait, laneSweepWait + 1: laneSweepWait} {
		if want == 0 && after > 1 {
			continue
		}
		l.begin(lane(maxCountedLanes), 1, start.Add(time.Duration(after)*time.Second))
		if got := l.swept - start.Unix(); got != want {
			t.Errorf("after %d s the last look was at %d s, want %d", after, got, want)
		}
	}
	for i := range 100 {
		l.begin(lane(maxCountedLanes+i), 1, start.Add(2*time.Hour))
	}
	var info LaneInfo
	if l.read(lane(maxCountedLanes+99), start.Add(2*time.Hour), &info); info.InFlight != 1 || len(l.lanes) > maxCountedLanes {
		t.Errorf("%d lanes, a new one has %+v", len(l.lanes), info)
	}
}

func TestLanesCountMail(t *testing.T) {
	w := newWorld(t, nil, first)
	w.event(w.accept(nil, w.at(lab.Google, 0, lab.Accept)), outbox.Delivered)
	lanes := w.engine.Lanes()
	if len(lanes) != 1 || lanes[0].Delivered != 1 || lanes[0].Deferred != 0 || lanes[0].Hold != "" || !lanes[0].WaitingSince.IsZero() {
		t.Errorf("lanes %+v", lanes)
	}
}

func BenchmarkLaneCounts(b *testing.B) {
	var l laneCounts
	a, s := &relay.Attempt{Source: ids.Source{1}, Provider: "google", EndedAt: time.Unix(1_800_000_000, 0)}, settled(relay.StateDelivered)
	lane := schedule.Lane{Source: a.Source, Provider: a.Provider}
	b.ReportAllocs()
	for b.Loop() {
		l.begin(lane, 1, a.EndedAt)
		l.end(lane, 1)
		l.count(a, s)
	}
}
