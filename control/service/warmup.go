package service

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// clockTimeout bounds how long other servers are asked for their clocks: an answer
// says little if it takes long.
const clockTimeout = time.Second

// WarmUpView is a subject with its day.
type WarmUpView struct {
	control.WarmSubject
	Name    string // the address, or the name of the pool or domain
	Today   warmup.Day
	Classes []WarmClassView
}

// WarmClassView is where a subject stands with a class of providers today.
type WarmClassView struct {
	Class     string
	Stage     int
	LastStage int // of the plan; 0: the plan is gone from the policy
	Quota     uint64
	Reserved  uint64
	Used      uint64
	Yesterday uint64       // spent
	Answers   warmup.Tally // of providers, today
	Before    warmup.Tally // yesterday
	Paused    warmup.Day
	Why       string
}

// Document returns the policy in force. Nobody may change it.
func (s *Service) Document() (*policy.Document, error) {
	v, err := s.baseView()
	if err != nil {
		return nil, err
	}
	return &v.Document, nil
}

// warmRef finds what an operator names.
func warmRef(r *state.Reader, kind control.WarmKind, name string) (ref, text string, err error) {
	switch kind {
	case control.WarmSource:
		src, err := sourceByRef(r, name)
		if err != nil {
			return "", "", err
		}
		return string(src.ID[:]), src.Bind.String(), nil
	case control.WarmPool:
		for _, p := range r.Pools() {
			if p.Name == name || p.ID.String() == name {
				return string(p.ID[:]), p.Name, nil
			}
		}
		return "", "", notFound("pool", "pool", name)
	case control.WarmDomain:
		d, err := parseDomain("domain", name)
		if err != nil {
			return "", "", err
		}
		if r.Domain(d) == nil {
			return "", "", notFound("domain", "domain", name)
		}
		return string(d), string(d), nil
	}
	return "", "", fault.Field("service.WarmUp", "kind", "%q is unknown: use one of %s", kind, strings.Join(control.WarmKinds, ", "))
}

func (s *Service) warmView(r *state.Reader, row *control.WarmSubject) (WarmUpView, error) {
	doc, err := s.Document()
	if err != nil {
		return WarmUpView{}, err
	}
	cal := r.WarmCalendar()
	out := WarmUpView{WarmSubject: *row, Name: r.WarmName(row), Today: cal.Today}
	named, ok := doc.Warmup.PlanNamed(row.Plan)
	var plan warmup.Plan
	if ok {
		plan = named.Plan()
	}
	today, yesterday := r.WarmDay(row, cal.Today), r.WarmDay(row, cal.Today-1)
	for i := range row.Tracks {
		t := &row.Tracks[i]
		c := WarmClassView{Class: cal.ClassName(t.Class), Stage: t.Stage, Why: t.Why}
		if t.PausedUntil > cal.Today {
			c.Paused = t.PausedUntil
		}
		if ok {
			c.LastStage = plan.Track(c.Class).Last()
		}
		c.Quota, c.Reserved, c.Used = today.Totals(row.Number, t.Class, cal.Today)
		_, _, c.Yesterday = yesterday.Totals(row.Number, t.Class, cal.Today-1)
		c.Answers, c.Before = today.Shown(row.Number, t.Class, cal.Today), yesterday.Shown(row.Number, t.Class, cal.Today-1)
		out.Classes = append(out.Classes, c)
	}
	return out, nil
}

