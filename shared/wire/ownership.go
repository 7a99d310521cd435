package wire

import "github.com/relais-mta/relais/shared/policy"

// encodeLeaving encodes the addresses that their owners are to stop using.
func encodeLeaving(out *View, v *policy.View) {
	for i := range v.Leaving {
		l := &v.Leaving[i]
		out.Leaving = append(out.Leaving, &LeavingSource{SourceId: EncodeID(l.ID), OwnerId: EncodeID(l.Owner), Epoch: l.Epoch})
	}
}

func (d *viewDecoder) leaving(in *View) {
	d.view.Leaving = sized[policy.LeavingSource](len(in.GetLeaving()))
	for i, l := range in.GetLeaving() {
		out := &d.view.Leaving[i]
		out.Epoch = l.GetEpoch()
		d.note(DecodeID(l.GetSourceId(), &out.ID))
		d.note(DecodeID(l.GetOwnerId(), &out.Owner))
	}
}
