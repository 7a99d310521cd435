package service

import (
	"github.com/relais-mta/relais/shared/fault"
)

// sectionSince is the version of the commands since which a section of the policy
// may be put: before it some server may not know the section, and could make no
// view for its relays.
var sectionSince = map[string]uint16{"limits": 4, "warmup": 4}

// checkSections refuses sections that some server may not know.
func (s *Service) checkSections(sections map[string]string) error {
	cluster, err := s.Cluster()
	if err != nil {
		return err
	}
	for name := range sections {
		if since := sectionSince[name]; since > cluster.FSMVersion {
			e := fault.New(fault.Unavailable, "service.PutPolicy", "needs version %d of the commands, the cluster works at %d: upgrade every server and finish the upgrade with `relais-control upgrade finish`, or wait ten minutes after the last one", since, cluster.FSMVersion)
			e.Field = name
			return e
		}
	}
	return nil
}
