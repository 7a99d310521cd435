package service

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/backup"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/warmup"
)

// TestRecoveryWaitsForRelays: recovery mode ends by itself when every active
// relay was heard and a minute passed, and on an operator's word for the others.
func TestRecoveryWaitsForRelays(t *testing.T) {
	f := newFixture(t)
	first, second, gone := f.join(t, "edge-1"), f.join(t, "edge-2"), f.join(t, "edge-3")
	must[*control.Node](t)(f.SetNodeState(ctx, admin, gone.String(), control.NodeEvicted, Change{}))
	server := *f.state.Read().Servers()[0]
	server.RaftAddress, server.HTTPAddress, server.Version = "10.0.0.1:7444", "10.0.0.1:8443", "1"
	for range 2 { // the second time as after another loss
		before := f.Generation()
		row := must[*control.Cluster](t)(f.Recover(ctx, control.CauseRestore, server))
		if row.Generation <= before || row.FSMVersion != command.FSMVersion {
			t.Fatalf("got %+v", row)
		}
	}
	v := must[RecoveryView](t)(f.Recovery(viewer))
	if v.Recovery == nil || len(v.Missing) != 2 || len(v.Heard) != 0 {
		t.Fatalf("got %+v", v)
	}
	later := v.Recovery.Since.Add(control.MinRecovery)
	f.refused(t, fault.Denied, "", func() error { return f.EndRecovery(ctx, operator, nil, Change{}) })
	f.refused(t, fault.Invalid, "waive", func() error { return f.EndRecovery(ctx, admin, []string{"edge-1"}, Change{}) })
	f.refused(t, fault.NotFound, "node", func() error { return f.EndRecovery(ctx, admin, []string{"nobody"}, Change{}) })

	f.NodeSeen(ctx, first, HelloInfo{Version: "1"})
	if err := f.EndRecoveryWhenHeard(ctx, later); err != nil {
		t.Fatal(err)
	}
	if v = must[RecoveryView](t)(f.Recovery(viewer)); v.Recovery == nil || len(v.Missing) != 1 || v.Missing[0].Name != "edge-2" {
		t.Fatalf("with one relay missing: %+v", v)
	}
	if err := f.EndRecovery(ctx, admin, []string{"edge-2"}, Change{Reason: "switched off"}); err != nil {
		t.Fatal(err)
	}
	if v = must[RecoveryView](t)(f.Recovery(viewer)); v.Recovery != nil {
		t.Errorf("still %+v", v)
	}
	if last := f.state.Read().Audit(1)[0]; last.Actor != admin.Name || last.Reason != "switched off" {
		t.Errorf("the audit tail says %+v", last)
	}

	must[*control.Cluster](t)(f.Recover(ctx, control.CauseRecover, server))
	since := f.state.Read().Recovery().Since
	f.NodeSeen(ctx, first, HelloInfo{Version: "1"})
	f.NodeSeen(ctx, second, HelloInfo{Version: "1"})
	if err := f.EndRecoveryWhenHeard(ctx, since.Add(control.MinRecovery-time.Second)); err != nil || f.state.Read().Recovery() == nil {
		t.Errorf("it ended too early: %v", err)
	}
	if err := f.EndRecoveryWhenHeard(ctx, since.Add(control.MinRecovery)); err != nil || f.state.Read().Recovery() != nil {
		t.Errorf("it did not end: %v", err)
	}
	if err := f.EndRecovery(ctx, admin, nil, Change{}); err != nil {
		t.Errorf("ending what has ended: %v", err)
	}
}

// TestRecoveryWaitsForWarmUp (W2): what a relay spent of warm-up since the backup is
// not known before it has said that all is settled, however long ago it was heard.
func TestRecoveryWaitsForWarmUp(t *testing.T) {
	f := newFixture(t)
	edge, old := f.join(t, "edge-1"), f.join(t, "edge-2")
	server := f.state.Read().Servers()[0]
	must[*control.Cluster](t)(propose[control.Cluster](ctx, f.Service, &command.ClusterRecover{Generation: 1_900_000_000, Cause: "restore", Server: command.ServerRecord(server)}))
	since := f.state.Read().Recovery().Since
	f.NodeSeen(ctx, edge, HelloInfo{Version: "1", Quota: true})
	f.NodeSeen(ctx, old, HelloInfo{Version: "1"}) // knows nothing of warm-up
	if v := f.recovery(); len(v.Missing) != 0 {
		t.Errorf("nothing warms up: %+v", v)
	}
	pool := must[*control.Pool](t)(f.AddPool(ctx, admin, "news", "", "", Change{}))
	must[*control.WarmCalendar](t)(propose[control.WarmCalendar](ctx, f.Service, &command.WarmRoll{Day: int32(warmup.DayOf(since, time.UTC))}))
	must[*control.WarmSubject](t)(propose[control.WarmSubject](ctx, f.Service, &command.WarmPut{Kind: "pool", Ref: pool.ID[:], Plan: "standard", Steps: []*command.WarmStep{{Class: "other", Stage: 1}}}))
	if err := f.EndRecoveryWhenHeard(ctx, since.Add(time.Hour)); err != nil || f.state.Read().Recovery() == nil {
		t.Fatalf("it ended although a relay has not told what it spent: %v", err)
	}
	if v := f.recovery(); len(v.Missing) != 1 || v.Missing[0].Name != "edge-1" {
		t.Errorf("missing are %+v", v.Missing)
	}
	out := must[*control.WarmOutcome](t)(propose[control.WarmOutcome](ctx, f.Service, &command.WarmBatch{Items: []*command.WarmItem{{Kind: command.WarmDeclare, Node: edge[:], Epoch: 1_900_000_000}}}))
	if out.Replies[0].Err != nil {
		t.Fatal(out.Replies[0].Err)
	}
	if err := f.EndRecoveryWhenHeard(ctx, since.Add(time.Hour)); err != nil || f.state.Read().Recovery() != nil {
		t.Errorf("it did not end: %v", err)
	}
}

