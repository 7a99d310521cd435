package service

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// HelloInfo is what a relay says when it connects.
type HelloInfo struct {
	Version   string
	Remote    netip.AddrPort
	Addresses []netip.Addr // present on its host
	Quota     bool         // it keeps the limits that relays share
	Handover  string       // host:port at which it takes mail of others, ":port" for the address it links from; empty: it takes none

	Generation uint64 // of the cluster, of the view that it works with
	Revision   uint64 // of that view; 0: it has none
}

// ReportInfo is what a relay says from time to time.
type ReportInfo struct {
	Reflexes           []Reflex // lanes that it has slowed down by itself for long
	Generation         uint64   // of the cluster, of the view that it works with
	Revision           uint64   // of that view; 0: it has none
	ClockOffset        time.Duration
	WaitingRecipients  uint64
	InFlightRecipients uint64
	HeldRecipients     uint64
	Handover           HandoverInfo
	QueueBytes         uint64
	FreeBytes          uint64
	Missing            []ids.Source // assigned to it but not on its host
	Left               []LeftSource // that it was to stop using, and has
	Certificate        CertificateState
	Problems           []string // in its own words
}

// Seen is what a server heard from a relay since it started. It is local memory,
// which the servers ask each other for.
type Seen struct {
	Connected   bool
	Since       time.Time // of the present connection, or of its end
	LastContact time.Time
	Version     string
	Remote      netip.AddrPort
	Addresses   []netip.Addr
	Quota       bool        // it keeps the limits that relays share
	Report      *ReportInfo // the newest; nil: none yet
	Acked       uint64      // revision the relay works with
	AckedAt     time.Time
	Refused     uint64 // revision it refused last
	RefusedWhy  string
	Clone       *Clone // nil: nobody else came with its key
	Handover    string // host:port at which it takes mail of others; empty: it takes none
}

// maxCertTries bounds how often a certificate is recorded anew after a conflict.
const maxCertTries = 4

// maxRefusalBytes bounds what is kept of a relay's refusal.
const maxRefusalBytes = 1024

// NodeByID returns the node, or NotFound.
func (s *Service) NodeByID(_ context.Context, id ids.Node) (*control.Node, error) {
	if err := s.log.Health(); err != nil {
		return nil, err
	}
	if n := s.state.Read().Node(id); n != nil {
		return n, nil
	}
	return nil, notFound("node", "node", id.String())
}

// SetNodeCert records the certificate a node was given.
func (s *Service) SetNodeCert(ctx context.Context, id ids.Node, serial string, spki []byte, notAfter time.Time) error {
	if err := s.enter(System, control.RoleAdmin, "service.SetNodeCert"); err != nil {
		return err
	}
	for try := 1; ; try++ {
		old := s.state.Read().Node(id)
		if old == nil {
			return notFound("node", "node", id.String())
		}
		row := *old
		row.CertSerial, row.CertSPKI, row.CertNotAfter = serial, spki, notAfter.UTC().Truncate(time.Millisecond)
		_, err := propose[control.Node](ctx, s, &command.NodeUpsert{Meta: &command.Meta{Actor: "ca", Reason: "certificate"}, Expect: old.Revision, Node: command.NodeRecord(&row)})
		// An operator may have changed another field of the row meanwhile.
		if !fault.Is(err, fault.Conflict) || try == maxCertTries {
			return err
		}
	}
}

// heard returns the memory of a node, making it if the node exists.
func (s *Service) heard(id ids.Node) *Seen {
	if n := s.seen[id]; n != nil {
		return n
	}
	n := &Seen{}
	if s.state.Read().Node(id) != nil { // so the map is bounded by the table of nodes
		s.seen[id] = n
	}
	return n
}

// NodeSeen records that a relay connected to this server, and what it said.
func (s *Service) NodeSeen(_ context.Context, id ids.Node, info HelloInfo) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n, at := s.heard(id), time.Now()
	n.Connected, n.Since, n.LastContact = true, at, at
	n.Version, n.Remote, n.Addresses = info.Version, info.Remote, slices.Clone(info.Addresses)
	n.Acked, n.Quota = s.ofGeneration(info.Generation, info.Revision), info.Quota
	n.Handover = reachedAt(info.Handover, info.Remote)
}

// ofGeneration returns the revision of a view if it is of this generation of the
// cluster, else 0: revisions of views of before a restore cannot be compared with those
// of after it.
func (s *Service) ofGeneration(generation, revision uint64) uint64 {
	if generation != s.Generation() {
		return 0
	}
	return revision
}

// NodeReported records what a relay said of itself.
func (s *Service) NodeReported(id ids.Node, report ReportInfo) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n := s.heard(id)
	report.Revision = s.ofGeneration(report.Generation, report.Revision)
	n.Report, n.LastContact = &report, time.Now()
}

// NodeGone records that a relay's connection to this server ended.
func (s *Service) NodeGone(id ids.Node) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n := s.heard(id)
	n.Connected, n.Since = false, time.Now()
}

