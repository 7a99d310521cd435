package fsm

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
)

func entry(t *testing.T, index uint64, n byte) *raft.Log {
	t.Helper()
	b, err := command.Encode(&command.TenantPut{Tenant: &command.Tenant{Id: bytes.Repeat([]byte{n}, 16), Name: string('a' + rune(n)), OwnershipToken: "own"}}, time.UnixMilli(1_767_225_600_000), 1)
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Type: raft.LogCommand, Data: b}
}

// sink is a snapshot sink in memory.
type sink struct {
	bytes.Buffer
	closed, cancelled bool
	fail              error
}

func (s *sink) Write(b []byte) (int, error) {
	if s.fail != nil {
		return 0, s.fail
	}
	return s.Buffer.Write(b)
}
func (s *sink) ID() string    { return "test" }
func (s *sink) Close() error  { s.closed = true; return nil }
func (s *sink) Cancel() error { s.cancelled = true; return nil }

func TestBatchSnapshotRestore(t *testing.T) {
	st := state.New()
	f := New(st, func(err error) { t.Error(err) })
	out := f.ApplyBatch([]*raft.Log{entry(t, 5, 1), {Index: 6, Type: raft.LogConfiguration}, entry(t, 7, 2)})
	if len(out) != 3 || out[0].(state.Result).Err != nil || out[1] != nil || out[2].(state.Result).Index != 7 {
		t.Fatalf("got %+v", out)
	}
	snap, err := f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	f.Apply(entry(t, 8, 3)) // after the snapshot was taken, so not in it
	var to sink
	if err := snap.Persist(&to); err != nil || !to.closed || to.cancelled {
		t.Fatalf("%v, %+v", err, to)
	}
	snap.Release()
	other := state.New()
	if err := New(other, func(err error) { t.Error(err) }).Restore(io.NopCloser(bytes.NewReader(to.Bytes()))); err != nil {
		t.Fatal(err)
	}
	if r := other.Read(); len(r.Tenants()) != 2 || r.Index() != 7 {
		t.Errorf("restored %d tenants at index %d", len(r.Tenants()), r.Index())
	}
	full := sink{fail: errors.New("disk full")}
	if err := snap.Persist(&full); !errors.Is(err, full.fail) || !full.cancelled || full.closed {
		t.Errorf("a failing sink: %v, %+v", err, full)
	}
}

// TestUnknownCommandHalts: an entry that cannot be applied is never skipped,
// unless its type says that it may be.
func TestUnknownCommandHalts(t *testing.T) {
	st := state.New()
	var halted error
	f := New(st, func(err error) { halted = err })
	skippable := entry(t, 1, 1)
	skippable.Data[0] = 0xff
	if r := f.Apply(skippable).(state.Result); r.Err != nil || st.Read().Index() != 1 || halted != nil {
		t.Errorf("a command that may be skipped: %+v, %v", r, halted)
	}
	unknown := entry(t, 2, 1)
	unknown.Data[0] = 0x7f // the highest that may not be skipped; types are given from below
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the entry was taken for applied")
			}
		}()
		f.Apply(unknown)
	}()
	if !errors.Is(halted, command.ErrUnknown) || st.Read().Index() != 1 {
		t.Errorf("halted with %v at index %d", halted, st.Read().Index())
	}
}

// TestNewerSnapshotHalts: raft would try an older snapshot and start from that.
func TestNewerSnapshotHalts(t *testing.T) {
	st := state.New()
	b, err := command.Encode(&command.ClusterInit{Cluster: &command.Cluster{Id: bytes.Repeat([]byte{1}, 16), Generation: 1, FsmVersion: uint32(command.FSMVersion) + 1}}, time.UnixMilli(1_767_225_600_000), 1)
	if err != nil {
		t.Fatal(err)
	}
	New(st, func(err error) { t.Error(err) }).Apply(&raft.Log{Index: 1, Type: raft.LogCommand, Data: b})
	var snapshot bytes.Buffer
	if _, err := st.Read().WriteTo(&snapshot); err != nil {
		t.Fatal(err)
	}
	var halted error
	err = New(state.New(), func(err error) { halted = err }).Restore(io.NopCloser(&snapshot))
	if !errors.Is(halted, command.ErrUnknown) || err == nil {
		t.Errorf("halted with %v, restored with %v", halted, err)
	}
}
