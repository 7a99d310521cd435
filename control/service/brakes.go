package service

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// maxBrakeTTL bounds how long a brake may be set for beforehand; one without an
// end is set without a TTL.
const maxBrakeTTL = 366 * 24 * time.Hour

// BrakeRequest asks for a brake on the mail that matches all that is given.
type BrakeRequest struct {
	Provider string
	Pool     string // id or name
	Source   string // address or id
	Tenant   string // id or name
	Domain   string // of recipients
	Percent  int    // of what policy allows a lane, 1 to 99; 0: nothing
	Cause    string
	TTL      time.Duration // 0: until it is cancelled
}

// SetBrake restricts mail.
func (s *Service) SetBrake(ctx context.Context, a Actor, req BrakeRequest, c Change) (*control.Brake, error) {
	const op = "service.SetBrake"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	at := now()
	row := control.Brake{Percent: req.Percent, Cause: strings.TrimSpace(req.Cause), Owner: a.Name, CreatedAt: at}
	var err error
	if row.Scope, err = s.brakeScope(req); err != nil {
		return nil, err
	}
	switch {
	case row.Cause == "":
		return nil, fault.Field(op, "cause", "is missing: say why the mail is restricted; who wonders why it waits is shown it")
	case req.Percent < 0 || req.Percent > 99:
		return nil, fault.Field(op, "percent", "%d is out of range: 1 to 99 of what policy allows, or 0 to hold", req.Percent)
	case req.TTL < 0 || req.TTL > maxBrakeTTL:
		return nil, fault.Field(op, "ttl", "%v is out of range: up to %v, or nothing for a brake without an end", req.TTL, maxBrakeTTL)
	case req.TTL > 0:
		row.Until = at.Add(req.TTL)
	}
	if c.Reason == "" {
		c.Reason = row.Cause
	}
	stamp(&row.ID, at)
	return propose[control.Brake](ctx, s, &command.BrakeSet{Meta: c.meta(a), Brake: command.BrakeRecord(&row)})
}

// brakeScope looks the names of a scope up.
func (s *Service) brakeScope(req BrakeRequest) (scope control.BrakeScope, err error) {
	const op = "service.brakeScope"
	r := s.state.Read()
	if req.Provider != "" {
		doc, err := s.policyInForce()
		if err != nil {
			return scope, err
		}
		if !doc.KnowsProvider(req.Provider) {
			return scope, fault.Field(op, "provider", "%q is not a known provider: write the name of one in the policy, or %q and a registrable domain", req.Provider, policy.UnlistedPrefix)
		}
		scope.Provider = req.Provider
	}
	if req.Pool != "" {
		p, err := poolByRef(r, req.Pool)
		if err != nil {
			return scope, err
		}
		scope.Pool = p.ID
	}
	if req.Source != "" {
		src, err := sourceByRef(r, req.Source)
		if err != nil {
			return scope, err
		}
		scope.Source = src.ID
	}
	if req.Tenant != "" {
		t, err := tenantByRef(r, req.Tenant)
		if err != nil {
			return scope, err
		}
		scope.Tenant = t.ID
	}
	if req.Domain != "" {
		if scope.Domain, err = mailaddr.ParseDomain(req.Domain); err != nil {
			return scope, fault.Field(op, "domain", "%s", fault.Public(err))
		}
	}
	if scope.IsZero() {
		return scope, fault.Field(op, "scope", "is missing: name a provider, pool, source, tenant or domain; the brake is for the mail that matches all of them")
	}
	return scope, nil
}

// policyInForce is the policy as relays get it now.
func (s *Service) policyInForce() (*policy.Document, error) {
	put := map[string]string{}
	for _, sec := range s.state.Read().Policy().Sections {
		put[sec.Name] = sec.Text
	}
	doc, err := policy.Parse(put)
	return &doc, err
}

// CancelBrake ends a brake. A rule does not set it again by what was known until
// now.
func (s *Service) CancelBrake(ctx context.Context, a Actor, ref string, c Change) (*control.Brake, error) {
	const op = "service.CancelBrake"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	row, err := brakeByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	return propose[control.Brake](ctx, s, &command.BrakeCancel{Meta: c.meta(a), Expect: c.revision(row.Revision), Brake: row.ID[:]})
}

// PinBrake keeps a brake from being ended by its time or a rule, or lets it again.
func (s *Service) PinBrake(ctx context.Context, a Actor, ref string, pinned bool, c Change) (*control.Brake, error) {
	const op = "service.PinBrake"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	row, err := brakeByRef(s.state.Read(), ref)
	if err != nil {
		return nil, err
	}
	return propose[control.Brake](ctx, s, &command.BrakePin{Meta: c.meta(a), Expect: c.revision(row.Revision), Brake: row.ID[:], Pinned: pinned})
}

func brakeByRef(r *state.Reader, ref string) (*control.Brake, error) {
	var id ids.Brake
	if parseID(&id, ref) {
		if b := r.Brake(id); b != nil {
			return b, nil
		}
	}
	return nil, notFound("brake", "brake", ref)
}

// BrakeView is a brake with the names of what it is for.
type BrakeView struct {
	control.Brake
	PoolName   string
	SourceAddr string
	TenantName string
	NodeName   string
}

// Brakes returns the brakes, oldest first: those in force, or those that ended
// lately as well.
func (s *Service) Brakes(a Actor, ended bool) ([]BrakeView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Brakes"); err != nil {
		return nil, err
	}
	r := s.state.Read()
	var out []BrakeView
	for _, b := range r.Brakes() {
		if ended || b.InForce() {
			out = append(out, brakeView(r, b))
		}
	}
	return out, nil
}

