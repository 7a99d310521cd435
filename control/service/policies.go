package service

import (
	"context"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// PolicyView is the whole policy as TOML texts.
type PolicyView struct {
	Revision uint64
	Sections []SectionView // in the order of policy.SectionNames
}

// SectionView is one section.
type SectionView struct {
	Name    string
	Text    string // what the operators put, or the shipped default
	Default bool   // nothing was put
}

// Policy returns every section.
func (s *Service) Policy(a Actor) (PolicyView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Policy"); err != nil {
		return PolicyView{}, err
	}
	return policyView(s.state.Read().Policy()), nil
}

func policyView(row *control.Policy) PolicyView {
	put := map[string]string{}
	for _, sec := range row.Sections {
		put[sec.Name] = sec.Text
	}
	v := PolicyView{Revision: row.Revision}
	for _, name := range policy.SectionNames() {
		if text, ok := put[name]; ok {
			v.Sections = append(v.Sections, SectionView{Name: name, Text: text})
		} else {
			v.Sections = append(v.Sections, SectionView{Name: name, Text: policy.DefaultSection(name), Default: true})
		}
	}
	return v
}

// PutPolicy changes the named sections; an empty text returns a section to its
// shipped default. The whole resulting policy is checked first, names of
// tenants, projects, pools and addresses included: one bad key and nothing
// changes. Expect in c is the policy's revision, which is 0 before the first
// change; nil stands for whatever it is.
func (s *Service) PutPolicy(ctx context.Context, a Actor, sections map[string]string, expect *uint64, c Change) (PolicyView, error) {
	const op = "service.PutPolicy"
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return PolicyView{}, err
	}
	row := s.state.Read().Policy()
	if expect != nil && *expect != row.Revision {
		e := fault.New(fault.Conflict, op, "the policy was changed meanwhile: it is at revision %d, the change was made from %d; get it again, or see `relais-control policy diff --rev %d`, and repeat", row.Revision, *expect, *expect)
		e.Cause = &state.StaleError{Revision: row.Revision}
		return PolicyView{}, s.sayWhatChanged(e)
	}
	if err := s.checkSections(sections); err != nil {
		return PolicyView{}, err
	}
	if _, err := s.checkPolicy(row, sections); err != nil {
		return PolicyView{}, err
	}
	cmd := &command.PolicyPut{Meta: c.meta(a), Expect: row.Revision, KeepVersions: keepPolicyVersions}
	for name, text := range sections {
		cmd.Sections = append(cmd.Sections, &command.PolicySection{Name: name, Text: text})
	}
	slices.SortFunc(cmd.Sections, func(x, y *command.PolicySection) int { return strings.Compare(x.Name, y.Name) })
	out, err := propose[control.Policy](ctx, s, cmd)
	if err != nil {
		return PolicyView{}, err
	}
	return policyView(out), nil
}

// checkPolicy checks the policy as it would be, with the code relays run, and
// returns it.
func (s *Service) checkPolicy(row *control.Policy, sections map[string]string) (*policy.Document, error) {
	const op = "service.PutPolicy"
	if len(sections) == 0 {
		return nil, fault.Field(op, "sections", "are missing: name at least one of %s", strings.Join(policy.SectionNames(), ", "))
	}
	merged := map[string]string{}
	for _, sec := range row.Sections {
		merged[sec.Name] = sec.Text
	}
	for name, text := range sections {
		if !slices.Contains(policy.SectionNames(), name) {
			return nil, fault.Field(op, name, "is not a section of the policy: use %s", strings.Join(policy.SectionNames(), ", "))
		}
		if merged[name] = text; text == "" {
			delete(merged, name)
		}
	}
	document, err := policy.Parse(merged)
	if err != nil {
		return nil, err
	}
	base, err := s.baseView()
	if err != nil {
		return nil, err
	}
	if err := policy.CheckReferences(&document, s.references(base)); err != nil {
		return nil, err
	}
	if err := s.keepsWarmPlans(&document); err != nil {
		return nil, err
	}
	next := *base
	next.Sections, next.Document = merged, document
	_, err = policy.Compile(&next)
	return &document, err
}

// references are the objects that a policy may name: those of a view, and the
// addresses that no relay may use yet.
func (s *Service) references(base *policy.View) policy.References {
	refs := policy.ReferencesOf(base)
	r := s.state.Read()
	for _, src := range r.Sources() {
		if p := r.Pool(src.Pool); p != nil && refs.Pools[p.Name].Sources != nil {
			refs.Pools[p.Name].Sources[src.Bind] = true
		}
	}
	return refs
}

// AuditFilter chooses entries of the audit tail; zero fields choose all.
type AuditFilter struct {
	Limit  int // entries, the newest ones
	Actor  string
	Object string // a part of the object's name or id
	Action string
	Since  time.Time
}

// names reports whether an entry is about an object with the text in its id or
// name. Rows that are known by an id have their name in what is shown of them.
func names(e *control.AuditEntry, text string) bool {
	if strings.Contains(e.Object, text) {
		return true
	}
	for _, shown := range []string{e.Before, e.After} {
		for word := range strings.FieldsSeq(shown) {
			key, value, ok := strings.Cut(word, "=")
			if ok && (key == "name" || key == "quarantined") && strings.Contains(value, text) {
				return true
			}
		}
	}
	return false
}

// Audit returns the newest changes that the filter chooses, newest first.
func (s *Service) Audit(a Actor, f AuditFilter) ([]*control.AuditEntry, error) {
	if err := s.enter(a, control.RoleOperator, "service.Audit"); err != nil {
		return nil, err
	}
	var out []*control.AuditEntry
	for _, e := range s.state.Read().Audit(math.MaxInt) {
		if len(out) == f.Limit || e.Time.Before(f.Since) {
			break // times never go back
		}
		if (f.Actor == "" || e.Actor == f.Actor) && (f.Action == "" || e.Action == f.Action) && names(e, f.Object) {
			out = append(out, e)
		}
	}
	return out, nil
}
