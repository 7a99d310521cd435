package submission

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// diary keeps events.
type diary struct {
	mu     sync.Mutex
	events []outbox.Event
	err    error
}

func (d *diary) write(_ context.Context, events []outbox.Event) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, events...)
	return d.err
}

func (d *diary) take() []outbox.Event {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := d.events
	d.events = nil
	return out
}

func testLock(n byte, until time.Time) lock {
	return lock{lockKey: lockKey{scope: lockAddress, network: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, n}), 32)}, failures: 10, until: until}
}

// One event at the begin, one at the end, at their times.
func TestLocksAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refused atomic.Uint32
		d := &diary{}
		teller := newLockTeller(func(lockKey) uint32 { return refused.Load() }, func() { t.Error("a lock has no events") })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); teller.run(ctx, d.write, slog.New(slog.DiscardHandler)) }()
		start := time.Now()
		client, tenant := netip.MustParseAddr("192.0.2.1"), id[ids.Tenant](7)
		long, short := testLock(1, start.Add(time.Hour)), testLock(2, start.Add(time.Minute))
		short.scope, short.account = lockAccount, id[ids.Credential](3)
		teller.begin(long, client, ids.Tenant{}, start)
		teller.begin(short, client, tenant, start)
		synctest.Wait()
		begun := d.take()
		if len(begun) != 2 || begun[0].Type != outbox.Locked || begun[0].Class != "address" || begun[0].Address != "192.0.2.1/32" || begun[0].Attempts != 10 ||
			!begun[0].Next.Equal(start.Add(time.Hour)) || !begun[0].Credential.IsZero() || begun[0].Reply.Text != "10 failed logins, no more until "+start.Add(time.Hour).UTC().Format(time.RFC3339) {
			t.Errorf("the locks begin as %+v", begun)
		}
		if begun[1].Class != "account" || begun[1].Credential != short.account || begun[1].Tenant != tenant || begun[1].RemoteIP != client {
			t.Errorf("the account's lock begins as %+v", begun[1])
		}
		refused.Store(25)
		time.Sleep(time.Minute - time.Millisecond)
		synctest.Wait()
		if early := d.take(); len(early) > 0 {
			t.Errorf("too early: %+v", early)
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if over := d.take(); len(over) != 1 || over[0].Type != outbox.Unlocked || over[0].Credential != short.account || over[0].Attempts != 25 ||
			!over[0].StartedAt.Equal(start) || !over[0].EndedAt.Equal(short.until) || over[0].Reply.Text != "logins are looked at again, 25 were refused" {
			t.Errorf("after a minute: %+v", over)
		}
		// A relay that stops forgets its locks.
		cancel()
		<-done
		if over := d.take(); len(over) != 1 || over[0].Type != outbox.Unlocked || over[0].Address != "192.0.2.1/32" || !over[0].EndedAt.Equal(time.Now()) {
			t.Errorf("when the relay stops: %+v", over)
		}
	})
}

// Whoever earns many locks does not fill the outbox; a store that fails ends
// nothing.
func TestLockEventsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dropped := 0
		d := &diary{err: errors.New("no space")}
		teller := newLockTeller(func(lockKey) uint32 { return 0 }, func() { dropped++ })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); teller.run(ctx, d.write, slog.New(slog.DiscardHandler)) }()
		const minutes = 30
		for range minutes {
			for i := range 1000 {
				teller.begin(testLock(byte(i), time.Now().Add(24*time.Hour)), netip.Addr{}, ids.Tenant{}, time.Now())
			}
			time.Sleep(time.Minute)
		}
		if n := len(d.take()); n != maxToldLocks || dropped != 1000*minutes-n {
			t.Errorf("%d events and %d dropped, want %d", n, dropped, maxToldLocks)
		}
		cancel()
		<-done
		if n := len(d.take()); n != maxToldLocks {
			t.Errorf("%d locks ended", n)
		}
	})
}

// A guesser over a session: the lock is told once with its counts, and nothing of
// what the client sent.
func TestGuessesMakeOneEvent(t *testing.T) {
	d := &diary{}
	w := newWorldWith(t, func(v *policy.View) {
		s := &v.Document.Submission
		s.AuthFailuresPerIP, s.AuthFailuresPerNetwork, s.AuthFailuresPerAccount = 3, 100, 100
	}, func(o *Options) { o.Events = d.write })
	p := w.dial(t)
	guess := base64.StdEncoding.EncodeToString([]byte("\x00" + w.user + "\x00hunter2"))
	for range 3 {
		p.do("AUTH PLAIN "+guess, "535")
	}
	for range 4 {
		p.do("AUTH PLAIN "+guess, "454 4.7.0")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // what is due is written once
	if err := w.server.Run(ctx); err != nil {
		t.Fatal(err)
	}
	got := d.take()
	if len(got) != 2 || got[0].Type != outbox.Locked || got[0].Attempts != 3 || got[0].Address != "127.0.0.1/32" || got[1].Type != outbox.Unlocked || got[1].Attempts != 4 {
		t.Fatalf("events %+v", got)
	}
	for i := range got {
		for _, secret := range []string{"hunter2", guess} {
			if bytes.Contains(got[i].Append(nil), []byte(secret)) || strings.Contains(got[i].Reply.Text, secret) {
				t.Errorf("event %+v holds what the client sent", got[i])
			}
		}
	}
}