// Brake returns one brake, by its id.
func (s *Service) Brake(a Actor, ref string) (BrakeView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Brake"); err != nil {
		return BrakeView{}, err
	}
	r := s.state.Read()
	b, err := brakeByRef(r, ref)
	if err != nil {
		return BrakeView{}, err
	}
	return brakeView(r, b), nil
}

func brakeView(r *state.Reader, b *control.Brake) BrakeView {
	v := BrakeView{Brake: *b}
	if p := r.Pool(b.Scope.Pool); p != nil {
		v.PoolName = p.Name
	}
	if src := r.Source(b.Scope.Source); src != nil {
		v.SourceAddr = src.Bind.String()
	}
	if t := r.Tenant(b.Scope.Tenant); t != nil {
		v.TenantName = t.Name
	}
	if n := r.Node(b.Node); n != nil {
		v.NodeName = n.Name
	}
	return v
}

// SweepBrakes ends the brakes whose time is over. The leader calls it now and
// then.
func (s *Service) SweepBrakes(ctx context.Context, at time.Time) error {
	if !s.state.Read().BrakesDue(at) {
		return nil
	}
	_, err := s.log.Propose(ctx, &command.BrakeSweep{Meta: Change{}.meta(System)})
	return err
}

// Times of the brakes that tell of relays' reflexes.
const (
	reflexTTL     = time.Hour        // one that its relay tells of no more ends after that
	reflexRefresh = 20 * time.Minute // its time is put off when so much of it is over
)

// Reflex is a lane that a relay has slowed down by itself for long.
type Reflex struct {
	Source      ids.Source
	Provider    string
	Phase       string
	PerHour     int64
	Connections int
	Class       string
	Reply       string
	CauseAt     time.Time
	Since       time.Time
}

// NoteReports makes brakes of what the relays that are connected here told last
// of their reflexes, and ends those of which they tell no more. Every server
// calls it now and then.
func (s *Service) NoteReports(ctx context.Context) error {
	r := s.state.Read()
	if c := r.Cluster(); c == nil || c.FSMVersion < control.BrakesVersion || !s.log.Fresh() {
		return nil
	}
	told := make(map[ids.Node][]Reflex)
	s.seenMu.Lock()
	for id, seen := range s.seen {
		if seen.Connected && seen.Report != nil && seen.LastContact.After(seen.Since) {
			told[id] = seen.Report.Reflexes
		}
	}
	s.seenMu.Unlock()
	noted := map[ids.Node]map[control.BrakeScope]*control.Brake{}
	for _, b := range r.Brakes() {
		if _, here := told[b.Node]; !here || !b.Automatic || b.Owner != control.BrakeReflex {
			continue
		}
		of := noted[b.Node]
		if of == nil {
			of = map[control.BrakeScope]*control.Brake{}
			noted[b.Node] = of
		}
		if old := of[b.Scope]; old == nil || b.InForce() || !old.InForce() && b.EndedAt.After(old.EndedAt) {
			of[b.Scope] = b
		}
	}
	at := now()
	for id, reflexes := range told {
		if err := s.noteReflexes(ctx, id, reflexes, noted[id], at); err != nil {
			return err
		}
	}
	return nil
}

// noteReflexes does so for one relay; noted is the newest brake of each lane.
func (s *Service) noteReflexes(ctx context.Context, node ids.Node, reflexes []Reflex, noted map[control.BrakeScope]*control.Brake, at time.Time) error {
	told := map[control.BrakeScope]bool{}
	for i := range reflexes {
		x := &reflexes[i]
		scope := control.BrakeScope{Provider: x.Provider, Source: x.Source}
		told[scope] = true
		b := noted[scope]
		switch {
		case b != nil && b.InForce() && b.Until.After(at.Add(reflexTTL-reflexRefresh)):
			continue
		case b != nil && !b.InForce() && b.EndedBy != "" && b.EndedBy != control.BrakeReflex && !x.CauseAt.After(b.EndedAt):
			continue // a person ended it and nothing has happened since
		}
		_, err := s.log.Propose(ctx, &command.BrakeSet{Meta: Change{}.meta(System), Brake: command.BrakeRecord(x.brake(node, at))})
		// A lane of a source that is gone, or one too many, is not worth a word.
		if err != nil && !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.Exhausted) {
			return err
		}
	}
	for scope, b := range noted {
		if told[scope] || !b.InForce() || b.Pinned {
			continue
		}
		if _, err := s.log.Propose(ctx, &command.BrakeCancel{Meta: Change{Reason: "the relay is back at policy's limits"}.meta(System), Brake: b.ID[:], Rule: control.BrakeReflex}); err != nil && !fault.Is(err, fault.Conflict) {
			return err
		}
	}
	return nil
}

// brake puts a reflex as a brake that tells of it.
func (x *Reflex) brake(node ids.Node, at time.Time) *control.Brake {
	b := &control.Brake{Scope: control.BrakeScope{Provider: x.Provider, Source: x.Source}, Owner: control.BrakeReflex, Automatic: true, Node: node,
		CreatedAt: at, Until: at.Add(reflexTTL), EvidenceAt: x.CauseAt.UTC().Truncate(time.Millisecond)}
	stamp(&b.ID, at)
	if x.Phase == "slowed" || x.Phase == "probing" {
		b.Percent = 99 // it is slower than policy allows; by how much changes all the time
	}
	b.Cause = oneLine(fmt.Sprintf("%s since %s after %s", x.Phase, x.Since.UTC().Format(time.RFC3339), x.Class), command.MaxTextBytes)
	b.Evidence = oneLine(x.Reply, command.MaxEvidenceBytes)
	return b
}

// oneLine cuts text that came from afar to what a row may hold.
func oneLine(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "")
	}
	return text
}
