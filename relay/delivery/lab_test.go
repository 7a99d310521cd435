package delivery_test

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

type labEgress struct{}

func (labEgress) Dial(ctx context.Context, _ ids.Source, remote netip.AddrPort, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	return d.DialContext(ctx, "tcp", remote.String())
}

// TestProvidersOfTheLab goes the whole way, from a domain over DNS, TLS and the
// dialogue to the verdict, with the simulated providers, whose wording was
// written by other hands: what an address asks for must be what is understood.
func TestProvidersOfTheLab(t *testing.T) {
	world, err := lab.Start(t.Context(), lab.Config{Seed: 1, Mode: lab.Open, Dir: t.TempDir(), SkipDKIM: true, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer world.Close()
	document, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &document.Delivery
	inForce := func() *policy.Delivery { return p }
	registry := prometheus.NewRegistry()
	resolver, err := resolve.New(resolve.Config{Servers: []netip.AddrPort{world.DNSAddr()}, Policy: inForce, AllowPrivate: true,
		Log: slog.New(slog.DiscardHandler), Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	dialer, err := delivery.New(delivery.Config{Egress: labEgress{}, Broken: tlspolicy.NewMemory(), Port: world.SMTPPort(), Policy: inForce,
		Log: slog.New(slog.DiscardHandler), Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	sender := mailaddr.Address{Local: "bounces", Domain: "sender.example"}
	// What the first try of an address must be understood as.
	want := map[lab.Outcome][]verdict.Class{
		lab.Accept:   {verdict.Delivered},
		lab.Nobody:   {verdict.BadMailbox},
		lab.Disabled: {verdict.InactiveMailbox, verdict.BadMailbox}, // some do not tell them apart
		lab.Full:     {verdict.Quota},
		lab.FullTemp: {verdict.Quota},
		lab.Grey:     {verdict.Greylist, verdict.RecipientRate, verdict.Throttled, verdict.RemoteSystem},
		lab.Defer:    {verdict.RemoteSystem},
		lab.Throttle: {verdict.Throttled, verdict.IPBlock},
		lab.Block:    {verdict.IPBlock, verdict.Blocklist},
		lab.Spam:     {verdict.SpamContent, verdict.Content, verdict.Policy},
		lab.Drop:     {verdict.BadConnection},
		lab.Late:     {verdict.BadConnection},
	}
	permanent := []lab.Outcome{lab.Nobody, lab.Disabled, lab.Full, lab.Block, lab.Spam}
	for _, provider := range world.Providers() {
		for outcome, classes := range want {
			text, err := world.Recipient(provider.Name, 1, outcome)
			if err != nil {
				t.Fatal(err)
			}
			rcpt, err := mailaddr.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			route := resolver.Route(t.Context(), rcpt.Domain, resolve.IPv4)
			if route.Failure != nil {
				t.Errorf("%s has no route: %s", rcpt.Domain, route.Failure.Reply.Text)
				continue
			}
			hosts := route.Order(rand.New(rand.NewPCG(1, 1)), nil)
			session, failure := dialer.Dial(t.Context(), &delivery.Target{Hosts: hosts,
				Source: policy.Source{Bind: netip.MustParseAddr("127.0.0.1"), EHLO: "out.sender.example"}})
			if failure != nil {
				t.Errorf("%s: %+v", text, failure)
				continue
			}
			out := session.Send(&delivery.Transaction{Sender: sender, Recipients: []delivery.Recipient{{Address: rcpt}},
				Content: delivery.Content{Bytes: []byte("From: a@sender.example\r\nMessage-ID: <" + text + ">\r\n\r\nhello\r\n")}})
			session.Quit()
			v := verdict.Of(provider.Name, &out[0])
			if !slices.Contains(classes, v.Class) {
				t.Errorf("%s at %s is understood as %s by %s, want %v: %+v", outcome, provider.Name, v.Class, v.Rule, classes, out[0])
			}
			final := v.Action == verdict.Fail
			if final != slices.Contains(permanent, outcome) || (v.Action == verdict.Deliver) != (outcome == lab.Accept) {
				t.Errorf("%s at %s: %+v on %+v", outcome, provider.Name, v, out[0])
			}
			if outcome == lab.Late && out[0].Status != relay.InDoubt {
				t.Errorf("%s at %s: %+v, want in doubt", outcome, provider.Name, out[0])
			}
		}
	}
}
