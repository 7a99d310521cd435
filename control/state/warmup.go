package state

import (
	"cmp"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// Bounds of warm-up.
const (
	maxWarmSubjects   = warmup.MaxSubjects
	maxWarmBlocks     = 4 * maxWarmSubjects // three open days, and one that is dropped
	maxWarmBlockBytes = 512 << 10           // so that a section of a snapshot holds it
)

var warmCalendarTable = &table[control.WarmCalendar]{
	name: "warm-up calendar", section: sectionWarmCalendar, maxRows: 1, inViews: true,
	key:      func(*control.WarmCalendar) []byte { return singleton },
	record:   func(c *control.WarmCalendar) proto.Message { return command.WarmCalendarRecord(c) },
	row:      unmarshalRow[command.WarmCalendar, control.WarmCalendar],
	revision: func(c *control.WarmCalendar) *uint64 { return &c.Revision },
}

// warmSubjectsTable is not part of views as such: stages and quotas change for
// everything each day, and relays learn of them when they reserve.
var warmSubjectsTable = &table[control.WarmSubject]{
	name: "warm-ups", section: sectionWarmSubjects, maxRows: maxWarmSubjects,
	key:      func(s *control.WarmSubject) []byte { return warmNumber(s.Number) },
	record:   func(s *control.WarmSubject) proto.Message { return command.WarmSubjectRecord(s) },
	row:      unmarshalRow[command.WarmSubject, control.WarmSubject],
	revision: func(s *control.WarmSubject) *uint64 { return &s.Revision },
	indexes:  []index[control.WarmSubject]{{name: "ref", unique: true, key: func(s *control.WarmSubject) []byte { return warmRef(s.Kind, s.Ref) }}},
}

var warmBlocksTable = &table[control.WarmBlock]{
	name: "warm-up ledger", section: sectionWarmBlocks, maxRows: maxWarmBlocks,
	key:      func(b *control.WarmBlock) []byte { return warmBlockKey(b.Day, b.Block) },
	record:   func(b *control.WarmBlock) proto.Message { return command.WarmBlockRecord(b) },
	row:      unmarshalRow[command.WarmBlock, control.WarmBlock],
	revision: func(b *control.WarmBlock) *uint64 { return &b.Revision },
}

func warmNumber(s warmup.Subject) []byte { return binary.BigEndian.AppendUint64(nil, uint64(s)) }

func warmRef(kind control.WarmKind, ref string) []byte { return text(string(kind) + "\x00" + ref) }

func warmBlockKey(d warmup.Day, block uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, uint32(d)), block)
}

// applyWarm applies the commands about warm-up; false: it is none of them.
func (a *applier) applyWarm(body command.Command) (row any, known bool, err error) {
	switch c := body.(type) {
	case *command.WarmPut:
		row, err = a.warmPut(c)
	case *command.WarmStop:
		row, err = a.warmStop(c)
	case *command.WarmRoll:
		row, err = a.warmRoll(c)
	case *command.WarmJudge:
		row, err = a.warmJudge(c)
	case *command.WarmBatch:
		row, err = a.warmBatch(c)
	case *command.WarmTell:
		row, err = a.warmTell(c)
	default:
		return nil, false, nil
	}
	return row, true, err
}

// calendar returns a copy of the calendar.
func (a *applier) calendar() (*control.WarmCalendar, error) {
	old := get(a.txn, warmCalendarTable, "id", singleton)
	if old == nil {
		return nil, fault.New(fault.Unavailable, op, "no day has begun yet: the leader begins one within seconds of the upgrade; try again")
	}
	c := *old
	c.Classes = slices.Clone(old.Classes)
	return &c, nil
}

// warmRoll begins a day and forgets the ledger of those that are no longer open.
func (a *applier) warmRoll(c *command.WarmRoll) (any, error) {
	day := warmup.Day(c.GetDay())
	old := get(a.txn, warmCalendarTable, "id", singleton)
	row := &control.WarmCalendar{Today: day}
	if old != nil {
		if old.Today == day {
			return old, nil // repeated after an unknown outcome
		}
		if err := warmup.NewLedger(old.Today).Roll(day, c.GetOrdered()); err != nil {
			return nil, err
		}
		*row = *old
		row.Today = day
	}
	var over []*control.WarmBlock
	each(a.txn, warmBlocksTable, "id", nil, func(b *control.WarmBlock) bool {
		if b.Day < day-1 {
			over = append(over, b)
		}
		return b.Day < day-1 // in the order of days
	})
	for _, b := range over {
		remove(a, warmBlocksTable, b)
	}
	var gone []*control.WarmSubject
	each(a.txn, warmSubjectsTable, "id", nil, func(s *control.WarmSubject) bool {
		// As long as a day is open on which it sent, it would begin where it was.
		if !s.Warms() && s.Stopped < day-1 {
			gone = append(gone, s)
		}
		return true
	})
	for _, s := range gone {
		remove(a, warmSubjectsTable, s)
	}
	if err := put(a, warmCalendarTable, row); err != nil {
		return nil, err
	}
	before := ""
	if old != nil {
		before = old.Today.String()
	}
	a.audit("warm-up", before, day.String())
	return row, nil
}

