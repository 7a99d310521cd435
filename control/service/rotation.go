package service

import (
	"context"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	prunePeriod = time.Hour      // between two looks for revocations that are over
	warnPeriod  = 24 * time.Hour // between two warnings that the issuing CA ends
)

// Rotation takes the change of the issuing key through its phases, and begins
// one before the issuing CA ends. It belongs to one goroutine of the leader.
type Rotation struct {
	service *Service
	pruned  time.Time
	warned  time.Time
}

// NewRotation returns the watch of a server that leads.
func (s *Service) NewRotation() *Rotation { return &Rotation{service: s} }

// Step looks where the change stands and does what is due. Whatever it does is
// a command, so a leader that takes over in the middle goes on where it was.
func (t *Rotation) Step(ctx context.Context, now time.Time) error {
	s := t.service
	r := s.state.Read()
	cluster := r.Cluster()
	if cluster == nil || cluster.FSMVersion < control.RotationVersion {
		return nil
	}
	if err := t.prune(ctx, now); err != nil {
		return err
	}
	if rotation := r.Rotation(); rotation != nil && rotation.Phase.Running() {
		return s.advanceRotation(ctx, rotation)
	}
	bundle, err := pki.ParseCertificates(cluster.CABundle)
	if err != nil {
		return err
	}
	ends := bundle[0].NotAfter
	switch left := ends.Sub(now); {
	case left < ca.RotateBefore:
		s.logger.Info("the issuing CA ends: its key is changed", "ends", ends)
		return s.beginRotation(ctx, &command.Meta{Actor: System.Name, Reason: "the issuing CA ends at " + ends.UTC().Format(time.RFC3339)}, false)
	case left < ca.WarnBefore && now.Sub(t.warned) >= warnPeriod:
		t.warned = now
		s.logger.Warn("the issuing CA ends: its key will be changed, see that every relay is linked", "ends", ends, "changes", ends.Add(-ca.RotateBefore))
	}
	return nil
}

func (t *Rotation) prune(ctx context.Context, now time.Time) error {
	r := t.service.state.Read()
	due := false
	for _, one := range r.RefusedCAs() {
		due = due || now.After(one.Until)
	}
	for _, one := range r.RevokedServers() {
		due = due || now.After(one.Until)
	}
	if !due || now.Sub(t.pruned) < prunePeriod {
		return nil
	}
	t.pruned = now
	_, err := t.service.log.Propose(ctx, &command.CAPrune{Meta: &command.Meta{Actor: System.Name, Reason: "over by themselves"}})
	return err
}

// advanceRotation records who has acknowledged, and goes on when all have.
func (s *Service) advanceRotation(ctx context.Context, rotation *control.Rotation) error {
	r := s.state.Read()
	bundle, err := pki.ParseCertificates(r.Cluster().CABundle)
	if err != nil {
		return err
	}
	sum := pki.BundleSum(bundle)
	now := time.Now()
	members := r.RotationMembers()
	if waits := rotation.Waits(members, now); len(waits) > 0 {
		states := s.certificateStates(ctx, r)
		ack := &command.CAAck{Meta: &command.Meta{Actor: System.Name, Reason: "heard from them"}, Rotation: rotation.New.KeyID, Phase: string(rotation.Phase)}
		for _, m := range waits {
			if len(ack.Members) < command.MaxRotationAcks && acknowledges(rotation, sum[:], r.Cluster().Revision, m, states[m.ID]) {
				ack.Members = append(ack.Members, m.ID[:])
			}
		}
		if len(ack.Members) == 0 {
			return nil
		}
		if rotation, err = propose[control.Rotation](ctx, s, ack); err != nil {
			return err
		}
		if len(rotation.Waits(members, now)) > 0 {
			return nil
		}
	}
	next, err := propose[control.Rotation](ctx, s, &command.CAAdvance{Meta: &command.Meta{Actor: System.Name, Reason: "everybody has acknowledged"}, Rotation: rotation.New.KeyID, Phase: string(rotation.Phase)})
	if err == nil {
		s.logger.Info("the change of the issuing key goes on", "from", string(rotation.Phase), "to", string(next.Phase))
	}
	return err
}

// CAHealth returns what is wrong with the issuing CA, one sentence; empty: nothing.
func (s *Service) CAHealth(now time.Time) string {
	r := s.state.Read()
	cluster := r.Cluster()
	if cluster == nil {
		return ""
	}
	bundle, err := pki.ParseCertificates(cluster.CABundle)
	if err != nil {
		return "the CA bundle is damaged"
	}
	if left := bundle[0].NotAfter.Sub(now); left < ca.WarnBefore {
		return "the issuing CA ends at " + bundle[0].NotAfter.UTC().Format(time.RFC3339) + ": see relais-control ca status"
	}
	if rotation := r.Rotation(); rotation != nil && rotation.Phase.Running() && now.Sub(rotation.Since) > slowPhase {
		return "the change of the issuing key waits in the phase " + string(rotation.Phase) + " since " + rotation.Since.UTC().Format(time.RFC3339) + ": see relais-control ca status"
	}
	return ""
}

// slowPhase is when a phase has waited so long that somebody should look.
const slowPhase = time.Hour

// IssuingEnds returns when the issuing CA ends that signs, zero if it is not known.
func (s *Service) IssuingEnds() time.Time {
	cluster := s.state.Read().Cluster()
	if cluster == nil {
		return time.Time{}
	}
	bundle, err := pki.ParseCertificates(cluster.CABundle)
	if err != nil {
		return time.Time{}
	}
	return bundle[0].NotAfter
}
