package main

import (
	"github.com/relais-mta/relais/control/dispatch"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/ids"
)

// NodeCloned implements dispatch.Nodes.
func (r relays) NodeCloned(id ids.Node, c dispatch.Clone) {
	r.Service.NodeCloned(id, service.Clone{At: c.At, Holder: c.Holder, Refused: c.Refused})
}

// ClonesElsewhere implements dispatch.Nodes.
func (r relays) ClonesElsewhere(clones map[ids.Node]dispatch.Clone) {
	out := make(map[ids.Node]service.Clone, len(clones))
	for id, c := range clones {
		out[id] = service.Clone{At: c.At, Holder: c.Holder, Refused: c.Refused}
	}
	r.Service.ClonesElsewhere(out)
}
