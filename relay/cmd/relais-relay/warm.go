package main

import (
	"time"

	"github.com/relais-mta/relais/relay/warm"
	"github.com/relais-mta/relais/shared/wire"
)

// openWarm makes the keeper of warm-up quotas and ties it to the leader.
func (n *node) openWarm() (err error) {
	n.warm, err = warm.New(warm.Config{Dir: n.dir, Directory: n.agent.Directory, Send: n.agent.SendQuota, Now: time.Now, ClockTrusted: n.trusted, Logger: n.log, Registerer: n.registry})
	if err != nil {
		return err
	}
	n.agent.HandleQuota(&wire.WarmDown{}, n.warm.Down)
	n.agent.NoteQuotaLink(n.warm.Linked)
	return nil
}
