package service

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// seenTimeout bounds how long the other servers may take to say what they heard
// from relays; one that is down must not hold up a list.
const seenTimeout = time.Second

// Membership is what the service asks the cluster about its servers.
type Membership interface {
	// ServerMembers returns who follows and who votes, as the leader sees it.
	ServerMembers(ctx context.Context) ([]ServerMember, error)
	// Ask asks the server at a raft address and decodes its answer.
	Ask(ctx context.Context, raftAddress, what string, v any) error
}

// ServerMember is a server as the leader sees it.
type ServerMember struct {
	ID     string
	Voter  bool
	Leader bool
	Alive  bool
	Lag    uint64 // entries that it has not applied
	// Problem is what is wrong with it, by its own word, and what helps.
	Problem string
}

// ServerView is a server's row with what the leader knows of it.
type ServerView struct {
	control.Server
	Member *ServerMember // nil: raft does not know it (yet, or any more)
}

// SetMembership tells the service how to reach the other servers.
func (s *Service) SetMembership(m Membership, self ids.Node) { s.membership, s.self = m, self }

// Servers returns the servers of the cluster; those that were removed only if asked for.
func (s *Service) Servers(ctx context.Context, a Actor, removed bool) ([]ServerView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Servers"); err != nil {
		return nil, err
	}
	var members []ServerMember
	if s.membership != nil {
		var err error
		if members, err = s.membership.ServerMembers(ctx); err != nil {
			return nil, err
		}
	}
	var out []ServerView
	for _, row := range s.state.Read().Servers() {
		v := ServerView{Server: *row}
		if i := slices.IndexFunc(members, func(m ServerMember) bool { return m.ID == row.ID.String() }); i >= 0 {
			v.Member = &members[i]
		}
		if row.State == control.NodeEvicted && !removed && v.Member == nil {
			continue // one that still counts is shown
		}
		out = append(out, v)
	}
	return out, nil
}

// RemoveServer takes a server out of the cluster for good; the leader stops
// counting its vote as soon as the others can decide without it.
func (s *Service) RemoveServer(ctx context.Context, a Actor, ref string, c Change) (*control.Server, error) {
	const op = "service.RemoveServer"
	servers, err := s.Servers(ctx, a, true)
	if err != nil {
		return nil, err
	}
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return nil, err
	}
	row, err := serverByRef(servers, ref)
	if err != nil {
		return nil, err
	}
	if row.State == control.NodeEvicted {
		return &row.Server, nil
	}
	others, voters, alive := 0, 0, 0
	for _, v := range servers {
		if v.ID == row.ID || v.State == control.NodeEvicted || v.Member == nil {
			continue
		}
		others++
		if v.Member.Voter {
			voters++
			if v.Member.Alive {
				alive++
			}
		}
	}
	if row.Member != nil && others == 0 {
		return nil, fault.New(fault.Conflict, op, "%s is the only server of this cluster: let another one join first", row.Name)
	}
	if row.Member != nil && row.Member.Voter && alive <= voters/2 {
		return nil, fault.New(fault.Conflict, op, "without %s only %d of %d voters would answer, and nothing could be changed any more: bring another server back, or let one join and become a voter first", row.Name, alive, voters)
	}
	changed := row.Server
	changed.State = control.NodeEvicted
	return propose[control.Server](ctx, s, &command.ServerUpsert{Meta: c.meta(a), Expect: c.revision(row.Revision), Server: command.ServerRecord(&changed)})
}

