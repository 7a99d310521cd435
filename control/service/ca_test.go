package service

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// caFixture has a server of its own and another one that the test speaks for.
type caFixture struct {
	*fixture
	own   CertificateState
	peer  map[string]CertificateState // by raft address; an absent one does not answer
	watch *Rotation
}

func newCAFixture(t *testing.T) *caFixture {
	f := &caFixture{fixture: newFixture(t), peer: map[string]CertificateState{}}
	f.SetMembership(f, f.state.Read().Servers()[0].ID)
	f.SetCertificateState(func() CertificateState { return f.own })
	f.watch = f.NewRotation()
	return f
}

// ServerMembers implements Membership.
func (f *caFixture) ServerMembers(context.Context) ([]ServerMember, error) { return nil, nil }

// Ask implements Membership.
func (f *caFixture) Ask(_ context.Context, address, what string, v any) error {
	st, ok := f.peer[address]
	if what != "certificate" || !ok {
		return errors.New("no answer")
	}
	text, err := json.Marshal(st)
	if err == nil {
		err = json.Unmarshal(text, v)
	}
	return err
}

// now returns what somebody says who believes the bundle of the moment and has
// a certificate of the CA that signs.
func (f *caFixture) now(t *testing.T) CertificateState {
	t.Helper()
	bundle, err := pki.ParseCertificates(f.state.Read().Cluster().CABundle)
	if err != nil {
		t.Fatal(err)
	}
	sum := pki.BundleSum(bundle)
	return CertificateState{BundleSum: sum[:], Issuer: pki.KeyID(bundle[0])}
}

func (f *caFixture) says(node ids.Node, revision uint64, st CertificateState) {
	f.NodeReported(node, ReportInfo{Generation: f.Generation(), Revision: revision, Certificate: st})
}

