package wire

import (
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// MaxWarmItems bounds the items of a WarmUp and the replies of a WarmDown.
const MaxWarmItems = 2_000

// Kinds of a WarmItem and of the reply to it.
const (
	WarmReserve uint32 = 1
	WarmSettle  uint32 = 2
	WarmCut     uint32 = 3
	WarmDeclare uint32 = 4
	WarmTell    uint32 = 5
)

// encodeWarm encodes what warms up.
func encodeWarm(out *View, v *policy.View) {
	out.WarmToday, out.WarmClasses = v.Warm.Today, v.Warm.Classes
	for i := range v.Warm.Subjects {
		s := &v.Warm.Subjects[i]
		out.WarmSubjects = append(out.WarmSubjects, &WarmSubject{Number: s.Number, SourceId: EncodeID(s.Source), PoolId: EncodeID(s.Pool), Domain: string(s.Domain), Plan: s.Plan, Hold: s.Hold})
	}
}

// warm reads what warms up.
func (d *viewDecoder) warm(in *View) {
	v := d.view
	v.Warm = policy.Warm{Today: in.GetWarmToday(), Classes: in.GetWarmClasses(), Subjects: sized[policy.WarmSubject](len(in.GetWarmSubjects()))}
	for i, s := range in.GetWarmSubjects() {
		out := &v.Warm.Subjects[i]
		*out = policy.WarmSubject{Number: s.GetNumber(), Domain: mailaddr.Domain(s.GetDomain()), Plan: s.GetPlan(), Hold: s.GetHold()}
		d.note(DecodeID(s.GetSourceId(), &out.Source))
		d.note(DecodeID(s.GetPoolId(), &out.Pool))
	}
}
