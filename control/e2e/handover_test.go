package e2e

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// behaveAll lets every provider of the lab behave so.
func behaveAll(t *testing.T, f *fleet.Fleet, b lab.Behaviour) {
	t.Helper()
	for _, p := range f.Lab.Providers() {
		if err := f.Lab.SetBehaviour(p.Name, b); err != nil {
			t.Fatal(err)
		}
	}
}

// down is a provider that takes no connection.
var down = lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down"})}

// metricOf returns a relay's metric without labels, 0 while it cannot be had.
func metricOf(t *testing.T, r *fleet.Relay, name string) float64 {
	t.Helper()
	for line := range strings.Lines(get(t, r.Metrics()+"/metrics")) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			v, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	return 0
}

// deliveredBy counts what a relay delivered, by its own events.
func deliveredBy(t *testing.T, f *fleet.Fleet, who *fleet.Relay) (n int) {
	t.Helper()
	if err := f.NewLedger().Read(context.WithoutCancel(t.Context()), func(r *fleet.Relay, e *fleet.Event) {
		if r == who && e.Type == "delivered" {
			n++
		}
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDrainedQueueGoesToAnotherRelay drains a relay with 10,000 messages in its
// queue, and kills both relays meanwhile: all of it is delivered by the other
// relay, none twice and none lost.
func TestDrainedQueueGoesToAnotherRelay(t *testing.T) {
	const messages = 10_000
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	drained, other := f.Relays[0], f.Relays[1]
	eventually(t, 60*time.Second, "the relays know of each other", func() bool {
		return strings.Contains(ctl(t, f, "node", "show", other.Node, "--json"), "handover_address")
	})
	behaveAll(t, f, down)
	submitted, err := f.Submit(within(t, 3*time.Minute), fleet.Stream{Recipients: recipients(t, f, messages), Size: 2000, Connections: 16, Tag: "handed", Only: drained})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	ctl(t, f, "node", "drain", drained.Node, "--reason", "new disk")
	for _, r := range []*fleet.Relay{drained, other, drained} {
		before := metricOf(t, other, "relais_relay_handover_taken_messages_total")
		eventually(t, 60*time.Second, "mail is handed over", func() bool {
			return metricOf(t, other, "relais_relay_handover_taken_messages_total") > before || metricOf(t, drained, "relais_relay_queue_waiting_recipients") == 0
		})
		r.Kill()
		if err := f.RestartUnready(within(t, time.Minute), r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Ctl(within(t, 4*time.Minute), "node", "drain", drained.Node, "--wait", "3m"); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d messages were handed over in %s, with both relays killed", messages, time.Since(began).Round(time.Second))
	behaveAll(t, f, lab.Behaviour{})
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != messages {
		t.Errorf("of %d messages: %+v", messages, a)
	}
	twice := 0
	for i := range submitted {
		if f.Lab.Deliveries(submitted[i].MessageID, submitted[i].Recipient) > 1 {
			twice++
		}
	}
	if n := deliveredBy(t, f, drained); n != 0 || twice != 0 {
		t.Errorf("%d messages came twice, the drained relay delivered %d", twice, n)
	}
}

// TestMailForAPoolElsewhere submits to a relay without any address: it takes the
// mail, says where it goes, and the other relay delivers it.
func TestMailForAPoolElsewhere(t *testing.T) {
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	without, other := f.Relays[0], f.Relays[1]
	eventually(t, 60*time.Second, "the relays know of each other", func() bool {
		return strings.Contains(ctl(t, f, "node", "show", other.Node, "--json"), "handover_address")
	})
	for _, source := range without.Sources {
		ctl(t, f, "ip", "assign", source.String(), "--node", other.Node, "--old-owner-is-off", "--reason", "moved")
	}
	if err := f.WaitApplied(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	other.Kill()
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 20), Size: 2000, Connections: 4, Tag: "elsewhere", Only: without})
	if err != nil {
		t.Fatal(err)
	}
	why := "it is handed over to relay relay2.relais.test, because no source address of the pool can be used here"
	eventually(t, 30*time.Second, "queue why names the relay", func() bool {
		out, err := program(t, "relais-relay", "queue", "list", "--data", without.Dir)
		if err != nil {
			t.Fatal(err, out)
		}
		for _, word := range strings.Fields(out) {
			if strings.HasPrefix(word, "msg_") {
				out, err = program(t, "relais-relay", "queue", "why", word, "--data", without.Dir)
				return err == nil && strings.Contains(out, why)
			}
		}
		return false
	})
	if err := f.Restart(within(t, time.Minute), other); err != nil {
		t.Fatal(err)
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
}
