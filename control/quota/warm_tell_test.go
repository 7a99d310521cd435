package quota

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

// TestADayIsJudgedByWhatProvidersAnswered: a quota that was used leads on only if
// providers welcomed the mail.
func TestADayIsJudgedByWhatProvidersAnswered(t *testing.T) {
	for name, tc := range map[string]struct {
		told  []*wire.WarmItem
		stage int
		why   string
	}{
		"welcome":          {[]*wire.WarmItem{{Attempts: 190, Accepted: 185, Deferred: 3, Hard: 2}}, 3, "passed"},
		"told in parts":    {[]*wire.WarmItem{{Attempts: 90, Accepted: 20, Deferred: 70}, {Attempts: 390, Accepted: 320, Deferred: 70}}, 3, "passed"},
		"not told":         {nil, 2, "held: 0 of 480 offered were answered, 50 are needed to judge"},
		"deferred":         {[]*wire.WarmItem{{Attempts: 400, Accepted: 300, Deferred: 100}}, 2, "held: deferred 25.0 % of 400"},
		"refused":          {[]*wire.WarmItem{{Attempts: 400, Accepted: 350}}, 2, "held: accepted 87.5 % of 400"},
		"blocked":          {[]*wire.WarmItem{{Attempts: 400, Accepted: 390, Blocked: 10}}, 2, "held: blocked 2.5 % of 400"},
		"no such users":    {[]*wire.WarmItem{{Attempts: 400, Accepted: 390, Hard: 10}}, 2, "held: failed for good 2.5 % of 400"},
		"block signatures": {[]*wire.WarmItem{{Attempts: 400, Accepted: 380, Deferred: 20, Signatures: 20}}, 1, "blocked in 5.0 % of 400 attempts"},
	} {
		w := newWarmLeader(t)
		w.look()
		w.put(2, 1, 500, "")
		w.say(&wire.WarmItem{Kind: 1, Seq: 1, Amount: 500})
		w.say(&wire.WarmItem{Kind: 2, Used: 480})
		for _, i := range tc.told {
			i.Kind = wire.WarmTell
			if d := w.say(i); d.Replies[0].GetKind() != wire.WarmTell || d.Replies[0].GetAttempts() != i.GetAttempts() {
				t.Errorf("%s: answered by %v", name, d)
			}
		}
		w.now = w.now.Add(24 * time.Hour)
		w.look()
		if stage, _, why := w.stage("google"); stage != tc.stage || !strings.Contains(why, tc.why) {
			t.Errorf("%s: stage %d: %s, want %d: %s", name, stage, why, tc.stage, tc.why)
		}
	}
}

// TestServersThatKnowNoAnswersJudgeByUse: until all servers know the commands, what
// relays tell is passed over, and a day is judged as before.
func TestServersThatKnowNoAnswersJudgeByUse(t *testing.T) {
	w := newWarmLeaderAt(t, control.WarmTellVersion-1)
	w.look()
	w.put(2, 1, 500, "")
	w.say(&wire.WarmItem{Kind: 1, Seq: 1, Amount: 500})
	w.say(&wire.WarmItem{Kind: 2, Used: 480})
	w.sent = nil
	w.part.tell(relayID(0), &wire.WarmItem{Kind: wire.WarmTell, Subject: uint64(w.pool().Number), Day: int32(w.today()), Attempts: 400, Deferred: 400})
	if err := w.part.hear(t.Context()); err != nil || len(w.sent) != 0 || len(w.part.tells) != 0 {
		t.Errorf("%v, answered by %v", err, w.sent)
	}
	w.now = w.now.Add(24 * time.Hour)
	w.look()
	if stage, _, why := w.stage("google"); stage != 3 || why != "passed" {
		t.Errorf("stage %d: %s", stage, why)
	}
}

// TestTellsAreBounded: what finds no room is told again by the relay; what is there
// is replaced by what is later.
func TestTellsAreBounded(t *testing.T) {
	w := newWarmLeader(t)
	w.look()
	for n := range uint64(maxWarmQueue + 10) {
		w.part.tell(relayID(0), &wire.WarmItem{Subject: n, Day: 1, Attempts: 5})
	}
	w.part.tell(relayID(0), &wire.WarmItem{Subject: 7, Day: 1, Attempts: 9})
	w.part.tell(relayID(0), &wire.WarmItem{Subject: 7, Day: 1, Attempts: 8})
	w.part.tell(relayID(0), &wire.WarmItem{Subject: 7, Day: 1, Attempts: 10, Accepted: 11}) // cannot be
	if n := len(w.part.tells); n != maxWarmQueue {
		t.Errorf("%d are kept", n)
	}
	if got := w.part.tells[tellOf{relayID(0), warmup.Subject(7), 0, 1, 0}]; got.GetAttempts() != 9 {
		t.Errorf("%v", got)
	}
}
