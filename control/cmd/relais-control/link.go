package main

import (
	"context"

	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control/dispatch"
	"github.com/relais-mta/relais/control/enroll"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// members shows the use cases to enrolment in its own words.
type members struct{ *service.Service }

// Redeem implements enroll.Members.
func (m members) Redeem(ctx context.Context, r enroll.Redemption) (enroll.Member, error) {
	node, _, err := m.RedeemToken(ctx, service.RedeemRequest{TokenID: r.Token, CSRHash: r.CSRHash, Role: string(r.Role), Name: r.Name, RemoteAddr: r.Remote, Labels: r.Labels, Version: r.Version, Addresses: r.Addresses})
	if err != nil {
		return enroll.Member{}, err
	}
	return m.Member(ctx, node)
}

// Member implements enroll.Members.
func (m members) Member(ctx context.Context, id ids.Node) (enroll.Member, error) {
	n, err := m.NodeByID(ctx, id)
	if err != nil {
		return enroll.Member{}, err
	}
	return enroll.Member{Node: n.ID, State: n.State, SPKI: n.CertSPKI}, nil
}

// SetCertificate implements enroll.Members.
func (m members) SetCertificate(ctx context.Context, c enroll.Certificate) error {
	if c.Role == pki.RoleControl {
		return m.SetServerCert(ctx, c.Node, c.Serial, c.SPKI[:], c.NotAfter)
	}
	return m.SetNodeCert(ctx, c.Node, c.Serial, c.SPKI[:], c.NotAfter)
}

// relays shows the use cases to the link server in its own words.
type relays struct{ *service.Service }

// NodeConnected implements dispatch.Nodes.
func (r relays) NodeConnected(id ids.Node, h dispatch.Hello) {
	r.NodeSeen(context.Background(), id, service.HelloInfo{Version: h.Version, Remote: h.Remote, Addresses: h.Addresses, Generation: h.Generation, Revision: h.Revision, Quota: h.Quota, Handover: h.Handover})
}

// NodeReported implements dispatch.Nodes.
func (r relays) NodeReported(id ids.Node, in dispatch.Report) {
	out := service.ReportInfo{Generation: in.Generation, Revision: in.Revision, ClockOffset: in.ClockOffset, WaitingRecipients: in.WaitingRecipients, InFlightRecipients: in.InFlightRecipients,
		HeldRecipients: in.HeldRecipients, Handover: handoverOf(in.Handover), QueueBytes: in.QueueBytes, FreeBytes: in.FreeBytes, Problems: in.Problems, Certificate: service.CertificateState{BundleSum: in.BundleSum, Issuer: in.LeafIssuer}}
	for _, s := range in.Sources {
		if !s.Present {
			out.Missing = append(out.Missing, s.Source)
		}
	}
	for _, left := range in.Left {
		out.Left = append(out.Left, service.LeftSource(left))
	}
	for _, x := range in.Reflexes {
		out.Reflexes = append(out.Reflexes, service.Reflex(x))
	}
	r.Service.NodeReported(id, out)
}

func handoverOf(in *wire.HandoverReport) service.HandoverInfo {
	return service.HandoverInfo{Given: in.GetGivenRecipients(), PerSecond: in.GetRecipientsPerSecond(), Offered: in.GetOfferedMessages(), Pools: in.GetPools()}
}

// serveLink opens the port that relays join and connect at.
func (s *server) serveLink(ctx context.Context, group *errgroup.Group) error {
	joins, err := enroll.New(enroll.Config{Cluster: s.file.Cluster, Members: members{s.service}, Servers: joining{s.service, s.kek}, Signer: &s.authority, Version: buildinfo.Version(), Logger: s.logger, Registerer: s.registry})
	if err != nil {
		return err
	}
	views, err := dispatch.New(dispatch.Config{Cluster: s.file.Cluster, Nodes: relays{s.service}, Address: hostPort(s.file.Advertise, s.conf.Listen.Link), Version: buildinfo.Version(), Self: s.file.Server, Peers: linkPeers{s}, Dropped: s.holder.Dropped, LeaseTTL: s.service.LeaseTTL, Quota: s.quota.Up, Logger: s.logger, Registerer: s.registry})
	if err != nil {
		return err
	}
	s.sessions.Store(views)
	group.Go(func() error { views.Run(ctx); return nil })
	group.Go(func() error { s.quota.Run(ctx); return nil })
	key, err := pki.LoadNodeKey(s.paths.nodeKey())
	if err != nil {
		return err
	}
	listener, err := link.Listen(link.ServerConfig{Address: s.conf.Listen.Link, TLS: enroll.TLSConfig(s.holder, s.file.Cluster, knowsKey(s.state)), ResetKey: key.Derive("quic stateless reset")})
	if err != nil {
		return &fault.Error{Kind: fault.Unavailable, Op: "relais-control.serve", Field: "listen.link", Public: "UDP " + s.conf.Listen.Link.String() + " cannot be bound: is another server using it?", Cause: err}
	}
	group.Go(func() error {
		return listener.Serve(ctx, map[string]link.Handler{wire.ALPNJoin: joins.Join, wire.ALPNRenew: joins.Renew, wire.ALPNLink: views.Link})
	})
	s.logger.Info("relays may join", "link", listener.Addr().String(), "ca_pin", s.authority.current.Load().Pin().String())
	return nil
}
