package dispatch

import (
	"math/rand/v2"
	"time"

	"github.com/relais-mta/relais/shared/wire"
)

// dropSpread is the time over which relays come back with a new certificate
// when the issuing CA of their old one was dropped.
const dropSpread = 5 * time.Second

// maxKeyIDBytes bounds key ids in reports, in hexadecimal.
const maxKeyIDBytes = 128

// expireDropped has the session end soon, once, if the certificate that opened
// it is of an issuing CA that was dropped since.
func (n *session) expireDropped(refresh *time.Timer) {
	dropped := n.server.config.Dropped
	if n.dropped || dropped == nil || !dropped(n.link.PeerCertificate()) {
		return
	}
	n.dropped = true
	refresh.Reset(rand.N(dropSpread))
}

// decodeCertificate reads what a relay says of its certificate.
func (r *Report) decodeCertificate(in *wire.Report) {
	if sum := in.GetBundleSha256(); len(sum) <= maxKeyIDBytes {
		r.BundleSum = sum
	}
	r.LeafIssuer = in.GetLeafIssuer()[:min(len(in.GetLeafIssuer()), maxKeyIDBytes)]
}
