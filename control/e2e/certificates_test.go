package e2e

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/cluster"
	commands "github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/pki"
)

const day = 24 * time.Hour

// oldCluster makes the directory of a control server as init does, but for a
// cluster whose CA began long ago: what it signs may have ended since.
type oldCluster struct {
	began     time.Time
	authority *ca.Authority
}

func (o *oldCluster) init(ctx context.Context, dir string, advertise netip.Addr) (err error) {
	conf, err := config.Load("", dir)
	if err != nil {
		return err
	}
	at := func(listen netip.AddrPort) string {
		return net.JoinHostPort(advertise.String(), strconv.Itoa(int(listen.Port())))
	}
	var id ids.Cluster
	var first ids.Node
	stamp(&id, o.began)
	stamp(&first, o.began)
	material, kek, _, err := ca.Create(id, o.began)
	if err != nil {
		return err
	}
	sealer := pki.NewSealer(kek)
	if o.authority, err = ca.Open(material, id, sealer); err != nil {
		return err
	}
	identity := filepath.Join(dir, "identity")
	if err := os.MkdirAll(identity, 0o700); err != nil {
		return err
	}
	if err := pki.WriteKey(filepath.Join(identity, "kek.key"), kek); err != nil {
		return err
	}
	made, err := bootstrap(ctx, dir, sealer, service.InitRequest{
		Cluster: id, CABundle: material.Bundle, CASealed: material.Sealed, KEKID: material.KEKID, RecoverySealed: material.RecoverySealed,
		Server: control.Server{ID: first, Name: "server1", RaftAddress: at(conf.Listen.Raft), LinkAddress: at(conf.Listen.Link), HTTPAddress: at(conf.Listen.HTTPS),
			MaxFSMVersion: commands.FSMVersion, State: control.NodeActive},
	})
	if err != nil {
		return err
	}
	key, err := pki.LoadOrCreateNodeKey(filepath.Join(identity, "node.key"))
	if err != nil {
		return err
	}
	own, err := o.authority.Issue(key, pki.RoleControl, first, pki.Request{Addresses: []netip.Addr{advertise}}, time.Now())
	if err != nil {
		return err
	}
	chain, err := pki.ParseChain(own.Certificate)
	if err != nil {
		return err
	}
	cli := map[string]any{"endpoints": []string{"https://" + at(conf.Listen.HTTPS)}, "ca_pin": o.authority.Pin().String(), "key": made.APIKey}
	server := map[string]any{"format": 1, "cluster": id, "server": first, "advertise": advertise, "raft": at(conf.Listen.Raft)}
	cliText, err := toml.Marshal(cli)
	if err != nil {
		return err
	}
	serverText, err := toml.Marshal(server)
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name string
		text []byte
	}{
		{"identity/leaf.pem", pki.EncodeCertificates(chain)}, {"identity/ca.pem", pki.EncodeCertificates(o.authority.Bundle())},
		{"ca.pem", pki.EncodeCertificates([]*x509.Certificate{o.authority.Root()})}, {"cli.toml", cliText}, {"server.toml", serverText},
	} {
		if err := pki.WriteFile(filepath.Join(dir, file.name), file.text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func stamp[K ids.Kind](id *ids.ID[K], at time.Time) { *id = ids.New[K](at) }

// bootstrap commits what a new cluster begins with.
func bootstrap(ctx context.Context, dir string, sealer *pki.Sealer, req service.InitRequest) (made service.InitResult, err error) {
	quiet := slog.New(slog.DiscardHandler)
	id, address := req.Server.ID.String(), req.Server.RaftAddress
	if err := cluster.Bootstrap(dir, id, address, quiet); err != nil {
		return made, err
	}
	st := state.New()
	log, err := cluster.Open(cluster.Options{Dir: dir, ServerID: id, Address: address, State: st, Logger: quiet, Registerer: prometheus.NewRegistry(), Halt: func(err error) { panic(err) }})
	if err != nil {
		return made, err
	}
	defer func() {
		if closing := log.Close(); err == nil {
			err = closing
		}
	}()
	if err := log.WaitReady(ctx); err != nil {
		return made, err
	}
	return service.New(service.Options{State: st, Log: log, Sealer: sealer, Logger: quiet}).Init(ctx, req)
}

// endLeaf gives a relay that does not run the certificate that it would have
// had, if it had stopped so long ago that this one has ended.
func (o *oldCluster) endLeaf(t *testing.T, r *fleet.Relay, ago time.Duration) *x509.Certificate {
	t.Helper()
	path := filepath.Join(r.Dir, "identity", "leaf.pem")
	chain, err := pki.LoadCertificates(path)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.LoadNodeKey(filepath.Join(r.Dir, "identity", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	names := pki.Request{DNSNames: chain[0].DNSNames}
	for _, ip := range chain[0].IPAddresses {
		address, _ := netip.AddrFromSlice(ip)
		names.Addresses = append(names.Addresses, address.Unmap())
	}
	identity, err := pki.CertIdentity(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	old, err := o.authority.Issue(key, pki.RoleRelay, identity.Node, names, time.Now().Add(-ago-ca.LeafLife))
	if err != nil {
		t.Fatal(err)
	}
	if chain, err = pki.ParseChain(old.Certificate); err != nil {
		t.Fatal(err)
	}
	if err := pki.WriteFile(path, pki.EncodeCertificates(chain), 0o644); err != nil {
		t.Fatal(err)
	}
	return chain[0]
}

// TestExpiredCertificates lets relays come back whose certificates ended while
// they were off: after 20 days a relay renews and works on as the same node,
// after 40 it is told what to do, and does its work when that was done.
func TestExpiredCertificates(t *testing.T) {
	old := &oldCluster{began: time.Now().Add(-60 * day)}
	f := start(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true, Init: old.init})
	weeks, months := f.Relays[0], f.Relays[1]
	for _, r := range f.Relays {
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	ended := old.endLeaf(t, weeks, 20*day)
	old.endLeaf(t, months, 40*day)
	t.Logf("the leaf of %s ended at %v", weeks.Name, ended.NotAfter)
	if err := f.Restart(within(t, time.Minute), weeks); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the relay that was off for weeks is linked", func() bool {
		s, err := statusOf(weeks)
		return err == nil && s.Connected && s.Node == weeks.Node
	})
	chain, err := pki.LoadCertificates(filepath.Join(weeks.Dir, "identity", "leaf.pem"))
	if err != nil || time.Until(chain[0].NotAfter) < 6*day {
		t.Errorf("its certificate: %v, %v", chain[0].NotAfter, err)
	}
	var row nodeRow
	if showNode(t, f, weeks.Node, &row); row.State != "active" || !row.Connected {
		t.Errorf("it is shown as %+v", row)
	}

	if err := f.RestartUnready(within(t, time.Minute), months); err != nil {
		t.Fatal(err)
	}
	const advice = "ended 40 days ago and is renewed for 30 days at most: join again with a new token"
	var said relayStatus
	eventually(t, 30*time.Second, "the relay that was off for months says what to do", func() bool {
		s, err := statusOf(months)
		said = s
		return err == nil && !s.Connected && strings.Contains(s.Problem, advice)
	})
	t.Logf("it says: %s", said.Problem)
	if said.Evicted {
		t.Error("it believes that it was evicted")
	}
	if health := get(t, months.Metrics()+"/health"); !strings.Contains(health, advice) {
		t.Errorf("its health says\n%s", health)
	}
	for _, log := range []string{months.Log, f.Control.Log} {
		eventually(t, 10*time.Second, log+" says so", func() bool { // the lines come after the answer
			text, err := os.ReadFile(log)
			return err == nil && strings.Contains(string(text), advice)
		})
	}
	if showNode(t, f, months.Node, &row); row.Connected {
		t.Errorf("it is shown as %+v", row)
	}

	joinAnew(t, f, months)
	submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: recipients(t, f, 40), Size: 2000, Connections: 4, Tag: "back"})
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range submitted {
		if one.Result.State != lab.StateAccepted {
			t.Errorf("%s refused: %d %s", one.Relay.Name, one.Result.Code, one.Result.Reply)
			break
		}
	}
	if a := settle(t, f, submitted); a.refused > 0 || a.delivered != len(submitted) {
		t.Errorf("of %d messages: %+v", len(submitted), a)
	}
}

// joinAnew does what a relay was told to have done that was off for too long.
func joinAnew(t *testing.T, f *fleet.Fleet, r *fleet.Relay) {
	t.Helper()
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	tok, _ := token(t, f)
	if out, err := command(t, filepath.Join(binaries, "relais-relay"), "join", "--token", tok, f.LinkAddr(), "--data", r.Dir); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	var again relayStatus
	eventually(t, 30*time.Second, "it is linked again", func() bool {
		s, err := statusOf(r)
		again = s
		return err == nil && s.Connected
	})
	if again.Node == r.Node {
		t.Error("it joined anew as the node that it was")
	}
	// It is a new node; the addresses and the row of the old one are its operator's to move.
	for _, source := range r.Sources {
		ctl(t, f, "ip", "assign", source.String(), "--node", again.Node, "--old-owner-is-off", "--reason", "the same machine")
	}
	ctl(t, f, "node", "evict", r.Node, "--reason", "joined anew as "+again.Node)
	r.Node = again.Node
	if err := f.WaitApplied(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestNotReadyWithoutPolicy starts a relay that has joined and never heard its
// policy: it is not ready, because it can take no mail.
func TestNotReadyWithoutPolicy(t *testing.T) {
	f := start(t, fleet.Config{Relays: 1, Open: true, NoDKIM: true})
	r := f.Relays[0]
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := f.Control.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(r.Dir, "view")); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartUnready(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "it says why it is not ready", func() bool {
		return strings.Contains(get(t, r.Metrics()+"/readyz"), "not ready: no policy yet")
	})
	if err := f.RestartControl(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	// It looks for control every 30 s at most, half as much more by chance, and takes
	// 5 s to find nobody (maxBackoff and jitter of relay/agent, DefaultDialTimeout of
	// shared/link).
	eventually(t, 75*time.Second, "it is ready with a policy", func() bool {
		return strings.HasPrefix(get(t, r.Metrics()+"/readyz"), "ready")
	})
}
