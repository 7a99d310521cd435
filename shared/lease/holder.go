package lease

import (
	"cmp"
	"slices"
	"time"
)

// minReportGap is the least time between two reports in the long run. One more may
// follow quickReport after another: who reported a moment ago, and is busy now, has
// its share within a second all the same.
const (
	minReportGap = time.Second
	quickReport  = 100 * time.Millisecond
)

// sendsKept is how many reports may be on their way before the oldest is no
// longer remembered; a grant for an older one prolongs nothing.
const sendsKept = 32

// Holder is a relay's half: it knows what the relay may do under every shared
// limit. One goroutine owns it. Instants given to it never go back.
type Holder struct {
	cfg         Config
	node        Node
	incarnation uint64
	weight      int64

	rights []*Rights // in the order of limits
	nonce  uint64
	sends  [sendsKept]struct {
		nonce uint64
		at    Instant
	}
	lastReport Instant
	due        Instant // when the reports so far, a gap apart, would end
	reported   bool
	urgent     bool   // a demand changed
	confirm    bool   // a share became smaller: the sooner that is known, the sooner others have it
	version    uint64 // of what SaveFloors returned last
}

// Rights is what the relay may do under one limit.
type Rights struct {
	limit LimitID
	kind  Kind
	per   time.Duration
	h     *Holder

	stamp   Stamp // of the last grant accepted
	acked   Stamp // of the last grant that is confirmed
	saving  Stamp // of the grant whose floor is being saved
	pending bool  // the floor became smaller, and the disk does not know yet
	given   Stamp // up to here grants are void: the limit was released
	share   Share
	until   Instant // the ceiling ends, or has ended
	stop    Instant // until, less the guard
	leased  bool
	floor   Share
	former  Share // the floor that ended at floorUntil
	soft    bool

	floorUntil Instant
	bucket     bucket // of rates
	open       int64  // of slots

	demand int64
	told   int64 // the demand last reported
	used   int64
	denied int64
	listed uint64 // nonce of the last report that listed it
	quiet  bool   // the leader does not list it any more
}

// NewHolder returns the half of a relay's process that begins at now with what
// its disk holds of floors. An incarnation is higher than any before.
func NewHolder(cfg Config, n Node, incarnation uint64, weight int64, floors []Floor, now Instant) *Holder {
	h := &Holder{cfg: cfg, node: n, incarnation: incarnation, weight: min(max(weight, 1), 1000), lastReport: now}
	for _, f := range floors {
		if !f.Soft && f.Until <= now {
			continue
		}
		r := h.Rights(f.Limit, f.Kind, f.Per)
		r.floor, r.floorUntil, r.soft = f.Share, f.Until, f.Soft
		r.refill(now)
	}
	return h
}

// Incarnation returns the incarnation of the process.
func (h *Holder) Incarnation() uint64 { return h.incarnation }

// Hello returns what begins a session with a leader.
func (h *Holder) Hello() Hello {
	return Hello{Node: h.node, Incarnation: h.incarnation}
}

// Floors returns what must be on the relay's disk, in the order of limits.
func (h *Holder) Floors() []Floor {
	var out []Floor
	for _, r := range h.rights {
		if !r.floor.zero() {
			out = append(out, Floor{Limit: r.limit, Kind: r.kind, Per: r.per, Share: r.floor, Until: r.floorUntil, Soft: r.soft})
		}
	}
	return out
}

// FloorsUnsaved reports whether a floor became smaller since it was saved. Until
// the smaller one is on stable storage it is not confirmed, for after a crash the
// relay would use the former.
func (h *Holder) FloorsUnsaved() bool {
	return slices.ContainsFunc(h.rights, func(r *Rights) bool { return r.pending })
}

// SaveFloors returns what is to be put on stable storage in place of what is
// there, and a number for FloorsSaved.
func (h *Holder) SaveFloors() ([]Floor, uint64) {
	h.version++
	for _, r := range h.rights {
		r.saving = r.stamp
	}
	return h.Floors(), h.version
}

// FloorsSaved says that what SaveFloors returned with the number is on stable
// storage. An older number than the last changes nothing.
func (h *Holder) FloorsSaved(version uint64) {
	if version != h.version {
		return
	}
	h.confirm = true
	for _, r := range h.rights {
		if r.saving.Compare(r.acked) > 0 {
			r.acked = r.saving
		}
		r.pending = r.pending && r.saving != r.stamp
	}
}

// Rights returns the relay's rights under a limit, none at first. The pointer
// stays good.
func (h *Holder) Rights(id LimitID, k Kind, per time.Duration) *Rights {
	at, found := h.find(id)
	if !found {
		h.rights = slices.Insert(h.rights, at, &Rights{limit: id, kind: k, per: per, h: h})
	}
	return h.rights[at]
}

// Forget drops a limit that does not exist any more. Its number is never used again.
func (h *Holder) Forget(id LimitID) {
	if at, found := h.find(id); found {
		h.rights = slices.Delete(h.rights, at, at+1)
	}
}

func (h *Holder) find(id LimitID) (int, bool) {
	return slices.BinarySearchFunc(h.rights, id, func(r *Rights, id LimitID) int { return cmp.Compare(r.limit, id) })
}

