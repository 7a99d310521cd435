package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Tuning is when membership changes and what is kept. The zero value means the
// defaults, which fit servers in one region.
type Tuning struct {
	StableFor         time.Duration // a server follows closely so long before it may vote
	LeaveEvenFor      time.Duration // an even number of voters is left alone so long: a replacement may be coming
	CheckEvery        time.Duration // between two looks at the members
	ProbeTimeout      time.Duration // for an entry to be committed by a leader whose disk works
	TrailingLogs      uint64
	SnapshotThreshold uint64
	SnapshotInterval  time.Duration
}

func (t *Tuning) setDefaults() {
	t.StableFor = cmp.Or(t.StableFor, stableFor)
	t.LeaveEvenFor = cmp.Or(t.LeaveEvenFor, leaveEvenFor)
	t.CheckEvery = cmp.Or(t.CheckEvery, memberCheckPeriod)
	t.ProbeTimeout = cmp.Or(t.ProbeTimeout, probeTimeout)
	t.TrailingLogs = cmp.Or(t.TrailingLogs, trailingLogs)
	t.SnapshotThreshold = cmp.Or(t.SnapshotThreshold, snapshotThreshold)
	t.SnapshotInterval = cmp.Or(t.SnapshotInterval, snapshotInterval)
}

const (
	stableFor         = 10 * time.Second
	leaveEvenFor      = 30 * time.Second
	maxTrailing       = 250 // entries a server may lag behind to be counted as following
	memberCheckPeriod = 500 * time.Millisecond
	statusTimeout     = time.Second
	configTimeout     = 10 * time.Second
	catchUpTimeout    = 5 * time.Second
	attachPause       = 500 * time.Millisecond
)

// Member is one server as the leader sees it.
type Member struct {
	ID      string    `json:"id"`
	Address string    `json:"address"` // of raft
	Voter   bool      `json:"voter"`
	Leader  bool      `json:"leader"`
	Alive   bool      `json:"alive"`             // it answered the leader within the last seconds
	Lag     uint64    `json:"lag"`               // entries it has not applied, when it answered last
	Since   time.Time `json:"since"`             // it has followed closely; zero if it does not
	Problem string    `json:"problem,omitempty"` // what is wrong with it, by its own word, and what helps
}

// status is what a server says of itself to the leader.
type status struct {
	Applied uint64 `json:"applied"`
	Term    uint64 `json:"term"`
	Problem string `json:"problem,omitempty"`
	Unfit   bool   `json:"unfit,omitempty"` // to vote: its state or log is not sound
}

// roster is the leader's memory of the other servers.
type roster struct {
	mu        sync.Mutex
	heard     map[raft.ServerID]*heard
	evenSince time.Time // voters were found to be even in number; zero: they are odd
}

type heard struct {
	at      time.Time // of the last answer
	applied uint64
	lag     uint64
	since   time.Time // it has followed closely
	problem string
}

func (c *Cluster) onStatus(context.Context, ids.Node, []byte) (any, error) {
	return status{Applied: c.raft.AppliedIndex(), Term: c.raft.CurrentTerm(), Problem: c.problem(), Unfit: c.sound() != nil}, nil
}

// onMembers tells another server who belongs to the cluster.
func (c *Cluster) onMembers(context.Context, ids.Node, []byte) (any, error) {
	if !c.Ready() {
		return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "cluster.onMembers", "this server does not lead the cluster: try again in a few seconds")
	}
	return c.agreed()
}

// Members returns who belongs to the cluster, as its leader sees it.
func (c *Cluster) Members(ctx context.Context) ([]Member, error) {
	if c.Ready() {
		return c.agreed()
	}
	to, id := c.Leader()
	if to == "" || id == c.id || c.peers == nil {
		return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, "cluster.Members", noLeaderText)
	}
	var out []Member
	return out, c.askFor(ctx, to, "members", nil, &out)
}

// agreed is members with the votes that a majority knows of: one that the leader
// is about to give is lost if it ends now.
func (c *Cluster) agreed() ([]Member, error) {
	members, err := c.members()
	conf := c.committed.Load()
	if err != nil || conf == nil {
		return members, err
	}
	for i := range members {
		at := slices.IndexFunc(conf.Servers, func(s raft.Server) bool { return string(s.ID) == members[i].ID })
		members[i].Voter = at >= 0 && conf.Servers[at].Suffrage == raft.Voter
	}
	return members, nil
}

