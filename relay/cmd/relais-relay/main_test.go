package main

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func fresh[K ids.Kind](id *ids.ID[K]) { *id = ids.New[K](time.Now()) }

// TestUnlistedAddressIsLocal: an address of a network that is local by route,
// as all of 127.0.0.0/8 is, is told to control though no interface lists it.
func TestUnlistedAddressIsLocal(t *testing.T) {
	var self ids.Node
	var one, two ids.Source
	fresh(&self)
	fresh(&one)
	fresh(&two)
	m, err := egress.New(egress.Config{Node: self, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	here, elsewhere := netip.MustParseAddr("127.9.8.7"), netip.MustParseAddr("192.0.2.77")
	m.SetSources([]policy.Source{
		{ID: one, Bind: here, Public: here, Owner: self, EHLO: "a.example.com"},
		{ID: two, Bind: elsewhere, Public: elsewhere, Owner: self, EHLO: "b.example.com"},
	})
	n := &node{cfg: &config.Config{}, egress: m}
	if got := n.localAddresses(); !slices.Contains(got, here) || slices.Contains(got, elsewhere) {
		t.Errorf("got %v, want %s and not %s", got, here, elsewhere)
	}
}
