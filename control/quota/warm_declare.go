package quota

import (
	"bytes"
	"context"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/wire"
)

// declare answers relays that say that all they spent is settled. In recovery mode
// that is committed first: it does not end before every relay has said so.
func (w *Warm) declare(ctx context.Context) error {
	if len(w.declares) == 0 {
		return nil
	}
	said := w.declares
	w.declares = make(map[ids.Node]uint64)
	r := w.o.State.Read()
	cluster, recovery := r.Cluster(), r.Recovery()
	if cluster == nil || cluster.FSMVersion < control.WarmVersion {
		return nil
	}
	var items []*command.WarmItem
	for node, generation := range said {
		switch row := r.LeaseNode(node); {
		case generation != cluster.Generation:
			delete(said, node) // it has not heard of this one yet
		case recovery == nil || r.WarmCalendar() == nil || row != nil && row.WarmDeclared == generation:
		default:
			items = append(items, &command.WarmItem{Kind: command.WarmDeclare, Node: node[:], Epoch: generation})
		}
	}
	slices.SortFunc(items, func(a, b *command.WarmItem) int { return bytes.Compare(a.Node, b.Node) })
	for some := range slices.Chunk(items, command.MaxWarmItems) {
		if _, err := w.o.Propose(ctx, &command.WarmBatch{Meta: &command.Meta{Actor: "system"}, Items: some}); err != nil {
			return err
		}
	}
	for node, generation := range said {
		w.o.Send(node, &wire.WarmDown{Replies: []*wire.WarmReply{{Kind: command.WarmDeclare, Epoch: generation}}})
	}
	return nil
}
