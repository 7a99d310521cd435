package sim

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// trouble is a kind of thing that goes wrong, or is changed, in a world.
type trouble int

// The kinds. Each must come in random worlds.
const (
	late      trouble = iota // a message took more than a second
	lost                     // one was lost
	repeated                 // one came twice
	overtaken                // one came before another that was sent earlier the same way
	oneWay                   // one fell into a cut that is open the other way
	cutOff                   // one fell into a cut of both ways
	relayStops
	serverStops
	clocks // two machines' clocks differ in speed by more than 0.7 percent
	crashes
	unsynced // a crash lost something that was written and not synced
	slowDisk // a disk hung, or took its time
	leaders  // another leader, or the same one started anew
	lostEntries
	unaware // a former leader did not hear for more than a second that it is none
	relayJoins
	relayLeaves
	serverJoins
	serverLeaves
	copies // of machines with their keys
	limitFalls
	limitRises
	quotas
	moves
	days
	troubles
)

var troubleNames = [troubles]string{
	"messages late", "lost", "twice", "overtaken", "cut one way", "cut both ways",
	"relays stop", "servers stop", "clocks differ", "crashes", "unsynced writes lost", "disks slow",
	"leaders change", "entries lost", "leaders unaware", "relays join", "relays leave", "servers join", "servers leave",
	"machines copied", "limits fall", "limits rise", "quotas change", "addresses move", "days begin",
}

// promise is one that the checker looked at while there was something to break.
type promise int

// The promises. I5 follows from I1 and I2 as they are checked; I7 and I8 are what
// calm worlds are held against.
const (
	i1 promise = iota
	i2
	i3
	i4
	i6
	i7
	i8
	w1
	w2
	w3
	w4
	w5
	a1
	a2
	a3
	a4
	promises
)

var promiseNames = [promises]string{"I1", "I2", "I3", "I4", "I6", "I7", "I8", "W1", "W2", "W3", "W4", "W5", "A1", "A2", "A3", "A4"}

// tally counts what happened in a world.
type tally struct {
	met  [troubles]int
	held [promises]int
}

// tallies adds up those of worlds.
type tallies struct {
	tally
	worlds     int
	worldsWith [troubles]int
}

func (s *tallies) add(t *tally) {
	s.worlds++
	for i, n := range t.met {
		if s.met[i] += n; n > 0 {
			s.worldsWith[i]++
		}
	}
	for i, n := range t.held {
		s.held[i] += n
	}
}

// enoughWorlds is from how many on each kind of trouble must have come in one of them,
// if no promise was broken, which ends a run.
const enoughWorlds = 50

// print says what came how often, in which part of the worlds, and how often each
// promise was looked at; what never came is a gap.
func (s *tallies) print(t *testing.T) {
	var met, held []string
	enough := s.worlds >= enoughWorlds && !t.Failed()
	for i, name := range troubleNames {
		met = append(met, fmt.Sprintf("%s %d %% (%d)", name, 100*s.worldsWith[i]/max(s.worlds, 1), s.met[i]))
		if enough && s.worldsWith[i] == 0 {
			t.Errorf("in %d worlds never: %s", s.worlds, name)
		}
	}
	for i, name := range promiseNames {
		held = append(held, fmt.Sprintf("%s %d", name, s.held[i]))
		if enough && s.held[i] == 0 {
			t.Errorf("in %d worlds nothing could have broken %s", s.worlds, name)
		}
	}
	t.Logf("in %% of worlds (times): %s", strings.Join(met, ", "))
	t.Logf("looked at (times): %s", strings.Join(held, ", "))
}

// compareClocks counts a world in which two machines' clocks differ as much as they
// nearly may.
func (w *world) compareClocks() {
	var speeds []int64
	for _, s := range w.servers {
		speeds = append(speeds, s.ppm)
	}
	for _, r := range w.all {
		speeds = append(speeds, r.ppm)
	}
	if slices.Max(speeds)-slices.Min(speeds) > 7000 {
		w.tally.met[clocks]++
	}
}