// warmPut starts a warm-up, or changes one.
func (a *applier) warmPut(c *command.WarmPut) (any, error) {
	cal, err := a.calendar()
	if err != nil {
		return nil, err
	}
	kind, ref := control.WarmKind(c.GetKind()), string(c.GetRef())
	if err := a.warmRefExists(kind, ref); err != nil {
		return nil, err
	}
	old := get(a.txn, warmSubjectsTable, "ref", warmRef(kind, ref))
	row := &control.WarmSubject{Kind: kind, Ref: ref, CreatedAt: a.now, StartDay: cal.Today, Judged: cal.Today - 1}
	if old != nil {
		*row = *old
		if !old.Warms() {
			row.CreatedAt, row.StartDay, row.Judged = a.now, cal.Today, cal.Today-1
		}
		row.Stopped = 0
	}
	row.Plan, row.Hold, row.Proofs = c.GetPlan(), c.GetHold(), command.WarmProofs(c.GetProofs())
	if old == nil {
		cal.Subjects++
		row.Number = warmup.Subject(cal.Subjects)
	}
	l := a.ledger(cal)
	if row.Tracks, err = a.warmTracks(cal, c.GetSteps()); err != nil {
		return nil, err
	}
	if err := l.quotas(row, c.GetQuotas()); err != nil {
		return nil, err
	}
	expect := c.GetExpect()
	if old != nil && !old.Warms() && expect == 0 {
		expect = old.Revision // it is started again
	}
	if old != nil && expect != old.Revision && same(warmSubjectsTable, old, row) {
		return old, nil // repeated after an unknown outcome: its quotas are set
	}
	out, err := putRow(a, warmSubjectsTable, row, change[control.WarmSubject]{what: "the warm-up of " + row.RefText(), object: row.RefText(), expect: expect})
	if err != nil {
		return nil, err
	}
	if err := put(a, warmCalendarTable, cal); err != nil { // relays must hear of it
		return nil, err
	}
	return out, l.save()
}

func (a *applier) warmRefExists(kind control.WarmKind, ref string) error {
	found := false
	switch kind {
	case control.WarmSource:
		found = get(a.txn, sourcesTable, "id", []byte(ref)) != nil
	case control.WarmPool:
		found = get(a.txn, poolsTable, "id", []byte(ref)) != nil
	case control.WarmDomain:
		found = get(a.txn, domainsTable, "id", text(ref)) != nil
	}
	if !found {
		return fault.New(fault.NotFound, op, "there is no such %s", kind)
	}
	return nil
}

// warmStop ends a warm-up. The row stays until its open days are over.
func (a *applier) warmStop(c *command.WarmStop) (any, error) {
	cal, err := a.calendar()
	if err != nil {
		return nil, err
	}
	old := get(a.txn, warmSubjectsTable, "ref", warmRef(control.WarmKind(c.GetKind()), string(c.GetRef())))
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "it does not warm up")
	}
	if !old.Warms() {
		return old, nil // repeated after an unknown outcome
	}
	row := *old
	row.Stopped, row.Tracks, row.Hold = cal.Today, nil, ""
	out, err := putRow(a, warmSubjectsTable, &row, change[control.WarmSubject]{what: "the warm-up of " + row.RefText(), object: row.RefText(), expect: revisionOr(c.GetExpect(), old.Revision)})
	if err != nil {
		return nil, err
	}
	return out, put(a, warmCalendarTable, cal)
}

// warmTracks gives the classes of steps their numbers.
func (a *applier) warmTracks(cal *control.WarmCalendar, steps []*command.WarmStep) ([]control.WarmTrack, error) {
	out := make([]control.WarmTrack, 0, len(steps))
	for _, s := range steps {
		class, err := a.warmClass(cal, s.GetClass())
		if err != nil {
			return nil, err
		}
		out = append(out, control.WarmTrack{Class: class, Why: s.GetWhy(),
			Progress: warmup.Progress{Stage: int(s.GetStage()), PausedUntil: warmup.Day(s.GetPausedUntil()), LastActive: warmup.Day(s.GetLastActive())}})
	}
	slices.SortFunc(out, func(x, y control.WarmTrack) int { return cmp.Compare(x.Class, y.Class) })
	for i := 1; i < len(out); i++ {
		if out[i].Class == out[i-1].Class {
			return nil, fault.Field(op, "class", "%q is there twice", cal.ClassName(out[i].Class))
		}
	}
	return out, nil
}

