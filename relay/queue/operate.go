package queue

import (
	"context"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Action is what an operator does with mail that a filter selects.
type Action string

// The actions.
const (
	ActionRetry   Action = "retry"   // what waits is due at once; order and limits stay
	ActionHold    Action = "hold"    // what waits is held by hand
	ActionRelease Action = "release" // what is held, and not by a rule in force, waits for an attempt at once
	ActionPurge   Action = "purge"   // removed, nobody is told
	ActionBounce  Action = "bounce"  // ends as refused; the sender is told as policy says
)

// Classes of the events of actions, beside held and released.
const (
	classHastened = "hastened"
	classPurged   = "purged"
)

// maxEndsUnderWay bounds the messages that an Operation's End works on at once:
// each may hold a notification in memory.
const maxEndsUnderWay = 128

// Operation is an action on many messages.
type Operation struct {
	Action Action
	Filter Filter
	Actor  string // who asked for it, for the events
	Reason string // words for people; a bounce needs one
	// End ends the works of one message, of which it may tell its sender, and
	// calls done. ActionBounce needs it. On error the works are the queue's again.
	End func(works []*Work, done func(error))
}

// Progress says how far an operation is, in recipients that are not final.
type Progress struct {
	Looked   int64       // of messages read, final ones included
	Matched  int64       // those of the other counts together
	Done     int64       // changed, durably
	Skipped  int64       // left as they were: due already, in doubt, or held by a rule in force
	InFlight int64       // being tried at the moment, and left alone
	Total    int64       // an estimate of Looked at the end
	After    ids.Message // what was looked at up to here: an operation with Filter.After goes on behind it
	Finished bool        // nothing is left
}

// CheckOperation refuses what an operation cannot do.
func CheckOperation(op *Operation) error {
	const name = "queue.Operate"
	f := &op.Filter
	held := f.State == relay.StateHeld
	switch op.Action {
	case ActionRetry, ActionHold:
		if held {
			return fault.Field(name, "state", "what is held does not wait for an attempt: release it, or name waiting")
		}
	case ActionRelease:
		if f.State == relay.StateWaiting || f.InDoubt {
			return fault.Field(name, "state", "only what is held can be released")
		}
	case ActionBounce:
		if strings.TrimSpace(op.Reason) == "" {
			return fault.Field(name, "reason", "say why, the senders are told it")
		}
		if op.End == nil {
			return fault.New(fault.Internal, name, "a bounce without a way to tell the senders")
		}
	case ActionPurge:
	default:
		return fault.Field(name, "action", "%q is not one of retry, hold, release, purge and bounce", op.Action)
	}
	if len(op.Reason) > maxWordsBytes {
		return fault.Field(name, "reason", "%d bytes are too many, %d are the most", len(op.Reason), maxWordsBytes)
	}
	if strings.ContainsFunc(op.Reason, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fault.Field(name, "reason", "holds a line end or another control character: write it on one line")
	}
	return nil
}

// Operate carries out an operation step by step in the order of message ids,
// each step durable and reported before the next is begun, until nothing is left
// or ctx ends, which lets the step that was begun come to its end. While one is
// made durable the next is read. What is being tried is counted and left alone.
// Mail that comes meanwhile is found, because its id is later. What resumes waits
// for operations of the same action to end: one that was interrupted a moment ago
// still has mail in its hands.
func (q *Queue) Operate(ctx context.Context, op Operation, report func(Progress)) (Progress, error) {
	var p Progress
	if err := CheckOperation(&op); err != nil {
		return p, err
	}
	f := op.Filter
	switch op.Action {
	case ActionRetry, ActionHold:
		f.State = relay.StateWaiting
	case ActionRelease:
		f.State = relay.StateHeld
	}
	p.After = f.After
	ended, err := q.operations.begin(ctx, op.Action, f.After != (ids.Message{}))
	if err != nil {
		return p, err
	}
	defer ended()
	if err := q.flush(); err != nil {
		return p, err
	}
	var under *operating
	for after := p.After; ; {
		var next *operating
		var err error
		if ctx.Err() == nil && (under == nil || !under.end) {
			if next, err = q.takeStep(&f, after); next != nil && next.last != (ids.Message{}) {
				after = next.last
			}
		}
		if under != nil {
			if failed := q.account(&p, &f, under); failed != nil {
				q.giveUp(next)
				return p, failed
			}
			report(p)
			if under.end {
				return p, nil
			}
		}
		if err != nil || next == nil || ctx.Err() != nil {
			q.giveUp(next)
			return p, err
		}
		under = next
		go func() {
			done, err := q.carryOut(&op, next.works)
			next.ended <- carried{done, err}
		}()
	}
}

// operating is a step of an operation with the recipients that it takes.
type operating struct {
	step
	works             []*Work
	matched, inFlight int
	ended             chan carried
}

// carried is what became of a step.
type carried struct {
	done int
	err  error
}

// takeStep reads the next step and takes what matches into the caller's hands.
func (q *Queue) takeStep(f *Filter, after ids.Message) (*operating, error) {
	s, err := q.readStep(f, after)
	if err != nil {
		return nil, err
	}
	o := &operating{step: s, ended: make(chan carried, 1)}
	if o.works, o.inFlight, err = q.seize(f, s.targets); err != nil {
		return nil, err
	}
	o.targets = nil // the works have what is needed of them
	for _, w := range o.works {
		o.matched += len(w.Recipients)
	}
	return o, nil
}

// giveUp lets go of a step that was taken and not begun; nil: of nothing.
func (q *Queue) giveUp(o *operating) {
	if o != nil {
		q.returnAll(o.works)
	}
}

// account waits for the end of a step and adds it to the progress.
func (q *Queue) account(p *Progress, f *Filter, o *operating) error {
	got := <-o.ended
	p.Looked += int64(o.looked)
	p.Matched += int64(o.matched + o.inFlight)
	p.InFlight += int64(o.inFlight)
	p.Done += int64(got.done)
	if got.err != nil {
		return got.err
	}
	p.Skipped += int64(o.matched - got.done)
	if o.last != (ids.Message{}) {
		p.After = o.last
	}
	p.Finished, p.Total = o.end, q.estimate(f, p.Looked, o.end)
	return nil
}

// estimate guesses how many recipients an operation will have looked at.
func (q *Queue) estimate(f *Filter, looked int64, end bool) int64 {
	if end {
		return looked
	}
	if f.Chosen != nil {
		return max(looked, int64(len(f.Chosen)))
	}
	s := q.Summary()
	return max(looked, s.Waiting+s.Held)
}

// carryOut does what the operation says with the recipients in hand, and
// returns for how many. A commit that was begun is awaited whatever becomes of
// who asked.
func (q *Queue) carryOut(op *Operation, works []*Work) (int, error) {
	if op.Action == ActionBounce {
		return q.endEach(works, op.End)
	}
	return q.endAll(context.Background(), works, q.resultsOf(op))
}

func (q *Queue) resultsOf(op *Operation) func(*Work) []Result {
	now := q.cfg.Now()
	note := func(class string) *Note { return &Note{Actor: op.Actor, Class: class, Text: op.Reason} }
	switch op.Action {
	case ActionHold:
		by, n := &relay.Held{By: op.Actor, Why: op.Reason, Since: now}, note(classHeld)
		return func(w *Work) []Result { return held(w, by, n) }
	case ActionRelease:
		n := note(classReleased)
		return func(w *Work) []Result {
			return dueNow(w, now, outbox.Released, n, func(s *relay.RecipientState) bool { return !q.ruled(s.Held) })
		}
	case ActionRetry:
		n, explicit := note(classHastened), op.Filter.InDoubt || op.Filter.Chosen != nil
		return func(w *Work) []Result {
			due := now
			if w.Env.NotBefore.After(due) {
				due = w.Env.NotBefore
			}
			return dueNow(w, now, outbox.Hastened, n, func(s *relay.RecipientState) bool {
				return s.Next.After(due) && (explicit || !inDoubt(s))
			})
		}
	}
	n := note(classPurged)
	return func(w *Work) []Result {
		out := make([]Result, 0, len(w.Recipients))
		for i := range w.Recipients {
			s := w.Recipients[i].State
			s.State, s.Next, s.Held = relay.StatePurged, time.Time{}, nil
			out = append(out, Result{Index: w.Recipients[i].Index, State: s, Event: outbox.Purged, Phase: relay.PhaseLocal, Note: n})
		}
		return out
	}
}

// ruled reports whether a rule in force holds the recipient.
func (q *Queue) ruled(h *relay.Held) bool {
	if h == nil || h.Rule.IsZero() {
		return false
	}
	_, ok := q.HoldRule(h.Rule)
	return ok
}

// endEach gives the works of each message to end, a bounded number of messages
// at a time.
func (q *Queue) endEach(works []*Work, end func([]*Work, func(error))) (done int, err error) {
	type ended struct {
		n   int
		err error
	}
	answers := make(chan ended, maxEndsUnderWay)
	under := 0
	await := func() {
		a := <-answers
		under--
		if a.err == nil {
			done += a.n
		} else if err == nil {
			err = a.err
		}
	}
	for len(works) > 0 {
		k, n := 0, 0
		for k < len(works) && works[k].msg == works[0].msg {
			n += len(works[k].Recipients)
			k++
		}
		if err != nil {
			q.returnAll(works)
			break
		}
		if under == maxEndsUnderWay {
			await()
			continue
		}
		under++
		end(works[:k], func(err error) { answers <- ended{n, err} })
		works = works[k:]
	}
	for under > 0 {
		await()
	}
	return done, err
}

// Visit calls each for every recipient that matches and is not final, in the
// order of message ids, and report from time to time with the recipients that
// were looked at, and an estimate of their final number.
func (q *Queue) Visit(ctx context.Context, f Filter, each func(env *relay.Envelope, index uint16, s *relay.RecipientState), report func(looked, total int64)) error {
	after, looked := f.After, int64(0)
	for ctx.Err() == nil {
		s, err := q.readStep(&f, after)
		if err != nil {
			return err
		}
		if err := q.readStates(&f, s.targets); err != nil {
			return err
		}
		for _, t := range s.targets {
			for _, index := range t.match {
				state, stored := t.states[index]
				if !stored {
					state = relay.RecipientState{State: relay.StateWaiting, Next: time.UnixMilli(t.firstDue)}
				}
				each(t.env, index, &state)
			}
		}
		looked += int64(s.looked)
		after = s.last
		report(looked, q.estimate(&f, looked, s.end))
		if s.end {
			return nil
		}
	}
	return ctx.Err()
}
