package quota

import (
	"bytes"
	"cmp"
	"context"
	"slices"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/warmup"
	"github.com/relais-mta/relais/shared/wire"
)

// tellOf names what one relay tells of one class on one day.
type tellOf struct {
	node    ids.Node
	subject warmup.Subject
	class   warmup.Class
	day     warmup.Day
	epoch   uint64
}

// tell keeps what a relay counted until the next look: of the same day, the later one
// counts. What finds no room is told again.
func (w *Warm) tell(node ids.Node, i *wire.WarmItem) {
	t := &command.WarmTold{Subject: i.GetSubject(), Class: i.GetClass(), Day: i.GetDay(), Node: node[:], Epoch: i.GetEpoch(), Attempts: i.GetAttempts(),
		Accepted: i.GetAccepted(), Deferred: i.GetDeferred(), Blocked: i.GetBlocked(), Hard: i.GetHard(), Signatures: i.GetSignatures()}
	if command.CheckWarmTold(t) != nil {
		return
	}
	of := tellOf{node, warmup.Subject(t.Subject), warmup.Class(t.Class), warmup.Day(t.Day), t.Epoch}
	switch before := w.tells[of]; {
	case before == nil && len(w.tells) >= maxWarmQueue:
	case before == nil || before.GetAttempts() < t.GetAttempts():
		w.tells[of] = t
	}
}

// hear commits what relays counted, and lets them know what is known.
func (w *Warm) hear(ctx context.Context) error {
	r := w.o.State.Read()
	if cluster := r.Cluster(); cluster == nil || cluster.FSMVersion < control.WarmTellVersion || r.WarmCalendar() == nil {
		clear(w.tells)
		return nil
	}
	items := make([]*command.WarmTold, 0, len(w.tells))
	for _, t := range w.tells {
		items = append(items, t)
	}
	clear(w.tells)
	slices.SortFunc(items, func(a, b *command.WarmTold) int {
		return cmp.Or(bytes.Compare(a.Node, b.Node), cmp.Compare(a.Subject, b.Subject), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Day, b.Day), cmp.Compare(a.Epoch, b.Epoch))
	})
	for batch := range slices.Chunk(items, command.MaxWarmItems) {
		result, err := w.o.Propose(ctx, &command.WarmTell{Meta: &command.Meta{Actor: "system"}, Items: batch})
		if err != nil {
			return err
		}
		if heard, ok := result.Row.(*control.WarmHeard); ok {
			w.confirm(batch, heard, int32(r.WarmCalendar().Today))
		}
	}
	return nil
}

// confirm tells the relays of a batch, which is in the order of relays, how much of
// what they counted is known.
func (w *Warm) confirm(batch []*command.WarmTold, heard *control.WarmHeard, today int32) {
	var down *wire.WarmDown
	for i, t := range batch {
		if i == 0 || !bytes.Equal(t.Node, batch[i-1].Node) {
			down = &wire.WarmDown{Today: today}
		}
		down.Replies = append(down.Replies, &wire.WarmReply{Kind: wire.WarmTell, Subject: t.Subject, Class: t.Class, Day: t.Day, Epoch: t.Epoch, Attempts: uint32(heard.Attempts[i])})
		if i == len(batch)-1 || !bytes.Equal(t.Node, batch[i+1].Node) {
			w.o.Send(ids.Node(t.Node), down)
		}
	}
}
