package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func parsed(t testing.TB, sections map[string]string) *Document {
	t.Helper()
	doc, err := Parse(sections)
	if err != nil {
		t.Fatal(err)
	}
	return &doc
}

const twoStreams = `
[[stream]]
tenant = "*"
project = "*"
name = "otp"
kind = "transactional"
pool = "default"
[[stream]]
tenant = "*"
project = "*"
name = "news"
kind = "bulk"
pool = "far"
`

func override(provider, kind string, max int) string {
	return fmt.Sprintf("[[limit]]\nprovider = %q\nkind = %q\nscope = \"source\"\nmax = %d\n", provider, kind, max)
}

func TestDiff(t *testing.T) {
	first, second, _ := strings.Cut(strings.TrimPrefix(twoStreams, "\n[[stream]]"), "[[stream]]")
	swapped := "[[stream]]" + second + "[[stream]]" + first
	for _, tc := range []struct {
		name     string
		from, to map[string]string
		want     []string
	}{
		{"nothing", nil, nil, nil},
		{"a comment", nil, map[string]string{"queue": "# slower?\n"}, nil},
		{"a duration", nil, map[string]string{"queue": "retry_max = \"7h\"\n"}, []string{`queue.retry_max: "4h" -> "7h"`}},
		{"a list", nil, map[string]string{"queue": "retry = [\"1m\"]\n"}, []string{`queue.retry: ["5m", "10m", "20m", "30m"] -> ["1m"]`}},
		{"two sections", nil, map[string]string{"delivery": "sign_dkim = false\n", "queue": "retry_max = \"7h\"\n"}, []string{`queue.retry_max: "4h" -> "7h"`, `delivery.sign_dkim: true -> false`}},
		{"a new entry", nil, map[string]string{"providers": override("orange", "connections", 0)}, []string{
			`providers.limit["orange/connections/source"].kind:  -> "connections"`, `providers.limit["orange/connections/source"].max:  -> 0`,
			`providers.limit["orange/connections/source"].provider:  -> "orange"`, `providers.limit["orange/connections/source"].scope:  -> "source"`}},
		{"the order of entries", map[string]string{"streams": twoStreams}, map[string]string{"streams": swapped}, nil},
		{"a key of an entry", map[string]string{"streams": twoStreams}, map[string]string{"streams": strings.Replace(twoStreams, `"far"`, `"near"`, 1)}, []string{`streams.stream["*/*/news"].pool: "far" -> "near"`}},
		{"weights", map[string]string{"pools": worldPools}, map[string]string{"pools": strings.Replace(worldPools, "= 20", "= 5", 1)}, []string{`pools.pool["default"].weights["192.0.2.10"]: 20 -> 5`}},
	} {
		var got []string
		for _, c := range Diff(parsed(t, tc.from), parsed(t, tc.to)) {
			got = append(got, fmt.Sprintf("%s.%s: %s -> %s", c.Section, c.Key, c.Old, c.New))
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s:\n got %q\nwant %q", tc.name, got, tc.want)
		}
		// The way back is the same with old and new exchanged.
		if back := Diff(parsed(t, tc.to), parsed(t, tc.from)); len(back) != len(tc.want) {
			t.Errorf("%s: the way back has %d changes, want %d", tc.name, len(back), len(tc.want))
		}
	}
}

func TestImpact(t *testing.T) {
	w := newWorld(t, nil)
	all := len(providerNames(newProviderTable(&parsed(t, nil).Providers, &problems{})))
	for _, tc := range []struct {
		name     string
		from, to map[string]string
		want     string
		lanes    int
	}{
		{"nothing", nil, map[string]string{"queue": "# only words\n"}, "nothing changes", 0},
		{"a lower limit", nil, map[string]string{"providers": override("orange", "connections", 1)}, "2 pools, 4 lanes; lowers orange on 4 sources", 4},
		{"a limit that goes", map[string]string{"providers": override("orange", "connections", 1)}, map[string]string{"providers": override("orange", "connections", 0)}, "2 pools, 4 lanes; raises orange on 4 sources", 4},
		{"an unlisted provider", nil, map[string]string{"providers": override("mx:example.net", "messages_per_connection", 3)}, "2 pools, 4 lanes; lowers mx:example.net on 4 sources", 4},
		{"a source out of use", nil, map[string]string{"pools": "[[pool]]\nname = \"default\"\n[pool.weights]\n\"192.0.2.12\" = 0\n"}, fmt.Sprintf("1 pool, %d lanes", all), all},
		{"a source that was out of use", map[string]string{"pools": worldPools}, map[string]string{"pools": worldPools, "providers": override("orange", "connections", 1)}, "2 pools, 3 lanes; lowers orange on 3 sources", 3},
		{"a stream", map[string]string{"streams": twoStreams}, map[string]string{"streams": strings.Replace(twoStreams, `"far"`, `"default"`, 1)}, "2 pools, 0 lanes; changes stream */*/news", 0},
		{"settings", nil, map[string]string{"queue": "retry_max = \"7h\"\n", "storage": "min_free_inodes = 7000\n"}, "settings of every relay: queue, storage", 0},
	} {
		got := ImpactOf(parsed(t, tc.from), parsed(t, tc.to), &w.view)
		if got.String() != tc.want || got.Lanes != tc.lanes {
			t.Errorf("%s: got %q with %d lanes, want %q with %d", tc.name, got, got.Lanes, tc.want, tc.lanes)
		}
	}
	everything := ImpactOf(parsed(t, nil), parsed(t, map[string]string{"providers": override("*", "connections", 1)}), &w.view)
	if len(everything.Providers) != all || everything.Lanes != 4*all || !strings.Contains(everything.String(), "more providers") {
		t.Errorf("got %v", everything)
	}
}
