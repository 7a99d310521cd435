package engine

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

var checkResults = map[sign.CheckVerdict]string{sign.CheckGood: "good", sign.CheckBad: "bad", sign.CheckUnknown: "unknown"}

// finish takes over the result of a check.
func (c *selfCheck) finish(r *checkResult) {
	e := c.engine
	j := r.judgement
	domain, now := r.signer.Domain(), e.cfg.Now()
	if e.signerOf(domain) != r.signer {
		j = sign.Judgement{Verdict: sign.CheckUnknown} // of keys that sign no more
	}
	c.counts.WithLabelValues(checkResults[j.Verdict]).Inc()
	if j.Verdict == sign.CheckBad {
		e.log.Warn("a DKIM signature of ours does not verify with the key that DNS shows", "alert", AlertDKIM, "domain", domain,
			"selector", j.Decided.Selector, "why", j.Decided.Words, "second_look", !r.live)
	}
	c.mu.Lock()
	d := c.domains[domain]
	if d == nil {
		if d = c.add(domain, &j); d == nil {
			c.mu.Unlock()
			return
		}
	}
	if r.live && r.want != d.want && d.Phase != sign.CheckPassing && j.Verdict != sign.CheckBad {
		c.mu.Unlock()
		return // of other keys than the ones that were found bad
	}
	confirms := d.confirms(r, &j)
	if j.Verdict != sign.CheckUnknown {
		d.signer, d.note = r.signer, j.Note
	}
	if r.live && j.Verdict == sign.CheckBad {
		d.want, d.bad = r.want, nil
		if j.Decided.Fault == sign.FaultSigned {
			d.bad = r.message
		}
		d.from(r.from)
	}
	c.mu.Unlock()
	c.step(domain, sign.CheckEvent{Judgement: j, Confirms: confirms, MayHold: e.mayHold(domain)}, now)
	c.mu.Lock()
	hurry := d.Phase == sign.CheckSuspect && d.Fault == sign.FaultSigned
	c.mu.Unlock()
	if hurry {
		r.signer.SetDue(now) // another message must say the same
	}
}

// add makes the record of a domain of which there is something to tell; nil if
// there is not, or there are too many. c.mu is held.
func (c *selfCheck) add(domain mailaddr.Domain, j *sign.Judgement) *domainCheck {
	bad := j.Verdict == sign.CheckBad
	switch {
	case !bad && (j.Note == "" || len(c.domains) >= maxTroubledDomains/2):
		return nil
	case len(c.domains) >= maxTroubledDomains:
		c.engine.log.Error("so many domains do not verify that no more are held: look at the name servers that this relay asks", "alert", AlertDKIM, "domain", domain)
		return nil
	}
	d := &domainCheck{tenant: c.engine.tenantOf(domain)}
	c.domains[domain] = d
	return d
}

// confirms reports whether a result is a second look at a suspect: of the key in
// DNS by asking every name server, of a signature that a right key does not verify
// by another message.
func (d *domainCheck) confirms(r *checkResult, j *sign.Judgement) bool {
	switch {
	case d.Phase != sign.CheckSuspect:
		return true
	case j.Decided.Fault == sign.FaultSigned:
		return r.live && d.Fault == sign.FaultSigned
	}
	return r.all
}

// from notes a From domain of mail that the domain signs.
func (d *domainCheck) from(from mailaddr.Domain) {
	if d.rules == nil {
		d.rules = make(map[mailaddr.Domain]ids.Hold)
	}
	if _, known := d.rules[from]; !known && len(d.rules) < maxFromsHeld {
		d.rules[from] = ids.Hold{}
	}
}

func (e *Engine) tenantOf(domain mailaddr.Domain) ids.Tenant {
	if dir := e.cfg.Directory(); dir != nil {
		if d, ok := dir.DomainFor(domain); ok {
			return d.Tenant
		}
	}
	return ids.Tenant{}
}

// mayHold reports whether policy lets the mail of a domain be held.
func (e *Engine) mayHold(domain mailaddr.Domain) bool {
	dir := e.cfg.Directory()
	if dir == nil {
		return false
	}
	p := &dir.Document().Delivery
	return p.DKIMCheckHold && !slices.Contains(p.DKIMCheckHoldExcept, string(domain))
}

// step moves a domain's state and does what follows from it. Only the deciding
// goroutine comes here.
func (c *selfCheck) step(domain mailaddr.Domain, event sign.CheckEvent, now time.Time) {
	c.mu.Lock()
	d := c.domains[domain]
	if d == nil {
		c.mu.Unlock()
		return
	}
	was := d.CheckState
	state, f := d.Step(event, now)
	d.CheckState = state
	if state.Phase == sign.CheckPassing && d.note == "" {
		delete(c.domains, domain)
	}
	c.mu.Unlock()
	switch {
	case f.Release:
		c.release(domain, d)
	case state.Phase == sign.CheckHolding && event.Kind == sign.Checked && event.Judgement.Verdict == sign.CheckBad:
		c.hold(domain, d, f.Reword)
	}
	if f.Begin {
		c.engine.log.Error("the DKIM signatures of a domain do not verify", "alert", AlertDKIM, "domain", domain, "why", state.Why, "held", f.Hold)
		c.alert(outbox.Alert, domain, d, state.Why, now)
	}
	if f.End {
		c.engine.log.Info("the DKIM signatures of a domain verify again, or are checked no more", "alert", AlertDKIM, "domain", domain, "since", was.Since)
		c.alert(outbox.AlertOver, domain, d, was.Why, now)
	}
}

