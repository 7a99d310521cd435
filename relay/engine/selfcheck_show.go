package engine

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// maxShownDomains bounds the domains that a sentence about the self-check names.
const maxShownDomains = 3

// nextLook says when a domain that is held is checked next, for the end of a
// sentence.
func (c *selfCheck) nextLook(from mailaddr.Domain) string {
	name := from
	if dir := c.engine.cfg.Directory(); dir != nil {
		if d, ok := dir.DomainFor(from); ok {
			name = d.Name
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.domains[name]
	if d == nil || d.Next.IsZero() {
		return ""
	}
	return "; it is checked next at " + d.Next.UTC().Format(time.RFC3339) + ", and released when the signature verifies"
}

// DKIMProblem says which domains' signatures do not verify, or verify with
// something to tell; empty: none.
func (e *Engine) DKIMProblem() string {
	c := e.checks
	c.mu.Lock()
	defer c.mu.Unlock()
	type line struct {
		phase sign.CheckPhase
		text  string
	}
	var lines []line
	for domain, d := range c.domains {
		switch d.Phase {
		case sign.CheckHolding:
			lines = append(lines, line{d.Phase, fmt.Sprintf("mail of %s is held (%s), its signatures do not verify: %s; checked next at %s", domain, AlertDKIM, d.Why, d.Next.UTC().Format(time.RFC3339))})
		case sign.CheckReleased, sign.CheckTold:
			lines = append(lines, line{d.Phase, fmt.Sprintf("signatures of %s do not verify (%s), its mail goes out all the same: %s", domain, AlertDKIM, d.Why)})
		case sign.CheckPassing:
			lines = append(lines, line{d.Phase, fmt.Sprintf("signatures of %s verify, but: %s", domain, d.note)})
		}
	}
	rank := func(p sign.CheckPhase) int {
		return slices.Index([]sign.CheckPhase{sign.CheckHolding, sign.CheckTold, sign.CheckReleased, sign.CheckPassing}, p)
	}
	slices.SortFunc(lines, func(a, b line) int {
		if a.phase != b.phase {
			return rank(a.phase) - rank(b.phase)
		}
		return strings.Compare(a.text, b.text)
	})
	var out []string
	for i, l := range lines {
		if i == maxShownDomains {
			out = append(out, fmt.Sprintf("and %d more domains", len(lines)-i))
			break
		}
		out = append(out, l.text)
	}
	return strings.Join(out, "; ")
}

// register makes what the self-check counts visible.
func (c *selfCheck) register(reg prometheus.Registerer) error {
	if reg == nil {
		return nil
	}
	failing := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "relais_relay_dkim_domains_failing", Help: "Sending domains whose signatures do not verify with the key that DNS shows, held or not.",
	}, func() float64 {
		c.mu.Lock()
		defer c.mu.Unlock()
		n := 0
		for _, d := range c.domains {
			if d.Phase >= sign.CheckHolding {
				n++
			}
		}
		return float64(n)
	})
	for _, m := range []prometheus.Collector{c.counts, failing} {
		if err := reg.Register(m); err != nil {
			return fault.Wrap(err, fault.Internal, "engine.New", "metrics could not be registered")
		}
	}
	return nil
}
