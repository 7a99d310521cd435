package queue

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Chosen is a message, or one recipient of it, that was named by its id.
type Chosen struct {
	Message ids.Message
	Index   int // of the recipient; AllRecipients: all of them
}

// AllRecipients is the Index of a Chosen that stands for the whole message.
const AllRecipients = -1

// UnknownProvider stands in a Filter for recipients whose domain was not looked up
// lately and who have not been tried.
const UnknownProvider = "unknown"

// Filter selects recipients that are not final; zero fields match all. A
// message matches when one of its recipients does.
type Filter struct {
	Match
	State          relay.State // waiting or held
	InDoubt        bool        // only those that an attempt without a known end may have reached
	AcceptedBefore time.Time
	AcceptedAfter  time.Time
	Priority       *PriorityRange
	LastReply      string   // class of the last verdict, or a part of the last reply in any case
	Chosen         []Chosen // only these, in the order of their ids; nil: all
	After          ids.Message

	rule *ids.Hold // only what this rule holds
}

// Empty reports whether the filter selects everything.
func (f *Filter) Empty() bool {
	return f.Match.Empty() && f.State == 0 && !f.InDoubt && f.AcceptedBefore.IsZero() && f.AcceptedAfter.IsZero() && f.Priority == nil && f.LastReply == "" && f.Chosen == nil
}

// PriorityRange is priorities of messages, both ends included.
type PriorityRange struct{ Least, Most policy.Priority }

// SortChosen puts named recipients into the order that Filter wants.
func SortChosen(c []Chosen) {
	slices.SortFunc(c, func(a, b Chosen) int {
		if d := bytes.Compare(a.Message[:], b.Message[:]); d != 0 {
			return d
		}
		return a.Index - b.Index
	})
}

// message reports whether what all recipients of a message share matches.
func (f *Filter) message(env *relay.Envelope) bool {
	return f.Match.message(env) && (f.AcceptedBefore.IsZero() || env.AcceptedAt.Before(f.AcceptedBefore)) &&
		(f.AcceptedAfter.IsZero() || env.AcceptedAt.After(f.AcceptedAfter)) &&
		(f.Priority == nil || env.Priority >= f.Priority.Least && env.Priority <= f.Priority.Most)
}

// state reports whether a recipient's state matches. The provider is found by
// its domain, or if that was not looked up lately it is that of the last
// attempt.
func (f *Filter) state(s *relay.RecipientState, d mailaddr.Domain, provider func(mailaddr.Domain) string) bool {
	switch {
	case s.State.Final(), f.State != 0 && f.State != s.State, f.InDoubt && !inDoubt(s), !f.Match.domain(d):
		return false
	case f.rule != nil && (s.Held == nil || s.Held.Rule != *f.rule):
		return false
	case f.Source.IsValid() && f.Source != s.Source && f.Source != s.Sticky:
		return false
	case f.LastReply != "" && f.LastReply != s.LastClass && !replyHolds(&s.LastReply, f.LastReply):
		return false
	}
	if f.Provider == "" {
		return true
	}
	return f.Provider == cmp.Or(provider(d), s.Provider, UnknownProvider)
}

// inDoubt reports whether an attempt whose end nobody saw may have reached the
// recipient.
func inDoubt(s *relay.RecipientState) bool { return s.State == relay.StateWaiting && s.InDoubt > 0 }

// replyHolds looks for words in a reply as it is shown: code, enhanced code,
// text.
func replyHolds(r *relay.Reply, words string) bool {
	if r.Code == 0 && r.Text == "" {
		return false
	}
	return strings.Contains(strings.ToLower(r.String()), strings.ToLower(words))
}
