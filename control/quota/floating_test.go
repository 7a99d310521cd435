package quota

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/ownership"
	"github.com/relais-mta/relais/shared/wire"
)

// floater is a leader's leasing of floating addresses, with relays 0 and 1.
type floater struct {
	*cluster
	part     *Floating
	heard    int // entries that prove the lead
	stuck    bool
	ahead    time.Duration // of the leader's clock: the machine was suspended for that long
	answers  []*wire.AddressAnswer
	to       []ids.Node
	proposed []time.Duration // since the start, of those entries
}

func newFloater(t *testing.T) *floater {
	f := &floater{cluster: newCluster(t, 2)}
	f.part = NewFloating(FloatingOptions{State: f.state, Propose: f.propose, Send: f.take, Succeeds: f.succeeds, Logger: slog.New(slog.DiscardHandler), Clock: func() lease.Instant {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.now().Add(f.ahead)
	}})
	return f
}

func (f *floater) propose(ctx context.Context, c command.Command) (state.Result, error) {
	if _, ok := c.(*command.IPHeard); ok {
		f.heard++
		f.proposed = append(f.proposed, time.Since(f.start))
		if f.stuck {
			<-ctx.Done()
			return state.Result{}, control.ErrOutcomeUnknown
		}
	}
	return f.Propose(ctx, c)
}

func (f *floater) take(node ids.Node, m proto.Message) {
	f.answers, f.to = append(f.answers, m.(*wire.AddressAnswer)), append(f.to, node)
}

// float gives a relay a floating address, and returns its epoch.
func (f *floater) float(n byte, relay int) (ip ids.Source, epoch uint64) {
	f.t.Helper()
	ip[15] = n
	if f.state.Read().Source(ip) == nil {
		f.must(&command.IPPut{Source: &command.Source{Id: ip[:], Bind: []byte{10, 0, 0, n}, Public: []byte{10, 0, 0, n}, Ehlo: "a.example.net", State: "free"}})
		f.verdict(ip, control.ReverseConfirmed)
	}
	node := relayID(relay)
	f.must(&command.IPAssign{Source: ip[:], Node: node[:]})
	return ip, f.state.Read().Source(ip).Epoch
}

func (f *floater) verdict(ip ids.Source, reverse control.ReverseVerdict) {
	f.t.Helper()
	f.must(&command.IPVerify{Source: ip[:], Reverse: string(reverse)})
}

func (f *floater) owner(ip ids.Source) ids.Node { return f.state.Read().Source(ip).Owner }

func (f *floater) report(relay int, incarnation, nonce uint64) {
	f.in <- Message{Node: relayID(relay), Body: &wire.AddressReport{Incarnation: incarnation, Nonce: nonce}, At: f.now()}
}

// lead runs a term beside the steps.
func (f *floater) lead(steps func()) error {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.part.Lead(ctx, f.in) }()
	steps()
	cancel()
	return <-ended
}

func after(d time.Duration) { _ = pause(context.Background(), d); synctest.Wait() }

// TestFloatingIsTakenFromTheSilent: reports are answered with what is committed, an
// address is free a lease and ten seconds after the last report, and not sooner.
func TestFloatingIsTakenFromTheSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		cfg := ownership.DefaultConfig()
		wait := lease.Outlast(cfg.TTL) + cfg.Takeover
		if err := f.lead(func() {
			f.report(0, 1, 1)
			after(5 * time.Second)
			if f.heard > 0 || len(f.answers) > 0 {
				t.Errorf("without floating addresses there were %d entries and %d answers", f.heard, len(f.answers))
			}
			after(10 * time.Minute) // so that silence counted from the barrier would be over
			ip, epoch := f.float(1, 0)
			gone, _ := f.float(2, 1)
			after(time.Second)
			if f.owner(ip) != relayID(0) {
				t.Fatal("what was assigned a moment ago is taken back")
			}
			came := time.Since(f.start)
			f.report(0, 1, 2)
			after(floatingTick + time.Millisecond)
			if len(f.answers) != 1 || f.to[0] != relayID(0) || f.answers[0].GetNonce() != 2 || f.answers[0].GetIncarnation() != 1 {
				t.Fatalf("answers %v", f.answers)
			}
			if got := f.answers[0].GetLeased(); len(got) != 1 || got[0].GetEpoch() != epoch || ids.Source(got[0].GetSourceId()) != ip {
				t.Errorf("the answer names %v", got)
			}
			if at := f.proposed[len(f.proposed)-1]; at < came {
				t.Errorf("answered by an entry of %v, the report came at %v", at, came)
			}
			for n := uint64(3); n < 13; n++ { // relay 0 is heard, relay 1 never was
				after(20 * time.Second)
				f.report(0, 1, n)
			}
			if f.owner(ip) != relayID(0) || !f.owner(gone).IsZero() {
				t.Errorf("the addresses are of %s and %s", f.owner(ip), f.owner(gone))
			}
			status, err := f.part.statusHere(t.Context())
			if err != nil || len(status) != 1 || status[0].Node != relayID(0) || !status[0].Heard || status[0].EndsMS != cfg.TTL.Milliseconds() || status[0].ReclaimMS != wait.Milliseconds() {
				t.Errorf("the leader says %+v, %v", status, err)
			}
			after(wait - time.Millisecond)
			if f.owner(ip) != relayID(0) {
				t.Error("taken back before its lease is over by every clock")
			}
			after(floatingTick + time.Millisecond)
			if row := f.state.Read().Source(ip); !row.Owner.IsZero() || row.State != control.SourceFree {
				t.Errorf("not taken back: %+v", row)
			}
			if a := f.state.Read().Audit(1)[0]; a.Action != "ip.reclaim" || a.Actor != "system" || a.Reason != "its relay edge-0 was silent until its lease was over" {
				t.Errorf("the audit tail has %+v", a)
			}
			if _, again := f.float(2, 1); again <= epoch {
				t.Errorf("epoch %d after %d", again, epoch)
			}
			after(4 * floatingTick)
			if f.owner(gone) != relayID(1) {
				t.Error("what was assigned to a relay that never spoke is taken back before it can")
			}
		}); err != nil {
			t.Error(err)
		}
	})
}

