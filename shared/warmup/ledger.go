package warmup

import (
	"cmp"
	"math"
	"slices"

	"github.com/relais-mta/relais/shared/fault"
)

// Subject numbers what warms up: an address, a domain, a pool. Node numbers a
// relay. The cluster gives each number once.
type (
	Subject uint64
	Node    uint64
)

// Class numbers a class of providers within a plan.
type Class uint8

// Bounds of the ledger.
const (
	MaxClasses  = 64
	MaxQuota    = 100_000_000
	MaxSubjects = 200_000
	maxHolders  = 10_000 // relays and epochs that reserve from one subject on one day
)

// Request asks for a reservation to be raised to an amount. Seq rises with every
// request and cut of a node about a subject and a day, also across restarts, so
// that what is repeated or comes late changes nothing.
type Request struct {
	Subject Subject
	Class   Class
	Day     Day
	Node    Node
	Epoch   uint64 // of the address's assignment; 0 for subjects without owner
	Seq     uint64
	UpTo    uint32 // cumulative over the day
}

// Reply answers a Request or a Cut with the state of the reservation.
type Reply struct {
	Seq    uint64 // of the request
	Amount uint32 // reserved, cumulative over the day
	Used   uint32 // settled
}

// Settlement tells how much of a reservation is spent, cumulative over the day.
type Settlement struct {
	Subject Subject
	Class   Class
	Day     Day
	Node    Node
	Epoch   uint64
	Used    uint32
}

// Cut gives a reservation back down to an amount: at the end of a day, when the
// address moves, or because the leader recalled it.
type Cut struct {
	Settlement
	Seq    uint64
	Amount uint32
}

// Ledger keeps the quotas of one time zone's days. Yesterday, today and tomorrow
// are open. Applying the same commands in the same order gives the same ledger.
type Ledger struct {
	today  Day
	pages  [3]*page // yesterday, today, tomorrow
	owners map[Subject]uint64
}

type page struct {
	rows map[Subject]*row
}

// row is one subject's day, packed: a hundred thousand of them with twenty classes
// each are to stay below 64 MiB. The first reservation of a class lies beside its
// quota; further ones, of shared subjects, in more.
type row struct {
	cells   []cell // in the order of classes
	more    []cell // in the order of classes, then of holders
	holders []holder
	tallies []tally // in the order of classes, then of holders
}

type cell struct {
	quota  uint32
	amount uint32 // reserved
	used   uint32 // settled; at most amount
	holder uint16 // index of row.holders plus one; 0: nothing reserved
	class  Class
}

type holder struct {
	node  Node
	epoch uint64
	seq   uint64
}

// NewLedger returns an empty ledger whose first day is today.
func NewLedger(today Day) *Ledger {
	l := &Ledger{today: today, owners: make(map[Subject]uint64)}
	for i := range l.pages {
		l.pages[i] = &page{rows: make(map[Subject]*row)}
	}
	return l
}

// Today returns the day that began last.
func (l *Ledger) Today() Day { return l.today }

// Roll begins a day. A day that was begun is not begun again, and none is passed
// over without order. What was reserved of the day before yesterday and not given
// back counts as spent for good; late settlements of it are of no use any more.
func (l *Ledger) Roll(day Day, ordered bool) error {
	const op = "warmup.Roll"
	switch {
	case day <= l.today:
		return fault.New(fault.Conflict, op, "%s has begun already: today is %s", day, l.today)
	case day > l.today+1 && !ordered:
		return fault.New(fault.Conflict, op, "from %s to %s is more than a day: it must be ordered", l.today, day)
	}
	for ; l.today < day; l.today++ {
		// Beyond three steps all pages are new.
		if day-l.today > 3 {
			l.today = day - 3
		}
		l.pages[0], l.pages[1], l.pages[2] = l.pages[1], l.pages[2], &page{rows: make(map[Subject]*row)}
	}
	return nil
}

// Assign says under which epoch a subject has its one owner from now on. Epochs
// only rise.
func (l *Ledger) Assign(s Subject, epoch uint64) error {
	if epoch <= l.owners[s] {
		return fault.New(fault.Conflict, "warmup.Assign", "epoch %d of subject %d is not above %d", epoch, s, l.owners[s])
	}
	if l.owners[s] == 0 && len(l.owners) >= MaxSubjects {
		return fault.New(fault.Exhausted, "warmup.Assign", "%d subjects have owners, the most there may be", MaxSubjects)
	}
	l.owners[s] = epoch
	return nil
}

func (l *Ledger) page(d Day) *page {
	if i := d - l.today + 1; i >= 0 && int(i) < len(l.pages) {
		return l.pages[i]
	}
	return nil
}