// members are those of the newest configuration, by which raft goes already.
func (c *Cluster) members() ([]Member, error) {
	conf := c.raft.GetConfiguration()
	if err := conf.Error(); err != nil {
		return nil, fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, "cluster.members", "the members cannot be told now")
	}
	if c.unheard(conf.Configuration().Servers) { // it leads since a moment, and would take others for dead
		c.hearAll()
	}
	now := time.Now()
	c.roster.mu.Lock()
	defer c.roster.mu.Unlock()
	var out []Member
	for _, s := range conf.Configuration().Servers {
		m := Member{ID: string(s.ID), Address: string(s.Address), Voter: s.Suffrage == raft.Voter}
		if m.ID == c.id {
			m.Leader, m.Alive, m.Since, m.Problem = true, true, now.Add(-c.tuning.StableFor), c.problem()
		} else if h := c.roster.heard[s.ID]; h != nil {
			m.Alive, m.Lag, m.Since, m.Problem = now.Sub(h.at) < maxReadAge, h.lag, h.since, h.problem
		}
		out = append(out, m)
	}
	return out, nil
}

// keepMembers lets the leader look after who votes.
func (c *Cluster) keepMembers() {
	tick := time.NewTicker(c.tuning.CheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-tick.C:
		}
		if !c.Ready() {
			c.roster.mu.Lock()
			clear(c.roster.heard) // what a former term knew is of no use
			c.roster.evenSince = time.Time{}
			c.roster.mu.Unlock()
			continue
		}
		c.hearAll()
		members, err := c.members()
		if err != nil {
			continue
		}
		if err := c.reconcile(members); err != nil {
			c.logger.Warn("the voters were not changed", "error", err)
		}
	}
}

// unheard reports whether some other server was not asked yet.
func (c *Cluster) unheard(servers []raft.Server) bool {
	c.roster.mu.Lock()
	defer c.roster.mu.Unlock()
	return slices.ContainsFunc(servers, func(s raft.Server) bool { return string(s.ID) != c.id && c.roster.heard[s.ID] == nil })
}

// hearAll asks every other server how far it is.
func (c *Cluster) hearAll() {
	conf := c.raft.GetConfiguration()
	if c.peers == nil || conf.Error() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	var asking sync.WaitGroup
	for _, s := range conf.Configuration().Servers {
		if string(s.ID) == c.id {
			continue
		}
		asking.Go(func() {
			last := c.raft.LastIndex() // before asking: what is added meanwhile is no lag
			var answer status
			if err := c.askFor(ctx, string(s.Address), "status", nil, &answer); err != nil {
				c.heardFrom(s.ID, nil, 0)
				return
			}
			c.heardFrom(s.ID, &answer, last)
		})
	}
	asking.Wait()
}

func (c *Cluster) heardFrom(id raft.ServerID, answer *status, last uint64) {
	c.roster.mu.Lock()
	defer c.roster.mu.Unlock()
	h := c.roster.heard[id]
	if h == nil {
		h = &heard{}
		c.roster.heard[id] = h
	}
	now := time.Now()
	if answer == nil {
		if now.Sub(h.at) >= maxReadAge {
			h.since = time.Time{}
		}
		return
	}
	h.at, h.applied, h.lag, h.problem = now, answer.Applied, last-min(last, answer.Applied), answer.Problem
	switch {
	case h.lag >= maxTrailing || answer.Unfit:
		h.since = time.Time{}
	case h.since.IsZero():
		h.since = now
	}
}

// change is what is to be done about one member.
type memberChange struct {
	id                      string
	promote, demote, remove bool
}