// SetDemand says what the relay could use of a limit now, in the unit of
// amounts. A change of more than a fifth has the next report sent early: at once
// after a pause, else when a second per report has gone by.
func (h *Holder) SetDemand(r *Rights, demand int64) {
	r.demand = max(demand, 0)
	if moved := r.demand - r.told; moved > r.told/5 || -moved > r.told/5 {
		h.urgent = true
	}
}

// ReportAt returns when the next report is due. Spread is 0 to 999, another one
// each time: reports come every third of a TTL, more or less a fifth.
func (h *Holder) ReportAt(spread int) Instant {
	if !h.reported {
		return h.lastReport
	}
	if h.confirm {
		return h.lastReport
	}
	if h.urgent {
		return max(h.lastReport.Add(quickReport), h.due.Add(-minReportGap))
	}
	refresh := h.cfg.Refresh()
	return h.lastReport.Add(refresh - refresh/5 + time.Duration(spread)*(2*refresh/5)/1000)
}

// Report returns the report to be sent. What it earns counts from now, which is
// therefore taken before the report is written.
func (h *Holder) Report(now Instant) Report {
	h.nonce++
	slot := &h.sends[h.nonce%sendsKept]
	slot.nonce, slot.at = h.nonce, now
	h.due = min(max(h.due, now), now.Add(minReportGap)).Add(minReportGap)
	h.lastReport, h.reported, h.urgent, h.confirm = now, true, false, false
	out := Report{Node: h.node, Incarnation: h.incarnation, Nonce: h.nonce, Weight: h.weight}
	for _, r := range h.rights {
		r.settle(now)
		if r.quiet && r.demand == 0 && r.open == 0 && !r.leased && r.floor.zero() {
			continue
		}
		r.listed, r.quiet = h.nonce, false
		out.Lines = append(out.Lines, Line{
			Limit: r.limit, Demand: r.demand, Held: r.held(), Stamp: r.acked, Used: r.used, Denied: r.denied,
		})
		r.told, r.used, r.denied = r.demand, 0, 0
	}
	return out
}

// Grant takes what a leader grants. What is for another process, or older than
// what is known, changes nothing.
func (h *Holder) Grant(now Instant, g *Grant) {
	if g.Node != h.node || g.Incarnation != h.incarnation {
		return
	}
	// A grant is good for a TTL from when the report was sent that earned it:
	// when it arrives means nothing.
	var sent Instant
	known := false
	if slot := h.sends[g.Nonce%sendsKept]; g.Nonce > 0 && slot.nonce == g.Nonce {
		sent, known = slot.at, true
	}
	for i := range g.Lines {
		l := &g.Lines[i]
		r := h.Rights(l.Limit, l.Kind, l.Per)
		if r.kind != l.Kind || r.per != l.Per {
			continue // a limit that the relay does not know yet as it is now
		}
		stamp := Stamp{g.Generation, g.Term, l.Seq}
		if stamp.Compare(r.stamp) < 0 || stamp.Compare(r.given) <= 0 {
			continue
		}
		if !r.share.add(r.floor).within(l.Share.add(l.Floor)) {
			h.confirm = true
		}
		r.accept(now, stamp, l)
		if known {
			r.renew(now, sent)
		}
	}
	if g.Reply {
		h.hush(g)
	}
}

// accept takes the shares of one line.
func (r *Rights) accept(now Instant, stamp Stamp, l *GrantLine) {
	r.settle(now)
	r.pending = r.pending || !r.floor.within(l.Floor)
	r.stamp, r.quiet = stamp, false
	r.share, r.floor, r.former, r.soft = l.Share, l.Floor, Share{}, l.Soft
	r.refill(now)
	if !r.pending {
		r.acked = stamp
	}
}

// renew prolongs the ceiling and the floor by a report sent at an instant.
func (r *Rights) renew(now, sent Instant) {
	if end := sent.Add(r.h.cfg.TTL); end > r.until && !r.share.zero() {
		r.until, r.stop = end, end.Add(-r.h.cfg.Guard)
	}
	if end := sent.Add(r.h.cfg.FloorTTL); end > r.floorUntil && !r.floor.zero() {
		r.floorUntil = end
	}
	r.settle(now)
	if live := !r.share.zero() && now < r.stop; live != r.leased {
		r.leased = live
		r.refill(now)
	}
}

// hush stops listing what the leader does not list in its reply. The stamps stay:
// a former grant that comes late must still be known as former.
func (h *Holder) hush(g *Grant) {
	for _, r := range h.rights {
		_, listed := slices.BinarySearchFunc(g.Lines, r.limit, func(l GrantLine, id LimitID) int { return cmp.Compare(l.Limit, id) })
		if !listed && r.listed != 0 && r.listed <= g.Nonce {
			r.quiet = true
		}
	}
}

// Release gives up a limit at once and returns the message that says so. False: not
// now, for the disk does not know yet of a smaller floor, which the message would
// confirm with the grant that brought it. After a crash the relay would use the
// former one, and others have it.
func (h *Holder) Release(now Instant, r *Rights) (Release, bool) {
	r.settle(now)
	if r.pending {
		return Release{}, false
	}
	r.given, r.share, r.leased = r.stamp, Share{}, false
	r.refill(now)
	return Release{Node: h.node, Incarnation: h.incarnation, Limit: r.limit, Stamp: r.stamp}, true
}