// hold sees that there is a rule for each From domain that is known. What fails
// is tried again with the next look.
func (c *selfCheck) hold(domain mailaddr.Domain, d *domainCheck, reword bool) {
	q := c.engine.queue
	c.mu.Lock()
	d.from(domain)
	rules := maps.Clone(d.rules)
	cause := "DKIM signatures of " + string(domain) + " do not verify: " + d.Why
	c.mu.Unlock()
	if len(cause) > maxHoldWords {
		cause = strings.ToValidUTF8(cause[:maxHoldWords], "") + "…"
	}
	for from, id := range rules {
		if !id.IsZero() && !reword {
			continue
		}
		made, err := q.PutHold(queue.HoldRule{ID: id, Match: queue.Match{From: from}, Cause: cause, Owner: AlertDKIM})
		if err != nil {
			c.engine.log.Error("the mail of a domain whose signatures do not verify could not be held", "alert", AlertDKIM, "domain", from, "error", err)
			continue
		}
		c.mu.Lock()
		d.rules[from] = made
		c.mu.Unlock()
	}
	if d.signer != nil {
		d.signer.SetDue(c.engine.cfg.Now()) // a From domain that is not held yet shows itself
	}
}

// release ends the rules of a domain.
func (c *selfCheck) release(domain mailaddr.Domain, d *domainCheck) {
	c.mu.Lock()
	rules := maps.Clone(d.rules)
	for from := range d.rules {
		d.rules[from] = ids.Hold{}
	}
	c.mu.Unlock()
	for from, id := range rules {
		if id.IsZero() {
			continue
		}
		if err := c.engine.queue.RemoveHold(id, AlertDKIM); err != nil && !fault.Is(err, fault.NotFound) {
			c.engine.log.Error("the mail of a domain could not be released; `relais-relay queue release` does it", "alert", AlertDKIM, "domain", from, "signed_by", domain, "rule", id, "error", err)
		}
	}
}

// checkLetGo looks whether an operator ended a hold.
func (c *selfCheck) checkLetGo(domain mailaddr.Domain, now time.Time) {
	c.mu.Lock()
	d := c.domains[domain]
	gone := false
	if d.Phase == sign.CheckHolding {
		for _, id := range d.rules {
			if _, there := c.engine.queue.HoldRule(id); !id.IsZero() && !there {
				gone = true
			}
		}
	}
	c.mu.Unlock()
	if gone {
		c.engine.log.Warn("an operator let the mail of a domain go whose signatures do not verify", "alert", AlertDKIM, "domain", domain)
		c.step(domain, sign.CheckEvent{Kind: sign.LetGo}, now)
		c.release(domain, d) // of its other From domains
	}
}

// applyView looks what a new view changes: domains that are gone, keys that are
// others, and after a restart the rules that were there before.
func (c *selfCheck) applyView() {
	e, now := c.engine, c.engine.cfg.Now()
	if e.cfg.Directory() == nil {
		return
	}
	if !c.loaded {
		c.loaded = true
		c.load(now)
	}
	c.mu.Lock()
	domains := slices.Collect(maps.Keys(c.domains))
	c.mu.Unlock()
	for _, domain := range domains {
		signer := e.signerOf(domain)
		c.mu.Lock()
		d := c.domains[domain]
		other := d.signer != nil && d.signer != signer
		if signer != nil && other {
			d.signer, d.bad, d.note = signer, nil, ""
		}
		if signer == nil || c.every.Load() == 0 {
			d.note = ""
		}
		c.mu.Unlock()
		switch {
		case signer == nil || c.every.Load() == 0:
			c.step(domain, sign.CheckEvent{Kind: sign.NotToBe}, now)
		case other:
			c.step(domain, sign.CheckEvent{Kind: sign.Replaced}, now)
		}
	}
}

// load finds the rules that held mail before a restart.
func (c *selfCheck) load(now time.Time) {
	dir := c.engine.cfg.Directory()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.engine.queue.Holds() {
		if h.Owner != AlertDKIM || h.Ending {
			continue
		}
		name := h.Match.From
		tenant := ids.Tenant{}
		if domain, ok := dir.DomainFor(name); ok {
			name, tenant = domain.Name, domain.Tenant
		}
		d := c.domains[name]
		if d == nil || d.Phase != sign.CheckHolding {
			_, why, _ := strings.Cut(h.Cause, "do not verify: ")
			d = &domainCheck{CheckState: sign.HeldCheck(why, h.Created, now), tenant: tenant}
			c.domains[name] = d
		}
		d.from(h.Match.From)
		d.rules[h.Match.From] = h.ID
	}
}

// alert writes the event that an alert began or ended.
func (c *selfCheck) alert(kind outbox.Type, domain mailaddr.Domain, d *domainCheck, why string, now time.Time) {
	e := c.engine
	if e.cfg.Outbox == nil {
		return
	}
	ev := outbox.Event{Type: kind, At: now, Tenant: d.tenant, Domain: string(domain), Class: AlertDKIM}
	ev.Reply.Text = why
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	if err := e.cfg.Outbox.Write(ctx, []outbox.Event{ev}); err != nil {
		e.log.Error("the event of an alert could not be stored", "alert", AlertDKIM, "domain", domain, "error", err)
	}
}