// warmClass returns the number of a class, and gives it one if it has none. A
// number is never given again: days that are open may have quotas under it.
func (a *applier) warmClass(cal *control.WarmCalendar, name string) (warmup.Class, error) {
	if n, ok := cal.Class(name); ok {
		return n, nil
	}
	if len(cal.Classes) < warmup.MaxClasses {
		cal.Classes = append(cal.Classes, name)
		return warmup.Class(len(cal.Classes) - 1), nil
	}
	return 0, fault.New(fault.Exhausted, op, "warm-ups use %d classes of providers already, the most there may be: %q has no room", warmup.MaxClasses, name)
}

// warmJudge judges days that are over and sets quotas. What was changed since the
// judgement was made is judged again by the next one.
func (a *applier) warmJudge(c *command.WarmJudge) (any, error) {
	cal, err := a.calendar()
	if err != nil {
		return nil, err
	}
	classes := len(cal.Classes)
	l := a.ledger(cal)
	for _, i := range c.GetItems() {
		old := get(a.txn, warmSubjectsTable, "id", warmNumber(warmup.Subject(i.GetNumber())))
		if old == nil || !old.Warms() || old.Revision != i.GetExpect() || warmup.Day(i.GetJudgedDay()) < old.Judged {
			continue
		}
		row := *old
		if len(i.GetSteps()) > 0 {
			if row.Tracks, err = a.warmTracks(cal, i.GetSteps()); err != nil {
				return nil, err
			}
			row.Judged = warmup.Day(i.GetJudgedDay())
		}
		if err := l.quotas(&row, i.GetQuotas()); err != nil {
			return nil, err
		}
		if err := put(a, warmSubjectsTable, &row); err != nil {
			return nil, err
		}
	}
	if len(cal.Classes) > classes {
		if err := put(a, warmCalendarTable, cal); err != nil {
			return nil, err
		}
	}
	return cal, l.save()
}

// warmBatch applies what relays reserve, settle and cut, in order.
func (a *applier) warmBatch(c *command.WarmBatch) (any, error) {
	cal, err := a.calendar()
	if err != nil {
		return nil, err
	}
	l := a.ledger(cal)
	out := &control.WarmOutcome{Replies: make([]control.WarmReply, 0, len(c.GetItems()))}
	for _, i := range c.GetItems() {
		reply, err := a.warmItem(l, i)
		if err != nil {
			reply.Err = err
		}
		reply.Seq = i.GetSeq()
		out.Replies = append(out.Replies, reply)
	}
	return out, l.save()
}

func (a *applier) warmItem(l *ledgers, i *command.WarmItem) (reply control.WarmReply, err error) {
	if err := command.CheckWarmItem(i); err != nil {
		return reply, err
	}
	var node ids.Node
	copy(node[:], i.GetNode())
	if i.GetKind() == command.WarmDeclare {
		return reply, a.warmDeclare(node, i.GetEpoch())
	}
	subject := get(a.txn, warmSubjectsTable, "id", warmNumber(warmup.Subject(i.GetSubject())))
	if subject == nil {
		return reply, fault.New(fault.NotFound, op, "subject %d does not warm up", i.GetSubject())
	}
	day, class := warmup.Day(i.GetDay()), warmup.Class(i.GetClass())
	settlement := warmup.Settlement{Subject: subject.Number, Class: class, Day: day, Node: control.WarmNode(node), Epoch: i.GetEpoch(), Used: i.GetUsed()}
	line, err := l.open(subject, day)
	if err != nil {
		return reply, err
	}
	switch i.GetKind() {
	case command.WarmSettle:
		line.Settle(settlement)
	case command.WarmCut:
		reply.Reply = line.Cut(warmup.Cut{Settlement: settlement, Seq: i.GetSeq(), Amount: i.GetAmount()})
	case command.WarmReserve:
		if err = a.mayReserve(subject, node, i.GetEpoch()); err == nil {
			reply.Reply, err = line.Reserve(warmup.Request{Subject: subject.Number, Class: class, Day: day, Node: settlement.Node, Epoch: i.GetEpoch(), Seq: i.GetSeq(), UpTo: i.GetAmount()})
		}
	}
	if err := l.close(subject, day, line); err != nil {
		return control.WarmReply{}, err
	}
	quota, reserved, _ := line.Totals(subject.Number, class, day)
	reply.Amount, reply.Used = line.Reserved(subject.Number, class, day, settlement.Node, i.GetEpoch())
	reply.Quota, reply.Committed = uint32(quota), uint32(min(reserved, 1<<32-1))
	return reply, err
}

