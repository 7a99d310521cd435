package e2e

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// begin is a transaction that began at the mail host.
type begin struct {
	at     time.Time
	source netip.Addr
}

// opened is how many connections were open at a time.
type opened struct {
	at    time.Time
	count int
}

// overRate returns by how many events any span of time, however long, has more
// than a rate lets pass in it: what the burst must allow. The times rise. A span
// that has the most begins and ends with an event; of those that end with one the
// best beginning is the one that was best so far.
func overRate(at []time.Time, perMinute float64) (most float64, from, to int) {
	best, begins := math.Inf(1), 0
	for i := range at {
		due := perMinute * at[i].Sub(at[0]).Minutes()
		if before := float64(i) - due; before < best {
			best, begins = before, i
		}
		if over := float64(i+1) - due - best; over > most {
			most, from, to = over, begins, i
		}
	}
	return most, from, to
}

// overOpen returns for how long more connections than most were open, at the
// longest.
func overOpen(seen []opened, most int) (longest time.Duration) {
	var since time.Time
	for _, o := range seen {
		switch {
		case o.count <= most:
			since = time.Time{}
		case since.IsZero():
			since = o.at
		default:
			longest = max(longest, o.at.Sub(since))
		}
	}
	return longest
}

// times returns when transactions began.
func times(begun []begin) []time.Time {
	at := make([]time.Time, len(begun))
	for i := range begun {
		at[i] = begun[i].at
	}
	return at
}

// noticed puts so many events more into spans of what was seen, and so many
// connections, that the limits are passed, and asserts that each is noticed: a
// check that does not look at every span would let some of them through.
func noticed(t *testing.T, at []time.Time, perMinute, burst float64, seen []opened, most int, overlap time.Duration) {
	t.Helper()
	if len(at) == 0 || len(seen) == 0 {
		t.Fatal("nothing was seen")
	}
	tried, whole := 0, at[len(at)-1].Sub(at[0])
	for _, length := range []time.Duration{0, time.Second, whole / 30, whole / 5, whole} {
		for part := range 5 {
			first := at[0].Add((whole - length) * time.Duration(part) / 4)
			span := inside(at, first, first.Add(length))
			// As many as make the span hold one event more than it may.
			extra := int(perMinute*length.Minutes()+burst) + 1 - len(span)
			more := slices.Clone(at)
			for i := range max(extra, 0) {
				more = append(more, first.Add(length*time.Duration(i)/time.Duration(max(extra-1, 1))))
			}
			slices.SortFunc(more, time.Time.Compare)
			if over, _, _ := overRate(more, perMinute); over <= burst {
				t.Errorf("%d events more within %v from %v on are not noticed: %.1f above the rate", extra, length, first.Sub(at[0]), over)
			}
			tried++
		}
	}
	for part := range 5 {
		from := part * (len(seen) - 1) / 5
		more := slices.Clone(seen)
		for i := from; i < len(more); i++ {
			if more[i].count = most + 1; more[i].at.Sub(more[from].at) > overlap {
				break
			}
		}
		if overOpen(more, most) <= overlap {
			t.Errorf("a connection more from %v on is not noticed", more[from].at.Sub(more[0].at))
		}
		tried++
	}
	t.Logf("%d ways to pass the limits were tried on what was seen", tried)
}

// inside returns the times of a span, its ends too.
func inside(at []time.Time, from, to time.Time) []time.Time {
	a, _ := slices.BinarySearchFunc(at, from, time.Time.Compare)
	b, _ := slices.BinarySearchFunc(at, to.Add(1), time.Time.Compare)
	return at[a:b]
}

// TestSharedLimitsAreChecked tries the check of TestSharedLimits: against one that
// looks at every pair of events, and on mail that uses limits up to the last event.
func TestSharedLimitsAreChecked(t *testing.T) {
	start := time.Now()
	r := rand.New(rand.NewPCG(6, 1))
	for range 50 {
		at := []time.Time{start}
		for range 200 {
			at = append(at, at[len(at)-1].Add(time.Duration(r.ExpFloat64()*float64(100*time.Millisecond))))
		}
		want := 0.0
		for i := range at {
			for j := i; j < len(at); j++ {
				want = max(want, float64(j-i+1)-600*at[j].Sub(at[i]).Minutes())
			}
		}
		if got, from, to := overRate(at, 600); math.Abs(got-want) > 1e-6 || math.Abs(float64(to-from+1)-600*at[to].Sub(at[from]).Minutes()-got) > 1e-6 {
			t.Fatalf("%v above the rate from %d to %d, want %v", got, from, to, want)
		}
	}
	// All of the burst at once, then an event each time that one is due.
	var at []time.Time
	for range sharedBurst {
		at = append(at, start)
	}
	for i := range 3000 {
		at = append(at, start.Add(time.Duration(i+1)*time.Minute/sharedPerMinute))
	}
	if over, _, _ := overRate(at, sharedPerMinute); over > sharedBurst+1e-6 {
		t.Errorf("mail within the limit is %v above the rate", over)
	}
	var seen []opened
	for i := range 30_000 {
		seen = append(seen, opened{start.Add(time.Duration(i) * sharedLook), sharedConnections})
	}
	if over := overOpen(seen, sharedConnections); over != 0 {
		t.Errorf("as many connections as allowed are too many for %v", over)
	}
	noticed(t, at, sharedPerMinute, sharedBurst, seen, sharedConnections, sharedOverlap)
}
