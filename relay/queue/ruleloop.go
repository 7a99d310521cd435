package queue

import (
	"context"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
)

// Times of the work that rules make.
const (
	maxRuleWait   = time.Minute // the clock may have been set
	ruleRetryWait = readRetryMS * time.Millisecond
	// Between two looks at an ended rule of which all that is left is in other hands.
	minReleasePause = 100 * time.Millisecond
	maxReleasePause = 5 * time.Second
	endedByItself   = "the rule's end"
	maxReleaseKeys  = maxStepRecipients
)

// wakeRules tells the loop that a rule changed.
func (q *Queue) wakeRules() {
	select {
	case q.ruleWake <- struct{}{}:
	default:
	}
}

// ruleLoop does what rules ask for in the background: it holds what waited when
// a rule came, and releases what a rule held when it is gone. Both go on after a
// restart, because the rule's record tells what is left to do.
func (q *Queue) ruleLoop() {
	defer q.done.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-q.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-q.stop:
			return
		case <-q.ruleWake:
		case <-timer.C:
		}
		timer.Reset(q.serveRules(ctx))
	}
}

// serveRules does all that is to be done and returns when to look again.
func (q *Queue) serveRules(ctx context.Context) time.Duration {
	for ctx.Err() == nil {
		task, rule, wait := q.nextRule()
		switch task {
		case ruleNothing:
			return wait
		case ruleRelease:
			if err := q.releaseRule(ctx, rule); err != nil {
				return q.ruleFailed(ctx, rule, err)
			}
		case ruleEnd:
			if err := q.RemoveHold(rule.ID, endedByItself); err != nil {
				return q.ruleFailed(ctx, rule, err)
			}
		case ruleSweep:
			if err := q.sweepRule(ctx, rule); err != nil {
				return q.ruleFailed(ctx, rule, err)
			}
		}
	}
	return maxRuleWait
}

func (q *Queue) ruleFailed(ctx context.Context, r *activeRule, err error) time.Duration {
	if ctx.Err() == nil {
		q.log.Error("a rule that holds mail could not be carried out; it is tried again", "rule", r.ID, "error", err)
	}
	return ruleRetryWait
}

// ruleTask is what there is to do for a rule.
type ruleTask uint8

const (
	ruleNothing ruleTask = iota
	ruleRelease          // release what it held
	ruleEnd              // its time has come
	ruleSweep            // hold what waited when it came
)

// nextRule returns a rule with something to do, or how long there is nothing.
func (q *Queue) nextRule() (task ruleTask, next *activeRule, wait time.Duration) {
	now, trusted := q.cfg.Now(), q.clockTrusted()
	wait = maxRuleWait
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range q.rules {
		if left := time.Until(r.use.rests); r.use.ended && left > 0 {
			wait = min(wait, left)
			continue
		}
		switch {
		case r.use.ended:
			return ruleRelease, r, 0
		case trusted && !r.Until.IsZero() && !r.Until.After(now):
			return ruleEnd, r, 0
		case !r.use.swept:
			return ruleSweep, r, 0
		}
		if trusted && !r.Until.IsZero() {
			wait = min(wait, r.Until.Sub(now))
		}
	}
	return ruleNothing, nil, wait
}

