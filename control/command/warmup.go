package command

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/warmup"
)

// The kinds of WarmItem.
const (
	WarmReserve uint32 = 1
	WarmSettle  uint32 = 2
	WarmCut     uint32 = 3
	WarmDeclare uint32 = 4 // the relay has settled all that it spent, in the generation Epoch
)

// Bounds of the commands about warm-up.
const (
	MaxWarmItems  = 2_000 // of a batch
	MaxWarmJudged = 500   // subjects in one judgement
	maxDay        = 1 << 20
)

func warmType(c Command) Type {
	switch c.(type) {
	case *WarmPut:
		return TypeWarmPut
	case *WarmStop:
		return TypeWarmStop
	case *WarmRoll:
		return TypeWarmRoll
	case *WarmJudge:
		return TypeWarmJudge
	case *WarmBatch:
		return TypeWarmBatch
	case *WarmTell:
		return TypeWarmTell
	}
	return 0
}

// WarmCalendarRecord returns the record of the row.
func WarmCalendarRecord(c *control.WarmCalendar) *WarmCalendar {
	return &WarmCalendar{Today: int32(c.Today), Classes: c.Classes, Subjects: c.Subjects}
}

// Row returns the row of the record.
func (r *WarmCalendar) Row() (*control.WarmCalendar, error) {
	return &control.WarmCalendar{Today: warmup.Day(r.GetToday()), Classes: r.GetClasses(), Subjects: r.GetSubjects()}, nil
}

// WarmSubjectRecord returns the record of the row.
func WarmSubjectRecord(s *control.WarmSubject) *WarmSubject {
	r := &WarmSubject{Number: uint64(s.Number), Kind: string(s.Kind), Ref: []byte(s.Ref), Plan: s.Plan, StartDay: int32(s.StartDay), JudgedDay: int32(s.Judged),
		QuotaDay: int32(s.QuotaDay), StoppedDay: int32(s.Stopped), Hold: s.Hold, CreatedMs: millis(s.CreatedAt)}
	for i := range s.Tracks {
		t := &s.Tracks[i]
		r.Tracks = append(r.Tracks, &WarmTrack{Class: uint32(t.Class), Stage: uint32(t.Stage), PausedUntil: int32(t.PausedUntil), LastActive: int32(t.LastActive), Why: t.Why})
	}
	for _, p := range s.Proofs {
		r.Proofs = append(r.Proofs, &WarmProof{Class: p.Class, Volume: p.Volume, Evidence: p.Evidence})
	}
	return r
}

// Row returns the row of the record.
func (r *WarmSubject) Row() (*control.WarmSubject, error) {
	s := &control.WarmSubject{Number: warmup.Subject(r.GetNumber()), Kind: control.WarmKind(r.GetKind()), Ref: string(r.GetRef()), Plan: r.GetPlan(),
		StartDay: warmup.Day(r.GetStartDay()), Judged: warmup.Day(r.GetJudgedDay()), QuotaDay: warmup.Day(r.GetQuotaDay()), Stopped: warmup.Day(r.GetStoppedDay()),
		Hold: r.GetHold(), CreatedAt: fromMillis(r.GetCreatedMs()), Tracks: make([]control.WarmTrack, 0, len(r.GetTracks())), Proofs: WarmProofs(r.GetProofs())}
	for _, t := range r.GetTracks() {
		if t.GetClass() >= warmup.MaxClasses {
			return nil, fault.Field(opValidate, "class", "%d is over %d", t.GetClass(), warmup.MaxClasses-1)
		}
		s.Tracks = append(s.Tracks, control.WarmTrack{Class: warmup.Class(t.GetClass()), Why: commonWhy(t.GetWhy()),
			Progress: warmup.Progress{Stage: int(t.GetStage()), PausedUntil: warmup.Day(t.GetPausedUntil()), LastActive: warmup.Day(t.GetLastActive())}})
	}
	return s, nil
}

// WarmProofs returns the proofs of a command or record.
func WarmProofs(in []*WarmProof) []control.WarmProof {
	var out []control.WarmProof
	for _, p := range in {
		out = append(out, control.WarmProof{Class: p.GetClass(), Volume: p.GetVolume(), Evidence: p.GetEvidence()})
	}
	return out
}

// commonWhy lets two million tracks share the texts that most of them have.
func commonWhy(why string) string {
	for _, common := range [...]string{"", "passed", "at the target", "held: nothing was offered"} {
		if why == common {
			return common
		}
	}
	return why
}

// WarmBlockRecord returns the record of the row.
func WarmBlockRecord(b *control.WarmBlock) *WarmBlock {
	r := &WarmBlock{Day: int32(b.Day), Block: b.Block}
	for i := range b.Lines {
		r.Lines = append(r.Lines, &WarmLine{Subject: uint64(b.Lines[i].Subject), Row: b.Lines[i].Row})
	}
	return r
}

