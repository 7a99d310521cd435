package quota

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/relais-mta/relais/shared/wire"
)

// TestWarmUpMetricsAreOfTheLeader: the server that leads shows the ledger of the day,
// and others nothing, so that a sum over servers is right.
func TestWarmUpMetricsAreOfTheLeader(t *testing.T) {
	w := newWarmLeader(t)
	w.look()
	w.put(2, 1, 500, "a ticket")
	w.say(&wire.WarmItem{Kind: 1, Seq: 1, Amount: 300})
	w.say(&wire.WarmItem{Kind: 2, Used: 70})
	w.now = w.now.Add(24 * time.Hour)
	w.look()
	w.say(&wire.WarmItem{Kind: 1, Seq: 2, Amount: 40})
	w.say(&wire.WarmItem{Kind: 2, Used: 7})
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(w.part); err != nil {
		t.Fatal(err)
	}
	if n, err := testutil.GatherAndCount(reg); n != 0 || err != nil {
		t.Fatalf("a server that does not lead shows %d metrics, %v", n, err)
	}
	w.part.leads.Store(true)
	const text = `
# HELP relais_control_warmup_day The day of the warm-up; its first is 1.
# TYPE relais_control_warmup_day gauge
relais_control_warmup_day{kind="pool",subject="news"} 2
# HELP relais_control_warmup_day_start_seconds Unix time at which the present day began.
# TYPE relais_control_warmup_day_start_seconds gauge
relais_control_warmup_day_start_seconds 1.795392e+09
# HELP relais_control_warmup_held 1 while an operator holds the warm-up at its stages.
# TYPE relais_control_warmup_held gauge
relais_control_warmup_held{kind="pool",subject="news"} 1
# HELP relais_control_warmup_left_out Subjects and classes that are not shown, for there are too many.
# TYPE relais_control_warmup_left_out gauge
relais_control_warmup_left_out 0
# HELP relais_control_warmup_quota_recipients Recipients that may be sent to on the present day.
# TYPE relais_control_warmup_quota_recipients gauge
relais_control_warmup_quota_recipients{class="google",kind="pool",subject="news"} 500
relais_control_warmup_quota_recipients{class="other",kind="pool",subject="news"} 100
# HELP relais_control_warmup_reserved_recipients Recipients of it that relays have reserved, or spent.
# TYPE relais_control_warmup_reserved_recipients gauge
relais_control_warmup_reserved_recipients{class="google",kind="pool",subject="news"} 40
relais_control_warmup_reserved_recipients{class="other",kind="pool",subject="news"} 0
# HELP relais_control_warmup_stage The stage of the plan.
# TYPE relais_control_warmup_stage gauge
relais_control_warmup_stage{class="google",kind="pool",subject="news"} 2
relais_control_warmup_stage{class="other",kind="pool",subject="news"} 1
# HELP relais_control_warmup_subjects What warms up, by kind.
# TYPE relais_control_warmup_subjects gauge
relais_control_warmup_subjects{kind="domain"} 0
relais_control_warmup_subjects{kind="pool"} 1
relais_control_warmup_subjects{kind="source"} 0
# HELP relais_control_warmup_used_recipients Recipients of it that relays have told to be spent.
# TYPE relais_control_warmup_used_recipients gauge
relais_control_warmup_used_recipients{class="google",kind="pool",subject="news"} 7
relais_control_warmup_used_recipients{class="other",kind="pool",subject="news"} 0
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(text)); err != nil {
		t.Error(err)
	}
}

// TestWarmUpMetricsFollowTheLead: they are there as long as the part leads.
func TestWarmUpMetricsFollowTheLead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWarmLeader(t)
		w.look()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.part.Lead(ctx, make(chan Message)) }()
		synctest.Wait()
		if n := testutil.CollectAndCount(w.part); n == 0 {
			t.Error("the leader shows nothing")
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if n := testutil.CollectAndCount(w.part); n != 0 {
			t.Errorf("after its term it shows %d metrics", n)
		}
	})
}