// SetQuota sets the quota of today or tomorrow. Lowering it takes back nothing
// that is reserved; Recalls says what to ask for.
func (l *Ledger) SetQuota(s Subject, c Class, d Day, quota uint32) error {
	const op = "warmup.SetQuota"
	switch p := l.page(d); {
	case p == nil || d < l.today:
		return fault.Field(op, "day", "is %s, today is %s: write today or tomorrow", d, l.today)
	case c >= MaxClasses:
		return fault.Field(op, "class", "is %d, write at most %d", c, MaxClasses-1)
	case quota > MaxQuota:
		return fault.Field(op, "quota", "is %d, write at most %d", quota, MaxQuota)
	case p.rows[s] == nil && len(p.rows) >= MaxSubjects:
		return fault.New(fault.Exhausted, op, "%d subjects warm up, the most there may be", MaxSubjects)
	default:
		p.row(s).cell(c).quota = quota
		return nil
	}
}

// Reserve raises a reservation as far as the quota allows: W1. The error says why
// it cannot be raised at all; the reply is right even then.
func (l *Ledger) Reserve(r Request) (Reply, error) {
	const op = "warmup.Reserve"
	p := l.page(r.Day)
	if p == nil || r.Day < l.today {
		return Reply{Seq: r.Seq}, fault.New(fault.Conflict, op, "%s is over or not open: today is %s", r.Day, l.today)
	}
	w := p.rows[r.Subject]
	if w == nil || w.find(r.Class) == nil {
		return Reply{Seq: r.Seq}, fault.New(fault.NotFound, op, "subject %d has no quota of class %d on %s", r.Subject, r.Class, r.Day)
	}
	if owner := l.owners[r.Subject]; r.Epoch != owner {
		// An old owner may account, but not acquire.
		return w.reply(r), fault.New(fault.Denied, op, "epoch %d of subject %d is not the present %d", r.Epoch, r.Subject, owner)
	}
	h, fresh := w.request(r.Node, r.Epoch, r.Seq)
	if h == 0 {
		return Reply{Seq: r.Seq}, fault.New(fault.Exhausted, op, "%d relays reserved from subject %d already", maxHolders, r.Subject)
	}
	if !fresh {
		return w.reply(r), nil
	}
	limit := w.find(r.Class).quota
	if r.Day > l.today {
		limit /= 2 // before a day begins half of it is to be had
	}
	committed := w.committed(r.Class)
	e := w.reservation(r.Class, h)
	if committed < limit && r.UpTo > e.amount {
		e.amount += min(r.UpTo-e.amount, limit-committed)
	}
	return w.reply(r), nil
}

// Settle takes how much of a reservation is spent. Whatever comes twice or out of
// order, the highest counts: W4, W5. What nobody reserved counts too.
func (l *Ledger) Settle(s Settlement) {
	p := l.page(s.Day)
	if p == nil || s.Class >= MaxClasses {
		return
	}
	w := p.rows[s.Subject]
	if w == nil {
		return
	}
	h := w.holder(s.Node, s.Epoch)
	if h == 0 {
		return
	}
	e := w.reservation(s.Class, h)
	e.used = max(e.used, min(s.Used, MaxQuota))
	e.amount = max(e.amount, e.used)
}

// Cut gives back what a relay says that it will not spend, and settles.
func (l *Ledger) Cut(c Cut) Reply {
	r := Request{Subject: c.Subject, Class: c.Class, Day: c.Day, Node: c.Node, Epoch: c.Epoch, Seq: c.Seq}
	l.Settle(c.Settlement)
	p := l.page(c.Day)
	if p == nil || p.rows[c.Subject] == nil {
		return Reply{Seq: c.Seq}
	}
	w := p.rows[c.Subject]
	if h, fresh := w.request(c.Node, c.Epoch, c.Seq); h != 0 && fresh {
		e := w.reservation(c.Class, h)
		e.amount = max(e.used, min(e.amount, c.Amount))
	}
	return w.reply(r)
}

// Totals returns a subject's quota, what is reserved of it, and what of that is
// settled as spent.
func (l *Ledger) Totals(s Subject, c Class, d Day) (quota, reserved, used uint64) {
	p := l.page(d)
	if p == nil || p.rows[s] == nil {
		return 0, 0, 0
	}
	w := p.rows[s]
	if e := w.find(c); e != nil {
		quota = uint64(e.quota)
	}
	w.each(c, func(e *cell) { reserved, used = reserved+uint64(e.amount), used+uint64(e.used) })
	return quota, reserved, used
}

