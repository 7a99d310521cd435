package fleet

import (
	"fmt"
	"net/netip"

	"github.com/relais-mta/relais/shared/fault"
)

// maxPeers is how many servers besides the lab's a fleet has addresses for.
const (
	placePeer = 3584 // peer i at placePeer+i
	maxPeers  = 64
)

// PeerAddr is where the i-th mail server that is not the lab's listens: the
// port is the one at which relays look for MX hosts.
func (f *Fleet) PeerAddr(i int) netip.AddrPort {
	if i < 0 || i >= maxPeers {
		panic(fmt.Sprintf("fleet: there is no place for peer %d", i))
	}
	return netip.AddrPortFrom(f.block.Addr(placePeer+i), portSMTP)
}

// PublishMX makes the i-th peer the MX host of a domain.
func (f *Fleet) PublishMX(i int, domain, host string) error {
	if err := f.Lab.AddRecords(fmt.Sprintf("%s. 60 IN MX 10 %s.", domain, host), fmt.Sprintf("%s. 60 IN A %s", host, f.PeerAddr(i).Addr())); err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.PublishMX", "the records of %s cannot be published", domain)
	}
	return nil
}
