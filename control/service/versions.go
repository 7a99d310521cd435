package service

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// keepPolicyVersions is how many policies are kept, the one in force included.
const keepPolicyVersions = 20

// Preview says what a change of the policy would do.
type Preview struct {
	Revision uint64 // of the policy that the change is compared with
	Changes  []policy.Change
	Impact   policy.Impact
}

// PreviewPolicy checks a change as PutPolicy does and says what it would do,
// without doing it.
func (s *Service) PreviewPolicy(a Actor, sections map[string]string) (Preview, error) {
	if err := s.enter(a, control.RoleViewer, "service.PreviewPolicy"); err != nil {
		return Preview{}, err
	}
	row := s.state.Read().Policy()
	next, err := s.checkPolicy(row, sections)
	if err != nil {
		return Preview{}, err
	}
	return s.preview(row, next)
}

func (s *Service) preview(row *control.Policy, next *policy.Document) (Preview, error) {
	texts := map[string]string{}
	for _, sec := range row.Sections {
		texts[sec.Name] = sec.Text
	}
	current, err := policy.Parse(texts)
	if err != nil {
		return Preview{}, err
	}
	base, err := s.baseView()
	if err != nil {
		return Preview{}, err
	}
	return Preview{Revision: row.Revision, Changes: policy.Diff(&current, next), Impact: policy.ImpactOf(&current, next, base)}, nil
}

// rollback returns the sections that differ between the policy in force and the
// one of a former revision; 0 is the shipped policy.
func (s *Service) rollback(row *control.Policy, revision uint64) (map[string]string, error) {
	const op = "service.RollbackPolicy"
	version := s.state.Read().PolicyVersion(revision)
	if version == nil {
		e := fault.New(fault.NotFound, op, "the policy of revision %d is not kept: `relais-control policy history` shows the last %d, 0 is the shipped policy", revision, keepPolicyVersions)
		e.Field = "revision"
		return nil, e
	}
	sections := map[string]string{}
	for _, sec := range row.Sections {
		sections[sec.Name] = ""
	}
	for _, sec := range version.Sections {
		sections[sec.Name] = sec.Text
	}
	for _, sec := range row.Sections {
		if sections[sec.Name] == sec.Text {
			delete(sections, sec.Name)
		}
	}
	if len(sections) == 0 {
		return nil, fault.Field(op, "revision", "%d has the same policy as revision %d, which is in force: there is nothing to go back to", revision, row.Revision)
	}
	return sections, nil
}

// PreviewRollback says what going back to a former revision would do.
func (s *Service) PreviewRollback(a Actor, revision uint64) (Preview, error) {
	if err := s.enter(a, control.RoleViewer, "service.PreviewRollback"); err != nil {
		return Preview{}, err
	}
	sections, err := s.rollback(s.state.Read().Policy(), revision)
	if err != nil {
		return Preview{}, err
	}
	return s.PreviewPolicy(a, sections)
}

// RollbackPolicy puts the policy of a former revision again, as a new revision:
// revisions never go back. Credentials, nodes, addresses and keys are no part
// of the policy, so nothing revoked comes back. The old policy is checked like
// any other, since pools it names may be gone.
func (s *Service) RollbackPolicy(ctx context.Context, a Actor, revision uint64, expect *uint64, c Change) (PolicyView, error) {
	if err := s.enter(a, control.RoleOperator, "service.RollbackPolicy"); err != nil {
		return PolicyView{}, err
	}
	row := s.state.Read().Policy()
	sections, err := s.rollback(row, revision)
	if err != nil {
		return PolicyView{}, err
	}
	if expect == nil {
		expect = &row.Revision
	}
	c.Reason = strings.TrimSuffix(fmt.Sprintf("rollback to revision %d: %s", revision, c.Reason), ": ")
	return s.PutPolicy(ctx, a, sections, expect, c)
}

// PolicyVersions returns the kept policies, newest first.
func (s *Service) PolicyVersions(a Actor) ([]*control.PolicyVersion, error) {
	if err := s.enter(a, control.RoleViewer, "service.PolicyVersions"); err != nil {
		return nil, err
	}
	return s.state.Read().PolicyVersions(), nil
}

// PolicyStatus says which relays work with the policy in force, as far as any
// server heard.
type PolicyStatus struct {
	Revision uint64
	Applied  int // relays that work with it
	Total    int // relays that should
	Relays   []RelayStatus
}

// RelayStatus is where one relay stands.
type RelayStatus struct {
	Node            control.Node
	Connected       bool // to any server
	Acked           uint64
	AckedAt         time.Time
	Refused         bool   // the relay refused the policy in force and keeps its last good one
	RefusedRevision uint64 // the revision that it refused; 0: none
	Why             string
}

// PolicyStatus reports how far the policy in force got.
func (s *Service) PolicyStatus(a Actor) (PolicyStatus, error) {
	nodes, err := s.Nodes(a)
	if err != nil {
		return PolicyStatus{}, err
	}
	out := PolicyStatus{Revision: s.state.Read().Policy().Revision}
	for i := range nodes {
		n := &nodes[i]
		if !n.State.Connects() {
			continue
		}
		r := RelayStatus{Node: n.Node, Connected: n.Seen.Connected, Acked: n.Seen.Acked, AckedAt: n.Seen.AckedAt}
		// What it refused before this policy was made says nothing of this one: it
		// has not answered yet.
		if n.Seen.Refused > n.Seen.Acked && n.Seen.Refused >= out.Revision {
			r.Refused, r.RefusedRevision, r.Why = true, n.Seen.Refused, n.Seen.RefusedWhy
		}
		out.Total++
		if r.Acked > 0 && r.Acked >= out.Revision {
			out.Applied++
		}
		out.Relays = append(out.Relays, r)
	}
	return out, nil
}
