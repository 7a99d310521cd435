package queue

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

// hurt damages the open queue.
func (w *ward) hurt(f func(w *ward)) {
	w.t.Helper()
	w.snap, w.b = w.st.Snapshot(), w.st.NewBatch()
	f(w)
	w.snap.Close()
	if err := w.st.Commit(context.Background(), w.b); err != nil {
		w.t.Fatal(err)
	}
}

func (w *ward) online() (FsckCount, []Finding) {
	w.t.Helper()
	var found []Finding
	count, err := w.q.FsckOnline(context.Background(), Online{Bodies: true, Report: func(f Finding) { found = append(found, f) }})
	if err != nil {
		w.t.Fatal(err)
	}
	return count, found
}

// TestOnlineFsckFindsEachDamage: a check beside an open queue finds what the
// check of a stopped one does, and changes nothing.
func TestOnlineFsckFindsEachDamage(t *testing.T) {
	for i, d := range damages {
		switch d.name {
		case "segment of nothing", "unreadable journal", "journal of a recipient that is not there":
			continue // the store looks after the files, and a start has ended the attempts
		}
		t.Run(strings.ReplaceAll(d.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			w := newWard(t, uint64(300+i))
			w.open()
			w.loaded()
			if count, found := w.online(); !count.Clean || len(found) > 0 {
				t.Fatalf("before the damage: %+v", found)
			}
			w.hurt(d.do)
			for range 2 { // nothing is repaired
				count, found := w.online()
				if count.Found[d.kind]+count.Notes[d.kind] == 0 || count.Repaired > 0 {
					t.Errorf("not found: %+v %+v", count, found)
				}
				for _, f := range found {
					if f.Repaired {
						t.Errorf("said to be repaired: %+v", f)
					}
				}
			}
			w.close()
			if count, found := w.fsck(false); count.Found[d.kind]+count.Notes[d.kind] == 0 {
				t.Errorf("the check of the stopped queue does not find it: %+v", found)
			}
		})
	}
}

// TestOnlineFsckBesideMail: mail that comes and goes meanwhile is no damage.
func TestOnlineFsckBesideMail(t *testing.T) {
	f := newFixture(t).open()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			f.accept(fmt.Sprintf("a@d%d.example", i%5), fmt.Sprintf("b@d%d.example", i%3))
			w := f.take(1)
			f.delivered(w, f.begin(w))
		}
	}()
	for range 20 {
		count, err := f.q.FsckOnline(context.Background(), Online{Bodies: true, Report: func(d Finding) {
			if !d.Note {
				t.Errorf("%+v", d)
			}
		}})
		if err != nil || !count.Clean {
			t.Errorf("%+v, %v", count, err)
		}
	}
	close(stop)
	<-done
}

// TestOnlineFsckEnds: one runs at a time, and it ends when nobody waits for it
// any more or the queue closes.
func TestOnlineFsckEnds(t *testing.T) {
	for _, closing := range []bool{false, true} {
		w := newWard(t, 7)
		w.open()
		w.hurt(func(w *ward) { w.b.Set([]byte("zebra"), []byte("stripes")) })
		ctx, cancel := context.WithCancel(context.Background())
		found, goOn := make(chan struct{}), make(chan struct{})
		var once sync.Once
		ended := make(chan error, 1)
		go func() {
			_, err := w.q.FsckOnline(ctx, Online{Bodies: true, Report: func(Finding) { once.Do(func() { close(found); <-goOn }) }})
			ended <- err
		}()
		<-found
		if _, err := w.q.FsckOnline(context.Background(), Online{}); !fault.Is(err, fault.Conflict) {
			t.Errorf("a second check: %v", err)
		}
		closed := make(chan error, 1)
		if closing {
			go func() { closed <- w.q.Close() }()
			<-w.q.stop
		} else {
			cancel()
			<-ctx.Done()
		}
		close(goOn)
		if err := <-ended; !errors.Is(err, context.Canceled) && !closing || !errors.Is(err, errClosing) && closing {
			t.Errorf("closing %v: %v", closing, err)
		}
		if closing {
			if err := <-closed; err != nil {
				t.Error(err)
			}
			if _, err := w.q.FsckOnline(context.Background(), Online{}); !fault.Is(err, fault.Unavailable) {
				t.Errorf("a check of a closed queue: %v", err)
			}
		} else if count, _ := w.online(); count.Found[UnknownKey] != 1 {
			t.Errorf("a check after one that was interrupted: %+v", count)
		}
		cancel()
		w.close()
	}
}
