package engine

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestSmallTenantGetsEverySecondTurn queues mail of one tenant for twenty
// domains of a provider under a tight rate, then little of another one: of what
// the provider gets from then on, every second mail is the small tenant's.
func TestSmallTenantGetsEverySecondTurn(t *testing.T) {
	const domains, each, few = 20, 10, 20
	w := newWorld(t, nil, first)
	w.view(func(d *policy.Document) {
		d.Providers.Limit = append(d.Providers.Limit, policy.Override{Provider: lab.Google, Limit: policy.Limit{
			Kind: policy.MessageRate, Scope: policy.ScopeSource, Max: 20, Per: policy.Duration(time.Second), Burst: 1,
		}})
	}, first)
	bulk := func(e *relay.Envelope) { e.Kind = policy.Bulk }
	var accepting sync.WaitGroup
	for i := range domains {
		domain := fmt.Sprintf("large%d.test", i)
		if err := w.lab.HostDomain(lab.Google, domain); err != nil {
			t.Fatal(err)
		}
		accepting.Go(func() {
			for n := range each {
				w.accept(bulk, fmt.Sprintf("ok-%d@%s", n, domain))
			}
		})
	}
	if err := w.lab.HostDomain(lab.Google, "small.test"); err != nil {
		t.Fatal(err)
	}
	accepting.Wait()
	w.until("the first mails", func() bool { return len(w.arrived(lab.Google)) > 5 })
	for n := range few {
		w.accept(func(e *relay.Envelope) { e.Kind, e.Tenant = policy.Bulk, ids.Tenant{15: 9} }, fmt.Sprintf("ok-%d@small.test", n))
	}
	before := len(w.arrived(lab.Google))
	last, small := 0, 0
	w.until("the small tenant's mail", func() bool {
		small = 0
		for i, m := range w.arrived(lab.Google) {
			if strings.HasSuffix(m.To[0], "@small.test") {
				small++
				last = i
			}
		}
		return small == few
	})
	if others := last + 1 - before - few; others > 2*few {
		t.Errorf("%d mails of the large tenant went before the last of %d of the small one", others, few)
	}
}

// TestTarpitTakesNothingFromOthers has a provider that answers no command in the
// time of the test, with mail for it that would fill every session of the relay,
// and mail for others meanwhile: that finds sessions, for the tarpit has its share
// of them at the most. How long the others wait is held in simulated time, in
// relay/schedule.
func TestTarpitTakesNothingFromOthers(t *testing.T) {
	const rounds, each, sessions, connects = 3, 40, 8, 4
	w := newWorld(t, nil, first, second)
	w.view(func(d *policy.Document) {
		d.Delivery.MaxSessions, d.Delivery.MaxConnectsInFlight, d.Delivery.UnprovenPercent = sessions, connects, 50
		d.Queue.Retry = []policy.Duration{policy.Duration(time.Hour)}
		d.Providers.Limit = append(d.Providers.Limit, policy.Override{Provider: "*", Limit: policy.Limit{Kind: policy.Connections, Scope: policy.ScopeSource}})
	}, first, second)
	// stuck is how many sessions wait for the tarpit.
	stuck := func() (n int) {
		w.engine.mu.Lock()
		defer w.engine.mu.Unlock()
		for _, s := range w.engine.sessions {
			if s.lane.Provider == lab.Free {
				n++
			}
		}
		return n
	}
	most := 0
	round := func() {
		began := len(w.arrived(lab.Google))
		for i := range each {
			w.accept(nil, w.at(lab.Google, i, lab.Accept))
		}
		w.until("the others' mail", func() bool {
			most = max(most, stuck())
			return len(w.arrived(lab.Google)) == began+each
		})
	}
	round() // routes and sessions
	reached := w.holdAt(lab.Free, lab.PhaseEhlo, time.Hour)
	for i := range 60 { // of many domains, so that each could have a session
		domain := fmt.Sprintf("tar%d.test", i)
		if err := w.lab.HostDomain(lab.Free, domain); err != nil {
			t.Fatal(err)
		}
		w.accept(func(e *relay.Envelope) { e.Kind = policy.Bulk }, "ok@"+domain)
	}
	reached()
	for range rounds {
		round()
	}
	// They are being opened for as long as it does not answer, so the bound of those holds.
	if want := connects / 2; most > want || most == 0 {
		t.Errorf("%d sessions of %d waited for the tarpit, %d may", most, sessions, want)
	}
	if n := len(w.arrived(lab.Free)); n > 0 {
		t.Errorf("the tarpit took %d mails, so it was none", n)
	}
}
