package main

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/handover"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/telemetry"
	"github.com/relais-mta/relais/shared/wire"
)

// openHandover makes what moves mail from relay to relay.
func (n *node) openHandover(context.Context) (err error) {
	if n.cfg.Listen.Handover == nil {
		n.listenByDefault()
	}
	n.handover, err = handover.New(handover.Config{
		Cluster: n.agent.Membership().Cluster, Node: n.agent.Membership().Node, Incarnation: n.agent.Incarnation(), Queue: n.queue,
		Directory: n.agent.Directory, Usable: n.usable, Closed: n.closed, Holder: n.agent.Holder(), Now: time.Now, Logger: n.log, Registerer: n.registry,
	})
	if err != nil {
		return err
	}
	n.notified.Store(n.handover)
	n.health.Watch("handover", func() (telemetry.Severity, string) {
		if p := n.handover.Problem(); p != "" {
			return telemetry.Warning, p
		}
		return telemetry.OK, ""
	})
	return nil
}

// listenByDefault opens the usual port. A configuration of before does not name
// it, so that a machine where it is taken must not stop the relay.
func (n *node) listenByDefault() {
	l, err := listen("listen.handover", netip.AddrPortFrom(netip.IPv6Unspecified(), config.DefaultHandoverPort))
	if err != nil {
		n.log.Warn("no mail of other relays is taken: name an address in listen.handover, or none", "error", err)
		n.health.Set("handover-port", telemetry.Warning, "no mail of other relays is taken: "+fault.Public(err)+"; name an address in listen.handover, or [] for none")
		return
	}
	n.listeners.handover = append(n.listeners.handover, l)
}

// handoverAddress is where other relays reach this one, as it tells control;
// empty: nowhere.
func (n *node) handoverAddress() string {
	switch {
	case len(n.listeners.handover) == 0:
		return ""
	case n.cfg.Listen.HandoverAdvertise != "":
		return n.cfg.Listen.HandoverAdvertise
	}
	at, err := netip.ParseAddrPort(n.listeners.handover[0].Addr().String())
	if err != nil || at.Addr().IsUnspecified() {
		_, port, _ := net.SplitHostPort(n.listeners.handover[0].Addr().String())
		return ":" + port
	}
	return net.JoinHostPort(at.Addr().Unmap().String(), strconv.Itoa(int(at.Port())))
}

// queueChanged tells who delivers, and who gives away, that a work queue may
// have got mail.
func (n *node) queueChanged(number queue.Number) {
	n.engine.Notify(number)
	if h := n.notified.Load(); h != nil {
		h.Notify(number)
	}
}

// usable reports whether mail of a pool can leave from this machine now.
func (n *node) usable(pool ids.Pool) bool {
	d := n.agent.Directory()
	if d == nil || n.closed() != "" {
		return false
	}
	for _, s := range d.LocalSources(pool) {
		if n.egress.Usable(s.ID) {
			return true
		}
	}
	return false
}

func (n *node) handoverReport() *wire.HandoverReport {
	if n.handover == nil {
		return nil
	}
	s := n.handover.Status()
	if s == (handover.Status{}) {
		return nil
	}
	return &wire.HandoverReport{GivenRecipients: s.Given, RecipientsPerSecond: s.PerSecond, OfferedMessages: uint64(s.Flying), Pools: uint32(s.Pools)}
}

// elsewhere explains mail that goes to another relay.
func (n *node) elsewhere(env *relay.Envelope, st *relay.RecipientState, inFlight bool) (engine.Explanation, bool) {
	const reason = "handover"
	if x, ok := n.handover.Flight(env.ID); ok && inFlight {
		return engine.Explanation{Reason: reason, Text: x.Text}, true
	}
	if inFlight || st.State == relay.StateHeld {
		return engine.Explanation{}, false
	}
	x, ok := n.handover.Explain(env.Pool)
	if !ok {
		return engine.Explanation{}, false
	}
	return engine.Explanation{Reason: reason, Text: x.Text + "; since " + x.Since.UTC().Format(time.RFC3339)}, true
}
