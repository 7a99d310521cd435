package control

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/warmup"
)

// WarmVersion is the version of the commands that brought warm-up.
const WarmVersion = 4

// WarmTellVersion is the version of the commands in which relays tell what
// providers answered, and days are judged by that.
const WarmTellVersion = 5

// WarmKind says what warms up.
type WarmKind string

// The kinds.
const (
	WarmSource WarmKind = "source"
	WarmPool   WarmKind = "pool"
	WarmDomain WarmKind = "domain" // of the From header
)

// WarmKinds are all of them.
var WarmKinds = []string{string(WarmSource), string(WarmPool), string(WarmDomain)}

// WarmCalendar is the one row about days.
type WarmCalendar struct {
	Today    warmup.Day
	Classes  []string // of providers, by number
	Subjects uint64   // numbers given so far
	Revision uint64
}

// ClassName returns the name of a class.
func (c *WarmCalendar) ClassName(n warmup.Class) string {
	if int(n) < len(c.Classes) {
		return c.Classes[n]
	}
	return ""
}

// Class returns the number of a class.
func (c *WarmCalendar) Class(name string) (warmup.Class, bool) {
	for i, have := range c.Classes {
		if have == name {
			return warmup.Class(i), true
		}
	}
	return 0, false
}

// WarmSubject is something that warms up.
type WarmSubject struct {
	Number    warmup.Subject
	Kind      WarmKind
	Ref       string // octets of the address's or pool's id, or the domain's name
	Plan      string
	StartDay  warmup.Day
	Judged    warmup.Day // the last day that was judged
	QuotaDay  warmup.Day // the last day that has quotas
	Stopped   warmup.Day // the day on which it was stopped; 0: it warms up
	Hold      string     // why it stays at its stages; empty: it goes on
	Tracks    []WarmTrack
	Proofs    []WarmProof
	CreatedAt time.Time
	Revision  uint64
}

// WarmTrack is where a subject stands with a class of providers.
type WarmTrack struct {
	Class warmup.Class
	warmup.Progress
	Why string // of the last judgement
}

// WarmProof is a volume that a subject has shown to be welcome.
type WarmProof struct {
	Class    string
	Volume   uint32 // recipients a day
	Evidence string
}

// Warms reports whether the subject has quotas.
func (s *WarmSubject) Warms() bool { return s.Stopped == 0 }

// Source returns the id of a subject that is an address.
func (s *WarmSubject) Source() (id ids.Source) {
	if s.Kind == WarmSource {
		copy(id[:], s.Ref)
	}
	return id
}

// Pool returns the id of a subject that is a pool.
func (s *WarmSubject) Pool() (id ids.Pool) {
	if s.Kind == WarmPool {
		copy(id[:], s.Ref)
	}
	return id
}

// Domain returns the name of a subject that is a sending domain.
func (s *WarmSubject) Domain() mailaddr.Domain {
	if s.Kind == WarmDomain {
		return mailaddr.Domain(s.Ref)
	}
	return ""
}

// RefText returns the subject's id or name as people write it.
func (s *WarmSubject) RefText() string {
	switch s.Kind {
	case WarmSource:
		return s.Source().String()
	case WarmPool:
		return s.Pool().String()
	}
	return s.Ref
}

// Summary renders the row for the audit tail.
func (s *WarmSubject) Summary() string {
	low, high := 0, 0
	for i := range s.Tracks {
		stage := s.Tracks[i].Stage
		if low == 0 || stage < low {
			low = stage
		}
		high = max(high, stage)
	}
	return fmt.Sprintf("kind=%s plan=%s stages=%d-%d hold=%q stopped=%t", s.Kind, s.Plan, low, high, s.Hold, s.Stopped != 0)
}

// WarmBlock is the ledger of some subjects on one day.
type WarmBlock struct {
	Day      warmup.Day
	Block    uint64
	Lines    []WarmLine // by subject
	Revision uint64
}

// WarmLine is a row of shared/warmup in its own encoding.
type WarmLine struct {
	Subject warmup.Subject
	Row     []byte
}

// warmBlockSubjects is how many addresses share a block. Pools and domains, whose
// rows have a part for each relay, have one each.
const warmBlockSubjects = 8

// WarmBlockOf returns the block of a subject's rows.
func WarmBlockOf(kind WarmKind, s warmup.Subject) uint64 {
	if kind == WarmSource {
		return uint64(s) / warmBlockSubjects
	}
	return 1<<63 | uint64(s)
}

// WarmNode returns the number by which the ledger knows a relay: the random part of
// its id, which no two share.
func WarmNode(id ids.Node) warmup.Node { return warmup.Node(binary.BigEndian.Uint64(id[8:])) }

// WarmOutcome is what a WarmBatch led to, item by item.
type WarmOutcome struct {
	Replies []WarmReply
}

// WarmHeard is what a WarmTell led to: of each item, the attempts that are known now.
// Below those that were told, it was not taken: the day is over, or nothing warms up.
type WarmHeard struct {
	Attempts []int64
}

// WarmReply is the state of a reservation after an item.
type WarmReply struct {
	warmup.Reply
	Quota     uint32
	Committed uint32 // of the quota, by all relays
	Err       error  // why it cannot be reserved; nil for the others
}
