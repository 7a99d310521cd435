package main

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/limits"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// openEgress makes what opens connections, and what keeps leases of floating
// addresses, and lets the leader of the control servers talk to that.
func (n *node) openEgress() (err error) {
	self := n.agent.Membership().Node
	n.leases, err = egress.NewLeases(egress.LeaseConfig{Node: self, Incarnation: n.agent.Incarnation(), Send: n.agent.SendQuota, Clock: limits.Now, Changed: n.leasesChanged, Log: n.log, Registerer: n.registry})
	if err != nil {
		return err
	}
	n.agent.HandleQuota(&wire.AddressAnswer{}, func(m proto.Message) { n.leases.Answer(m.(*wire.AddressAnswer)) })
	n.agent.NoteQuotaLink(n.leases.Linked)
	n.egress, err = egress.New(egress.Config{Node: self, Leases: n.leases, Log: n.log, Registerer: n.registry})
	if err != nil {
		return err
	}
	if d := n.agent.Directory(); d != nil {
		n.useSources(d)
	}
	return nil
}

// useSources takes over the addresses of a view.
func (n *node) useSources(d *policy.Directory) {
	sources, leaving := n.sources(d), d.View().Leaving
	if n.agent.Evicted() != nil {
		leaving = nil
	}
	n.leases.SetView(sources, leaving)
	n.egress.SetSources(sources)
}

// leasesChanged is told when a floating address may be used, or may not any more.
func (n *node) leasesChanged() {
	n.egress.Refresh()
	n.engine.Changed()
	n.handover.Changed()
}
