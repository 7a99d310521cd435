package state

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/warmup"
)

// warmTell notes what providers answered to relays. What has come too late, or is
// of nothing that warms up, is passed over: the others of the command count.
func (a *applier) warmTell(c *command.WarmTell) (any, error) {
	cal, err := a.calendar()
	if err != nil {
		return nil, err
	}
	l := a.ledger(cal)
	out := &control.WarmHeard{Attempts: make([]int64, 0, len(c.GetItems()))}
	for _, i := range c.GetItems() {
		if err := command.CheckWarmTold(i); err != nil {
			return nil, err
		}
		heard, err := a.warmTold(l, i)
		if err != nil {
			heard = 0
		}
		out.Attempts = append(out.Attempts, heard)
	}
	return out, l.save()
}

// warmTold notes one relay's counts and returns how many attempts are known then.
func (a *applier) warmTold(l *ledgers, i *command.WarmTold) (int64, error) {
	subject := get(a.txn, warmSubjectsTable, "id", warmNumber(warmup.Subject(i.GetSubject())))
	if subject == nil {
		return 0, nil
	}
	day, class := warmup.Day(i.GetDay()), warmup.Class(i.GetClass())
	line, err := l.open(subject, day)
	if err != nil {
		return 0, err
	}
	var id ids.Node
	copy(id[:], i.GetNode())
	node := control.WarmNode(id)
	line.Tell(warmup.Told{Subject: subject.Number, Class: class, Day: day, Node: node, Epoch: i.GetEpoch(), Tally: i.Tally()})
	if err := l.close(subject, day, line); err != nil {
		return 0, err
	}
	return line.ShownBy(subject.Number, class, day, node, i.GetEpoch()).Attempts, nil
}
