package service

import (
	"context"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// WatchRevision returns a channel that is closed at the next change that relays
// must hear of. Take it before building a view, so that no change is missed.
func (s *Service) WatchRevision() <-chan struct{} { return s.state.WatchViews() }

// Revision returns the revision of the newest view.
func (s *Service) Revision() uint64 { return s.state.Read().ViewRevision() }

// ViewFor builds what one relay works from, of the newest revision. It is
// built once per revision: views of one revision share everything but the node,
// and nobody may change them.
func (s *Service) ViewFor(_ context.Context, node ids.Node) (*policy.View, error) {
	if err := s.log.Health(); err != nil {
		return nil, err
	}
	base, err := s.baseView()
	if err != nil {
		return nil, err
	}
	v := *base
	v.Node, v.Draining = node, s.state.Read().Draining(node)
	return &v, nil
}

func (s *Service) baseView() (*policy.View, error) {
	s.viewMu.Lock()
	defer s.viewMu.Unlock()
	r := s.state.Read()
	if s.view != nil && s.view.Revision == r.ViewRevision() {
		return s.view, nil
	}
	v, err := r.View(ids.Node{}, s.sealer.Open)
	if err != nil {
		return nil, fault.Wrap(err, fault.KindOf(err), "service.ViewFor", "the relays' view cannot be built: %s", fault.Public(err))
	}
	s.view = v
	return v, nil
}
