package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/shared/fault"
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

// TestUsageErrors: what no command can mean is a usage error.
func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"nonsense"}, {"queue", "nonsense"}, {"queue", "show"}, {"queue", "show", ""}, {"join"}, {"--nonsense"}, {"classify", "--provider", "gogle"},
		{"queue", "purge", "--tenant", "acme", "--domain", "", "--yes"}, {"queue", "list", "--tag", ""}, {"trace", "--provider", ""}} {
		root := newRoot()
		root.SetIn(strings.NewReader(""))
		root.SetArgs(append(args, "--data", t.TempDir()))
		var usage usageError
		if err := root.Execute(); !errors.As(err, &usage) {
			t.Errorf("%q: got %v, want a usage error", args, err)
		}
	}
}

// TestMessageSaysTheSystemsCause: our own words are said once, a system's cause
// is said behind them.
func TestMessageSaysTheSystemsCause(t *testing.T) {
	system := &fs.PathError{Op: "mkdir", Path: "x", Err: syscall.EROFS}
	if got := message(fault.Wrap(system, fault.Internal, "op", "cannot make x")); !strings.Contains(got, "read-only") {
		t.Errorf("got %q", got)
	}
	if got := message(fault.Wrap(fault.New(fault.Invalid, "op", "cannot make x"), fault.Internal, "op", "cannot make x")); got != "cannot make x" {
		t.Errorf("got %q", got)
	}
}
