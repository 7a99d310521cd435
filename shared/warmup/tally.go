package warmup

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// Tally counts what providers answered to what was offered on a day, in
// recipients of transactions: one who is deferred counts again when tried again.
// What got no answer does not count. Those refused for good for other reasons, like
// a mailbox that is full, are the attempts that are in no other count.
type Tally struct {
	Attempts   int64
	Accepted   int64
	Deferred   int64
	Blocked    int64 // refused for good because of who sends, or of the content
	Hard       int64 // refused for good because there is no such recipient
	Signatures int64 // of the attempts, deferred or refused: the source is blocked
}

// Settled is how many attempts ended: the others come again.
func (t *Tally) Settled() int64 { return t.Attempts - t.Deferred }

// Sound reports whether the counts can be of one day.
func (t *Tally) Sound() bool {
	for _, n := range t.counts() {
		if n < 0 || n > MaxQuota {
			return false
		}
	}
	return t.Accepted+t.Deferred+t.Blocked+t.Hard <= t.Attempts && t.Signatures <= t.Attempts
}

func (t *Tally) counts() [tallyCounts]int64 {
	return [...]int64{t.Attempts, t.Accepted, t.Deferred, t.Blocked, t.Hard, t.Signatures}
}

const tallyCounts = 6

func tallyOf(n [tallyCounts]int64) Tally {
	return Tally{Attempts: n[0], Accepted: n[1], Deferred: n[2], Blocked: n[3], Hard: n[4], Signatures: n[5]}
}

// Add adds another relay's counts.
func (t *Tally) Add(o Tally) {
	n, more := t.counts(), o.counts()
	for i := range n {
		n[i] += more[i]
	}
	*t = tallyOf(n)
}

// Told is a Tally of one relay, cumulative over the day.
type Told struct {
	Subject Subject
	Class   Class
	Day     Day
	Node    Node
	Epoch   uint64
	Tally
}

// tally is a Tally of one holder, packed.
type tally struct {
	counts [tallyCounts]uint32
	holder uint16 // index of row.holders plus one
	class  Class
}

func (t *tally) order(o *tally) int {
	return cmp.Or(cmp.Compare(t.class, o.class), cmp.Compare(t.holder, o.holder))
}

func (t *tally) set(n Tally) {
	for i, v := range n.counts() {
		t.counts[i] = uint32(v)
	}
}

func (t *tally) unpacked() Tally {
	var n [tallyCounts]int64
	for i, v := range t.counts {
		n[i] = int64(v)
	}
	return tallyOf(n)
}

// Tell takes what a relay counted. Told twice or out of order, the one with the
// most attempts counts: a relay's attempts only rise, and one that restarts and
// has forgotten the last of them is heard again when it has counted more. What is
// told of a day that is not open, or of a subject without quotas, is lost.
func (l *Ledger) Tell(t Told) {
	p := l.page(t.Day)
	if p == nil || t.Class >= MaxClasses || t.Attempts == 0 || !t.Sound() {
		return
	}
	w := p.rows[t.Subject]
	if w == nil {
		return
	}
	h := w.holder(t.Node, t.Epoch)
	if h == 0 {
		return
	}
	own := tally{holder: h, class: t.Class}
	own.set(t.Tally)
	at, found := slices.BinarySearchFunc(w.tallies, own, func(a, b tally) int { return a.order(&b) })
	switch {
	case !found:
		w.tallies = slices.Insert(w.tallies, at, own)
	case w.tallies[at].counts[0] < own.counts[0]:
		w.tallies[at] = own
	}
}

// Shown returns what all relays counted of a subject's day.
func (l *Ledger) Shown(s Subject, c Class, d Day) (sum Tally) {
	p := l.page(d)
	if p == nil || p.rows[s] == nil {
		return sum
	}
	for i := range p.rows[s].tallies {
		if t := &p.rows[s].tallies[i]; t.class == c {
			sum.Add(t.unpacked())
		}
	}
	return sum
}

// ShownBy returns what one relay, under an epoch, told.
func (l *Ledger) ShownBy(s Subject, c Class, d Day, n Node, epoch uint64) Tally {
	p := l.page(d)
	if p == nil || p.rows[s] == nil {
		return Tally{}
	}
	w := p.rows[s]
	for i := range w.tallies {
		t := &w.tallies[i]
		if h := &w.holders[t.holder-1]; t.class == c && h.node == n && h.epoch == epoch {
			return t.unpacked()
		}
	}
	return Tally{}
}

// appendTallies writes the attempts that were in no other count for the accepted ones:
// they are few, and the others follow.
func appendTallies(dst []byte, tallies []tally) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(tallies)))
	for i := range tallies {
		t := &tallies[i]
		n := t.unpacked()
		dst = binary.AppendUvarint(dst, uint64(t.holder-1)*MaxClasses+uint64(t.class))
		for _, v := range [tallyCounts]int64{n.Attempts, n.other(), n.Deferred, n.Blocked, n.Hard, n.Signatures} {
			dst = binary.AppendUvarint(dst, uint64(v))
		}
	}
	return dst
}

// other is how many were refused for good for other reasons.
func (t *Tally) other() int64 { return t.Attempts - t.Accepted - t.Deferred - t.Blocked - t.Hard }

// tallies reads what appendTallies wrote.
func (r *rowReader) tallies(holders int) []tally {
	n := r.count(MaxClasses * maxHolders)
	if n == 0 {
		r.bad = true // such a row has the format without tallies
		return nil
	}
	out := make([]tally, n)
	for i := range out {
		t := &out[i]
		of := r.uvarint()
		var v [tallyCounts]int64
		for k := range v {
			v[k] = int64(min(r.uvarint(), MaxQuota+1))
		}
		whole := Tally{Attempts: v[0], Accepted: v[0] - v[1] - v[2] - v[3] - v[4], Deferred: v[2], Blocked: v[3], Hard: v[4], Signatures: v[5]}
		t.set(whole)
		t.class, t.holder = Class(of%MaxClasses), uint16(min(of/MaxClasses, maxHolders)+1)
		if r.bad || int(t.holder) > holders || whole.Attempts == 0 || !whole.Sound() || i > 0 && out[i-1].order(t) >= 0 {
			r.bad = true
			return nil
		}
	}
	return out
}
