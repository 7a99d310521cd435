package lab

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Outcome is what a recipient's local part asks for; see the package comment.
type Outcome string

// The outcomes, each the word before the first hyphen of a local part.
const (
	Accept   Outcome = "accept"
	Bounce   Outcome = "bounce"
	Nobody   Outcome = "nobody"
	Disabled Outcome = "disabled"
	Full     Outcome = "full"
	FullTemp Outcome = "fulltemp"
	Grey     Outcome = "grey"
	Defer    Outcome = "defer"
	Throttle Outcome = "throttle"
	Block    Outcome = "block"
	Spam     Outcome = "spam"
	Slow     Outcome = "slow"
	Drop     Outcome = "drop"
	Late     Outcome = "late"
)

// outcomeOf reads the outcome out of an address.
func outcomeOf(rcpt string) Outcome {
	word, _, found := strings.Cut(rcpt, "-")
	if !found || strings.IndexByte(word, '@') >= 0 {
		return Accept
	}
	switch o := Outcome(word); o {
	case Bounce, Nobody, Disabled, Full, FullTemp, Grey, Defer, Throttle, Block, Spam, Slow, Drop, Late:
		return o
	}
	return Accept
}

// Permanent reports whether a recipient with this outcome is refused for good.
func (o Outcome) Permanent() bool {
	switch o {
	case Bounce, Nobody, Disabled, Full, Block, Spam:
		return true
	}
	return false
}

// Recipient returns the i-th address at a provider that gets an outcome. The
// provider's domains take turns. It fails for a name that is not a provider.
func (l *Lab) Recipient(provider string, i int, o Outcome) (string, error) {
	p := l.farm.providers[provider]
	if p == nil {
		return "", fmt.Errorf("lab: provider %q does not exist", provider)
	}
	domains := p.profile.Domains
	return string(o) + "-" + strconv.Itoa(i) + "@" + domains[i%len(domains)], nil
}

// fate is what happens to one recipient at one try.
type fate int

const (
	fateAccept fate = iota
	fateUnknown
	fateDisabled
	fateFull
	fateFullTemp
	fateGrey // ask the greylist
	fateDefer
	fateThrottle
	fateBlock
	fateSpam
	fateSlow
	fateDropAtRcpt
	fateDropInData
	fateLate
)

// dice draws the random part of decisions. Every draw has its own generator,
// seeded by what the decision is about, so draws do not influence each other.
type dice struct {
	seed     uint64
	provider uint64
}

func newDice(seed uint64, provider string) dice {
	return dice{seed: seed, provider: hashText(provider)}
}

func hashText(s string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(s)) // a hash never fails
	return h.Sum64()
}

// draw returns a number in [0, 1) for one purpose, address and try.
func (d dice) draw(purpose, rcpt string, try int) float64 {
	r := rand.New(rand.NewPCG(d.seed^d.provider, hashText(purpose+"\x00"+rcpt)+uint64(try)))
	return r.Float64()
}

// decide says what happens to a recipient at its try-th RCPT (from 1) at this
// provider. open leaves out what the address did not ask for.
func (d dice) decide(p *Profile, rcpt string, o Outcome, try int, open bool) fate {
	switch o {
	case Bounce, Nobody:
		return fateUnknown
	case Disabled:
		return fateDisabled
	case Full:
		return fateFull
	case FullTemp:
		return fateFullTemp
	case Block:
		return fateBlock
	case Spam:
		return fateSpam
	case Slow:
		return fateSlow
	case Grey:
		return fateGrey
	case Defer:
		if try == 1 || try == 2 && d.draw("defer", rcpt, 0) < 0.5 {
			return fateDefer
		}
		return fateAccept
	case Throttle:
		if try == 1 {
			return fateThrottle
		}
		return fateAccept
	case Drop:
		switch try {
		case 1:
			return fateDropAtRcpt
		case 2:
			return fateDropInData
		}
		return fateAccept
	case Late:
		if try == 1 {
			return fateLate
		}
		return fateAccept
	}
	if open {
		return fateAccept
	}
	if p.DeferShare > 0 && d.draw("share", rcpt, try) < p.DeferShare {
		return fateDefer
	}
	if p.GreylistShare > 0 && d.draw("grey", rcpt, 0) < p.GreylistShare {
		return fateGrey
	}
	return fateAccept
}

// counted reports whether the fate of a recipient depends on how often it was
// tried.
func counted(p *Profile, o Outcome, open bool) bool {
	switch o {
	case Defer, Throttle, Drop, Late:
		return true
	case Accept:
		return !open && p.DeferShare > 0
	}
	return false
}

// generations is a map that forgets: when the younger half holds max entries
// it becomes the older half, and what the older half held is gone. It keeps
// between max and 2*max of the most recently touched keys.
type generations[V any] struct {
	young, old map[string]V
	max        int
}

func newGenerations[V any](limit int) *generations[V] {
	return &generations[V]{young: make(map[string]V), max: limit}
}

func (g *generations[V]) get(k string) (V, bool) {
	if v, ok := g.young[k]; ok {
		return v, true
	}
	v, ok := g.old[k]
	if ok {
		g.put(k, v)
	}
	return v, ok
}

func (g *generations[V]) put(k string, v V) {
	if _, ok := g.young[k]; !ok && len(g.young) >= g.max {
		g.old, g.young = g.young, make(map[string]V)
	}
	g.young[k] = v
}
