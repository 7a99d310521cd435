// Package fsm is the thin shim between hashicorp/raft and the state: it decodes
// log entries, hands them to state.Apply and returns what that says. Whatever
// is worth testing without raft lives in control/command and control/state.
package fsm

import (
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/raft"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
)

// FSM implements raft.BatchingFSM over a state.
type FSM struct {
	state *state.Store
	halt  func(error)
}

var _ raft.BatchingFSM = (*FSM)(nil)

// New returns an FSM over the state. halt is called, and must not return to
// normal work, when the log holds an entry this program cannot apply: skipping
// it would make this server differ from the others.
func New(s *state.Store, halt func(error)) *FSM { return &FSM{state: s, halt: halt} }

// Apply implements raft.FSM. The response is a state.Result.
func (f *FSM) Apply(l *raft.Log) any {
	e, err := command.Decode(l.Data)
	if err != nil {
		err = fmt.Errorf("log entry %d: %w", l.Index, err)
		f.halt(err)
		// Should halt return, raft must still not count the entry as applied.
		panic(err)
	}
	return f.state.Apply(l.Index, e)
}

// ApplyBatch implements raft.BatchingFSM. Entries of other kinds are
// configurations, which the state does not follow.
func (f *FSM) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	for i, l := range logs {
		if l.Type == raft.LogCommand {
			out[i] = f.Apply(l)
		}
	}
	return out
}

// Snapshot implements raft.FSM. It takes pointers only; Persist does the work.
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) { return snapshot{f.state.Read()}, nil }

// Restore implements raft.FSM. A snapshot of a newer release halts the server:
// raft would otherwise try an older snapshot, and say nothing useful at the end.
func (f *FSM) Restore(r io.ReadCloser) error {
	err := f.state.Restore(r)
	if errors.Is(err, command.ErrUnknown) {
		f.halt(err)
	}
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	return err
}

type snapshot struct{ reader *state.Reader }

// Persist implements raft.FSMSnapshot.
func (s snapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := s.reader.WriteTo(sink); err != nil {
		_ = sink.Cancel() // the first error says why
		return err
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (snapshot) Release() {}
