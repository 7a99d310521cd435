package outbox

import (
	"context"
	"encoding/hex"
	"log/slog"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func fullEvent() Event {
	at := time.UnixMilli(1_800_000_000_123).UTC()
	e := Event{
		Type: Deferred, At: at, Index: 3, Stream: "news", Address: "joe@example.net", Size: 10240,
		SourceIP: netip.MustParseAddr("192.0.2.1"), Epoch: 77, Provider: "google", MX: "mx.example.net",
		RemoteIP: netip.MustParseAddr("2001:db8::1"), TLS: "TLS1.3", Phase: relay.PhaseFinalDot, Class: "throttled",
		Reply:      relay.Reply{Code: 421, Enhanced: "4.7.28", Text: "slow down"},
		AcceptedAt: at.Add(-time.Hour), StartedAt: at.Add(-time.Second), EndedAt: at, Next: at.Add(5 * time.Minute), Attempts: 2, Revision: 9,
	}
	for i := range 16 {
		e.Message[i], e.Tenant[i], e.Project[i], e.Pool[i], e.Source[i] = byte(i), byte(16+i), byte(32+i), byte(48+i), byte(64+i)
	}
	return e
}

func TestEventRoundTripsAndKeepsItsBytes(t *testing.T) {
	e := fullEvent()
	b := e.Append(nil)
	const golden = "010208fba0f1c2b1341210000102030405060708090a0b0c0d0e0f18032210101112131415161718191a1b1c1d1e1f2a10202122232425262728292a" +
		"2b2c2d2e2f32046e6577733a10303132333435363738393a3b3c3d3e3f420f6a6f65406578616d706c652e6e65744880505210404142434445464748" +
		"494a4b4c4d4e4f5a04c0000201604d6a06676f6f676c65720e6d782e6578616d706c652e6e65747a1020010db8000000000000000000000001820106" +
		"544c53312e338801089201097468726f74746c65649801a503a20106342e372e3238aa0109736c6f7720646f776eb001fbc395c1b134b8019399f1c2" +
		"b134c001fba0f1c2b134c801dbc883c3b134d00102d80109"
	if got := hex.EncodeToString(b); got != golden {
		t.Errorf("the encoding changed, stored events would be misread:\n%s", got)
	}
	var back Event
	if err := back.Parse(b); err != nil || !reflect.DeepEqual(back, e) {
		t.Errorf("read back as %+v, %v", back, err)
	}
	for n := range b {
		var cut Event
		if err := cut.Parse(b[:n]); err == nil && reflect.DeepEqual(cut, e) {
			t.Errorf("%d of %d bytes read as the whole event", n, len(b))
		}
	}
	b[0] = Schema + 1
	if err := back.Parse(b); !fault.Is(err, fault.Invalid) {
		t.Errorf("a newer schema: %v", err)
	}
}

// TestEventsOfBrakesRoundTrip: they have fields of their own.
func TestEventsOfBrakesRoundTrip(t *testing.T) {
	e := Event{Type: Slowed, At: time.UnixMilli(1_800_000_000_123).UTC(), Provider: "google", PerHour: 720, Conns: 2, Brake: ids.Brake{7}}
	b := e.Append(nil)
	if got, want := hex.EncodeToString(b), "011608fba0f1c2b1346a06676f6f676c658202100700000000000000000000000000000088"+"02d005900202"; got != want {
		t.Errorf("the encoding changed, stored events would be misread:\n%s", got)
	}
	var back Event
	if err := back.Parse(b); err != nil || !reflect.DeepEqual(back, e) {
		t.Errorf("read back as %+v, %v", back, err)
	}
}

func FuzzParse(f *testing.F) {
	e := fullEvent()
	f.Add(e.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e, again Event
		if e.Parse(b) != nil {
			return
		}
		if err := again.Parse(e.Append(nil)); err != nil || !reflect.DeepEqual(e, again) {
			t.Errorf("%+v became %+v, %v", e, again, err)
		}
	})
}

type box struct {
	t   *testing.T
	dir string
	max int64
	st  *store.Store
	ob  *Outbox
}