// serverByRef finds a server by id, or by the name of one that was not removed.
func serverByRef(servers []ServerView, ref string) (*ServerView, error) {
	var found []*ServerView
	for i := range servers {
		v := &servers[i]
		if v.ID.String() == ref {
			return v, nil
		}
		if v.Name == ref && v.State != control.NodeEvicted {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return nil, notFound("server", "server", ref)
	case 1:
		return found[0], nil
	}
	return nil, fault.Field("service.Servers", "server", "%d servers are named %q: name one by its id, such as %s", len(found), ref, found[0].ID)
}

// JoinServerRequest is the certificate request of a control server, whose proof
// enrolment has checked.
type JoinServerRequest struct {
	RedeemRequest
	RaftAddress   string
	LinkAddress   string
	HTTPAddress   string
	MaxFSMVersion uint16
}

// JoinServer makes the server of a certificate request, or finds the one it was
// made before.
func (s *Service) JoinServer(ctx context.Context, req JoinServerRequest) (*control.Server, error) {
	const op = "service.JoinServer"
	if err := s.enter(System, control.RoleAdmin, op); err != nil {
		return nil, err
	}
	cluster, err := s.Cluster()
	if err != nil {
		return nil, err
	}
	if req.MaxFSMVersion < cluster.FSMVersion {
		return nil, fault.Field(op, "version", "release %s applies commands of version %d, this cluster uses %d: install a newer release on the joining server", req.Version, req.MaxFSMVersion, cluster.FSMVersion)
	}
	row := control.Server{Name: req.Name, RaftAddress: req.RaftAddress, LinkAddress: req.LinkAddress, HTTPAddress: req.HTTPAddress, Version: req.Version, MaxFSMVersion: req.MaxFSMVersion, State: control.NodePending}
	stamp(&row.ID, now())
	cmd := &command.TokenRedeem{Meta: &command.Meta{Actor: "join", Reason: "token " + req.TokenID.String()}, Token: req.TokenID[:], CsrHash: req.CSRHash[:], Role: req.Role, Node: row.ID[:],
		Name: req.Name, Remote: req.RemoteAddr.Unmap().AsSlice(), Version: req.Version, Server: command.ServerRecord(&row)}
	return propose[control.Server](ctx, s, cmd)
}

// ServerByID returns the row of a server, or NotFound.
func (s *Service) ServerByID(id ids.Node) (*control.Server, error) {
	if row := s.state.Read().Server(id); row != nil {
		return row, nil
	}
	return nil, notFound("server", "server", id.String())
}

// ServerRows returns the servers that were not removed.
func (s *Service) ServerRows() []*control.Server {
	return slices.DeleteFunc(s.state.Read().Servers(), func(r *control.Server) bool { return r.State == control.NodeEvicted })
}

// ServerKey makes the API key that the command line on a joining server uses.
// It belongs to the first admin; one that an earlier try of the same server got
// ends.
func (s *Service) ServerKey(ctx context.Context, server ids.Node) (string, error) {
	const op = "service.ServerKey"
	r := s.state.Read()
	var admin *control.Operator
	for _, o := range r.Operators() {
		if o.Role == control.RoleAdmin && !o.Disabled && (admin == nil || o.CreatedAt.Before(admin.CreatedAt)) {
			admin = o
		}
	}
	if admin == nil {
		return "", fault.New(fault.Conflict, op, "the cluster has no admin whom the new server's command line could act for: enable one")
	}
	name := "join-" + server.String()
	meta := &command.Meta{Actor: "join", Reason: "command line of " + server.String()}
	for _, old := range r.APIKeys() {
		if old.Name != name || old.Revoked {
			continue
		}
		row := *old
		row.Revoked = true
		if _, err := s.log.Propose(ctx, &command.APIKeyPut{Meta: meta, Expect: old.Revision, Key: command.APIKeyRecord(&row)}); err != nil {
			return "", err
		}
	}
	key := control.APIKey{Operator: admin.ID, Name: name, CreatedAt: now()}
	stamp(&key.ID, key.CreatedAt)
	var text string
	text, key.SecretHash = auth.NewAPIKey(key.ID)
	_, err := s.log.Propose(ctx, &command.APIKeyPut{Meta: meta, Key: command.APIKeyRecord(&key)})
	return text, err
}

// AllSeen returns what this server heard from relays, for the other servers.
func (s *Service) AllSeen() map[ids.Node]Seen {
	s.seenMu.Lock()
	defer s.seenMu.Unlock()
	out := make(map[ids.Node]Seen, len(s.seen))
	for id, seen := range s.seen {
		out[id] = *seen
	}
	return out
}

// seenAnywhere returns what was heard from relays, by whichever server heard
// last. A server that does not answer in time is left out.
func (s *Service) seenAnywhere() map[ids.Node]Seen {
	all := s.AllSeen()
	if s.membership == nil {
		return all
	}
	ctx, cancel := context.WithTimeout(context.Background(), seenTimeout)
	defer cancel()
	answers := make(chan map[ids.Node]Seen)
	asked := 0
	for _, row := range s.ServerRows() {
		if row.ID == s.self || row.State != control.NodeActive {
			continue
		}
		asked++
		go func() { // ends with its answer, which is always taken
			var text json.RawMessage
			var heard map[ids.Node]Seen
			err := s.membership.Ask(ctx, row.RaftAddress, "seen", &text)
			if err == nil {
				err = json.Unmarshal(text, &heard)
			}
			if err != nil {
				s.logger.Debug("another server does not say what it heard from relays", "server", row.ID.String(), "error", err)
			}
			answers <- heard
		}()
	}
	for range asked {
		for id, theirs := range <-answers {
			ours, ok := all[id]
			clone := moreCloned(ours.Clone, theirs.Clone)
			if !ok || newer(theirs, ours) {
				ours = theirs
			}
			ours.Clone = clone
			all[id] = ours
		}
	}
	return all
}

// newer reports whether a tells more of the present than b.
func newer(a, b Seen) bool {
	if a.Connected != b.Connected {
		return a.Connected
	}
	return a.LastContact.After(b.LastContact)
}

// Fresh reports whether this server's state is up to date: it leads, or follows
// closely.
func (s *Service) Fresh() bool { return s.log.Fresh() }
