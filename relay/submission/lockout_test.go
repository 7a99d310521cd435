package submission

import (
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

var testLocks = lockLimits{failures: [lockScopes]int{lockAddress: 10, lockNetwork: 20, lockAccount: 3}, window: time.Minute, longest: 10 * time.Minute}

func TestLockout(t *testing.T) {
	var o lockout
	now := time.Unix(1_800_000_000, 0)
	ann, bob := id[ids.Credential](1), id[ids.Credential](2)
	here, near, far := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("198.51.100.1")
	fail := func(ip netip.Addr, account ids.Credential, times int) {
		for range times {
			o.failed(lockKeys(ip, account), &testLocks, now)
		}
	}
	waits := func(ip netip.Addr, account ids.Credential, want time.Duration) {
		t.Helper()
		if got, scope := o.locked(lockKeys(ip, account), now); got != want {
			t.Errorf("%v waits %v for the lock of its %s, want %v", ip, got, lockNames[scope], want)
		}
	}
	fail(here, ann, 2)
	waits(here, ann, 0)
	fail(here, ann, 1)
	waits(here, ann, time.Minute)
	waits(here, bob, 0)
	waits(near, ann, time.Minute) // a neighbour is as likely the same
	waits(far, ann, 0)            // one network never locks an account for all
	for _, want := range []time.Duration{2, 4, 8, 10, 10} {
		now = now.Add(10 * time.Minute) // the lock is over and remembered
		waits(here, ann, 0)
		fail(here, ann, 3)
		waits(here, ann, want*time.Minute)
	}
	now = now.Add(10*time.Minute + testLocks.longest)
	fail(here, ann, 3)
	waits(here, ann, time.Minute) // and then forgotten
	now = now.Add(time.Hour)
	fail(here, ann, 2)
	now = now.Add(time.Minute) // the window has passed
	fail(here, ann, 2)
	waits(here, ann, 0)
	o.succeeded(lockKeys(here, ann))
	fail(here, ann, 2)
	waits(here, ann, 0)

	o = lockout{}
	fail(here, ids.Credential{}, 10) // user names that are none
	waits(here, bob, time.Minute)
	waits(near, bob, 0)
	fail(near, ids.Credential{}, 10)
	waits(netip.MustParseAddr("192.0.2.77"), bob, time.Minute) // the whole network now
	waits(far, bob, 0)

	o = lockout{}
	fail(netip.MustParseAddr("2001:db8:1:2::1"), ann, 3)
	waits(netip.MustParseAddr("2001:db8:1:2:ffff::1"), ann, time.Minute) // the same host
	waits(netip.MustParseAddr("2001:db8:1:3::1"), ann, 0)
}

// Memory is bounded, and who is locked and goes on trying stays locked whatever
// comes from elsewhere.
func TestLockoutIsBounded(t *testing.T) {
	o := lockout{most: 300}
	now := time.Unix(1_800_000_000, 0)
	random := rand.New(rand.NewPCG(1, 2))
	ann, here := id[ids.Credential](1), netip.MustParseAddr("192.0.2.1")
	for i := range 5000 {
		o.failed(lockKeys(netip.AddrFrom4([4]byte{10, byte(random.Uint32()), byte(i >> 8), byte(i)}), ann), &testLocks, now)
		if i%20 == 0 {
			o.failed(lockKeys(here, ann), &testLocks, now)
		}
	}
	if len(o.entries) > 300 || len(o.entries) != o.recent.Len() {
		t.Errorf("%d keys are tracked, %d in order", len(o.entries), o.recent.Len())
	}
	if wait, _ := o.locked(lockKeys(here, ann), now); wait == 0 {
		t.Error("who fails all the time was forgotten")
	}
	for i := range 10 {
		o.failed(lockKeys(netip.AddrFrom4([4]byte{11, byte(i), 0, 1}), ann), &testLocks, now.Add(24*time.Hour))
	}
	if len(o.entries) > 30 {
		t.Errorf("a day later %d keys are tracked", len(o.entries))
	}
}

// A lock of one account is said to it alone, with the time.
func TestAccountIsLocked(t *testing.T) {
	w := newWorld(t, func(v *policy.View) {
		v.Document.Submission.AuthFailuresPerAccount, v.Document.Submission.AuthFailuresPerIP = 2, 100
	})
	p := w.dial(t)
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535 5.7.8")
	p.do("AUTH PLAIN "+plain(w.user, "wrong"), "535 5.7.8")
	p.do("AUTH PLAIN "+plain(w.user, testSecret), "454 4.7.0 Too many failed logins with this user name from your network, wait ")
	p.do("AUTH PLAIN "+plain(w.onlyRemote, testSecret), "235")
}

// What an authenticated session that waits costs, the client's side and both
// sides of TLS included: max_connections times this is what load can take.
func TestMemoryOfASession(t *testing.T) {
	const sessions, maxSessionBytes = 100, 192 << 10
	w := newWorld(t, nil)
	w.login(t).mail(goodMessage, "250")
	used := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := used()
	for range sessions - 1 {
		p := w.login(t)
		p.mail(goodMessage, "250")
		p.do("MAIL FROM:<a@acme.example>", "250")
	}
	each := (used() - before) / sessions
	t.Logf("%d octets a session", each)
	if each > maxSessionBytes {
		t.Errorf("a session holds %d octets, want at most %d", each, maxSessionBytes)
	}
}