// plan says which members to change, in order. removed are those whose row says
// that they no longer belong. Voters are odd in number: the second server waits
// for the third, because two voters stand still when either of them is lost.
func plan(members []Member, removed map[string]bool, now time.Time, stable time.Duration, evenSince time.Time, leaveEven time.Duration) []memberChange {
	var out []memberChange
	var voters, ready []Member
	for _, m := range members {
		switch {
		case removed[m.ID]:
			if !m.Leader && mayLose(members, m) {
				out = append(out, memberChange{id: m.ID, remove: true})
			}
		case m.Voter:
			voters = append(voters, m)
		case m.Alive && !m.Since.IsZero() && now.Sub(m.Since) >= stable:
			ready = append(ready, m)
		}
	}
	if len(out) > 0 || slices.ContainsFunc(members, func(m Member) bool { return removed[m.ID] }) {
		return out // one thing after the other
	}
	want := len(voters) + len(ready)
	if want%2 == 0 {
		want--
	}
	if want > len(voters) {
		for _, m := range ready[:want-len(voters)] {
			out = append(out, memberChange{id: m.ID, promote: true})
		}
		return out
	}
	if len(voters)%2 == 0 && !evenSince.IsZero() && now.Sub(evenSince) >= leaveEven {
		// The one that is missed least: first a dead one, then who lags most.
		followers := slices.DeleteFunc(slices.Clone(voters), func(m Member) bool { return m.Leader })
		slices.SortStableFunc(followers, func(a, b Member) int {
			if a.Alive != b.Alive {
				return compareBool(a.Alive, b.Alive)
			}
			return cmp.Compare(b.Lag, a.Lag)
		})
		if len(followers) > 0 {
			out = append(out, memberChange{id: followers[0].ID, demote: true})
		}
	}
	return out
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// mayLose reports whether the voters that remain without m can still decide.
func mayLose(members []Member, m Member) bool {
	if !m.Voter {
		return true
	}
	voters, alive := 0, 0
	for _, other := range members {
		if other.Voter && other.ID != m.ID {
			voters++
			if other.Alive {
				alive++
			}
		}
	}
	return voters > 0 && alive > voters/2
}

// reconcile makes the raft configuration what plan wants.
func (c *Cluster) reconcile(members []Member) error {
	removed := c.removedServers(members)
	now := time.Now()
	voters := 0
	for _, m := range members {
		if m.Voter {
			voters++
		}
	}
	c.roster.mu.Lock()
	if voters%2 == 1 {
		c.roster.evenSince = time.Time{}
	} else if c.roster.evenSince.IsZero() {
		c.roster.evenSince = now
	}
	evenSince := c.roster.evenSince
	c.roster.mu.Unlock()
	if removed[c.id] {
		return c.raft.LeadershipTransfer().Error() // the next leader removes this one
	}
	byID := make(map[string]Member, len(members))
	for _, m := range members {
		byID[m.ID] = m
	}
	for _, change := range plan(members, removed, now, c.tuning.StableFor, evenSince, c.tuning.LeaveEvenFor) {
		m := byID[change.id]
		if err := c.apply(change, m); err != nil {
			return err
		}
		c.logger.Info("membership changed", "server", change.id, "address", m.Address, "promoted", change.promote, "demoted", change.demote, "removed", change.remove)
	}
	return nil
}

// removedServers returns who no longer belongs. One that answers is to learn it
// from its own state first: afterwards it hears nothing any more.
func (c *Cluster) removedServers(members []Member) map[string]bool {
	removed := make(map[string]bool)
	c.roster.mu.Lock()
	defer c.roster.mu.Unlock()
	for _, row := range c.state.Read().Servers() {
		if row.State != control.NodeEvicted {
			continue
		}
		id := row.ID.String()
		answers := slices.ContainsFunc(members, func(m Member) bool { return m.ID == id && m.Alive && !m.Leader })
		if h := c.roster.heard[raft.ServerID(id)]; answers && h != nil && h.applied < row.Revision {
			continue
		}
		removed[id] = true
	}
	return removed
}

func (c *Cluster) apply(change memberChange, m Member) error {
	id, address := raft.ServerID(m.ID), raft.ServerAddress(m.Address)
	var f raft.IndexFuture
	switch {
	case change.promote:
		f = c.raft.AddVoter(id, address, 0, configTimeout)
	case change.demote:
		f = c.raft.DemoteVoter(id, 0, configTimeout)
	default:
		f = c.raft.RemoveServer(id, 0, configTimeout)
	}
	return f.Error()
}

// attachRequest is what a server says that wants to follow.
type attachRequest struct {
	Address string `json:"address"` // of raft
}

// onAttach lets a server that has joined follow as a non-voter. A server that
// was there before at the same address is gone: its machine joined anew.
func (c *Cluster) onAttach(ctx context.Context, from ids.Node, body []byte) (any, error) {
	const op = "cluster.onAttach"
	if !c.Ready() {
		return nil, fault.Wrap(control.ErrNoLeader, fault.Unavailable, op, "this server does not lead the cluster: ask the leader")
	}
	var req attachRequest
	if err := json.Unmarshal(body, &req); err != nil || req.Address == "" {
		return nil, fault.Field(op, "address", "a server says where raft reaches it")
	}
	row := c.state.Read().Server(from)
	if row == nil {
		return nil, fault.New(fault.Denied, op, "%s is not a server of this cluster: let it join first", from)
	}
	if row.RaftAddress != req.Address {
		return nil, fault.New(fault.Denied, op, "server %s joined with the address %s, not %s: addresses do not change, let it join anew", row.Name, row.RaftAddress, req.Address)
	}
	members, err := c.members()
	if err != nil {
		return nil, err
	}
	for _, m := range members {
		if m.Address != req.Address || m.ID == from.String() {
			continue
		}
		if !mayLose(members, m) {
			return nil, fault.New(fault.Conflict, op, "the server that was at %s cannot be replaced now: too few of the others answer", req.Address)
		}
		if err := c.setServerState(ctx, m.ID, control.NodeEvicted, "replaced by "+from.String()); err != nil {
			return nil, err
		}
		if err := c.raft.RemoveServer(raft.ServerID(m.ID), 0, configTimeout).Error(); err != nil {
			return nil, fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, op, "the former server at %s was not removed: try again in a few seconds", req.Address)
		}
		c.logger.Info("a server was replaced", "server", m.ID, "by", from.String(), "address", req.Address)
	}
	if err := c.setServerState(ctx, from.String(), control.NodeActive, "first contact"); err != nil {
		return nil, err
	}
	if err := c.raft.AddNonvoter(raft.ServerID(from.String()), raft.ServerAddress(req.Address), 0, configTimeout).Error(); err != nil {
		return nil, fault.Wrap(errors.Join(control.ErrNoLeader, err), fault.Unavailable, op, "server %s was not added: try again in a few seconds", row.Name)
	}
	c.logger.Info("a server follows", "server", from.String(), "address", req.Address)
	return true, nil
}