// Row returns the row of the record.
func (r *WarmBlock) Row() (*control.WarmBlock, error) {
	b := &control.WarmBlock{Day: warmup.Day(r.GetDay()), Block: r.GetBlock(), Lines: make([]control.WarmLine, 0, len(r.GetLines()))}
	for _, l := range r.GetLines() {
		b.Lines = append(b.Lines, control.WarmLine{Subject: warmup.Subject(l.GetSubject()), Row: l.GetRow()})
	}
	return b, nil
}

func checkWarmRef(kind string, ref []byte) error {
	if err := oneOf("kind", kind, control.WarmKinds...); err != nil {
		return err
	}
	if control.WarmKind(kind) != control.WarmDomain {
		return checkBytes(kind, ref, 16, 16)
	}
	if d, err := mailaddr.ParseDomain(string(ref)); err != nil || string(d) != string(ref) {
		return fault.Field(opValidate, "domain", "%q is not a domain name", ref)
	}
	return nil
}

func checkWarmSteps(steps []*WarmStep, quotas []*WarmQuota) error {
	if len(steps) > warmup.MaxClasses || len(quotas) > 2*warmup.MaxClasses {
		return fault.Field(opValidate, "classes", "%d are too many, allowed are %d", len(steps), warmup.MaxClasses)
	}
	for _, s := range steps {
		if s.GetStage() < 1 || s.GetStage() > 2_000 || s.GetLastActive() < 0 || s.GetLastActive() > maxDay || s.GetPausedUntil() < 0 || s.GetPausedUntil() > maxDay {
			return fault.Field(opValidate, "stage", "of class %q is out of range", s.GetClass())
		}
		if err := first(CheckName("class", s.GetClass()), checkText("why", s.GetWhy())); err != nil {
			return err
		}
	}
	for _, q := range quotas {
		if q.GetQuota() > warmup.MaxQuota {
			return fault.Field(opValidate, "quota", "of class %q is %d, allowed are %d", q.GetClass(), q.GetQuota(), warmup.MaxQuota)
		}
		if err := CheckName("class", q.GetClass()); err != nil {
			return err
		}
	}
	return nil
}

// Validate implements Command.
func (c *WarmPut) Validate() error {
	if len(c.GetSteps()) == 0 {
		return missing("steps")
	}
	if len(c.GetProofs()) > warmup.MaxClasses {
		return fault.Field(opValidate, "proven", "%d classes are too many, allowed are %d", len(c.GetProofs()), warmup.MaxClasses)
	}
	for _, p := range c.GetProofs() {
		if p.GetVolume() > warmup.MaxQuota {
			return fault.Field(opValidate, "proven", "is %d, write at most %d", p.GetVolume(), warmup.MaxQuota)
		}
		if p.GetEvidence() == "" {
			return fault.Field(opValidate, "evidence", "is missing: say what shows that the volume was welcome")
		}
		if err := first(CheckName("class", p.GetClass()), checkText("evidence", p.GetEvidence())); err != nil {
			return err
		}
	}
	return first(checkMeta(c.GetMeta()), checkWarmRef(c.GetKind(), c.GetRef()), CheckName("plan", c.GetPlan()), checkText("hold", c.GetHold()), checkWarmSteps(c.GetSteps(), c.GetQuotas()))
}

// Validate implements Command.
func (c *WarmStop) Validate() error {
	return first(checkMeta(c.GetMeta()), checkWarmRef(c.GetKind(), c.GetRef()))
}

// Validate implements Command.
func (c *WarmRoll) Validate() error {
	if c.GetDay() <= 0 || c.GetDay() > maxDay {
		return fault.Field(opValidate, "day", "%d is out of range", c.GetDay())
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *WarmJudge) Validate() error {
	if n := len(c.GetItems()); n < 1 || n > MaxWarmJudged {
		return fault.Field(opValidate, "items", "%d are out of range, allowed are 1 to %d", n, MaxWarmJudged)
	}
	for _, i := range c.GetItems() {
		if err := checkWarmSteps(i.GetSteps(), i.GetQuotas()); err != nil {
			return err
		}
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *WarmBatch) Validate() error {
	if n := len(c.GetItems()); n < 1 || n > MaxWarmItems {
		return fault.Field(opValidate, "items", "%d are out of range, allowed are 1 to %d", n, MaxWarmItems)
	}
	for _, i := range c.GetItems() {
		if err := CheckWarmItem(i); err != nil {
			return err
		}
	}
	return checkMeta(c.GetMeta())
}

// CheckWarmItem checks the form of one item.
func CheckWarmItem(i *WarmItem) error {
	if i.GetKind() < WarmReserve || i.GetKind() > WarmDeclare {
		return fault.Field(opValidate, "kind", "%d is unknown", i.GetKind())
	}
	if i.GetClass() >= warmup.MaxClasses || i.GetAmount() > warmup.MaxQuota || i.GetUsed() > warmup.MaxQuota || i.GetDay() < 0 || i.GetDay() > maxDay {
		return fault.Field(opValidate, "items", "one is out of range")
	}
	return checkBytes("node", i.GetNode(), 16, 16)
}
