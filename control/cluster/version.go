package cluster

import (
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// gate refuses a command that a server of the cluster may not know yet. It
// would halt there.
func (c *Cluster) gate(cmd command.Command) error {
	row := c.state.Read().Cluster()
	if row == nil || row.FSMVersion >= command.Since(command.TypeOf(cmd)) {
		return nil
	}
	return fault.New(fault.Unavailable, "cluster.Propose",
		"this needs version %d of the commands, the cluster works at %d: upgrade every server, the version is raised ten minutes after the last one, or by `relais-control upgrade finish`", command.Since(command.TypeOf(cmd)), row.FSMVersion)
}
