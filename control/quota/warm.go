package quota

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	warmTick        = 250 * time.Millisecond // between two batches
	warmLook        = time.Second            // between two looks for what is due
	maxWarmQueue    = 20_000                 // items that wait for a batch
	maxMissedDays   = 400                    // that are judged one after the other
	warmJudged      = 100                    // subjects in one command
	warmAhead       = 2 * time.Hour          // before a day begins, half of it may be reserved
	maxWarmCommands = 4                      // judgements in one look, so that reservations are not kept waiting
)

// WarmOptions configure the leader's part of warm-up. All are required.
type WarmOptions struct {
	State    *state.Store
	Propose  func(context.Context, command.Command) (state.Result, error)
	Send     func(ids.Node, proto.Message)
	Document func() (*policy.Document, error)
	// Clocks asks the other voters for their clocks, and says how many voters
	// there are with this one.
	Clocks func(context.Context) (offsets []time.Duration, voters int, err error)
	Now    func() time.Time
	Logger *slog.Logger
}

// Warm is the leader's part of warm-up: it begins days, judges those that are
// over, and commits what relays reserve, spend and give back, many in one command.
// As a prometheus.Collector it shows the day.
type Warm struct {
	o     WarmOptions
	queue []warmItem
	// Relays that say that they settled all that they spent, and in which generation.
	declares map[ids.Node]uint64
	tells    map[tellOf]*command.WarmTold
	told     string // why no day begins, as it was logged last
	leads    atomic.Bool
}

type warmItem struct {
	node ids.Node
	item *wire.WarmItem
}

// NewWarm returns the part. Add it to a Quota.
func NewWarm(o WarmOptions) *Warm {
	return &Warm{o: o, declares: make(map[ids.Node]uint64), tells: make(map[tellOf]*command.WarmTold)}
}

// Takes implements Part.
func (w *Warm) Takes(m proto.Message) bool {
	_, ok := m.(*wire.WarmUp)
	return ok
}

