package schedule

import (
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var (
	four = Source{ID: ids.Source{15: 4}, Weight: 1}
	six  = Source{ID: ids.Source{15: 6}, Weight: 1, IPv6: true}
)

// familyWorld is a scheduler with one queue that always has work.
type familyWorld struct {
	s   *Scheduler
	key Key
	now time.Time
}

func newFamilyWorld(f Families, shape Shape, sources ...Source) *familyWorld {
	w := &familyWorld{s: New(Limits{}), key: testKey(1, policy.Bulk, "a.test"), now: time.Unix(1_800_000_000, 0)}
	w.s.SetPool(testPool(1), sources)
	w.s.SetHead(1, w.key, w.now, 1, w.now)
	w.s.Next(w.now)
	w.s.Routed(w.key.Domain, Route{Provider: "p", Site: "mx", Shape: shape, Families: f, Expires: w.now.Add(24 * time.Hour)}, w.now)
	return w
}

// open returns the source of the session that is opened next, zero for none.
func (w *familyWorld) open() (id ids.Source, session Session) {
	for range 3 {
		for _, f := range w.s.Next(w.now) {
			if f.Kind == Open {
				return f.Lane.Source, f.Session
			}
		}
	}
	return id, 0
}

func TestFamilies(t *testing.T) {
	for _, tc := range []struct {
		name    string
		f       Families
		sources []Source
		want    map[ids.Source]bool // sources used over several sessions
		why     string
	}{
		{"either", Families{}, []Source{four, six}, map[ids.Source]bool{four.ID: true, six.ID: true}, ""},
		{"hosts without IPv6", Families{NoIPv6: true}, []Source{four, six}, map[ids.Source]bool{four.ID: true}, ""},
		{"hosts without IPv4", Families{NoIPv4: true}, []Source{four, six}, map[ids.Source]bool{six.ID: true}, ""},
		{"IPv4 first", Families{First: IPv4First}, []Source{six, four}, map[ids.Source]bool{four.ID: true}, ""},
		{"IPv6 first", Families{First: IPv6First}, []Source{four, six}, map[ids.Source]bool{six.ID: true}, ""},
		{"IPv4 first without such hosts", Families{First: IPv4First, NoIPv4: true}, []Source{four, six}, map[ids.Source]bool{six.ID: true}, ""},
		{"IPv4 first without such sources", Families{First: IPv4First}, []Source{six}, map[ids.Source]bool{six.ID: true}, ""},
		{"nothing fits", Families{NoIPv6: true}, []Source{six}, map[ids.Source]bool{six.ID: true}, ""}, // the attempt says why
		{"IPv4 only", Families{NoIPv6: true, Refused: true}, []Source{six, four}, map[ids.Source]bool{four.ID: true}, ""},
		{"IPv4 only without such sources", Families{NoIPv6: true, Refused: true}, []Source{six}, map[ids.Source]bool{}, "family"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newFamilyWorld(tc.f, Shape{}, tc.sources...)
			used, sessions := map[ids.Source]bool{}, 0
			for range 6 {
				id, session := w.open()
				if session == 0 {
					break
				}
				used[id] = true
				w.s.Ended(session)
				w.s.SetHead(1, w.key, time.Time{}, 0, w.now)
				w.now = w.now.Add(time.Second)
				w.s.SetHead(1, w.key, w.now, 1, w.now)
				sessions++
			}
			if sessions != 6 && tc.why == "" {
				t.Errorf("%d sessions", sessions)
			}
			if len(used) != len(tc.want) {
				t.Errorf("used %v, want %v", used, tc.want)
			}
			for id := range used {
				if !tc.want[id] {
					t.Errorf("used %v, want %v", used, tc.want)
				}
			}
			if why := w.s.Why(1, w.now).Reason; tc.why != "" && why != tc.why {
				t.Errorf("waits for %q, want %q", why, tc.why)
			}
		})
	}
}

// TestSecondFamilyWaitsForTheFirstToFail: a source at its limit is no reason to
// leave its family, one that cannot reach the site is, until it may try again.
func TestSecondFamilyWaitsForTheFirstToFail(t *testing.T) {
	w := newFamilyWorld(Families{First: IPv4First}, Shape{SourceConnections: 1}, four, six)
	id, session := w.open()
	if id != four.ID {
		t.Fatalf("opened from %v", id)
	}
	w.s.SetHead(1, w.key, w.now, 100, w.now)
	w.now = w.now.Add(time.Minute)
	if id, _ := w.open(); !id.IsZero() {
		t.Fatalf("opened from %v beside a busy source of the first family", id)
	}
	w.s.Failed(session, w.now.Add(time.Minute))
	id, session = w.open()
	if id != six.ID {
		t.Fatalf("opened from %v while the first family backs off", id)
	}
	w.s.Ended(session)
	w.now = w.now.Add(2 * time.Minute)
	if id, _ := w.open(); id != four.ID {
		t.Errorf("opened from %v after the back-off", id)
	}
}

// TestPinnedToTheSecondFamily: mail that was greylisted from a source of the
// other family still goes back to it.
func TestPinnedToTheSecondFamily(t *testing.T) {
	for name, f := range map[string]Families{"second": {First: IPv4First}, "no address any more": {NoIPv6: true}} {
		t.Run(name, func(t *testing.T) {
			w := newFamilyWorld(f, Shape{}, four, six)
			w.s.SetHead(1, Key{}, time.Time{}, 0, w.now)
			w.s.SetPinnedHead(2, w.key, Lane{Source: six.ID, Provider: "p"}, w.now, 1, w.now)
			if id, _ := w.open(); id != six.ID {
				t.Errorf("opened from %v", id)
			}
		})
	}
}
