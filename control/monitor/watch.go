package monitor

import (
	"context"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/ids"
)

// How often the leader looks.
const (
	watchTick      = 5 * time.Second
	firstRetry     = 5 * time.Second // of what is not confirmed, doubling
	lastRetry      = 5 * time.Minute
	confirmedCheck = 10 * time.Minute // of what is confirmed
	maxChecks      = 16               // at once
)

// failedGrace is how long a confirmed address may fail before it is taken out
// of use: a moment's mistake in DNS must not stop mail.
const failedGrace = time.Hour

// Objects is what the watch needs of the service.
type Objects interface {
	Leads() bool
	WatchRevision() <-chan struct{}
	SourceRows() []*control.Source
	UnverifiedDomains() []service.DomainFacts
	RecordReverse(ctx context.Context, source ids.Source, verdict control.ReverseVerdict, detail string) error
	RecordOwnership(ctx context.Context, domain string) error
}

// Watch checks addresses and domains as long as this server leads.
type Watch struct {
	objects Objects
	dns     service.DNS
	log     *slog.Logger
	now     func() time.Time
	seen    map[string]*attempt // by source id or domain; only of what exists
}

// attempt is what the watch remembers of one object.
type attempt struct {
	next    time.Time
	wait    time.Duration
	failing time.Time // since when a confirmed address fails; zero: it does not
	round   uint64
}

// NewWatch returns a watch; now tells the time.
func NewWatch(objects Objects, dns service.DNS, log *slog.Logger, now func() time.Time) *Watch {
	return &Watch{objects: objects, dns: dns, log: log, now: now, seen: map[string]*attempt{}}
}

// Run checks until ctx ends.
func (w *Watch) Run(ctx context.Context) {
	tick := time.NewTicker(watchTick)
	defer tick.Stop()
	for round := uint64(1); ; round++ {
		changed := w.objects.WatchRevision()
		if w.objects.Leads() {
			w.Round(ctx, round)
		} else {
			clear(w.seen) // who leads next begins anew, and so do we
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// Round checks once everything that is due.
func (w *Watch) Round(ctx context.Context, round uint64) {
	var group errgroup.Group
	group.SetLimit(maxChecks)
	for _, s := range w.objects.SourceRows() {
		if a := w.due(s.ID.String(), s.Reverse == control.ReverseConfirmed, round); a != nil {
			group.Go(func() error { w.source(ctx, s, a); return nil })
		}
	}
	for _, d := range w.objects.UnverifiedDomains() {
		if w.due(d.Name, false, round) != nil {
			group.Go(func() error { w.domain(ctx, d); return nil })
		}
	}
	_ = group.Wait() // no check returns an error
	for key, a := range w.seen {
		if a.round != round {
			delete(w.seen, key)
		}
	}
}

// due returns what is remembered of an object if it is to be checked now.
func (w *Watch) due(key string, confirmed bool, round uint64) *attempt {
	a := w.seen[key]
	if a == nil {
		a = &attempt{wait: firstRetry}
		w.seen[key] = a
	}
	a.round = round
	if w.now().Before(a.next) {
		return nil
	}
	if confirmed {
		a.wait = firstRetry
		a.next = w.now().Add(confirmedCheck)
	} else {
		a.next = w.now().Add(a.wait)
		a.wait = min(2*a.wait, lastRetry)
	}
	return a
}

func (w *Watch) source(ctx context.Context, s *control.Source, a *attempt) {
	verdict, detail, err := w.dns.Reverse(ctx, s.Public, s.PTRName())
	if err != nil {
		w.log.Debug("reverse DNS not checked", "address", s.Public.String(), "error", err)
		return // nothing is known, so the verdict stays
	}
	if verdict != control.ReverseFailed {
		a.failing = time.Time{}
	} else if s.Reverse == control.ReverseConfirmed {
		if a.failing.IsZero() {
			a.failing = w.now()
			w.log.Warn("reverse DNS of an address fails", "address", s.Public.String(), "detail", detail, "out_of_use_in", failedGrace.String())
		}
		a.next = w.now().Add(firstRetry)
		if w.now().Sub(a.failing) < failedGrace {
			return
		}
	}
	if verdict == s.Reverse && detail == s.ReverseDetail {
		return
	}
	if err := w.objects.RecordReverse(ctx, s.ID, verdict, detail); err != nil {
		w.log.Warn("a verdict on reverse DNS was not recorded", "address", s.Public.String(), "error", err)
	}
}

func (w *Watch) domain(ctx context.Context, d service.DomainFacts) {
	f := w.dns.Ownership(ctx, d)
	if f.Status != service.FindingOK {
		return
	}
	if err := w.objects.RecordOwnership(ctx, d.Name); err != nil {
		w.log.Warn("the ownership of a domain was not recorded", "domain", d.Name, "error", err)
	}
}
