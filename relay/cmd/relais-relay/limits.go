package main

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/limits"
	"github.com/relais-mta/relais/shared/wire"
)

// openLimits makes what keeps the relay within the limits that all relays share,
// and lets the leader of the control servers talk to it.
func (n *node) openLimits() (err error) {
	n.limits, err = limits.New(limits.Config{
		Dir: n.dir, Incarnation: n.agent.Incarnation(), Directory: n.agent.Directory, Send: n.agent.SendQuota, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.agent.HandleQuota(&wire.LeaseWelcome{}, func(m proto.Message) { n.limits.Welcome(m.(*wire.LeaseWelcome)) })
	n.agent.HandleQuota(&wire.LeaseHelloWanted{}, func(proto.Message) { n.limits.HelloWanted() })
	n.agent.HandleQuota(&wire.LeaseGrant{}, func(m proto.Message) { n.limits.Grant(m.(*wire.LeaseGrant)) })
	n.agent.NoteQuotaLink(n.limits.Linked)
	return nil
}
