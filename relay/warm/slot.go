package warm

import (
	"fmt"
	"time"

	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// key names a reservation.
type key struct {
	Subject warmup.Subject
	Class   warmup.Class
	Day     warmup.Day
	Epoch   uint64 // of the address's assignment; 0 for pools and domains
}

// slot is a reservation of this relay.
type slot struct {
	key
	spender warmup.Spender

	saved   bool // the disk knows it: the ledger may be asked
	probed  bool // what an earlier life of this relay reserved is known
	mark    bool // a higher mark is wanted
	want    uint32
	asked   time.Time // when something was last asked of the leader
	told    time.Time // when the leader was last told what is spent
	settled uint32    // what it was told then and has confirmed
	owed    uint32    // of what was spent, what the leader must have confirmed before all is told
	cutSeq  uint64    // of a cut that waits for its answer; 0: none
	over    bool      // nothing more is spent of it
	plan    string    // that mail was asked about last

	// What the leader said last.
	heard     bool
	quota     uint32
	committed uint32
	stage     uint32
	relays    uint32
	refused   string

	second  int64 // in which spent counts
	spent   uint32
	rate    uint32 // spent in the second before
	hour    int64
	inHour  uint32
	percent int // of the quota that may go within one hour

	refusals struct{ day, hour uint64 } // times that mail found no room

	tally    warmup.Tally // what providers answered
	known    int64        // attempts of it that the leader knows of
	said     int64        // and that it was told last
	saidWhen time.Time
}

// roll counts in the present second and hour.
func (s *slot) roll(now time.Time) {
	if second := now.Unix(); second != s.second {
		s.rate = 0
		if second == s.second+1 {
			s.rate = s.spent
		}
		s.second, s.spent = second, 0
	}
	if hour := now.Unix() / 3600; hour != s.hour {
		s.hour, s.inHour = hour, 0
	}
}

// hourly is how much this relay may spend within one hour, so that the quota is
// spread over the day.
func (s *slot) hourly() uint32 {
	whole := (uint64(s.quota)*uint64(s.percent) + 99) / 100
	return uint32(max(whole/uint64(max(s.relays, 1)), 1))
}

// full reports that no more can be reserved today, as far as is known.
func (s *slot) full() bool { return s.heard && (s.committed >= s.quota || s.refused != "") }

// lacks says what keeps n recipients from being spent now.
type lacks uint8

const (
	nothing     lacks = iota
	aMark             // the disk
	reservation       // the leader's answer
	quota             // the next day
	anHour            // the next hour
)

func (s *slot) lacks(n uint32, now time.Time) lacks {
	s.roll(now)
	switch {
	case s.heard && s.percent < 100 && s.inHour > 0 && s.inHour+n > s.hourly():
		return anHour
	case s.spender.Left() >= n && s.probed:
		if s.spender.Room() >= n {
			return nothing
		}
		return aMark
	case s.full():
		return quota
	}
	return reservation
}

func (s *slot) take(n uint32, now time.Time) bool {
	if !s.spender.Take(n) {
		return false
	}
	s.roll(now)
	s.spent += n
	s.inHour += n
	return true
}

func (s *slot) refund(n uint32) {
	s.spender.Refund(n)
	s.inHour -= min(n, s.inHour)
	s.spent -= min(n, s.spent)
}

// step is by how much a mark is raised at once.
//
// Twice what is wanted, because Raise waits until half of a step is spent.
func (s *slot) step() uint32 { return max(warmup.Step(int(s.rate)), 2*s.want) }

// upTo is how much to have reserved in all.
func (s *slot) upTo() uint32 {
	own := s.spender.Reserved()
	chunk := warmup.Chunk(s.quota, s.committed, own, int(max(s.relays, 1)), max(s.rate*15*60, s.want))
	return own + max(chunk, min(s.want, s.quota-min(s.quota, s.committed)))
}

// text says who holds how much of it.
func (s *slot) text(subject *policy.WarmSubject, what, class string) string {
	used, _ := s.spender.Peek()
	switch {
	case !s.heard:
		return fmt.Sprintf("warm-up of %s by plan %s: no reservation for %s yet", what, subject.Plan, class)
	case s.refused != "":
		return fmt.Sprintf("warm-up of %s by plan %s: %s", what, subject.Plan, s.refused)
	}
	return fmt.Sprintf("warm-up of %s by plan %s: stage %d, %d a day to %s, %d of it reserved by all relays; this relay has %d and spent %d",
		what, subject.Plan, s.stage, s.quota, class, s.committed, s.spender.Reserved(), used)
}