// Reserved returns what one relay, under an epoch, reserved and what of that is
// settled.
func (l *Ledger) Reserved(s Subject, c Class, d Day, n Node, epoch uint64) (amount, used uint32) {
	p := l.page(d)
	if p == nil || p.rows[s] == nil {
		return 0, 0
	}
	r := p.rows[s].reply(Request{Class: c, Node: n, Epoch: epoch})
	return r.Amount, r.Used
}

// Recall asks a relay to cut its reservation down to an amount.
type Recall struct {
	Node   Node
	Epoch  uint64
	Amount uint32
}

// Recalls returns what must come back for a quota that was lowered, in the order
// in which relays first reserved. What is not settled is cut in proportion. Until
// a relay confirms, its whole reservation counts.
func (l *Ledger) Recalls(s Subject, c Class, d Day) []Recall {
	quota, reserved, used := l.Totals(s, c, d)
	if reserved <= quota {
		return nil
	}
	var out []Recall
	left, open := max(quota, used)-used, max(reserved-used, 1)
	w := l.page(d).rows[s]
	w.each(c, func(e *cell) {
		h := w.holders[e.holder-1]
		if keep := e.used + uint32(uint64(e.amount-e.used)*left/open); keep < e.amount {
			out = append(out, Recall{h.node, h.epoch, keep})
		}
	})
	return out
}

func (p *page) row(s Subject) *row {
	w := p.rows[s]
	if w == nil {
		w = &row{}
		p.rows[s] = w
	}
	return w
}

func (w *row) search(c Class) (int, bool) {
	return slices.BinarySearchFunc(w.cells, c, func(e cell, c Class) int { return cmp.Compare(e.class, c) })
}

func (w *row) find(c Class) *cell {
	if at, found := w.search(c); found {
		return &w.cells[at]
	}
	return nil
}

// cell returns a class's cell and makes it if need be. Rows are kept as tight as
// they can be: they outnumber their changes.
func (w *row) cell(c Class) *cell {
	at, found := w.search(c)
	if !found {
		grown := make([]cell, len(w.cells)+1)
		copy(grown, w.cells[:at])
		copy(grown[at+1:], w.cells[at:])
		grown[at].class = c
		w.cells = grown
	}
	return &w.cells[at]
}

// holder returns the index plus one of who reserves, or 0 if there are too many.
func (w *row) holder(n Node, epoch uint64) uint16 {
	for i := range w.holders {
		if w.holders[i].node == n && w.holders[i].epoch == epoch {
			return uint16(i + 1)
		}
	}
	if len(w.holders) >= maxHolders {
		return 0
	}
	w.holders = append(w.holders, holder{node: n, epoch: epoch})
	return uint16(len(w.holders))
}

// request notes a request's number and reports whether it is new.
func (w *row) request(n Node, epoch, seq uint64) (h uint16, fresh bool) {
	h = w.holder(n, epoch)
	if h == 0 || seq <= w.holders[h-1].seq {
		return h, false
	}
	w.holders[h-1].seq = seq
	return h, true
}

// reservation returns a holder's part of a class and makes it if need be.
func (w *row) reservation(c Class, h uint16) *cell {
	first := w.cell(c)
	if first.holder == 0 {
		first.holder = h
	}
	if first.holder == h {
		return first
	}
	at, found := slices.BinarySearchFunc(w.more, cell{class: c, holder: h}, func(a, b cell) int {
		return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.holder, b.holder))
	})
	if !found {
		w.more = slices.Insert(w.more, at, cell{class: c, holder: h})
	}
	return &w.more[at]
}

// each calls fn for every reservation of a class.
func (w *row) each(c Class, fn func(*cell)) {
	if e := w.find(c); e != nil && e.holder != 0 {
		fn(e)
	}
	at, _ := slices.BinarySearchFunc(w.more, c, func(e cell, c Class) int { return cmp.Compare(e.class, c) })
	for ; at < len(w.more) && w.more[at].class == c; at++ {
		fn(&w.more[at])
	}
}

// committed is what of a class's quota is spent or may be.
func (w *row) committed(c Class) uint32 {
	sum := uint64(0) // late settlements of many relays may pass 32 bits
	w.each(c, func(e *cell) { sum += uint64(e.amount) })
	return uint32(min(sum, math.MaxUint32))
}

func (w *row) reply(r Request) Reply {
	out := Reply{Seq: r.Seq}
	w.each(r.Class, func(e *cell) {
		if h := w.holders[e.holder-1]; h.node == r.Node && h.epoch == r.Epoch {
			out.Amount, out.Used = e.amount, e.used
		}
	})
	return out
}