// WarmUps returns what warms up.
func (s *Service) WarmUps(a Actor) ([]WarmUpView, error) {
	if err := s.enter(a, control.RoleViewer, "service.WarmUps"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	out := []WarmUpView{}
	for _, row := range r.WarmSubjects() {
		if !row.Warms() {
			continue
		}
		v, err := s.warmView(r, row)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// WarmUp returns one warm-up.
func (s *Service) WarmUp(a Actor, kind control.WarmKind, name string) (WarmUpView, error) {
	const op = "service.WarmUp"
	if err := s.enter(a, control.RoleViewer, op); err != nil {
		return WarmUpView{}, err
	}
	r, row, _, err := s.warming(kind, name)
	if err != nil {
		return WarmUpView{}, err
	}
	return s.warmView(r, row)
}

func (s *Service) warming(kind control.WarmKind, name string) (*state.Reader, *control.WarmSubject, string, error) {
	r := s.state.Read()
	ref, text, err := warmRef(r, kind, name)
	if err != nil {
		return nil, nil, "", err
	}
	row := r.WarmSubjectByRef(kind, ref)
	if row == nil || !row.Warms() {
		return nil, nil, "", fault.New(fault.NotFound, "service.WarmUp", "%s %s does not warm up: see `relais-control warmup list`", kind, text)
	}
	return r, row, ref, nil
}

// warmReady refuses what an older server of the cluster would not know.
func (s *Service) warmReady(a Actor, op string) error {
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return err
	}
	if err := s.needs(op, "warm-up", control.WarmVersion); err != nil {
		return err
	}
	if s.state.Read().WarmCalendar() == nil {
		return fault.New(fault.Unavailable, op, "no day has begun yet: the leader begins one within seconds, if its clock is right; try again")
	}
	return nil
}

// StartWarmUp puts something under a plan. Proofs say what it has shown already:
// it enters at the stages that allow that.
func (s *Service) StartWarmUp(ctx context.Context, a Actor, kind control.WarmKind, name, plan string, proofs []control.WarmProof, c Change) (WarmUpView, error) {
	const op = "service.StartWarmUp"
	if err := s.warmReady(a, op); err != nil {
		return WarmUpView{}, err
	}
	r := s.state.Read()
	ref, text, err := warmRef(r, kind, name)
	if err != nil {
		return WarmUpView{}, err
	}
	expect := c.Expect
	if row := r.WarmSubjectByRef(kind, ref); row != nil {
		if row.Warms() {
			return WarmUpView{}, fault.New(fault.Exists, op, "%s %s warms up already, by plan %q: stop that first", kind, text, row.Plan)
		}
		expect = c.revision(row.Revision)
	}
	named, kernel, err := s.warmPlan(plan)
	if err != nil {
		return WarmUpView{}, err
	}
	doc, err := s.Document()
	if err != nil {
		return WarmUpView{}, err
	}
	volumes := map[string]int64{}
	for i := range proofs {
		class := doc.Warmup.ClassOf(named, proofs[i].Class)
		if class != proofs[i].Class {
			return WarmUpView{}, fault.Field(op, "proven", "plan %q has no class %q: name one of its classes, as `warmup plan show %s` lists them", plan, proofs[i].Class, plan)
		}
		if _, twice := volumes[class]; twice {
			return WarmUpView{}, fault.Field(op, "proven", "class %q is named twice: say once what it has shown", class)
		}
		volumes[class] = int64(proofs[i].Volume)
	}
	cmd := &command.WarmPut{Meta: c.meta(a), Expect: expect, Kind: string(kind), Ref: []byte(ref), Plan: plan}
	for _, p := range proofs {
		cmd.Proofs = append(cmd.Proofs, &command.WarmProof{Class: p.Class, Volume: p.Volume, Evidence: p.Evidence})
	}
	cal := r.WarmCalendar()
	for i := range kernel.Tracks {
		t := &kernel.Tracks[i]
		stage := t.Enter(volumes[t.Class])
		cmd.Steps = append(cmd.Steps, &command.WarmStep{Class: t.Class, Stage: uint32(stage), Why: "started"})
		cmd.Quotas = append(cmd.Quotas, &command.WarmQuota{Class: t.Class, Day: int32(cal.Today), Quota: uint32(t.Quota(stage))})
	}
	return s.putWarmUp(ctx, cmd)
}

func (s *Service) warmPlan(name string) (*policy.WarmupPlan, warmup.Plan, error) {
	doc, err := s.Document()
	if err != nil {
		return nil, warmup.Plan{}, err
	}
	named, ok := doc.Warmup.PlanNamed(name)
	if !ok {
		return nil, warmup.Plan{}, fault.Field("service.WarmUp", "plan", "there is no plan %q: see `relais-control warmup plan list`, or add it to section warmup of the policy", name)
	}
	return named, named.Plan(), nil
}

// keepsWarmPlans refuses a policy without a plan by which something warms up: its
// mail would have no quota, and wait.
func (s *Service) keepsWarmPlans(document *policy.Document) error {
	r := s.state.Read()
	for _, row := range r.WarmSubjects() {
		if _, ok := document.Warmup.PlanNamed(row.Plan); !ok && row.Warms() {
			return fault.Field("service.PutPolicy", "warmup.plan", "%q is missing, and %s %s warms up by it: keep the plan, or end that first with `relais-control warmup stop`", row.Plan, row.Kind, r.WarmName(row))
		}
	}
	return nil
}

func (s *Service) putWarmUp(ctx context.Context, cmd *command.WarmPut) (WarmUpView, error) {
	if err := cmd.Validate(); err != nil {
		return WarmUpView{}, err
	}
	row, err := propose[control.WarmSubject](ctx, s, cmd)
	if err != nil {
		return WarmUpView{}, err
	}
	return s.warmView(s.state.Read(), row)
}

// HoldWarmUp keeps a warm-up at its stages, whatever its days show; resume lets it
// go on. The quotas stay as they are.
func (s *Service) HoldWarmUp(ctx context.Context, a Actor, kind control.WarmKind, name string, resume bool, c Change) (WarmUpView, error) {
	hold := c.Reason
	if resume {
		hold = ""
	} else if hold == "" {
		return WarmUpView{}, fault.Field("service.HoldWarmUp", "reason", "is missing: say why it is held")
	}
	return s.changeWarmUp(ctx, a, kind, name, &hold, 0, "", c)
}

// StepBackWarmUp puts a warm-up back by some stages, of one class or of all, from
// now on: what relays have reserved beyond the smaller quota is recalled.
func (s *Service) StepBackWarmUp(ctx context.Context, a Actor, kind control.WarmKind, name string, stages int, class string, c Change) (WarmUpView, error) {
	const op = "service.StepBackWarmUp"
	if stages < 1 || stages > 100 {
		return WarmUpView{}, fault.Field(op, "stages", "is %d, write 1 to 100", stages)
	}
	return s.changeWarmUp(ctx, a, kind, name, nil, stages, class, c)
}

func (s *Service) changeWarmUp(ctx context.Context, a Actor, kind control.WarmKind, name string, hold *string, back int, class string, c Change) (WarmUpView, error) {
	const op = "service.changeWarmUp"
	if err := s.warmReady(a, op); err != nil {
		return WarmUpView{}, err
	}
	r, row, ref, err := s.warming(kind, name)
	if err != nil {
		return WarmUpView{}, err
	}
	_, plan, err := s.warmPlan(row.Plan)
	if err != nil {
		return WarmUpView{}, err
	}
	cal := r.WarmCalendar()
	if row.Judged < cal.Today-1 {
		return WarmUpView{}, fault.New(fault.Unavailable, op, "its last day is being judged: try again in a few seconds")
	}
	cmd := &command.WarmPut{Meta: c.meta(a), Expect: c.revision(row.Revision), Kind: string(kind), Ref: []byte(ref), Plan: row.Plan, Hold: row.Hold}
	if hold != nil {
		cmd.Hold = *hold
	}
	for _, p := range row.Proofs {
		cmd.Proofs = append(cmd.Proofs, &command.WarmProof{Class: p.Class, Volume: p.Volume, Evidence: p.Evidence})
	}
	found := class == ""
	for i := range row.Tracks {
		t := row.Tracks[i]
		name := cal.ClassName(t.Class)
		if back > 0 && (class == "" || class == name) {
			found = true
			t.Stage, t.Why = max(1, t.Stage-back), fmt.Sprintf("back by an operator: %s", c.Reason)
		}
		t.Why = clipText(t.Why)
		cmd.Steps = append(cmd.Steps, &command.WarmStep{Class: name, Stage: uint32(t.Stage), PausedUntil: int32(t.PausedUntil), LastActive: int32(t.LastActive), Why: t.Why})
		if back > 0 {
			for day := cal.Today; day <= row.QuotaDay; day++ {
				cmd.Quotas = append(cmd.Quotas, &command.WarmQuota{Class: name, Day: int32(day), Quota: uint32(plan.Quota(name, t.Progress, day))})
			}
		}
	}
	if !found {
		return WarmUpView{}, fault.Field(op, "class", "%q is not a class of this warm-up", class)
	}
	return s.putWarmUp(ctx, cmd)
}

// StopWarmUp ends a warm-up: nothing limits the subject any more.
func (s *Service) StopWarmUp(ctx context.Context, a Actor, kind control.WarmKind, name string, c Change) error {
	const op = "service.StopWarmUp"
	if err := s.warmReady(a, op); err != nil {
		return err
	}
	_, row, ref, err := s.warming(kind, name)
	if err != nil {
		return err
	}
	if c.Reason == "" {
		return fault.Field(op, "reason", "is missing: say why it may send without quota")
	}
	_, err = propose[control.WarmSubject](ctx, s, &command.WarmStop{Meta: c.meta(a), Expect: c.revision(row.Revision), Kind: string(kind), Ref: []byte(ref)})
	return err
}

// RollWarmDay begins today, by an operator's order, when more than a day has
// passed since the last one began: the leader does not do that by itself.
func (s *Service) RollWarmDay(ctx context.Context, a Actor, c Change) (warmup.Day, error) {
	const op = "service.RollWarmDay"
	if err := s.warmReady(a, op); err != nil {
		return 0, err
	}
	offsets, voters, err := s.WarmClocks(ctx)
	if err != nil {
		return 0, err
	}
	today := s.state.Read().WarmCalendar().Today
	day, err := warmup.NextDay(today, time.Now(), time.UTC, offsets, voters, true)
	if err != nil {
		return 0, err
	}
	if day == today {
		return 0, fault.New(fault.Conflict, op, "%s has begun already", today)
	}
	row, err := propose[control.WarmCalendar](ctx, s, &command.WarmRoll{Meta: c.meta(a), Day: int32(day), Ordered: true})
	if err != nil {
		return 0, err
	}
	return row.Today, nil
}

// WarmClocks asks the other servers for their clocks and returns how far each is
// from this one's, and how many servers there are with this one.
func (s *Service) WarmClocks(ctx context.Context) (offsets []time.Duration, servers int, err error) {
	ctx, cancel := context.WithTimeout(ctx, clockTimeout)
	defer cancel()
	servers = 1
	answers := make(chan *time.Duration)
	for _, row := range s.ServerRows() {
		if row.ID == s.self || row.State != control.NodeActive {
			continue
		}
		servers++
		go func() { // ends with its answer, which is always taken
			var text json.RawMessage
			var theirs int64
			asked := time.Now()
			err := s.membership.Ask(ctx, row.RaftAddress, "clock", &text)
			took := time.Since(asked)
			if err == nil {
				err = json.Unmarshal(text, &theirs)
			}
			if err != nil {
				s.logger.Debug("another server does not tell its time", "server", row.ID.String(), "error", err)
				answers <- nil
				return
			}
			offset := time.Unix(0, theirs).Sub(asked.Add(took / 2))
			answers <- &offset
		}()
	}
	for range servers - 1 {
		if offset := <-answers; offset != nil {
			offsets = append(offsets, *offset)
		}
	}
	return offsets, servers, nil
}

// Clock is what this server answers those that ask for its time.
func Clock() int64 { return time.Now().UnixNano() }