func (b *box) open() {
	b.t.Helper()
	var err error
	limits := policy.Storage{MinFreeBytes: 1 << 20, ReserveBytes: 1 << 20, SegmentBytes: 1 << 20}
	b.st, err = store.Open(context.Background(), store.Config{Dir: b.dir, Storage: limits, Logger: slog.New(slog.DiscardHandler), MemTableBytes: 8 << 20})
	if err != nil {
		b.t.Fatal(err)
	}
	if b.ob, err = Open(b.st, Config{MaxBytes: b.max, Logger: slog.New(slog.DiscardHandler)}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) close() {
	b.ob.Close()
	if err := b.st.Close(); err != nil {
		b.t.Error(err)
	}
}

func (b *box) write(n int) {
	b.t.Helper()
	batch := b.st.NewBatch()
	for range n {
		e := fullEvent()
		b.ob.Add(batch, &e, nil)
	}
	if err := b.st.Commit(context.Background(), batch); err != nil {
		b.t.Fatal(err)
	}
}

// readAll reads everything after seq in small steps and checks that the
// numbers have no hole beyond the announced gap.
func (b *box) readAll(after uint64) (events int, gap uint64) {
	b.t.Helper()
	for {
		got, err := b.ob.Read(after, 1000)
		if err != nil {
			b.t.Fatal(err)
		}
		if len(got) == 0 {
			return events, gap
		}
		for _, e := range got {
			if e.Type == Gap {
				if e.Count != e.Seq-after {
					b.t.Errorf("a gap of %d from %d to %d", e.Count, after, e.Seq)
				}
				gap += e.Count
			} else {
				if e.Seq != after+1 || e.Address != "joe@example.net" {
					b.t.Fatalf("event %d to %q follows %d", e.Seq, e.Address, after)
				}
				events++
			}
			after = e.Seq
		}
	}
}

func TestNumbersAreConsecutiveAcrossRestartsAndTrims(t *testing.T) {
	b := &box{t: t, dir: t.TempDir(), max: 1 << 30}
	b.open()
	generation := b.ob.Generation()
	b.write(3)
	b.write(2000) // several runs
	b.close()
	b.open()
	b.write(7)
	if events, gap := b.readAll(0); events != 2010 || gap != 0 || b.ob.Last() != 2010 {
		t.Fatalf("%d events, gap %d, last %d", events, gap, b.ob.Last())
	}
	if err := b.ob.Trim(1500); err != nil {
		t.Fatal(err)
	}
	if events, gap := b.readAll(1500); events != 510 || gap != 0 {
		t.Errorf("after a trim: %d events, gap %d", events, gap)
	}
	if err := b.ob.Trim(1 << 60); err != nil {
		t.Fatal(err)
	}
	if s := b.ob.Stats(); s.Bytes != 0 || s.First != 2011 {
		t.Errorf("after trimming all: %+v", s)
	}
	b.close()
	b.open()
	defer b.close()
	b.write(1)
	if b.ob.Last() != 2011 {
		t.Errorf("a number was used again: %d", b.ob.Last())
	}
	if events, gap := b.readAll(2010); events != 1 || gap != 0 {
		t.Errorf("%d events, gap %d", events, gap)
	}
	if b.ob.Generation() != generation || generation == [16]byte{} {
		t.Error("the generation changed")
	}
}

func TestAFullOutboxDropsTheOldestAsACountedGap(t *testing.T) {
	b := &box{t: t, dir: t.TempDir(), max: 200 << 10}
	b.open()
	for range 40 {
		b.write(50)
		b.ob.idle.Wait()
	}
	s := b.ob.Stats()
	if s.Bytes > b.max+64<<10 || s.Bytes < b.max/2 {
		t.Errorf("holds %d bytes, bound %d", s.Bytes, b.max)
	}
	for _, restarted := range []bool{false, true} {
		if restarted {
			b.close()
			b.open()
			if again := b.ob.Stats(); again != s {
				t.Errorf("after a restart %+v, before %+v", again, s)
			}
		}
		events, gap := b.readAll(0)
		if events+int(gap) != 2000 || gap == 0 || gap != s.First-1 {
			t.Errorf("%d events and a gap of %d, want 2000 together", events, gap)
		}
	}
	b.close()
}

// TestARaisedBoundDropsNothing: the bound is raised while the removal that the
// lower one began waits for an upload's; so many events have room now.
func TestARaisedBoundDropsNothing(t *testing.T) {
	for name, raised := range map[string]int64{"raised": 1 << 30, "lifted": 0} {
		t.Run(name, func(t *testing.T) {
			b := &box{t: t, dir: t.TempDir(), max: 20 << 10}
			b.open()
			defer b.close()
			b.ob.trimming.Lock()
			b.write(200)
			b.ob.SetMaxBytes(raised)
			b.ob.trimming.Unlock()
			b.ob.idle.Wait()
			if events, gap := b.readAll(0); events != 200 || gap != 0 {
				t.Errorf("%d events and a gap of %d, want 200 and none", events, gap)
			}
		})
	}
}

// TestDroppingStaysBehindWhatWasForgotten: the oldest run, part of which was
// uploaded, is larger than what is to be dropped.
func TestDroppingStaysBehindWhatWasForgotten(t *testing.T) {
	b := &box{t: t, dir: t.TempDir()}
	b.open()
	defer b.close()
	b.write(200)
	b.write(1)
	if err := b.ob.Trim(150); err != nil {
		t.Fatal(err)
	}
	b.ob.SetMaxBytes(b.ob.Stats().Bytes)
	b.write(1)
	b.ob.idle.Wait()
	if s := b.ob.Stats(); s.First != 151 {
		t.Errorf("after a removal that found nothing to drop the oldest event is %d, want 151", s.First)
	}
}
