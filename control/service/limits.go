package service

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/policy"
)

// Lender knows who holds and wants how much of shared limits; quota.Quota is one.
type Lender interface {
	Status(ctx context.Context, limits []lease.LimitID) ([]quota.HolderStatus, error)
}

// LimitView is a limit that relays share, and who holds how much of it.
type LimitView struct {
	control.SharedLimit
	Held    lease.Share // by all relays
	Free    lease.Share
	Holders []LimitHolder // in the order of relays' names
	NotKept []string      // connected relays of a release that knows no shared limits, by name
	Problem string        // why nothing is known of what relays want; empty: it is known
}

// LimitHolder is one relay's part.
type LimitHolder struct {
	Name        string
	Node        ids.Node
	State       control.NodeState
	Incarnation uint64
	Ceiling     lease.Share // may be held at most, beyond the floor
	Floor       lease.Share
	Live        *quota.HolderStatus // nil: the leader knows nothing
}

// Limits returns every limit that relays share, by name.
func (s *Service) Limits(ctx context.Context, a Actor) ([]LimitView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Limits"); err != nil {
		return nil, err
	}
	return s.limitViews(ctx, s.state.Read(), func(*control.SharedLimit) bool { return true }, false), nil
}

// Limit returns what a limit of the policy comes to: a limit of messages, one of
// connections, or both; with what relays want and when they were heard.
func (s *Service) Limit(ctx context.Context, a Actor, name string) ([]LimitView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Limit"); err != nil {
		return nil, err
	}
	views := s.limitViews(ctx, s.state.Read(), func(l *control.SharedLimit) bool { return l.Name == name }, true)
	if len(views) == 0 {
		return nil, notFound("limit", "limit", name)
	}
	return views, nil
}

// limitViews returns the limits that are wanted. Without the lender's word only
// what is replicated is shown.
func (s *Service) limitViews(ctx context.Context, r *state.Reader, wanted func(*control.SharedLimit) bool, live bool) []LimitView {
	notKept := s.notKeeping(r)
	var out []LimitView
	var numbers []lease.LimitID
	for _, l := range r.SharedLimits() {
		if wanted(l) {
			out = append(out, LimitView{SharedLimit: *l, NotKept: notKept})
		}
	}
	slices.SortFunc(out, func(x, y LimitView) int {
		if c := strings.Compare(x.Name, y.Name); c != 0 {
			return c
		}
		return int(x.Kind) - int(y.Kind)
	})
	for i := range out[:min(len(out), quota.MaxStatusLimits)] {
		numbers = append(numbers, out[i].ID)
	}
	known, problem := map[holderKey]*quota.HolderStatus{}, ""
	if live && len(numbers) > 0 {
		known, problem = s.askLender(ctx, numbers)
	}
	relays := map[lease.Node]*control.LeaseNode{}
	for _, n := range r.LeaseNodes() {
		relays[n.Number] = n
	}
	for i := range out {
		v := &out[i]
		if v.Problem = problem; live && problem == "" && i >= quota.MaxStatusLimits {
			v.Problem = fmt.Sprintf("the leader was asked about the first %d limits: select less mail, or name the limit", quota.MaxStatusLimits)
		}
		s.fillHolders(r, v, relays, known)
	}
	return out
}

type holderKey struct {
	node  ids.Node
	limit lease.LimitID
}

func (s *Service) askLender(ctx context.Context, numbers []lease.LimitID) (map[holderKey]*quota.HolderStatus, string) {
	known := map[holderKey]*quota.HolderStatus{}
	if s.lender == nil {
		return known, "this server lends nothing out"
	}
	status, err := s.lender.Status(ctx, numbers)
	if err != nil {
		return known, fault.Public(err)
	}
	for i := range status {
		known[holderKey{status[i].Node, status[i].Limit}] = &status[i]
	}
	return known, ""
}

