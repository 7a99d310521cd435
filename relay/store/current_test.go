package store

import (
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// stalling is a sequencer that holds every transaction with events until it is
// let go.
type stalling struct{ begun, goOn chan struct{} }

func (q *stalling) Assign([][]byte, int, func(_, _ []byte), func([]byte)) {
	q.begun <- struct{}{}
	<-q.goOn
}

func TestReadersDoNotWaitForTheCommitUnderWay(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	q := &stalling{begun: make(chan struct{}), goOn: make(chan struct{})}
	s.SetSequencer(q)
	before := s.Snapshot()
	defer before.Close()

	b := s.NewBatch()
	b.Set([]byte("zkey"), []byte("value"))
	b.AddEvent([]byte("event"))
	told := make(chan error, 1)
	s.CommitAsync(b, func(err error) {
		if err == nil {
			_, err = s.Get([]byte("zkey"), nil) // a callback sees what it is told of
		}
		told <- err
	})
	<-q.begun
	ran := false
	if err := s.Settled(func() {
		ran = true
		snap := s.Snapshot()
		defer snap.Close()
		if _, err := snap.Get([]byte("zkey"), nil); !fault.Is(err, fault.NotFound) {
			t.Errorf("a transaction that is under way is seen: %v", err)
		}
	}); err != nil || !ran {
		t.Fatalf("Settled beside a commit: ran %v, %v", ran, err)
	}
	q.goOn <- struct{}{}
	if err := <-told; err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get([]byte("zkey"), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := before.Get([]byte("zkey"), nil); !fault.Is(err, fault.NotFound) {
		t.Fatalf("a snapshot has what was written after it: %v", err)
	}
}

// What Settled sees is what callbacks were told, at every moment.
func TestSettledSeesWhatCallbacksWereTold(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	key := []byte("zcount")
	var told atomic.Uint64
	const commits = 300
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			var value []byte
			for {
				select {
				case <-stop:
					return
				default:
				}
				err := s.Settled(func() {
					var seen uint64
					var err error
					if value, err = s.Get(key, value[:0]); err == nil {
						seen = binary.BigEndian.Uint64(value)
					} else if !fault.Is(err, fault.NotFound) {
						t.Error(err)
					}
					if n := told.Load(); seen != n {
						t.Errorf("seen %d, told %d", seen, n)
					}
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var callbacks sync.WaitGroup
	for i := range uint64(commits) {
		b := s.NewBatch()
		b.Set(key, binary.BigEndian.AppendUint64(nil, i+1))
		callbacks.Add(1)
		done := make(chan struct{})
		s.CommitAsync(b, func(err error) {
			if err != nil {
				t.Error(err)
			}
			told.Store(i + 1)
			callbacks.Done()
			close(done)
		})
		if i%3 == 0 { // others share a transaction
			<-done
		}
	}
	callbacks.Wait()
	close(stop)
	readers.Wait()
}

func TestSnapshotsGoWhenTheLastReaderHasClosed(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	first, second := s.Snapshot(), s.Snapshot()
	if first.view != second.view {
		t.Fatal("two readers between the same commits have two views")
	}
	view := first.view
	b := s.NewBatch()
	b.Set([]byte("zkey"), nil)
	if err := s.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	if third := s.Snapshot(); third.view == view {
		t.Error("a reader after a commit has the view before it")
	} else {
		third.Close()
	}
	first.Close()
	first.Close()
	if n := view.refs.Load(); n != 1 {
		t.Errorf("%d use the view, want the second reader", n)
	}
	second.Close()
	if n := view.refs.Load(); n != 0 {
		t.Errorf("%d use the view, want none", n)
	}
}

func TestSettledEndsWithTheStore(t *testing.T) {
	s := openTest(t, testConfig(t.TempDir()))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Settled(func() { t.Error("it ran in a closed store") }); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("got %v, want unavailable", err)
	}
}

// A body whose commit is under way is in no snapshot yet: a segment with one must
// not lose its dead parts before.
func TestSegmentsOfACommitUnderWayAreNotPunched(t *testing.T) {
	l := newLedger()
	l.scanned = true
	const number, size = 7, 256 << 20
	l.open(number, size)
	body := &Body{ref: relay.BodyRef{Kind: relay.BodySegment, Segment: number, Length: 1 << 10}}
	g := &group{segment: number, batches: []*Batch{{bodies: []placedBody{{body: body}}}}}
	l.addSegment(number, g)
	l.seal(number, size)
	if got := l.sparse(punchDivisor, minPunchBytes); len(got) != 0 {
		t.Fatalf("segments %v would be punched while a body in one is not in the index", got)
	}
	l.landed(number)
	if got := l.sparse(punchDivisor, minPunchBytes); len(got) != 1 {
		t.Fatalf("segments %v are found, want one", got)
	}
}