// TestUpgradeWaitsForEveryServer: the version follows the oldest server, after
// all of them were stable.
func TestUpgradeWaitsForEveryServer(t *testing.T) {
	f := newFixture(t)
	if got := f.state.Read().Cluster().FSMVersion; got != command.FSMVersion {
		t.Fatalf("a new cluster works at %d", got)
	}
	// A cluster as the last release left it.
	old := command.ClusterRecord(f.state.Read().Cluster())
	old.FsmVersion = 1
	f.reset(t, old)
	put := func(known uint16, state control.NodeState, name string) {
		t.Helper()
		row := control.Server{Name: name, RaftAddress: "10.0.0.2:7444", LinkAddress: "10.0.0.2:7443", HTTPAddress: "10.0.0.2:8443", Version: "1", MaxFSMVersion: known, State: state}
		expect := uint64(0)
		for _, s := range f.state.Read().Servers() {
			if s.Name == name {
				row.ID, expect = s.ID, s.Revision
			}
		}
		if row.ID.IsZero() {
			stamp(&row.ID, time.Now())
		}
		must[*control.Server](t)(propose[control.Server](ctx, f.Service, &command.ServerUpsert{Expect: expect, Server: command.ServerRecord(&row)}))
	}
	put(2, control.NodeActive, "c1")
	put(1, control.NodeActive, "c2")
	put(1, control.NodeEvicted, "c3")
	u, at := f.NewUpgrade(), time.Now()
	step := func(d time.Duration, want uint16) {
		t.Helper()
		at = at.Add(d)
		if err := u.Step(ctx, at); err != nil {
			t.Fatal(err)
		}
		if got := f.state.Read().Cluster().FSMVersion; got != want {
			t.Errorf("the cluster works at version %d, want %d", got, want)
		}
	}
	step(0, 1)
	step(time.Hour, 1) // one server is old
	put(2, control.NodeActive, "c2")
	step(0, 1)
	step(StableBeforeUpgrade-time.Second, 1)
	put(1, control.NodeActive, "c2") // it went back
	step(0, 1)
	step(time.Hour, 1)
	put(2, control.NodeActive, "c2")
	step(0, 1)
	step(StableBeforeUpgrade, 2)
}

// reset gives the fixture an empty state but for the cluster's row.
func (f *fixture) reset(t *testing.T, row *command.Cluster) {
	t.Helper()
	fresh := state.New()
	f.Service.state, f.log.state, f.log.index = fresh, fresh, 0
	must[*control.Cluster](t)(propose[control.Cluster](ctx, f.Service, &command.ClusterInit{Cluster: row}))
}

type fixedBackup struct{ text string }

func (b fixedBackup) Take(context.Context) (io.ReadCloser, backup.Manifest, error) {
	return io.NopCloser(strings.NewReader(b.text)), backup.Manifest{Index: 7}, nil
}

func TestBackupIsForAdmins(t *testing.T) {
	f := newFixture(t)
	if _, _, err := f.Backup(ctx, admin); !fault.Is(err, fault.Unavailable) {
		t.Errorf("without a keeper: %v", err)
	}
	f.Service.backups = fixedBackup{"whole"}
	if _, _, err := f.Backup(ctx, operator); !fault.Is(err, fault.Denied) {
		t.Errorf("an operator: %v", err)
	}
	r, m, err := f.Backup(ctx, admin)
	if err != nil || m.Index != 7 {
		t.Fatalf("%+v, %v", m, err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "whole" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestIssueAdminKey(t *testing.T) {
	f := newFixture(t)
	secret := must[string](t)(f.IssueAdminKey(ctx, "restore"))
	if a, err := f.Authenticate(secret); err != nil || a.Role != control.RoleAdmin {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestGenerationsOfTwoDisasters: a cluster that was recovered, and then restored
// from a backup of before, must not come to the same generation twice.
func TestGenerationsOfTwoDisasters(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	recovered := nextGeneration(1, at)
	if restored := nextGeneration(1, at.Add(time.Second)); restored <= recovered {
		t.Errorf("recovered into %d, then restored into %d", recovered, restored)
	}
	if again := nextGeneration(recovered, at.Add(-24*time.Hour)); again != recovered+1 {
		t.Errorf("with the clock set back, %d follows %d", again, recovered)
	}
	if odd := nextGeneration(3, time.Unix(-5, 0)); odd != 4 {
		t.Errorf("with a clock of before 1970, %d follows 3", odd)
	}
}
