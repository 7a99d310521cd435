package command

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

// warmSamples are the samples of the commands about warm-up.
func warmSamples(meta *Meta) []Command {
	step := &WarmStep{Class: "google", Stage: 3, PausedUntil: 20_001, LastActive: 19_999, Why: "passed"}
	quota := &WarmQuota{Class: "google", Day: 20_000, Quota: 1000}
	return []Command{
		&WarmPut{Meta: meta, Expect: 31, Kind: "pool", Ref: id(13), Plan: "standard", Hold: "by hand", Steps: []*WarmStep{step}, Quotas: []*WarmQuota{quota},
			Proofs: []*WarmProof{{Class: "google", Volume: 50_000, Evidence: "logs of the former platform"}}},
		&WarmStop{Meta: meta, Expect: 32, Kind: "domain", Ref: []byte("example.com")},
		&WarmRoll{Meta: meta, Day: 20_000, Ordered: true},
		&WarmJudge{Meta: meta, Items: []*WarmJudgement{{Number: 7, Expect: 33, JudgedDay: 19_999, Steps: []*WarmStep{step}, Quotas: []*WarmQuota{quota}}}},
		&WarmBatch{Meta: meta, Items: []*WarmItem{{Kind: WarmReserve, Subject: 7, Class: 2, Day: 20_000, Node: id(5), Epoch: 34, Seq: 1 << 33, Amount: 90},
			{Kind: WarmSettle, Subject: 7, Class: 2, Day: 20_000, Node: id(5), Used: 30}, {Kind: WarmCut, Subject: 7, Class: 2, Day: 20_000, Node: id(5), Seq: 1<<33 + 1, Amount: 40, Used: 31}}},
		&WarmTell{Meta: meta, Items: []*WarmTold{{Subject: 7, Class: 2, Day: 20_000, Node: id(5), Epoch: 34, Attempts: 90, Accepted: 70, Deferred: 9, Blocked: 8, Hard: 2, Signatures: 5}}},
	}
}

func TestWarmUpsThatAreRefused(t *testing.T) {
	step := []*WarmStep{{Class: "other", Stage: 1}}
	for _, tc := range []struct {
		field string
		c     Command
	}{
		{"steps", &WarmPut{Kind: "pool", Ref: id(1), Plan: "standard"}},
		{"kind", &WarmPut{Kind: "tenant", Ref: id(1), Plan: "standard", Steps: step}},
		{"pool", &WarmPut{Kind: "pool", Ref: []byte("x"), Plan: "standard", Steps: step}},
		{"domain", &WarmPut{Kind: "domain", Ref: []byte("Example.com"), Plan: "standard", Steps: step}},
		{"plan", &WarmPut{Kind: "pool", Ref: id(1), Plan: "a plan", Steps: step}},
		{"evidence", &WarmPut{Kind: "pool", Ref: id(1), Plan: "standard", Steps: step, Proofs: []*WarmProof{{Class: "google", Volume: 5}}}},
		{"proven", &WarmPut{Kind: "pool", Ref: id(1), Plan: "standard", Steps: step, Proofs: []*WarmProof{{Class: "google", Volume: 1 << 30, Evidence: "e"}}}},
		{"stage", &WarmPut{Kind: "pool", Ref: id(1), Plan: "standard", Steps: []*WarmStep{{Class: "other"}}}},
		{"quota", &WarmPut{Kind: "pool", Ref: id(1), Plan: "standard", Steps: step, Quotas: []*WarmQuota{{Class: "other", Quota: 1 << 30}}}},
		{"day", &WarmRoll{Day: -1}},
		{"items", &WarmJudge{}},
		{"items", &WarmBatch{}},
		{"kind", &WarmBatch{Items: []*WarmItem{{Kind: 5, Node: id(1)}}}},
		{"items", &WarmBatch{Items: []*WarmItem{{Kind: 1, Class: 64, Node: id(1)}}}},
		{"node", &WarmBatch{Items: []*WarmItem{{Kind: 1}}}},
		{"items", &WarmTell{}},
		{"items", &WarmTell{Items: []*WarmTold{{Class: 64, Node: id(1), Attempts: 1}}}},
		{"items", &WarmTell{Items: []*WarmTold{{Day: -1, Node: id(1), Attempts: 1}}}},
		{"items", &WarmTell{Items: []*WarmTold{{Node: id(1)}}}},
		{"items", &WarmTell{Items: []*WarmTold{{Node: id(1), Attempts: 2, Accepted: 2, Deferred: 1}}}},
		{"node", &WarmTell{Items: []*WarmTold{{Attempts: 1}}}},
	} {
		f, ok := tc.c.Validate().(*fault.Error)
		if !ok || f.Field != tc.field || strings.TrimSpace(f.Public) == "" {
			t.Errorf("%T: %v, want a refusal of %s", tc.c, f, tc.field)
		}
	}
}