// AckView records that a relay works with a revision.
func (s *Service) AckView(id ids.Node, revision uint64) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n := s.heard(id)
	n.Acked, n.AckedAt = revision, time.Now()
	n.LastContact = n.AckedAt
}

// NackView records that a relay refused a revision, and why.
func (s *Service) NackView(id ids.Node, revision uint64, why string) {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	n := s.heard(id)
	n.Refused, n.RefusedWhy, n.LastContact = revision, why[:min(len(why), maxRefusalBytes)], time.Now()
}

// NodeView is a node with what the cluster's servers heard from it.
type NodeView struct {
	control.Node
	Seen    Seen
	Sources []*control.Source // assigned to it
}

// Nodes returns the nodes, oldest first.
func (s *Service) Nodes(a Actor) ([]NodeView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Nodes"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	byOwner := map[ids.Node][]*control.Source{}
	for _, src := range r.Sources() {
		byOwner[src.Owner] = append(byOwner[src.Owner], src)
	}
	rows := r.Nodes()
	out := make([]NodeView, 0, len(rows))
	heard := s.seenAnywhere()
	for _, n := range rows {
		v := NodeView{Node: *n, Seen: heard[n.ID], Sources: byOwner[n.ID]}
		out = append(out, v)
	}
	return out, nil
}

// Node returns one node, by id or by name.
func (s *Service) Node(a Actor, ref string) (NodeView, error) {
	all, err := s.Nodes(a)
	if err != nil {
		return NodeView{}, err
	}
	n, err := s.nodeByRef(ref)
	if err != nil {
		return NodeView{}, err
	}
	for _, v := range all {
		if v.ID == n.ID {
			return v, nil
		}
	}
	return NodeView{}, notFound("node", "node", ref)
}

// nodeByRef finds a node by id or name. Evicted nodes lose their name to a
// machine that joined again.
func (s *Service) nodeByRef(ref string) (*control.Node, error) {
	r := s.state.Read()
	var id ids.Node
	if parseID(&id, ref) {
		if n := r.Node(id); n != nil {
			return n, nil
		}
		return nil, notFound("node", "node", ref)
	}
	named := r.NodesByName(ref)
	if live := slices.DeleteFunc(slices.Clone(named), func(n *control.Node) bool { return n.State == control.NodeEvicted }); len(live) > 0 {
		named = live
	}
	switch len(named) {
	case 0:
		return nil, notFound("node", "node", ref)
	case 1:
		return named[0], nil
	}
	return nil, fault.Field("service.Node", "node", "%d nodes are named %q: name one by its id, such as %s", len(named), ref, named[len(named)-1].ID)
}

// SetNodeState moves a node between its states; eviction is for good.
func (s *Service) SetNodeState(ctx context.Context, a Actor, ref string, to control.NodeState, c Change) (*control.Node, error) {
	if err := s.enter(a, control.RoleOperator, "service.SetNodeState"); err != nil {
		return nil, err
	}
	n, err := s.nodeByRef(ref)
	if err != nil {
		return nil, err
	}
	if to == control.NodeDraining || to == control.NodeActive && n.State != control.NodePending {
		// Relays hear of these two, so they have a command of their own.
		return propose[control.Node](ctx, s, &command.NodeDrain{Meta: c.meta(a), Expect: c.revision(n.Revision), Node: n.ID[:], Draining: to == control.NodeDraining})
	}
	return propose[control.Node](ctx, s, &command.NodeSetState{Meta: c.meta(a), Expect: c.revision(n.Revision), Node: n.ID[:], State: string(to)})
}

// LinkServers returns the addresses, host:port, at which relays reach the
// servers of the cluster.
func (s *Service) LinkServers(context.Context) ([]string, error) {
	var out []string
	for _, srv := range s.state.Read().Servers() {
		if srv.State == control.NodeActive {
			out = append(out, srv.LinkAddress)
		}
	}
	return out, nil
}

// Generation returns the cluster's generation, 0 before it was initialised.
func (s *Service) Generation() uint64 {
	if c := s.state.Read().Cluster(); c != nil {
		return c.Generation
	}
	return 0
}

// AnnounceServer records where this server is reached and what it runs, if that
// changed since it was recorded.
func (s *Service) AnnounceServer(ctx context.Context, id ids.Node, link, https, version string) error {
	const op = "service.AnnounceServer"
	if err := s.enter(System, control.RoleAdmin, op); err != nil {
		return err
	}
	for _, old := range s.state.Read().Servers() {
		if old.ID != id {
			continue
		}
		row := *old
		row.LinkAddress, row.HTTPAddress, row.Version, row.MaxFSMVersion = link, https, version, command.FSMVersion
		if row.LinkAddress == old.LinkAddress && row.HTTPAddress == old.HTTPAddress && row.Version == old.Version && row.MaxFSMVersion == old.MaxFSMVersion {
			return nil
		}
		_, err := propose[control.Server](ctx, s, &command.ServerUpsert{Meta: &command.Meta{Actor: System.Name, Reason: "start"}, Expect: old.Revision, Server: command.ServerRecord(&row)})
		return err
	}
	return fault.New(fault.NotFound, op, "server %s is not a member of this cluster", id)
}
