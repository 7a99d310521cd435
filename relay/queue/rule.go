package queue

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds of the rules that hold mail.
const (
	maxHoldRules  = 256
	maxWordsBytes = 500 // of a cause or reason
	maxOwnerBytes = 64
)

// Match names mail by what is known of it; zero fields match all.
type Match struct {
	Tenant   ids.Tenant
	Stream   string
	Pool     ids.Pool
	From     mailaddr.Domain // of the From header
	Domain   mailaddr.Domain // of the recipient
	Provider string
	Source   netip.Addr // bind address: of the last attempt, or kept for a greylisting peer
	Tag      string
}

// Empty reports whether all mail matches.
func (m *Match) Empty() bool { return *m == Match{} }

// message reports whether what all recipients of a message share matches.
func (m *Match) message(env *relay.Envelope) bool {
	return (m.Tenant.IsZero() || m.Tenant == env.Tenant) && (m.Stream == "" || m.Stream == env.Stream) &&
		(m.Pool.IsZero() || m.Pool == env.Pool) && (m.From == "" || m.From == env.From) && (m.Tag == "" || m.Tag == env.Tag)
}

// domain reports whether the recipient's domain matches.
func (m *Match) domain(d mailaddr.Domain) bool { return m.Domain == "" || m.Domain == d }

// HoldRule says which mail is held: what waits, and what comes while the rule
// is there.
type HoldRule struct {
	ID      ids.Hold // zero: PutHold gives one
	Match   Match
	All     bool      // it holds everything; without it Match must not be empty
	Cause   string    // words for people, at most 500 bytes
	Owner   string    // "operator", or the name of the automatic check that made it
	Actor   string    // who asked for it, for the events; empty: the owner
	Created time.Time // zero: PutHold sets it
	Until   time.Time // it ends by itself then; zero: it does not
}

// HoldInfo is a rule with what it does.
type HoldInfo struct {
	HoldRule
	Held     int64 // recipients
	Sweeping bool  // what waited when the rule came is still being held
	Ending   bool  // the rule is gone, what it held is being released
}

// activeRule is a rule in memory. It never changes; use does, under the lock.
type activeRule struct {
	HoldRule
	held *relay.Held
	note *Note
	use  *ruleUse
}

// ruleUse is what becomes of a rule. A rule whose words are replaced keeps it.
type ruleUse struct {
	pending int  // commits under way that hold mail by it
	swept   bool // what waited when it came is held
	ended   bool // what it held is being released
	endedBy string

	// Of ruleLoop, once it has ended.
	rests time.Time     // it is left alone until then
	pause time.Duration // for how long, last
}

// ruleSet is what arriving and departing mail is compared with, oldest rule
// first.
type ruleSet struct {
	rules    []*activeRule
	provider bool // a rule names a provider
}

func newActiveRule(r HoldRule) *activeRule {
	actor := r.Actor
	if actor == "" {
		actor = r.Owner
	}
	return &activeRule{
		HoldRule: r, held: &relay.Held{Rule: r.ID, By: r.Owner, Why: r.Cause, Since: r.Created},
		note: &Note{Actor: actor, Class: classHeld, Text: r.Cause}, use: &ruleUse{},
	}
}

// Classes of the events of actions.
const (
	classHeld     = "held"
	classReleased = "released"
)

func checkRule(r *HoldRule, now time.Time) error {
	const op = "queue.PutHold"
	switch {
	case r.Match.Empty() && !r.All:
		return fault.Field(op, "rule", "a rule that names no mail would hold everything: name a tenant, stream, pool, domain, provider, source or tag, or say all")
	case !r.Match.Empty() && r.All:
		return fault.Field(op, "all", "all mail and only some of it were asked for: leave one away")
	case strings.TrimSpace(r.Cause) == "":
		return fault.Field(op, "cause", "say why, for those who wonder where their mail is")
	case len(r.Cause) > maxWordsBytes:
		return fault.Field(op, "cause", "%d bytes are too many, %d are the most", len(r.Cause), maxWordsBytes)
	case r.Owner == "" || len(r.Owner) > maxOwnerBytes || len(r.Actor) > maxWordsBytes:
		return fault.Field(op, "owner", "must have 1 to %d bytes", maxOwnerBytes)
	case !r.Until.IsZero() && !r.Until.After(now):
		return fault.Field(op, "until", "%s is in the past", r.Until.Format(time.RFC3339))
	}
	return nil
}