// warmDeclare notes, in recovery mode, that a relay has settled all that it spent.
func (a *applier) warmDeclare(node ids.Node, generation uint64) error {
	if r := get(a.txn, recoveryTable, "id", singleton); r == nil || r.Generation != generation {
		return fault.New(fault.Conflict, op, "generation %d is not in recovery mode", generation)
	}
	row := a.lease()
	before := *row
	n, err := a.numberNode(row, node)
	switch {
	case err != nil:
		return err
	case n == nil:
		return fault.New(fault.NotFound, op, "there is no such relay")
	case n.WarmDeclared == generation:
		return nil
	}
	next := *n
	next.WarmDeclared = generation
	if err := put(a, leaseNodesTable, &next); err != nil || *row == before {
		return err
	}
	return put(a, leaseTable, row)
}

// mayReserve refuses relays that were put out, and of an address all but its owner:
// they may account, but not acquire.
func (a *applier) mayReserve(s *control.WarmSubject, node ids.Node, epoch uint64) error {
	row := get(a.txn, nodesTable, "id", node[:])
	if row == nil || !row.State.Connects() {
		return fault.New(fault.Denied, op, "%s may not reserve", node)
	}
	if !s.Warms() {
		return fault.New(fault.NotFound, op, "%s does not warm up any more", s.RefText())
	}
	if r := get(a.txn, recoveryTable, "id", singleton); r != nil {
		return fault.New(fault.Unavailable, op, "the cluster is in recovery mode since its %s: until every relay was heard nobody knows what is reserved", r.Cause)
	}
	if s.Kind != control.WarmSource {
		return nil
	}
	id := s.Source()
	if src := get(a.txn, sourcesTable, "id", id[:]); src == nil || src.Owner != node || src.State != control.SourceAssigned || src.Epoch != epoch {
		return fault.New(fault.Denied, op, "%s does not own the address under epoch %d", node, epoch)
	}
	return nil
}

// ledgers are the rows of the ledger that a command works on. They are written
// once, in order, when it is through.
type ledgers struct {
	a      *applier
	cal    *control.WarmCalendar
	blocks map[string]*control.WarmBlock
}

func (a *applier) ledger(cal *control.WarmCalendar) *ledgers {
	return &ledgers{a: a, cal: cal, blocks: map[string]*control.WarmBlock{}}
}

// block returns a copy of a block that may be changed.
func (l *ledgers) block(s *control.WarmSubject, d warmup.Day) *control.WarmBlock {
	n := control.WarmBlockOf(s.Kind, s.Number)
	key := string(warmBlockKey(d, n))
	b := l.blocks[key]
	if b == nil {
		b = &control.WarmBlock{Day: d, Block: n}
		if old := get(l.a.txn, warmBlocksTable, "id", []byte(key)); old != nil {
			b.Lines = slices.Clone(old.Lines)
		}
		l.blocks[key] = b
	}
	return b
}

func warmLine(b *control.WarmBlock, s warmup.Subject) (int, bool) {
	return slices.BinarySearchFunc(b.Lines, s, func(l control.WarmLine, s warmup.Subject) int { return cmp.Compare(l.Subject, s) })
}

// open returns a ledger of one subject's day.
func (l *ledgers) open(s *control.WarmSubject, d warmup.Day) (*warmup.Ledger, error) {
	k := warmup.NewLedger(l.cal.Today)
	if d < l.cal.Today-1 || d > l.cal.Today+1 {
		return nil, fault.New(fault.Conflict, op, "%s is over or not open: today is %s", d, l.cal.Today)
	}
	if s.Kind == control.WarmSource {
		id := s.Source()
		if src := get(l.a.txn, sourcesTable, "id", id[:]); src != nil && src.Epoch > 0 {
			if err := k.Assign(s.Number, src.Epoch); err != nil {
				return nil, err
			}
		}
	}
	b := l.block(s, d)
	if at, found := warmLine(b, s.Number); found {
		return k, k.SetRow(s.Number, d, b.Lines[at].Row)
	}
	return k, nil
}

