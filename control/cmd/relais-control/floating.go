package main

import (
	"time"

	"github.com/relais-mta/relais/control/api"
)

// leaseText says by what a relay uses an address.
func leaseText(i api.IP) string {
	switch {
	case i.Pinned:
		return "pinned"
	case i.Node == "" || i.NodeName == "":
		return "floating"
	case !i.Leased:
		return "floating, assigned without a lease"
	case i.LeaseUntil == nil:
		return "floating, its lease: " + i.LeaseProblem
	case !i.LeaseHeard:
		return "floating, its relay was not heard by this leader; free at " + i.FreeAt.UTC().Format(time.TimeOnly) + " UTC"
	}
	return "floating, until " + i.LeaseUntil.UTC().Format(time.TimeOnly) + " UTC"
}
