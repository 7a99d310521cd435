package service

import (
	"context"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// RecoveryView is where recovery mode stands.
type RecoveryView struct {
	Recovery *control.Recovery // nil: the cluster is not in recovery mode
	Heard    []*control.Node   // relays that said since then what they hold
	Missing  []*control.Node   // active relays that did not, or not all of it
}

// Recovery returns where recovery mode stands.
func (s *Service) Recovery(a Actor) (RecoveryView, error) {
	if err := s.enter(a, control.RoleViewer, "service.Recovery"); err != nil {
		return RecoveryView{}, err
	}
	return s.recovery(), nil
}

func (s *Service) recovery() RecoveryView {
	r := s.state.Read()
	v := RecoveryView{Recovery: r.Recovery()}
	if v.Recovery == nil {
		return v
	}
	heard := s.seenAnywhere()
	for _, n := range r.Nodes() {
		if !n.State.Connects() {
			continue
		}
		seen := heard[n.ID]
		if seen.LastContact.After(v.Recovery.Since) && !owesFloors(r, n.ID, seen.Quota, v.Recovery.Generation) && !owesWarm(r, n.ID, seen.Quota, v.Recovery.Generation) {
			v.Heard = append(v.Heard, n)
		} else {
			v.Missing = append(v.Missing, n)
		}
	}
	return v
}

// EndRecovery ends recovery mode on an operator's word. A relay that was not
// heard since must be named in waive: it may be sending from addresses that
// will then be given to another one.
func (s *Service) EndRecovery(ctx context.Context, a Actor, waive []string, c Change) error {
	const op = "service.EndRecovery"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return err
	}
	v := s.recovery()
	if v.Recovery == nil {
		return nil
	}
	waived := map[ids.Node]bool{}
	for _, ref := range waive {
		n, err := s.nodeByRef(ref)
		if err != nil {
			return err
		}
		waived[n.ID] = true
	}
	for _, n := range v.Missing {
		if !waived[n.ID] {
			return fault.Field(op, "waive", "%q was not heard since the %s, or has not told yet what it holds of limits and spent of warm-up: start it and wait, evict it, or waive it if it is switched off for good", n.Name, v.Recovery.Cause)
		}
	}
	_, err := propose[control.Cluster](ctx, s, &command.RecoveryEnd{Meta: c.meta(a), Generation: v.Recovery.Generation})
	return err
}

// EndRecoveryWhenHeard ends recovery mode by itself, once it lasted long enough
// and every active relay was heard. The leader calls it from time to time.
func (s *Service) EndRecoveryWhenHeard(ctx context.Context, now time.Time) error {
	v := s.recovery()
	if v.Recovery == nil || len(v.Missing) > 0 || now.Sub(v.Recovery.Since) < max(control.MinRecovery, 2*s.LeaseTTL()) {
		return nil
	}
	_, err := propose[control.Cluster](ctx, s, &command.RecoveryEnd{Meta: &command.Meta{Actor: System.Name, Reason: "every active relay was heard"}, Generation: v.Recovery.Generation})
	if err == nil {
		s.logger.Info("recovery mode ended: every active relay was heard", "relays", len(v.Heard))
	}
	return err
}

// Recover begins a new generation with one server, after a restore or a
// recovery. This program is then the only one there is, so the cluster works at
// its version.
func (s *Service) Recover(ctx context.Context, cause control.RecoveryCause, server control.Server) (*control.Cluster, error) {
	cluster, err := s.Cluster()
	if err != nil {
		return nil, err
	}
	meta := &command.Meta{Actor: System.Name, Reason: string(cause)}
	if cluster.FSMVersion < command.FSMVersion {
		if cluster, err = propose[control.Cluster](ctx, s, &command.FSMVersionSet{Meta: meta, Version: uint32(command.FSMVersion)}); err != nil {
			return nil, err
		}
	}
	return propose[control.Cluster](ctx, s, &command.ClusterRecover{Meta: meta, Generation: nextGeneration(cluster.Generation, now()), Cause: string(cause), Server: command.ServerRecord(&server)})
}

// nextGeneration is the second in which the generation begins, so that no two
// are alike even if both come from the same backup; or the next number, if the
// clock says that the last one lies ahead.
func nextGeneration(last uint64, now time.Time) uint64 {
	return max(last+1, uint64(max(now.Unix(), 0)))
}

// IssueAdminKey makes an API key of an admin, for the command line of a server
// that was restored: the old keys' secrets are on the disks that were lost.
func (s *Service) IssueAdminKey(ctx context.Context, name string) (string, error) {
	for _, o := range s.state.Read().Operators() {
		if o.Role != control.RoleAdmin || o.Disabled {
			continue
		}
		key := control.APIKey{Operator: o.ID, Name: name, CreatedAt: now()}
		stamp(&key.ID, key.CreatedAt)
		var secret string
		secret, key.SecretHash = auth.NewAPIKey(key.ID)
		_, err := propose[control.APIKey](ctx, s, &command.APIKeyPut{Meta: &command.Meta{Actor: System.Name, Reason: name}, Key: command.APIKeyRecord(&key)})
		return secret, err
	}
	return "", fault.New(fault.NotFound, "service.IssueAdminKey", "the cluster has no admin")
}
