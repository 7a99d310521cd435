package dispatch

import (
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/wire"
)

// Reflex is a lane that a relay has slowed down by itself for long.
type Reflex struct {
	Source      ids.Source
	Provider    string
	Phase       string
	PerHour     int64
	Connections int
	Class       string
	Reply       string
	CauseAt     time.Time
	Since       time.Time
}

// maxReflexTextBytes bounds each text of a reflex that is kept.
const maxReflexTextBytes = 1 << 10

func (r *Report) decodeReflexes(in *wire.Report) error {
	if n := len(in.GetReflexes()); n > wire.MaxLaneReflexes {
		return fault.New(fault.TooLarge, "dispatch.decodeReport", "a report names %d lanes that were slowed down, at most %d", n, wire.MaxLaneReflexes)
	}
	for _, x := range in.GetReflexes() {
		cut := func(text string) string { return text[:min(len(text), maxReflexTextBytes)] }
		out := Reflex{Provider: cut(x.GetProvider()), Phase: cut(x.GetPhase()), PerHour: x.GetPerHour(), Connections: int(x.GetConnections()), Class: cut(x.GetClass()), Reply: cut(x.GetReply()),
			CauseAt: time.UnixMilli(x.GetCauseMs()).UTC(), Since: time.UnixMilli(x.GetSinceMs()).UTC()}
		if err := wire.DecodeID(x.GetSourceId(), &out.Source); err != nil {
			return err
		}
		r.Reflexes = append(r.Reflexes, out)
	}
	return nil
}
