package schedule

import "time"

// Hold says why somebody outside refused to have work started, in words that
// people are shown.
type Hold struct {
	Reason string    // stable word, as in Waiting
	Name   string    // of the limit, plan or brake
	Scope  string    // whom it counts together, such as "provider google, all relays"
	Text   string    // who holds how much of it
	Gate   GateID    // whose owner words it when somebody asks, in place of Text; zero: nobody does
	Until  time.Time // when that ends, if it is known
	Look   time.Time // when to ask again all the same; zero: at Until
}

// putOff is a queue that is left alone for a while.
type putOff struct {
	until time.Time
	hold  Hold
}

// PutOff has a queue left alone until a time, whatever is due in it, because
// its mail was refused where it was to begin. Recall ends that early.
func (s *Scheduler) PutOff(n Queue, h Hold, until, now time.Time) {
	q := s.queues[n]
	if q == nil || !until.After(now) {
		return
	}
	q.off = &putOff{until, h}
	switch {
	case q.ready:
		s.deactivate(q)
		s.due.set(q, until)
	case q.timer.index > 0 && q.timer.at.Before(until):
		s.due.set(q, until)
	}
}

// Recall ends what PutOff began for holds of a name. It looks at every queue.
func (s *Scheduler) Recall(name string, now time.Time) {
	for _, q := range s.queues {
		if q.off != nil && q.off.hold.Name == name {
			q.off = nil
			if q.timer.index > 0 {
				s.due.set(q, now)
			}
		}
	}
}

// after returns when a head that is due may be looked at.
func (o *putOff) after(due time.Time) time.Time {
	if o != nil && o.until.After(due) {
		return o.until
	}
	return due
}

// NotStarted takes Started back: the message was not offered after all.
func (s *Scheduler) NotStarted(id Session) {
	if ss := s.sessions[id]; ss != nil && ss.messages > ss.proofs {
		ss.messages--
		ss.reserved = true
	}
}