// fillHolders adds the relays that hold something, and those that want something.
func (s *Service) fillHolders(r *state.Reader, v *LimitView, relays map[lease.Node]*control.LeaseNode, known map[holderKey]*quota.HolderStatus) {
	shown := map[ids.Node]bool{}
	add := func(id ids.Node, h lease.Holding) {
		holder := LimitHolder{Node: id, Ceiling: h.Ceiling, Floor: h.Floor, Live: known[holderKey{id, v.ID}]}
		if n := r.Node(id); n != nil {
			holder.Name, holder.State = n.Name, n.State
		}
		if n := r.LeaseNode(id); n != nil {
			holder.Incarnation = n.Incarnation
		}
		shown[id] = true
		v.Holders = append(v.Holders, holder)
	}
	for _, h := range r.Holdings(v.ID) {
		v.Held.Amount += h.Ceiling.Amount + h.Floor.Amount
		v.Held.Burst += h.Ceiling.Burst + h.Floor.Burst
		if n := relays[h.Node]; n != nil {
			add(n.ID, h)
		}
	}
	for key := range known {
		if key.limit == v.ID && !shown[key.node] {
			add(key.node, lease.Holding{})
		}
	}
	v.Free = lease.Share{Amount: max(0, v.Max-v.Held.Amount), Burst: max(0, v.Burst-v.Held.Burst)}
	slices.SortFunc(v.Holders, func(x, y LimitHolder) int { return strings.Compare(x.Name, y.Name) })
}

// notKeeping names the relays that are connected and do not keep shared limits.
func (s *Service) notKeeping(r *state.Reader) []string {
	var out []string
	for id, seen := range s.seenAnywhere() {
		if n := r.Node(id); n != nil && n.State.Connects() && seen.Connected && !seen.Quota {
			out = append(out, n.Name)
		}
	}
	slices.Sort(out)
	return out
}

// SetLender says who knows what relays want of shared limits. It is called before
// the service is used.
func (s *Service) SetLender(l Lender) { s.lender = l }

// Mail selects mail. What is empty is left open.
type Mail struct {
	Source   string // address that it leaves from
	Provider string
	Tenant   string
	Domain   string // of the recipient
	Pool     string
}

// Why is what holds for some mail.
type Why struct {
	Mail     Mail           // with what follows from it: the pool of a source, the tenant of a pool
	Provider ProviderLimits // of each source or relay by itself
	Shared   []LimitView    // of all relays together
	Brakes   []BrakeView    // in force
	WarmUps  []WarmUpView   // of the address, of pools and of sending domains
}

// ProviderLimits are the limits of a provider's profile.
type ProviderLimits struct {
	Name   string // empty: no provider was named
	Listed bool   // it has a profile of its own
	Limits []ProviderLimit
}

// ProviderLimit is one limit of a profile.
type ProviderLimit struct {
	Kind  policy.LimitKind
	Scope policy.Scope
	Max   int
	Per   time.Duration // of rates
	Burst int
}

// PolicyWhy returns every limit, brake and warm-up that holds for some mail, and who
// holds how much of the limits that are shared. What the selection leaves open may or may not match: a
// limit is left out only if it certainly does not.
func (s *Service) PolicyWhy(ctx context.Context, a Actor, m Mail) (Why, error) {
	if err := s.enter(a, control.RoleViewer, "service.PolicyWhy"); err != nil {
		return Why{}, err
	}
	r := s.state.Read()
	if err := s.completeMail(r, &m); err != nil {
		return Why{}, err
	}
	out := Why{Mail: m}
	if m.Provider != "" {
		limits, err := s.providerLimits(m.Provider)
		if err != nil {
			return Why{}, err
		}
		out.Provider = limits
	}
	out.Shared = s.limitViews(ctx, r, func(l *control.SharedLimit) bool {
		return may(l.Provider, m.Provider) && may(l.Tenant, m.Tenant) && may(l.Domain, m.Domain) && may(l.Pool, m.Pool)
	}, true)
	out.Brakes = brakesOn(r, &m)
	var err error
	out.WarmUps, err = s.warmUpsOf(r, &m)
	return out, err
}