// Lead implements Part.
func (w *Warm) Lead(ctx context.Context, in <-chan Message) error {
	w.queue = nil
	clear(w.declares)
	clear(w.tells)
	w.leads.Store(true)
	defer w.leads.Store(false)
	tick, look := time.NewTicker(warmTick), time.NewTicker(warmLook)
	defer tick.Stop()
	defer look.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case m := <-in:
			w.take(m)
		case <-tick.C:
			if err = w.commit(ctx); err == nil {
				err = w.declare(ctx)
			}
		case <-look.C:
			if err = w.hear(ctx); err == nil {
				err = w.look(ctx)
			}
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// take queues what a relay said. The oldest make room; who said it says it again.
func (w *Warm) take(m Message) {
	for _, item := range m.Body.(*wire.WarmUp).GetItems() {
		if item.GetKind() == command.WarmDeclare {
			w.declares[m.Node] = item.GetEpoch()
			continue
		}
		if item.GetKind() == wire.WarmTell {
			w.tell(m.Node, item)
			continue
		}
		if len(w.queue) >= maxWarmQueue {
			w.queue = w.queue[1:]
		}
		w.queue = append(w.queue, warmItem{m.Node, item})
	}
}

// commit commits what is queued and answers it, once that is committed.
func (w *Warm) commit(ctx context.Context) error {
	r := w.o.State.Read()
	if cluster := r.Cluster(); cluster == nil || cluster.FSMVersion < control.WarmVersion || r.WarmCalendar() == nil {
		w.queue = nil
		return nil
	}
	for len(w.queue) > 0 {
		n := min(len(w.queue), command.MaxWarmItems)
		items := w.queue[:n]
		w.queue = w.queue[n:]
		batch := &command.WarmBatch{Meta: &command.Meta{Actor: "system"}}
		kept := items[:0]
		for _, i := range items {
			c := &command.WarmItem{Kind: i.item.GetKind(), Subject: i.item.GetSubject(), Class: i.item.GetClass(), Day: i.item.GetDay(), Node: i.node[:],
				Epoch: i.item.GetEpoch(), Seq: i.item.GetSeq(), Amount: i.item.GetAmount(), Used: i.item.GetUsed()}
			if command.CheckWarmItem(c) == nil {
				batch.Items, kept = append(batch.Items, c), append(kept, i)
			}
		}
		if len(kept) == 0 {
			continue
		}
		result, err := w.o.Propose(ctx, batch)
		if err != nil {
			return err
		}
		if outcome, ok := result.Row.(*control.WarmOutcome); ok {
			w.answer(kept, outcome)
		}
	}
	w.queue = nil
	return nil
}

// answer tells relays what became of their items, and what they must give back.
func (w *Warm) answer(items []warmItem, outcome *control.WarmOutcome) {
	r := w.o.State.Read()
	cal := r.WarmCalendar()
	relays := w.relays(r)
	downs := map[ids.Node]*wire.WarmDown{}
	var order []ids.Node
	for n, i := range items {
		reply := &outcome.Replies[n]
		down := downs[i.node]
		if down == nil {
			down = &wire.WarmDown{Today: int32(cal.Today)}
			downs[i.node] = down
			order = append(order, i.node)
		}
		out := &wire.WarmReply{Kind: i.item.GetKind(), Subject: i.item.GetSubject(), Class: i.item.GetClass(), Day: i.item.GetDay(), Epoch: i.item.GetEpoch(), Seq: i.item.GetSeq(),
			Amount: reply.Amount, Used: reply.Used, Quota: reply.Quota, Committed: reply.Committed, Relays: uint32(max(relays, 1))}
		if reply.Err != nil {
			out.Refused = fault.Public(reply.Err)
		}
		if s := r.WarmSubject(warmup.Subject(i.item.GetSubject())); s != nil {
			if s.Kind == control.WarmSource {
				out.Relays = 1
			}
			for t := range s.Tracks {
				if s.Tracks[t].Class == warmup.Class(i.item.GetClass()) {
					out.Stage = uint32(s.Tracks[t].Stage)
				}
			}
			w.recall(r, s, i, down)
		}
		down.Replies = append(down.Replies, out)
	}
	for _, node := range order {
		w.o.Send(node, downs[node])
	}
}

// recall adds what the relay must give back of a quota that was lowered.
func (w *Warm) recall(r *state.Reader, s *control.WarmSubject, i warmItem, down *wire.WarmDown) {
	day, class := warmup.Day(i.item.GetDay()), warmup.Class(i.item.GetClass())
	k := r.WarmDay(s, day)
	if k == nil {
		return
	}
	for _, recall := range k.Recalls(s.Number, class, day) {
		if recall.Node == control.WarmNode(i.node) && recall.Epoch == i.item.GetEpoch() {
			down.Recalls = append(down.Recalls, &wire.WarmRecall{Subject: i.item.GetSubject(), Class: i.item.GetClass(), Day: i.item.GetDay(), Epoch: recall.Epoch, Amount: recall.Amount})
		}
	}
}

// relays is how many relays share pools and domains: those that have addresses.
func (w *Warm) relays(r *state.Reader) int {
	owners := map[ids.Node]bool{}
	for _, s := range r.Sources() {
		if s.State == control.SourceAssigned {
			owners[s.Owner] = true
		}
	}
	return len(owners)
}

// look begins a day if it is time, and judges what is due.
func (w *Warm) look(ctx context.Context) error {
	r := w.o.State.Read()
	if cluster := r.Cluster(); cluster == nil || cluster.FSMVersion < control.WarmVersion {
		return nil
	}
	now := w.o.Now()
	if err := w.roll(ctx, r.WarmCalendar(), now); err != nil {
		return err
	}
	if r = w.o.State.Read(); r.WarmCalendar() == nil || len(r.WarmSubjects()) == 0 {
		return nil
	}
	doc, err := w.o.Document()
	if err != nil {
		return err
	}
	judge, commands := &command.WarmJudge{Meta: &command.Meta{Actor: "system"}}, 0
	for _, s := range r.WarmSubjects() {
		if i := Judge(r, &doc.Warmup, s, now); i != nil {
			judge.Items = append(judge.Items, i)
		}
		if len(judge.Items) == warmJudged {
			if _, err := w.o.Propose(ctx, judge); err != nil {
				return err
			}
			judge = &command.WarmJudge{Meta: judge.Meta}
			if commands++; commands == maxWarmCommands {
				return nil // the next look goes on
			}
		}
	}
	if len(judge.Items) == 0 {
		return nil
	}
	_, err = w.o.Propose(ctx, judge)
	return err
}

// roll begins a day if it is time and the leader's clock is confirmed.
func (w *Warm) roll(ctx context.Context, cal *control.WarmCalendar, now time.Time) error {
	today := warmup.DayOf(now, time.UTC) - 1 // the first day begins like any other
	if cal != nil {
		today = cal.Today
	}
	if warmup.DayOf(now, time.UTC) <= today {
		return nil
	}
	offsets, voters, err := w.o.Clocks(ctx)
	day := today
	if err == nil {
		day, err = warmup.NextDay(today, now, time.UTC, offsets, voters, false)
	}
	if err != nil {
		if w.told != err.Error() {
			w.told = err.Error()
			w.o.Logger.Error("a day of warm-up does not begin", "error", err)
		}
		return nil // the next look asks again
	}
	w.told = ""
	if day == today {
		return nil
	}
	_, err = w.o.Propose(ctx, &command.WarmRoll{Meta: &command.Meta{Actor: "system"}, Day: int32(day)})
	if err == nil {
		w.o.Logger.Info("a day of warm-up begins", "day", day.String())
	}
	return err
}

// Judge returns what is due for a subject: the judgement of days that are over,
// the quotas of today, and those of tomorrow from two hours before it begins; nil:
// nothing is. It knows of a day what was settled, and what providers answered; harm
// that shows elsewhere is for an operator to tell (`warmup step-back`).
func Judge(r *state.Reader, section *policy.Warmup, s *control.WarmSubject, now time.Time) *command.WarmJudgement {
	cal := r.WarmCalendar()
	named, ok := section.PlanNamed(s.Plan)
	if !s.Warms() || !ok {
		return nil
	}
	tomorrow := cal.Today + 1
	ahead := s.QuotaDay < tomorrow && !now.Before(tomorrow.Start(time.UTC).Add(-warmAhead))
	if s.Judged >= cal.Today-1 && s.QuotaDay >= cal.Today && !ahead {
		return nil
	}
	plan := named.Plan()
	out := &command.WarmJudgement{Number: uint64(s.Number), Expect: s.Revision, JudgedDay: int32(max(s.Judged, cal.Today-1))}
	for i := range plan.Tracks {
		step := judgeTrack(r, &plan, &plan.Tracks[i], s, cal)
		out.Steps = append(out.Steps, step)
		at := warmup.Progress{Stage: int(step.GetStage()), PausedUntil: warmup.Day(step.GetPausedUntil())}
		out.Quotas = append(out.Quotas, &command.WarmQuota{Class: step.GetClass(), Day: int32(cal.Today), Quota: uint32(plan.Quota(step.GetClass(), at, cal.Today))})
		if ahead {
			out.Quotas = append(out.Quotas, &command.WarmQuota{Class: step.GetClass(), Day: int32(tomorrow), Quota: uint32(plan.Quota(step.GetClass(), at, tomorrow))})
		}
	}
	return out
}

func judgeTrack(r *state.Reader, plan *warmup.Plan, t *warmup.Track, s *control.WarmSubject, cal *control.WarmCalendar) *command.WarmStep {
	// Before all servers know what relays tell, a day is judged by use alone.
	cluster := r.Cluster()
	heard := cluster != nil && cluster.FSMVersion >= control.WarmTellVersion
	at, why := warmup.Progress{Stage: 1}, ""
	class, known := cal.Class(t.Class)
	for i := range s.Tracks {
		if known && s.Tracks[i].Class == class {
			at, why = s.Tracks[i].Progress, s.Tracks[i].Why
		}
	}
	for day := max(s.Judged+1, cal.Today-maxMissedDays); day < cal.Today; day++ {
		results := warmup.Results{Quota: plan.Quota(t.Class, at, day)}
		if k := r.WarmDay(s, day); k != nil && known {
			quota, _, used := k.Totals(s.Number, class, day)
			results = warmup.Results{Quota: int64(quota), Offered: int64(used), Tally: k.Shown(s.Number, class, day)}
			if !heard {
				results.Tally = warmup.Tally{Attempts: results.Offered, Accepted: results.Offered}
			}
		}
		judged := plan.Next(t.Class, at, day, results)
		if s.Hold != "" {
			judged = warmup.Judgement{Progress: warmup.Progress{Stage: at.Stage, PausedUntil: at.PausedUntil, LastActive: judged.LastActive}, Why: "held by an operator"}
		}
		at, why = judged.Progress, judged.Why
	}
	return &command.WarmStep{Class: t.Class, Stage: uint32(max(at.Stage, 1)), PausedUntil: int32(at.PausedUntil), LastActive: int32(at.LastActive), Why: why}
}