// PutHold makes a rule, durable when it returns. What it matches is held from
// then on: mail that comes at once, mail that waits in large transactions in
// the background, mail that is being tried when that attempt has failed. A rule
// with the id of one that is there replaces its words and its end.
func (q *Queue) PutHold(r HoldRule) (ids.Hold, error) {
	now := q.cfg.Now()
	if err := checkRule(&r, now); err != nil {
		return ids.Hold{}, err
	}
	if r.ID.IsZero() {
		r.ID = ids.NewHold(now)
	}
	if r.Created.IsZero() {
		r.Created = now
	}
	q.ruleChange.Lock()
	defer q.ruleChange.Unlock()
	q.mu.Lock()
	old, count := q.rules[r.ID], len(q.rules)
	if old != nil {
		r.Created = old.Created
	}
	rule := newActiveRule(r)
	ended := false
	if old != nil {
		rule.use, ended = old.use, old.use.ended
	}
	use := *rule.use
	q.mu.Unlock()
	switch {
	case old != nil && (ended || old.Match != r.Match || old.All != r.All):
		return r.ID, fault.New(fault.Conflict, "queue.PutHold", "rule %s is there already and holds other mail: make another one", r.ID)
	case old == nil && count >= maxHoldRules:
		return r.ID, fault.New(fault.Conflict, "queue.PutHold", "%d rules hold mail already, which is the most: release some", count)
	}
	if err := q.storeRule(rule, use); err != nil {
		return r.ID, err
	}
	q.mu.Lock()
	q.rules[r.ID] = rule
	q.publishRules()
	q.mu.Unlock()
	q.wakeRules()
	return r.ID, nil
}

// RemoveHold ends a rule. What it held waits for its next attempt at once: that
// is done in the background, in bounded transactions, and goes on after a
// restart.
func (q *Queue) RemoveHold(id ids.Hold, actor string) error {
	q.ruleChange.Lock()
	defer q.ruleChange.Unlock()
	q.mu.Lock()
	rule := q.rules[id]
	if rule == nil {
		q.mu.Unlock()
		return fault.New(fault.NotFound, "queue.RemoveHold", "there is no rule %s: `relais-relay queue holds` lists them", id)
	}
	if rule.use.ended {
		q.mu.Unlock()
		return nil
	}
	gone := *rule.use
	gone.ended, gone.endedBy = true, actor
	q.mu.Unlock()
	if err := q.storeRule(rule, gone); err != nil {
		return err
	}
	q.mu.Lock()
	rule.use.ended, rule.use.endedBy = true, actor
	q.publishRules()
	q.mu.Unlock()
	q.wakeRules()
	return nil
}

// Holds lists the rules, oldest first.
func (q *Queue) Holds() []HoldInfo {
	q.mu.Lock()
	defer q.mu.Unlock()
	out := make([]HoldInfo, 0, len(q.rules))
	for _, r := range q.rules {
		out = append(out, HoldInfo{HoldRule: r.HoldRule, Held: q.heldBy[r.ID], Sweeping: !r.use.swept && !r.use.ended, Ending: r.use.ended})
	}
	slices.SortFunc(out, func(a, b HoldInfo) int { return slices.Compare(a.ID[:], b.ID[:]) })
	return out
}

// HoldRule returns the rule of an id, unless it is gone or ending.
func (q *Queue) HoldRule(id ids.Hold) (HoldRule, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.rules[id]
	if r == nil || r.use.ended {
		return HoldRule{}, false
	}
	return r.HoldRule, true
}

// storeRule writes a rule's record.
func (q *Queue) storeRule(r *activeRule, use ruleUse) error {
	b := q.st.NewBatch()
	b.Set(store.AppendRuleKey(nil, r.ID), appendRule(nil, r, use))
	return q.st.Commit(context.Background(), b)
}

// publishRules makes a changed set of rules the one that mail is compared with.
// Call with the lock held.
func (q *Queue) publishRules() {
	set := &ruleSet{}
	for _, r := range q.rules {
		if !r.use.ended {
			set.rules = append(set.rules, r)
			set.provider = set.provider || r.Match.Provider != ""
		}
	}
	if len(set.rules) == 0 {
		q.active.Store(nil)
		return
	}
	slices.SortFunc(set.rules, func(a, b *activeRule) int { return slices.Compare(a.ID[:], b.ID[:]) })
	q.active.Store(set)
}

