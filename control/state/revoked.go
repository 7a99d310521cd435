package state

import (
	"encoding/pem"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/policy"
)

var revokedTable = &table[control.RevokedServer]{
	name: "revoked servers", section: sectionRevoked, maxRows: maxRevoked, inViews: true,
	key:      func(r *control.RevokedServer) []byte { return r.Server[:] },
	record:   func(r *control.RevokedServer) proto.Message { return command.RevokedServerRecord(r) },
	row:      unmarshalRow[command.RevokedServer, control.RevokedServer],
	revision: func(r *control.RevokedServer) *uint64 { return &r.Revision },
}

// leafLife is at least the life of a server's certificate: one that was removed
// may have one that its row does not tell of.
const leafLife = 7 * 24 * time.Hour

// revokeServer remembers a server that was removed, with its certificates,
// until the last of them cannot be renewed any more. In a full list the one
// that ends first makes room.
func (a *applier) revokeServer(s *control.Server) error {
	if c := get(a.txn, clusterTable, "id", singleton); c == nil || c.FSMVersion < control.RotationVersion {
		return nil // older servers apply the same entry and know no such list
	}
	row := control.RevokedServer{Server: s.ID, Since: a.now, Until: a.now.Add(leafLife + control.RenewGrace)}
	for _, c := range s.Certificates {
		row.Serials = append(row.Serials, c.Serial)
		if until := c.NotAfter.Add(control.RenewGrace); until.After(row.Until) {
			row.Until = until
		}
	}
	if a.progress.counts[sectionRevoked] >= maxRevoked && get(a.txn, revokedTable, "id", s.ID[:]) == nil {
		remove(a, revokedTable, slices.MinFunc(all(a.txn, revokedTable), func(x, y *control.RevokedServer) int { return x.Until.Compare(y.Until) }))
	}
	return put(a, revokedTable, &row)
}

// RevokedServers returns the servers whose certificates relays refuse.
func (r *Reader) RevokedServers() []*control.RevokedServer { return all(r.txn, revokedTable) }

// viewTrust tells relays whom to believe. A cluster that an older server may
// belong to does not, so that all its servers say the same.
func (r *Reader) viewTrust(v *policy.View) {
	cluster := r.Cluster()
	if cluster.FSMVersion < control.RotationVersion {
		return
	}
	for block, rest := pem.Decode(cluster.CABundle); block != nil; block, rest = pem.Decode(rest) {
		v.Trust.CAs = append(v.Trust.CAs, block.Bytes)
	}
	for _, ca := range r.RefusedCAs() {
		v.Trust.RefusedCAs = append(v.Trust.RefusedCAs, ca.KeyID)
	}
	for _, s := range r.RevokedServers() {
		v.Trust.RevokedServers = append(v.Trust.RevokedServers, policy.RevokedServer{Server: s.Server, Serials: s.Serials})
	}
}