// TestFloatingIsNotLeasedWithoutACommit (R1): a leader that cannot commit answers
// nobody, and begins anew.
func TestFloatingIsNotLeasedWithoutACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		f.float(1, 0)
		f.stuck = true
		err := f.lead(func() {
			f.report(0, 1, 1)
			after(proposeTimeout + time.Second)
		})
		if !errors.Is(err, control.ErrOutcomeUnknown) || len(f.answers) > 0 {
			t.Errorf("ended with %v after the answers %v", err, f.answers)
		}
	})
}

// TestANewLeaderWaitsForWhatOthersLeased (R4): silence counts from its barrier.
func TestANewLeaderWaitsForWhatOthersLeased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		ip, _ := f.float(1, 0)
		after(time.Hour)
		cfg := ownership.DefaultConfig()
		if err := f.lead(func() {
			after(floatingTick)
			after(lease.Outlast(cfg.TTL) + cfg.Takeover)
			if f.owner(ip).IsZero() {
				t.Error("taken back from a relay that a former leader may have answered")
			}
			after(floatingTick)
			if !f.owner(ip).IsZero() {
				t.Error("never taken back")
			}
		}); err != nil {
			t.Error(err)
		}
	})
}

// TestACopyGetsNoAddress (A4): a machine that has not its relay's session gets no
// answer, until it has.
func TestACopyGetsNoAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		f.float(1, 0)
		f.barred = 2
		if err := f.lead(func() {
			f.report(0, 1, 1)
			after(time.Second)
			f.report(0, 2, 1)
			after(time.Second)
			if len(f.answers) != 1 || f.answers[0].GetIncarnation() != 1 {
				t.Errorf("answers %v", f.answers)
			}
			f.mu.Lock()
			f.barred = 1 // nobody is known to have a session, as after a change of leader
			f.mu.Unlock()
			f.report(0, 1, 2)
			after(time.Second)
			if len(f.answers) != 2 || f.answers[1].GetIncarnation() != 1 {
				t.Errorf("the process that was answered before got %v", f.answers)
			}
			f.answers = f.answers[1:]
			f.mu.Lock()
			f.barred = 0
			f.mu.Unlock()
			f.report(0, 2, 2)
			after(time.Second)
			if len(f.answers) != 2 || f.answers[1].GetIncarnation() != 2 {
				t.Errorf("answers %v", f.answers)
			}
		}); err != nil {
			t.Error(err)
		}
	})
}

// TestNothingIsLeasedInRecoveryMode: the state may be older than what relays hold.
func TestNothingIsLeasedInRecoveryMode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		f.float(1, 0)
		err := f.lead(func() {
			after(time.Second)
			f.must(&command.ClusterRecover{Generation: 2, Cause: "restore", Server: &command.Server{Id: bytesOf(9), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: uint32(command.FSMVersion)}})
			f.report(0, 1, 1)
			after(time.Second)
		})
		if !fault.Is(err, fault.Unavailable) || len(f.answers) > 0 {
			t.Errorf("ended with %v after the answers %v", err, f.answers)
		}
	})
}

// TestASuspendedLeaderTakesNothing: what it did not hear while it was stopped is not
// held against the relays.
func TestASuspendedLeaderTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		ip, _ := f.float(1, 0)
		cfg := ownership.DefaultConfig()
		if err := f.lead(func() {
			f.report(0, 1, 1)
			after(time.Second)
			f.mu.Lock()
			f.ahead = time.Hour
			f.mu.Unlock()
			after(lease.Outlast(cfg.TTL) + cfg.Takeover)
			if f.owner(ip).IsZero() {
				t.Error("taken back although nobody could be heard")
			}
			after(time.Second)
			if !f.owner(ip).IsZero() {
				t.Error("never taken back")
			}
		}); err != nil {
			t.Error(err)
		}
	})
}

// TestAnAddressThatNobodyMayUseIsNotTaken: a relay is not told of an address whose
// reverse DNS is not confirmed, so that it does not report of it is no silence. Once it
// is told, it has its time.
func TestAnAddressThatNobodyMayUseIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFloater(t)
		ip, _ := f.float(1, 0)
		f.verdict(ip, control.ReverseFailed)
		other, _ := f.float(2, 1)
		cfg := ownership.DefaultConfig()
		wait := lease.Outlast(cfg.TTL) + cfg.Takeover
		if err := f.lead(func() {
			after(time.Hour)
			if f.owner(ip) != relayID(0) || !f.owner(other).IsZero() {
				t.Fatalf("the addresses are of %s and %s", f.owner(ip), f.owner(other))
			}
			f.verdict(ip, control.ReverseConfirmed)
			after(wait - time.Millisecond)
			if f.owner(ip).IsZero() {
				t.Error("taken back before its relay had its time to report")
			}
			after(2 * floatingTick)
			if !f.owner(ip).IsZero() {
				t.Error("never taken back")
			}
		}); err != nil {
			t.Error(err)
		}
	})
}