// sweepRule holds what waited when the rule came.
func (q *Queue) sweepRule(ctx context.Context, r *activeRule) error {
	f := Filter{Match: r.Match, State: relay.StateWaiting}
	if err := q.flush(); err != nil { // mail that was placed before the rule counted
		return err
	}
	for {
		q.mu.Lock()
		pinned := r.pin()
		q.mu.Unlock()
		if !pinned {
			return nil // it ended meanwhile
		}
		end, err := q.sweepStep(ctx, r, &f)
		q.mu.Lock()
		r.unpin()
		q.mu.Unlock()
		if err != nil {
			return err
		}
		if end {
			return q.swept(r)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

func (q *Queue) sweepStep(ctx context.Context, r *activeRule, f *Filter) (end bool, err error) {
	s, err := q.readStep(f, f.After)
	if err != nil {
		return false, err
	}
	works, _, err := q.seize(f, s.targets)
	if err != nil {
		return false, err
	}
	if _, err = q.endAll(ctx, works, r.results); err != nil {
		return false, err
	}
	f.After = s.last
	return s.end, nil
}

// swept remembers that what waited when the rule came is held.
func (q *Queue) swept(r *activeRule) error {
	q.ruleChange.Lock()
	defer q.ruleChange.Unlock()
	q.mu.Lock()
	use := *r.use
	current := q.rules[r.ID]
	q.mu.Unlock()
	if use.ended || current == nil {
		return nil
	}
	use.swept = true
	if err := q.storeRule(current, use); err != nil {
		return err
	}
	q.mu.Lock()
	r.use.swept = true
	q.mu.Unlock()
	return nil
}

// releaseRule lets everything that an ended rule holds wait again, and forgets
// the rule when nothing is left and nothing more can come.
func (q *Queue) releaseRule(ctx context.Context, r *activeRule) error {
	for {
		q.mu.Lock()
		busy := r.use.pending > 0
		q.mu.Unlock()
		seen, released, err := q.releasePass(ctx, r)
		switch {
		case err != nil:
			return err
		case seen == 0 && !busy:
			return q.forgetRule(r)
		case released == 0:
			q.rest(r)
			return nil
		}
	}
}

// rest has an ended rule looked at again after a moment, longer each time: all
// that is left is in other hands, for as long as another relay does not say
// whether it took it. Other rules must not wait for that.
func (q *Queue) rest(r *activeRule) {
	q.mu.Lock()
	defer q.mu.Unlock()
	u := r.use
	u.pause = min(max(2*u.pause, minReleasePause), maxReleasePause)
	u.rests = time.Now().Add(u.pause)
}

// releasePass goes once through what the index has under a rule.
func (q *Queue) releasePass(ctx context.Context, r *activeRule) (seen, released int, err error) {
	f := Filter{State: relay.StateHeld, rule: &r.ID}
	note := &Note{Actor: r.use.endedBy, Class: classReleased, Text: r.Cause}
	var from []byte
	for ctx.Err() == nil {
		targets, n, next, err := q.readHeld(r.ID, from)
		if err != nil || n == 0 {
			return seen, released, err
		}
		seen += n
		works, _, err := q.seize(&f, targets)
		if err != nil {
			return seen, released, err
		}
		done, err := q.endAll(ctx, works, func(w *Work) []Result { return q.release(w, note) })
		released += done
		if err != nil {
			return seen, released, err
		}
		stale, err := q.dropStale(ctx, r.ID, targets)
		released += stale
		if err != nil || next == nil {
			return seen, released, err
		}
		from = next
	}
	return seen, released, ctx.Err()
}

// release lets the held recipients of work wait for an attempt at once, but not
// before the time that the client set.
func (q *Queue) release(w *Work, note *Note) []Result {
	return dueNow(w, q.cfg.Now(), outbox.Released, note, func(*relay.RecipientState) bool { return true })
}

// dueNow makes those recipients of work that are wanted due.
func dueNow(w *Work, now time.Time, event outbox.Type, note *Note, wanted func(*relay.RecipientState) bool) []Result {
	if w.Env.NotBefore.After(now) {
		now = w.Env.NotBefore
	}
	var out []Result
	for i := range w.Recipients {
		s := w.Recipients[i].State
		if !wanted(&s) {
			continue
		}
		s.State, s.Next, s.Held = relay.StateWaiting, now, nil
		out = append(out, Result{Index: w.Recipients[i].Index, State: s, Event: event, Phase: relay.PhaseLocal, Note: note})
	}
	return out
}

// readHeld reads the next recipients that a rule holds; next is nil when there
// are no more.
func (q *Queue) readHeld(rule ids.Hold, from []byte) (targets []*target, n int, next []byte, err error) {
	snap, err := q.settledSnapshot()
	if err != nil {
		return nil, 0, nil, err
	}
	defer snap.Close()
	type entry struct {
		id      ids.Message
		indexes []uint16
	}
	var entries []entry
	err = snap.Iterate(store.AppendHeldPrefix(nil, rule), from, true, func(k, _ []byte) bool {
		_, id, index, ok := store.ParseHeldKey(k)
		if !ok {
			return true
		}
		if last := len(entries) - 1; last < 0 || entries[last].id != id {
			if len(entries) >= q.stepMessages() || n >= maxReleaseKeys {
				next = slices.Clone(k)
				return false
			}
			entries = append(entries, entry{id: id})
		}
		last := &entries[len(entries)-1]
		last.indexes = append(last.indexes, index)
		n++
		return true
	})
	if err != nil {
		return nil, 0, nil, err
	}
	for _, e := range entries {
		t := &target{only: e.indexes}
		found, err := q.readTarget(snap, t, e.id)
		if err != nil {
			return nil, 0, nil, err
		}
		if t.damaged {
			continue // it stays in the index until it is repaired
		}
		if !found {
			t.env, t.gone = &relay.Envelope{ID: e.id}, true
		}
		targets = append(targets, t)
	}
	return targets, n, next, nil
}

// dropStale removes what the index has about recipients that their rule does
// not hold: a release that does not know the index has ended them. The rule has
// ended, so nothing comes back under it.
func (q *Queue) dropStale(ctx context.Context, rule ids.Hold, targets []*target) (dropped int, err error) {
	var stale [][]byte
	for _, t := range targets {
		if t.damaged {
			continue
		}
		for _, index := range t.only {
			if _, match := slices.BinarySearch(t.match, index); t.gone || !match {
				stale = append(stale, store.AppendHeldKey(nil, rule, t.env.ID, index))
			}
		}
	}
	for part := range slices.Chunk(stale, maxBatchRecipients) {
		b := q.st.NewBatch()
		for _, key := range part {
			b.Delete(key)
		}
		if err := q.st.Commit(ctx, b); err != nil {
			return dropped, err
		}
		dropped += len(part)
	}
	return dropped, nil
}

// forgetRule removes the record of a rule that holds nothing.
func (q *Queue) forgetRule(r *activeRule) error {
	b := q.st.NewBatch()
	b.Delete(store.AppendRuleKey(nil, r.ID))
	if err := q.st.Commit(context.Background(), b); err != nil {
		return err
	}
	q.mu.Lock()
	delete(q.rules, r.ID)
	if q.counted { // otherwise it says how many of those that are being counted were released
		delete(q.heldBy, r.ID)
	}
	q.mu.Unlock()
	return nil
}

// countHeld counts the held recipients by rule.
func countHeld(snap *store.Snapshot) (map[ids.Hold]int64, error) {
	held := make(map[ids.Hold]int64)
	err := snap.Iterate([]byte{store.SpaceHeld}, nil, true, func(k, _ []byte) bool {
		if rule, _, _, ok := store.ParseHeldKey(k); ok {
			held[rule]++
		}
		return true
	})
	return held, err
}