// setServerState commits the state of a server's row, if it is another one.
func (c *Cluster) setServerState(ctx context.Context, id string, to control.NodeState, reason string) error {
	for _, old := range c.state.Read().Servers() {
		if old.ID.String() != id || old.State == to {
			continue
		}
		row := *old
		row.State = to
		_, err := c.proposeHere(ctx, &command.ServerUpsert{Meta: &command.Meta{Actor: "system", Reason: reason}, Expect: old.Revision, Server: command.ServerRecord(&row)})
		return err
	}
	return nil
}

// Attach makes a server that has joined a follower: it asks the servers at the
// raft addresses in turn, until the leader has let it in. A server that follows
// already returns at once.
func (c *Cluster) Attach(ctx context.Context, addresses []string) error {
	const op = "cluster.Attach"
	if c.peers == nil {
		return nil
	}
	body, err := json.Marshal(attachRequest{Address: c.address})
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "the request cannot be encoded")
	}
	for {
		if conf := c.raft.GetConfiguration(); conf.Error() == nil && slices.ContainsFunc(conf.Configuration().Servers, func(s raft.Server) bool { return string(s.ID) == c.id }) {
			return nil
		}
		for _, to := range addresses {
			if to == c.address {
				continue
			}
			err = c.attachAt(ctx, to, body)
			if err == nil || fault.Is(err, fault.Denied) {
				return err
			}
			c.logger.Info("this server does not follow yet", "asked", to, "error", err)
		}
		select {
		case <-time.After(attachPause):
		case <-ctx.Done():
			return fault.Wrap(errors.Join(err, ctx.Err()), fault.Timeout, op, "no server let this one follow")
		case <-c.stop:
			return nil
		}
	}
}

// attachAt asks one server, and the leader it names.
func (c *Cluster) attachAt(ctx context.Context, to string, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 3*configTimeout)
	defer cancel()
	for range 2 {
		out, err := c.peers.ask(ctx, to, "attach", body)
		switch {
		case err != nil:
			return err
		case out.Error == nil:
			return nil
		case !out.Error.NotDone || out.Error.Leader == "" || out.Error.Leader == to:
			return out.Error.fault()
		}
		to = out.Error.Leader
	}
	return fault.New(fault.Unavailable, "cluster.Attach", "the cluster is choosing a leader")
}