// completeMail checks that what is named exists, and adds what follows from it.
func (s *Service) completeMail(r *state.Reader, m *Mail) error {
	const op = "service.PolicyWhy"
	if m.Source != "" {
		addr, err := netip.ParseAddr(m.Source)
		if err != nil {
			return fault.Field(op, "source", "%q is not an address: write one such as 198.51.100.7", m.Source)
		}
		var row *control.Source
		for _, src := range r.Sources() {
			if src.Bind == addr.Unmap() || src.Public == addr.Unmap() {
				row = src
			}
		}
		if row == nil {
			return notFound("source", "ip", m.Source)
		}
		if p := r.Pool(row.Pool); p != nil && m.Pool == "" {
			m.Pool = p.Name
		}
	}
	if m.Pool != "" {
		at := slices.IndexFunc(r.Pools(), func(p *control.Pool) bool { return p.Name == m.Pool })
		if at < 0 {
			return notFound("pool", "pool", m.Pool)
		}
		if t := r.Tenant(r.Pools()[at].Tenant); t != nil && m.Tenant == "" {
			m.Tenant = t.Name
		}
	}
	if m.Tenant != "" && !slices.ContainsFunc(r.Tenants(), func(t *control.Tenant) bool { return t.Name == m.Tenant }) {
		return notFound("tenant", "tenant", m.Tenant)
	}
	if m.Domain != "" {
		d, err := mailaddr.ParseDomain(m.Domain)
		if err != nil {
			return fault.Field(op, "domain", "%q is not a recipient's domain", m.Domain)
		}
		m.Domain = string(d)
	}
	return nil
}

// providerLimits returns what a provider's profile says.
func (s *Service) providerLimits(name string) (ProviderLimits, error) {
	base, err := s.baseView()
	if err != nil {
		return ProviderLimits{}, err
	}
	d, err := policy.Compile(base)
	if err != nil {
		return ProviderLimits{}, err
	}
	profile, ok := d.Providers().Named(name)
	if !ok {
		return ProviderLimits{}, fault.Field("service.PolicyWhy", "provider", "%q is not a known provider: name a [[provider]] of section providers, or \"mx:\" and a registrable domain", name)
	}
	out := ProviderLimits{Name: name, Listed: profile.Name != ""}
	count := func(kind policy.LimitKind, scope policy.Scope, n int) {
		if n > 0 {
			out.Limits = append(out.Limits, ProviderLimit{Kind: kind, Scope: scope, Max: n})
		}
	}
	rate := func(kind policy.LimitKind, scope policy.Scope, r policy.Rate) {
		if r.Limited() {
			out.Limits = append(out.Limits, ProviderLimit{Kind: kind, Scope: scope, Max: r.Max, Per: r.Per, Burst: r.Burst})
		}
	}
	for _, scope := range []policy.Scope{policy.ScopeSource, policy.ScopeRelay} {
		count(policy.Connections, scope, profile.Connections(scope))
		rate(policy.ConnectionRate, scope, profile.ConnectionRate(scope))
		rate(policy.MessageRate, scope, profile.MessageRate(scope))
	}
	count(policy.MessagesPerConnection, policy.ScopeSource, profile.MessagesPerConnection())
	count(policy.RecipientsPerTransaction, policy.ScopeSource, profile.RecipientsPerTransaction())
	return out, nil
}

// owesFloors reports whether a relay has not yet said, in recovery mode, what its
// disk holds of shared limits: the state may be older than that.
func owesFloors(r *state.Reader, id ids.Node, keeps bool, generation uint64) bool {
	if len(r.SharedLimits()) == 0 {
		return false
	}
	n := r.LeaseNode(id)
	if n == nil {
		return keeps
	}
	return n.Declared != generation
}

// LeaseTTL is the longest life of anything that is leased to a relay now: a share of
// a limit, or a floating address.
func (s *Service) LeaseTTL() time.Duration { return leaseTTL(s.state.Read()) }

func leaseTTL(r *state.Reader) time.Duration {
	row := r.Lease()
	longest := max(row.Config.TTL, row.Reclaim.TTL)
	if r.LeasesSources() {
		longest = max(longest, ownership.DefaultConfig().TTL)
	}
	return longest
}

// owesWarm reports whether a relay has not yet said, in recovery mode, that all that
// it spent of warm-up is settled: the ledger may be older than that.
func owesWarm(r *state.Reader, id ids.Node, keeps bool, generation uint64) bool {
	if !keeps || !slices.ContainsFunc(r.WarmSubjects(), (*control.WarmSubject).Warms) {
		return false
	}
	n := r.LeaseNode(id)
	return n == nil || n.WarmDeclared != generation
}