func (f *caFixture) step(t *testing.T) CAView {
	t.Helper()
	if err := f.watch.Step(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	return must[CAView](t)(f.CA(ctx, viewer))
}

// TestRotationFollowsWhatMembersSay: the leader records who has acknowledged and
// goes on; what a relay said before this phase does not count.
func TestRotationFollowsWhatMembersSay(t *testing.T) {
	t.Parallel()
	f := newCAFixture(t)
	node := f.join(t, "edge-1")
	first := f.now(t)
	v := must[CAView](t)(f.RotateCA(ctx, admin, Change{Reason: "yearly"}))
	if v.Rotation.Phase != control.PhaseDistribute || len(v.Members) != 2 || len(v.Bundle) != 3 {
		t.Fatalf("got %+v", v)
	}
	f.refused(t, fault.Conflict, "", func() error { _, err := f.RotateCA(ctx, admin, Change{}); return err })
	if v = f.step(t); len(v.Rotation.Acked) != 0 || !strings.Contains(v.Members[1].Why, "not linked") {
		t.Errorf("nobody said anything, acked by %v: %+v", v.Rotation.Acked, v.Members[1])
	}
	f.own = f.now(t)
	f.says(node, 0, f.now(t)) // it says so of a view of before
	if v = f.step(t); len(v.Rotation.Acked) != 1 || v.Rotation.Phase != control.PhaseDistribute {
		t.Errorf("acked by %v in %s", v.Rotation.Acked, v.Rotation.Phase)
	}
	f.says(node, f.state.Read().ViewRevision(), f.now(t))
	if v = f.step(t); v.Rotation.Phase != control.PhaseSign || v.Signer().NotAfter.Before(time.Now().Add(364*24*time.Hour)) {
		t.Fatalf("after all have acknowledged: %s", v.Rotation.Phase)
	}
	old := f.now(t)
	old.Issuer = first.Issuer
	f.own = f.now(t)
	f.says(node, f.state.Read().ViewRevision(), old)
	if v = f.step(t); v.Rotation.Phase != control.PhaseSign || !strings.Contains(v.Members[1].Why, "not linked") && !strings.Contains(v.Members[1].Why, "renewed") {
		t.Errorf("a relay with an old certificate: %s, %+v", v.Rotation.Phase, v.Members[1])
	}
	f.says(node, f.state.Read().ViewRevision(), f.now(t))
	if v = f.step(t); v.Rotation.Phase != control.PhaseDone || len(v.Bundle) != 2 || v.Members != nil {
		t.Errorf("at the end: %s with %d CAs", v.Rotation.Phase, len(v.Bundle))
	}
	f.refused(t, fault.Conflict, "", func() error { _, err := f.RollbackCA(ctx, admin, Change{}); return err })
}

// TestRotationGoesOnWithoutSome by name and by force, with a reason.
func TestRotationGoesOnWithoutSome(t *testing.T) {
	t.Parallel()
	f := newCAFixture(t)
	f.join(t, "edge-1")
	for _, refused := range []func() error{
		func() error { _, err := f.SkipCA(ctx, admin, "edge-1", Change{Reason: "x"}); return err },
		func() error { _, err := f.ForceCA(ctx, admin, Change{Reason: "x"}); return err },
	} {
		f.refused(t, fault.Conflict, "", refused)
	}
	for _, refused := range []func() error{
		func() error { _, err := f.RotateCA(ctx, operator, Change{}); return err },
		func() error { _, err := f.RollbackCA(ctx, operator, Change{}); return err },
		func() error { _, err := f.ForceCA(ctx, operator, Change{Reason: "x"}); return err },
		func() error { _, err := f.SkipCA(ctx, operator, "edge-1", Change{Reason: "x"}); return err },
	} {
		f.refused(t, fault.Denied, "", refused)
	}
	must[CAView](t)(f.RotateCA(ctx, admin, Change{}))
	f.refused(t, fault.Invalid, "reason", func() error { _, err := f.SkipCA(ctx, admin, "edge-1", Change{}); return err })
	f.refused(t, fault.NotFound, "node", func() error { _, err := f.SkipCA(ctx, admin, "edge-9", Change{Reason: "x"}); return err })
	v := must[CAView](t)(f.SkipCA(ctx, admin, "edge-1", Change{Reason: "in repair"}))
	if s := v.Members[1].Skip; s == nil || s.Reason != "in repair" || s.Actor != admin.Name {
		t.Errorf("skipped: %+v", v.Members[1])
	}
	f.own = f.now(t)
	if v = f.step(t); v.Rotation.Phase != control.PhaseSign {
		t.Errorf("it waits for whom was skipped: %s", v.Rotation.Phase)
	}
	f.refused(t, fault.Invalid, "reason", func() error { _, err := f.ForceCA(ctx, admin, Change{}); return err })
	if v = must[CAView](t)(f.ForceCA(ctx, admin, Change{Reason: "hurry"})); v.Rotation.Phase != control.PhaseDone {
		t.Errorf("forced to %s", v.Rotation.Phase)
	}
}

// TestRotationNeedsAllServers: a cluster with a server of the release before
// refuses, and names it.
func TestRotationNeedsAllServers(t *testing.T) {
	t.Parallel()
	newer := newCAFixture(t)
	cluster := *newer.state.Read().Cluster()
	cluster.FSMVersion = 2
	st := state.New()
	log := &localLog{state: st}
	f := New(Options{State: st, Log: log, Sealer: newer.sealer, Logger: slog.New(slog.DiscardHandler)})
	old := control.Server{Name: "ctl2", RaftAddress: "10.0.0.2:7444", Version: "0.9", MaxFSMVersion: 2, State: control.NodeActive}
	stamp(&old.ID, time.Now())
	for _, c := range []command.Command{&command.ClusterInit{Cluster: command.ClusterRecord(&cluster)}, &command.ServerUpsert{Server: command.ServerRecord(&old)}} {
		if _, err := log.Propose(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	_, err := f.RotateCA(ctx, admin, Change{})
	if !fault.Is(err, fault.Conflict) || !strings.Contains(fault.Public(err), "ctl2 (release 0.9)") {
		t.Errorf("got %v", err)
	}
	if v := must[CAView](t)(f.CA(ctx, viewer)); v.Supported {
		t.Error("said to be supported")
	}
	if err := f.NewRotation().Step(ctx, time.Now().Add(ca.IssuingLife)); err != nil || f.state.Read().Rotation() != nil {
		t.Errorf("begun by itself: %v", err)
	}
}

// TestRotationBeginsByItself a month before the issuing CA ends.
func TestRotationBeginsByItself(t *testing.T) {
	t.Parallel()
	f := newCAFixture(t)
	ends := f.IssuingEnds()
	for _, c := range []struct {
		before  time.Duration
		problem bool
		begun   bool
	}{{ca.WarnBefore + time.Hour, false, false}, {ca.WarnBefore - time.Hour, true, false}, {ca.RotateBefore + time.Hour, true, false}, {ca.RotateBefore - time.Hour, true, true}} {
		at := ends.Add(-c.before)
		if got := f.CAHealth(at) != ""; got != c.problem {
			t.Errorf("%s before the end: health says %q", c.before, f.CAHealth(at))
		}
		if err := f.watch.Step(ctx, at); err != nil {
			t.Fatal(err)
		}
		if got := f.state.Read().Rotation() != nil; got != c.begun {
			t.Errorf("%s before the end: begun is %t", c.before, got)
		}
	}
	e := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1}))[0]
	if e.Action != "ca.rotate" || e.Actor != System.Name || !strings.Contains(e.Reason, "ends at") {
		t.Errorf("audited as %+v", e)
	}
}

// TestServerCertificatesAreRecorded, so that those of a removed server can be
// refused; the list is bounded.
func TestServerCertificatesAreRecorded(t *testing.T) {
	t.Parallel()
	f := newCAFixture(t)
	self := f.state.Read().Servers()[0].ID
	pin := sha256.Sum256([]byte("key"))
	for n := range command.MaxServerCertificates + 5 {
		if err := f.SetServerCert(ctx, self, strings.Repeat("a", n+1), pin[:], time.Now().Add(ca.LeafLife)); err != nil {
			t.Fatal(err)
		}
	}
	row := f.state.Read().Server(self)
	if n := len(row.Certificates); n != command.MaxServerCertificates || row.Certificates[n-1].Serial != strings.Repeat("a", n+5) || string(row.SPKI) != string(pin[:]) {
		t.Errorf("recorded are %d, the last %s", n, row.Certificates[n-1].Serial)
	}
	hash := f.state.Read().Hash()
	if err := f.SetServerCert(ctx, self, row.Certificates[3].Serial, pin[:], row.Certificates[3].NotAfter); err != nil || f.state.Read().Hash() != hash {
		t.Errorf("recording again changed something: %v", err)
	}
}
