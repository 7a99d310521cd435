package quota

import (
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

// greetWait is how long a greeting waits until its process is known to have the
// relay's session. After that the relay has greeted again.
const greetWait = 5 * time.Second

// greet hands a greeting on. One of a new process frees what the former held, so the
// former must have ended: a copy of the relay's machine, which has a higher number
// too, gets nothing while the first has the session.
func (t *term) greet(m Message, h lease.Hello) {
	delete(t.early, m.Node)
	if t.unknown(m.Node, h.Incarnation) && !t.l.o.Succeeds(m.Node, m.Through, h.Incarnation) {
		t.early[m.Node] = m
		return
	}
	t.grantor.Hello(m.At, h)
}

// again takes the greetings that wait.
func (t *term) again() {
	if len(t.early) == 0 {
		return
	}
	waiting := t.early
	t.early = make(map[ids.Node]Message)
	for _, m := range waiting {
		if t.l.o.Clock().Sub(m.At) < greetWait {
			t.take(m)
		}
	}
}