// close takes over what became of it.
func (l *ledgers) close(s *control.WarmSubject, d warmup.Day, k *warmup.Ledger) error {
	row := k.AppendRow(nil, s.Number, d)
	b := l.block(s, d)
	at, found := warmLine(b, s.Number)
	size := len(row)
	for i := range b.Lines {
		if i != at || !found {
			size += len(b.Lines[i].Row)
		}
	}
	switch {
	case size > maxWarmBlockBytes:
		return fault.New(fault.Exhausted, op, "%s has no room for another relay", s.RefText())
	case len(row) == 0:
	case found:
		b.Lines[at].Row = slices.Clip(row)
	default:
		b.Lines = slices.Clip(slices.Insert(b.Lines, at, control.WarmLine{Subject: s.Number, Row: slices.Clip(row)}))
	}
	return nil
}

// quotas sets quotas of today and tomorrow.
func (l *ledgers) quotas(s *control.WarmSubject, quotas []*command.WarmQuota) error {
	for _, q := range quotas {
		class, err := l.a.warmClass(l.cal, q.GetClass())
		if err != nil {
			return err
		}
		day := warmup.Day(q.GetDay())
		if day < l.cal.Today {
			continue // the day has changed meanwhile
		}
		k, err := l.open(s, day)
		if err != nil {
			return err
		}
		if err := k.SetQuota(s.Number, class, day, q.GetQuota()); err != nil {
			return err
		}
		if err := l.close(s, day, k); err != nil {
			return err
		}
		s.QuotaDay = max(s.QuotaDay, day)
	}
	return nil
}

// save writes the blocks that changed.
func (l *ledgers) save() error {
	keys := make([]string, 0, len(l.blocks))
	for key := range l.blocks {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		b := l.blocks[key]
		old := get(l.a.txn, warmBlocksTable, "id", []byte(key))
		if len(b.Lines) == 0 || old != nil && same(warmBlocksTable, old, b) {
			continue
		}
		if err := put(l.a, warmBlocksTable, b); err != nil {
			return err
		}
	}
	return nil
}

// WarmCalendar returns the calendar; nil: no day has begun.
func (r *Reader) WarmCalendar() *control.WarmCalendar {
	return get(r.txn, warmCalendarTable, "id", singleton)
}

// WarmSubjects returns what warms up, and what was stopped of late.
func (r *Reader) WarmSubjects() []*control.WarmSubject { return all(r.txn, warmSubjectsTable) }

// WarmSubject returns a subject by its number, or nil.
func (r *Reader) WarmSubject(n warmup.Subject) *control.WarmSubject {
	return get(r.txn, warmSubjectsTable, "id", warmNumber(n))
}

// WarmSubjectByRef returns a subject by what it is, or nil.
func (r *Reader) WarmSubjectByRef(kind control.WarmKind, ref string) *control.WarmSubject {
	return get(r.txn, warmSubjectsTable, "ref", warmRef(kind, ref))
}

// WarmName is how people name a subject.
func (r *Reader) WarmName(s *control.WarmSubject) string {
	switch s.Kind {
	case control.WarmSource:
		if src := r.Source(s.Source()); src != nil {
			return src.Bind.String()
		}
	case control.WarmPool:
		if p := r.Pool(s.Pool()); p != nil {
			return p.Name
		}
	}
	return s.RefText()
}

// WarmDay returns the ledger of a subject's day, for reading; nil: it is not open.
func (r *Reader) WarmDay(s *control.WarmSubject, d warmup.Day) *warmup.Ledger {
	cal := r.WarmCalendar()
	if cal == nil || d < cal.Today-1 || d > cal.Today+1 {
		return nil
	}
	k := warmup.NewLedger(cal.Today)
	if b := get(r.txn, warmBlocksTable, "id", warmBlockKey(d, control.WarmBlockOf(s.Kind, s.Number))); b != nil {
		if at, found := warmLine(b, s.Number); found && k.SetRow(s.Number, d, b.Lines[at].Row) != nil {
			return nil
		}
	}
	return k
}

// viewWarm tells relays what warms up.
func (r *Reader) viewWarm(v *policy.View) {
	cal := r.WarmCalendar()
	if cal == nil {
		return
	}
	v.Warm = policy.Warm{Today: int32(cal.Today), Classes: cal.Classes}
	for _, s := range r.WarmSubjects() {
		if s.Warms() {
			v.Warm.Subjects = append(v.Warm.Subjects, policy.WarmSubject{Number: uint64(s.Number), Source: s.Source(), Pool: s.Pool(), Domain: s.Domain(), Plan: s.Plan, Hold: s.Hold})
		}
	}
}
