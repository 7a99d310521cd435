package policy

import (
	"fmt"
	"slices"

	"github.com/relais-mta/relais/shared/ids"
)

// Peer is a relay of the cluster that mail may come from, and go to, by
// hand-over. A relay that was put out of the cluster is none.
type Peer struct {
	Node     ids.Node
	Name     string
	KeyPin   []byte // SHA-256 of its public key; empty: it is known by its certificate alone
	Address  string // host:port at which it takes mail of others; empty: it does not
	Draining bool   // it takes none now
}

// Takes reports whether the relay takes mail of others now.
func (p *Peer) Takes() bool { return p.Address != "" && !p.Draining }

// compilePeers makes the look-ups of other relays: who may hand over mail, and
// who has sources of which pool.
func (d *Directory) compilePeers(p *problems) {
	d.peers = make(map[ids.Node]*Peer, len(d.view.Peers))
	for i := range d.view.Peers {
		peer := &d.view.Peers[i]
		if peer.Node.IsZero() || d.peers[peer.Node] != nil {
			p.add(fmt.Sprintf("view.peers[%d]", i), "relay %v has no id, or its id is there twice", peer.Node)
		}
		d.peers[peer.Node] = peer
	}
	d.owners = make(map[ids.Pool][]*Peer)
	if d.peers[d.view.Node] == nil {
		return // nobody would take mail from this relay
	}
	weights := weightsByPool(&d.view.Document.Pools)
	for i := range d.view.Sources {
		s := &d.view.Sources[i]
		pool, peer := d.pools[s.Pool], d.peers[s.Owner]
		if pool == nil || peer == nil || s.Owner == d.view.Node {
			continue
		}
		if w, ok := weights[poolAddress{pool.Name, s.Bind.Unmap()}]; ok && w == 0 || slices.Contains(d.owners[s.Pool], peer) {
			continue
		}
		d.owners[s.Pool] = append(d.owners[s.Pool], peer)
	}
}

// Peer returns a relay of the cluster, this one included.
func (d *Directory) Peer(id ids.Node) (*Peer, bool) {
	p, ok := d.peers[id]
	return p, ok
}

// Owners returns the other relays that have a source of the pool, whether they
// take mail or not. The slice must not be changed.
func (d *Directory) Owners(pool ids.Pool) []*Peer { return d.owners[pool] }

// Elsewhere reports whether mail for the pool can be handed over to another
// relay.
func (d *Directory) Elsewhere(pool ids.Pool) bool {
	return slices.ContainsFunc(d.owners[pool], (*Peer).Takes)
}