// Fields of a rule's record.
const (
	ruTenant   protowire.Number = 1
	ruStream   protowire.Number = 2
	ruPool     protowire.Number = 3
	ruFrom     protowire.Number = 4
	ruDomain   protowire.Number = 5
	ruProvider protowire.Number = 6
	ruSource   protowire.Number = 7
	ruTag      protowire.Number = 8
	ruAll      protowire.Number = 9
	ruCause    protowire.Number = 10
	ruOwner    protowire.Number = 11
	ruActor    protowire.Number = 12
	ruCreated  protowire.Number = 13
	ruUntil    protowire.Number = 14
	ruSwept    protowire.Number = 15
	ruEnded    protowire.Number = 16
	ruEndedBy  protowire.Number = 17
)

const ruleVersion = 1

func putBool(b []byte, n protowire.Number, v bool) []byte {
	if !v {
		return b
	}
	return putUint(b, n, 1)
}

func appendRule(b []byte, r *activeRule, use ruleUse) []byte {
	b = append(b, ruleVersion)
	b = putID(b, ruTenant, r.Match.Tenant)
	b = putString(b, ruStream, r.Match.Stream)
	b = putID(b, ruPool, r.Match.Pool)
	b = putString(b, ruFrom, string(r.Match.From))
	b = putString(b, ruDomain, string(r.Match.Domain))
	b = putString(b, ruProvider, r.Match.Provider)
	b = putAddr(b, ruSource, r.Match.Source)
	b = putString(b, ruTag, r.Match.Tag)
	b = putBool(b, ruAll, r.All)
	b = putString(b, ruCause, r.Cause)
	b = putString(b, ruOwner, r.Owner)
	b = putString(b, ruActor, r.Actor)
	b = putTime(b, ruCreated, r.Created)
	b = putTime(b, ruUntil, r.Until)
	b = putBool(b, ruSwept, use.swept)
	b = putBool(b, ruEnded, use.ended)
	return putString(b, ruEndedBy, use.endedBy)
}

func parseRule(id ids.Hold, b []byte) (*activeRule, error) {
	const op = "queue.parseRule"
	if len(b) < 1 || b[0] != ruleVersion {
		return nil, fault.New(fault.Invalid, op, "the rule %s is damaged or of a newer version", id)
	}
	r, use := HoldRule{ID: id}, ruleUse{}
	err := fields(b[1:], func(n protowire.Number, v uint64, text []byte) {
		switch n {
		case ruTenant:
			copy(r.Match.Tenant[:], text)
		case ruStream:
			r.Match.Stream = string(text)
		case ruPool:
			copy(r.Match.Pool[:], text)
		case ruFrom:
			r.Match.From = mailaddr.Domain(text)
		case ruDomain:
			r.Match.Domain = mailaddr.Domain(text)
		case ruProvider:
			r.Match.Provider = string(text)
		case ruSource:
			r.Match.Source = toAddr(text)
		case ruTag:
			r.Match.Tag = string(text)
		case ruAll:
			r.All = v != 0
		case ruCause:
			r.Cause = string(text)
		case ruOwner:
			r.Owner = string(text)
		case ruActor:
			r.Actor = string(text)
		case ruCreated:
			r.Created = fromMS(v)
		case ruUntil:
			r.Until = fromMS(v)
		case ruSwept:
			use.swept = v != 0
		case ruEnded:
			use.ended = v != 0
		case ruEndedBy:
			use.endedBy = string(text)
		}
	})
	rule := newActiveRule(r)
	rule.use = &use
	return rule, fault.Wrap(err, fault.Invalid, op, "the rule %s is damaged", id)
}

// loadRules reads the rules. They hold mail from the first moment; what they
// have to do in the background goes on where it was. One that cannot be read holds
// nothing new: nobody knows which mail it means, and holding all of it would stop the
// rest. What it held stays held.
func (q *Queue) loadRules(snap *store.Snapshot) error {
	err := snap.Iterate([]byte{store.SpaceRule}, nil, false, func(k, v []byte) bool {
		id, ok := store.ParseRuleKey(k)
		if !ok {
			return true
		}
		r, err := parseRule(id, v)
		if err != nil {
			q.badRecord(RuleDamaged, "that of a rule; what it held stays held, and new mail is not", "rule", id, "error", err)
			return true
		}
		q.rules[id] = r
		return true
	})
	q.publishRules()
	return err
}
