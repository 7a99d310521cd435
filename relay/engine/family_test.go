package engine

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

func TestFamiliesOfARoute(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	both := []resolve.Host{{Addrs: []netip.Addr{v4}}, {Addrs: []netip.Addr{v6}}}
	for _, tc := range []struct {
		hosts  []resolve.Host
		family string
		want   schedule.Families
	}{
		{both, policy.FamilyAny, schedule.Families{}},
		{both[:1], policy.FamilyAny, schedule.Families{NoIPv6: true}},
		{both[1:], policy.FamilyAny, schedule.Families{NoIPv4: true}},
		{both, policy.FamilyIPv4First, schedule.Families{First: schedule.IPv4First}},
		{both, policy.FamilyIPv6First, schedule.Families{First: schedule.IPv6First}},
		{both, policy.FamilyIPv4, schedule.Families{NoIPv6: true, Refused: true}},
		{both[1:], policy.FamilyIPv4, schedule.Families{NoIPv4: true, NoIPv6: true, Refused: true}},
	} {
		if got := familiesOf(&resolve.Route{Hosts: tc.hosts}, tc.family); got != tc.want {
			t.Errorf("%d hosts, %s: %+v, want %+v", len(tc.hosts), tc.family, got, tc.want)
		}
	}
}

// TestPoolOfTwoFamilies has a pool with an IPv4 and an IPv6 source and hosts
// with IPv4 addresses: no mail waits for a retry because the other source was
// chosen for it.
func TestPoolOfTwoFamilies(t *testing.T) {
	loop := netip.IPv6Loopback()
	six := policy.Source{ID: ids.Source{15: 6}, Bind: loop, Public: loop, EHLO: "mx6.brand.test", Pool: pool, Owner: here, Epoch: 1}
	w := newWorld(t, nil, first, six)
	if !w.egress.Usable(six.ID) {
		t.Fatal("::1 is not a local address of this machine: the test needs IPv6 on loopback")
	}
	for _, provider := range []string{lab.Google, lab.Yahoo, lab.Orange, lab.Free} {
		env := w.accept(nil, w.at(provider, 0, lab.Accept), w.at(provider, 1, lab.Accept))
		w.gone(env)
	}
	for _, e := range w.events() {
		if e.Type == outbox.Deferred || e.Type == outbox.Delivered && e.SourceIP != first.Bind {
			t.Errorf("event %+v", e)
		}
	}
}

// TestWhyNamesTheFailure: mail that waits for a dead site is told what that
// site did last.
func TestWhyNamesTheFailure(t *testing.T) {
	w := newWorld(t, nil, first)
	w.view(func(d *policy.Document) { d.Delivery.HostBackoff = policy.Duration(time.Minute) }, first)
	if err := w.lab.SetBehaviour(lab.Yahoo, lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "554 5.7.1 not from you", Close: true})}); err != nil {
		t.Fatal(err)
	}
	w.event(w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept)), outbox.Deferred)
	env := w.accept(nil, w.at(lab.Yahoo, 0, lab.Accept))
	w.until("the reason", func() bool {
		why := w.engine.Explain(env, 0, relay.RecipientState{State: relay.StateWaiting})
		return why.Reason == "backoff" && strings.Contains(why.Text, "554 5.7.1 not from you") && strings.Contains(why.Text, "yahoodns.net")
	})
}
