package lease

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

func TestLimitsThatAreRefused(t *testing.T) {
	good := Limit{ID: 1, Kind: Rate, Max: 10 * Milli, Per: time.Minute, Burst: 5, FloorPercent: 20, ReservePercent: 5}
	for _, tc := range []struct {
		field string
		spoil func(*Limit)
	}{
		{"", func(*Limit) {}},
		{"id", func(l *Limit) { l.ID = 0 }},
		{"kind", func(l *Limit) { l.Kind = 9 }},
		{"max", func(l *Limit) { l.Max = 0 }},
		{"max", func(l *Limit) { l.Max = -Milli }},
		{"max", func(l *Limit) { l.Max = MaxEvents*Milli + 1 }},
		{"max", func(l *Limit) { *l = slotLimit(1, 0) }},
		{"max", func(l *Limit) { *l = slotLimit(1, -2) }},
		{"per", func(l *Limit) { l.Per = 0 }},
		{"per", func(l *Limit) { l.Per = 25 * time.Hour }},
		{"per", func(l *Limit) { *l = slotLimit(1, 2); l.Per = time.Second }},
		{"burst", func(l *Limit) { l.Burst = 0 }},
		{"burst", func(l *Limit) { l.Burst = MaxBurst + 1 }},
		{"floor_percent", func(l *Limit) { l.FloorPercent = -1 }},
		{"floor_percent", func(l *Limit) { l.FloorPercent = 100 }},
		{"floor_percent", func(l *Limit) { l.FloorPercent, l.ReservePercent = 80, 20 }},
		{"reserve_percent", func(l *Limit) { l.ReservePercent = 51 }},
	} {
		l := good
		tc.spoil(&l)
		err := l.Validate()
		if tc.field == "" {
			if err != nil {
				t.Error(err)
			}
			continue
		}
		f, ok := err.(*fault.Error)
		if !ok || f.Kind != fault.Invalid || f.Field != tc.field {
			t.Errorf("%+v: %v, want a refusal of %s", l, err, tc.field)
		}
	}
}

func TestConfigsThatAreRefused(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Error(err)
	}
	for _, tc := range []struct {
		field string
		spoil func(*Config)
	}{
		{"ttl", func(c *Config) { c.TTL = time.Second }},
		{"floor_ttl", func(c *Config) { c.FloorTTL = time.Second }},
		{"guard", func(c *Config) { c.Guard = 20 * time.Second }},
		{"linger", func(c *Config) { c.Linger = -1 }},
		{"hold", func(c *Config) { c.Hold = 0 }},
		{"floor_gap", func(c *Config) { c.FloorGap = 0 }},
	} {
		c := DefaultConfig()
		tc.spoil(&c)
		if f, ok := c.Validate().(*fault.Error); !ok || f.Field != tc.field {
			t.Errorf("%+v: %v, want a refusal of %s", c, c.Validate(), tc.field)
		}
	}
}

// TestTableKeepsTheLimit: whatever a leader proposes, the sum never rises above
// the limit, and only a raise raises.
func TestTableKeepsTheLimit(t *testing.T) {
	table := NewTable()
	if err := table.PutLimit(rateLimit(1, 100, 10)); err != nil {
		t.Fatal(err)
	}
	table.Apply(&Tick{Sessions: []Session{{1, 5}, {2, 1}, {3, 1}}})
	set := func(n Node, inc uint64, amount, burst int64, why Reason) string {
		refused := table.Apply(&Tick{Changes: []Change{{1, n, inc, Share{amount, burst}, Share{}, why}}})
		if len(refused) == 0 {
			return ""
		}
		return refused[0].Why
	}
	for i, tc := range []struct {
		n             Node
		inc           uint64
		amount, burst int64
		why           Reason
		want          string
	}{
		{1, 5, 60_000, 5, Raised, ""},
		{2, 1, 40_001, 1, Raised, "would be passed"},
		{2, 1, 1000, 6, Raised, "would be passed"},
		{2, 1, 40_000, 5, Raised, ""},
		{3, 1, 1, 1, Raised, "would be passed"},
		{1, 5, 61_000, 5, Acked, "only a raise"},
		{1, 4, 0, 0, Acked, "another incarnation"},
		{1, 5, -1, 0, Acked, "negative"},
		{9, 1, 0, 0, Reclaimed, "another incarnation"},
		{1, 5, 20_000, 5, Acked, ""},
		{3, 1, 40_000, 0, Raised, ""},
	} {
		if got := set(tc.n, tc.inc, tc.amount, tc.burst, tc.why); got == "" != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("change %d: refused with %q, want %q", i, got, tc.want)
		}
	}
	if got := table.Sum(1); got != (Share{100_000, 10}) {
		t.Errorf("the sum is %v", got)
	}
	// A limit that is lowered takes nothing, and gives nothing until it fits.
	lower := rateLimit(1, 10, 1)
	if err := table.PutLimit(lower); err != nil {
		t.Fatal(err)
	}
	if got := set(3, 1, 40_001, 0, Raised); got == "" {
		t.Error("raised above a lowered limit")
	}
	if got := set(2, 1, 30_000, 5, Acked); got != "" {
		t.Errorf("a step down was refused: %s", got)
	}
	lower.Per = time.Minute
	if err := table.PutLimit(lower); !fault.Is(err, fault.Conflict) {
		t.Errorf("another span under the same number: %v", err)
	}
	table.Evict(2)
	if got := set(2, 1, 30_001, 5, Raised); got == "" {
		t.Error("an evicted relay was given more")
	}
	table.DropLimit(1)
	if len(table.Limits()) != 0 || table.rows != 0 || len(table.nodes[1].limits) != 0 {
		t.Error("a dropped limit left something behind")
	}
}

// TestIncarnationFreesCeilingsAndKeepsFloors: a new process has nothing of the
// former one's but what is on disk.
func TestIncarnationFreesCeilingsAndKeepsFloors(t *testing.T) {
	table := NewTable()
	if err := table.PutLimit(rateLimit(1, 100, 10)); err != nil {
		t.Fatal(err)
	}
	table.Apply(&Tick{Sessions: []Session{{1, 5}}, Changes: []Change{{1, 1, 5, Share{60_000, 5}, Share{10_000, 1}, Raised}}})
	table.Apply(&Tick{Sessions: []Session{{1, 4}}})
	if h := table.Holding(1, 1); h.Ceiling.Amount != 60_000 {
		t.Error("an older incarnation took a newer one's ceiling")
	}
	table.Apply(&Tick{Sessions: []Session{{1, 6}}})
	if h := table.Holding(1, 1); !h.Ceiling.zero() || h.Floor != (Share{10_000, 1}) {
		t.Errorf("the new incarnation begins with %+v", h)
	}
	if table.Sum(1) != (Share{10_000, 1}) {
		t.Errorf("the sum is %v", table.Sum(1))
	}
}

// TestShareMovesToWhoNeedsIt: what one relay does not use goes to the other
// within a second, and never exists twice on the way.
func TestShareMovesToWhoNeedsIt(t *testing.T) {
	c := newCluster(t, 2, rateLimit(1, 100, 20))
	c.want(2, 1, 90_000)
	c.run(2 * time.Second)
	if got := c.usable(2, 1).Amount; got < 90_000 {
		t.Fatalf("one busy relay has %d of 100000", got)
	}
	c.want(1, 1, 90_000)
	c.want(2, 1, 10_000)
	c.run(2 * time.Second) // a report may wait one second for the last one
	if got := c.usable(1, 1).Amount; got < 80_000 {
		t.Errorf("the share moved %d of 80000 in two seconds", got)
	}
	c.want(2, 1, 90_000)
	c.run(30 * time.Second)
	if a, b := c.usable(1, 1).Amount, c.usable(2, 1).Amount; a < 45_000 || b < 45_000 {
		t.Errorf("two relays that want the same have %d and %d", a, b)
	}
}

// TestDeadRelayIsReclaimed: what a silent relay held is used again after its
// lease, and not before.
func TestDeadRelayIsReclaimed(t *testing.T) {
	c := newCluster(t, 2, rateLimit(1, 100, 20))
	c.want(1, 1, 200_000)
	c.want(2, 1, 200_000)
	c.run(15 * time.Second)
	c.deaf[2] = true
	cut := c.now
	c.run(18 * time.Second)
	if got := c.table.Holding(1, 2).Ceiling; got.zero() {
		t.Errorf("reclaimed %v after the relay fell silent", c.now.Sub(cut))
	}
	c.run(14 * time.Second)
	if got := c.usable(1, 1).Amount; got < 95_000 {
		t.Errorf("after %v the live relay has %d of 95000", c.now.Sub(cut), got)
	}
	if got := c.usable(2, 1); !got.zero() {
		t.Errorf("the dead relay still uses %v", got)
	}
}

// TestFloorsAreReservedAndShared: relays that are cut off go on at their floor,
// and everybody's together is the floor of the limit.
func TestFloorsAreReservedAndShared(t *testing.T) {
	l := rateLimit(1, 100, 20)
	l.FloorPercent = 20
	c := newCluster(t, 3, l)
	c.want(1, 1, 60_000)
	c.want(2, 1, 20_000)
	c.want(3, 1, 20_000)
	c.run(5 * time.Minute)
	total := int64(0)
	for n := Node(1); n <= 3; n++ {
		_, _, floor := c.rights(n, 1).Lease()
		if !floor.usable(Rate) {
			t.Errorf("relay %d has the floor %v", n, floor)
		}
		total += floor.Amount
		c.deaf[n] = true
	}
	if total > 20_000 || total < 15_000 {
		t.Errorf("floors of %d together, the limit sets 20000 aside", total)
	}
	c.run(40 * time.Second)
	for n := Node(1); n <= 3; n++ {
		_, _, floor := c.rights(n, 1).Lease()
		if got := c.usable(n, 1); got != floor {
			t.Errorf("cut off, relay %d uses %v, its floor is %v", n, got, floor)
		}
	}
	c.run(25 * time.Hour)
	for n := Node(1); n <= 3; n++ {
		if got := c.usable(n, 1); !got.zero() {
			t.Errorf("after a day relay %d still uses %v", n, got)
		}
	}
	if got := c.table.Sum(1); !got.zero() {
		t.Errorf("after a day the table still counts %v", got)
	}
}

// TestLaterRelayGetsAFloor: floors were divided when one relay was heard, and it
// has all of them; the others do not wait until they are divided by use.
func TestLaterRelayGetsAFloor(t *testing.T) {
	l := rateLimit(1, 100, 20)
	l.FloorPercent = 20
	c := newCluster(t, 3, l)
	c.want(1, 1, 60_000)
	c.run(time.Second)
	if _, _, floor := c.rights(1, 1).Lease(); floor.Amount != 20_000 {
		t.Fatalf("the only relay has the floor %v, want all that is set aside", floor)
	}
	c.want(2, 1, 60_000)
	c.want(3, 1, 60_000)
	c.run(c.cfg.TTL + 2*c.cfg.Refresh())
	floors := func() (out [3]Share) {
		for i := range out {
			_, _, out[i] = c.rights(Node(i+1), 1).Lease()
		}
		return out
	}
	had := floors()
	for i, floor := range had {
		if !floor.usable(Rate) {
			t.Errorf("relay %d has the floor %v", i+1, floor)
		}
	}
	c.want(1, 1, 0)
	c.run(c.cfg.FloorGap / 2)
	if now := floors(); now != had {
		t.Errorf("floors were %v and are %v before the time to divide them by use", had, now)
	}
}

// TestSoftFloorsStay: where the limit says so, a floor outlives the day.
func TestSoftFloorsStay(t *testing.T) {
	l := rateLimit(1, 100, 20)
	l.FloorPercent, l.SoftFloor = 20, true
	c := newCluster(t, 2, l)
	c.want(1, 1, 60_000)
	c.run(time.Minute)
	c.deaf[1] = true
	c.run(26 * time.Hour)
	if got := c.usable(1, 1); !got.usable(Rate) {
		t.Error("the soft floor ended")
	}
	if h := c.table.Holding(1, 1); !h.Floor.usable(Rate) {
		t.Error("the soft floor was given away")
	}
}

// TestLimitIsLowered (I6): nothing is given out until what is held fits the new
// limit, which takes a lease at most.
func TestLimitIsLowered(t *testing.T) {
	c := newCluster(t, 3, rateLimit(1, 100, 20))
	for n := Node(1); n <= 3; n++ {
		c.want(n, 1, 100_000)
	}
	c.run(20 * time.Second)
	c.deaf[3] = true
	l := rateLimit(1, 10, 20)
	if err := c.table.PutLimit(l); err != nil {
		t.Fatal(err)
	}
	c.grantor.PutLimit(l)
	c.run(32 * time.Second)
	if got := c.table.Sum(1).Amount; got > 10_000 {
		t.Errorf("32 s after the limit was lowered to 10000, %d are held", got)
	}
	c.run(5 * time.Second)
	if got := c.usable(1, 1).Amount + c.usable(2, 1).Amount; got < 9_000 {
		t.Errorf("of the lowered limit only %d are used", got)
	}
}

// TestDivisionSettles (I7): with the same demands the leader soon has nothing
// more to say.
func TestDivisionSettles(t *testing.T) {
	c := newCluster(t, 10, rateLimit(1, 1000, 100))
	for n := Node(1); n <= 10; n++ {
		c.want(n, 1, int64(n)*20_000)
	}
	c.run(5 * time.Second)
	before := c.grantor.seq
	c.run(time.Minute)
	if c.grantor.seq != before {
		t.Errorf("%d grants changed although nothing else did", c.grantor.seq-before)
	}
	sum := int64(0)
	for n := Node(1); n <= 10; n++ {
		sum += c.usable(n, 1).Amount
	}
	if sum < 940_000 {
		t.Errorf("%d of 950000 are given out", sum)
	}
	if small := c.usable(1, 1).Amount; small < 20_000 {
		t.Errorf("the smallest demand, 20000, got %d", small)
	}
}

// TestNewLeaderTakesNothing: a change of leader alone moves no share.
func TestNewLeaderTakesNothing(t *testing.T) {
	c := newCluster(t, 3, rateLimit(1, 100, 20))
	for n := Node(1); n <= 3; n++ {
		c.want(n, 1, 100_000)
	}
	c.run(15 * time.Second)
	var before [4]Share
	for n := Node(1); n <= 3; n++ {
		before[n] = c.usable(n, 1)
	}
	for range 20 {
		c.elect()
		c.run(5 * time.Second)
		for n := Node(1); n <= 3; n++ {
			if got := c.usable(n, 1); got.Amount < before[n].Amount*9/10 {
				t.Fatalf("term %d: relay %d fell from %v to %v", c.term, n, before[n], got)
			}
		}
	}
}

// TestReportFromBeforeTheBarrier (R4): a report that came before the leader's barrier
// and was taken up after it does not shorten the wait for what former leaders granted.
func TestReportFromBeforeTheBarrier(t *testing.T) {
	c := newCluster(t, 2, rateLimit(1, 100, 100))
	c.want(1, 1, 100_000)
	c.want(2, 1, 100_000)
	c.run(time.Minute)
	early := c.relays[0].Report(c.now)
	came := c.now
	c.now = c.now.Add(5 * time.Second) // meanwhile a former leader may have answered a later one
	c.elect()
	c.grantor.Report(came, &early)
	if basis := c.grantor.byNode[1].basis; basis < c.now {
		t.Errorf("the wait for a silent relay begins %v before the barrier", c.now.Sub(basis))
	}
}

// TestReclaimedRelayStartsAnew: what a silent relay holds is due to be reclaimed when
// its new process greets. One command cannot do both.
func TestReclaimedRelayStartsAnew(t *testing.T) {
	l := rateLimit(1, 100, 100)
	l.FloorPercent = 20
	for _, ttl := range []time.Duration{DefaultConfig().TTL, DefaultConfig().FloorTTL} {
		c := newCluster(t, 2, l)
		c.want(1, 1, 100_000)
		c.want(2, 1, 100_000)
		c.run(time.Minute)
		silent := c.relays[0]
		c.deaf[1] = true
		due := c.grantor.byNode[1].basis.Add(Outlast(ttl)) + 1
		c.run(due.Sub(c.now) - time.Second)
		c.now = due
		silent.Holder = NewHolder(c.cfg, 1, 2, 1, nil, c.now)
		c.grantor.Hello(c.now, silent.Hello())
		c.tick() // which fails if anything is refused
		c.tick()
		if h := c.table.Holding(1, 1); !h.Ceiling.zero() || ttl == DefaultConfig().FloorTTL && !h.Floor.zero() {
			t.Errorf("after %v of silence and a new start the table has %v and %v", ttl, h.Ceiling, h.Floor)
		}
		if incarnation, _ := c.table.Session(1); incarnation != 2 {
			t.Errorf("the incarnation is %d", incarnation)
		}
	}
}

// TestStaleReleaseMeansNothing: a release that was written before the last grant
// arrived does not free what that grant gave.
func TestStaleReleaseMeansNothing(t *testing.T) {
	c := newCluster(t, 1, rateLimit(1, 100, 20))
	c.want(1, 1, 50_000)
	c.run(time.Second)
	r := c.rights(1, 1)
	stale := Release{Node: 1, Incarnation: 1, Limit: 1, Stamp: Stamp{1, 1, 0}}
	c.grantor.Release(c.now, stale)
	c.tick()
	if got := c.table.Holding(1, 1).Ceiling; got.zero() {
		t.Fatal("a stale release freed what the relay uses")
	}
	m, ok := c.relays[0].Release(c.now, r)
	if !ok {
		t.Fatal("nothing was released")
	}
	c.grantor.Release(c.now, m)
	if got := r.Usable(c.now); !got.zero() {
		t.Errorf("released, and still uses %v", got)
	}
	c.tick()
	if got := c.table.Holding(1, 1).Ceiling; !got.zero() {
		t.Errorf("released, and the table still counts %v", got)
	}
	c.run(12 * time.Second)
	if got := r.Usable(c.now); !got.usable(Rate) {
		t.Error("a relay that released a limit and still wants it gets nothing more")
	}
}

// TestEvictedRelayGetsNothing: it is not answered, and its part comes back.
func TestEvictedRelayGetsNothing(t *testing.T) {
	c := newCluster(t, 2, rateLimit(1, 100, 20))
	c.want(1, 1, 100_000)
	c.want(2, 1, 100_000)
	c.run(10 * time.Second)
	c.table.Evict(1)
	c.grantor.Evict(1)
	c.run(35 * time.Second)
	if got := c.usable(1, 1); !got.zero() {
		t.Errorf("evicted, it uses %v", got)
	}
	if got := c.usable(2, 1).Amount; got < 94_000 {
		t.Errorf("the other relay has %d", got)
	}
	c.grantor.Hello(c.now, Hello{Node: 1, Incarnation: 2})
	c.run(time.Second)
	if inc, gone := c.table.Session(1); inc != 1 || !gone {
		t.Error("an evicted relay began a session")
	}
}

// TestStatus: what people are shown of a limit.
func TestStatus(t *testing.T) {
	c := newCluster(t, 3, slotLimit(1, 2))
	for n := Node(1); n <= 3; n++ {
		c.want(n, 1, 2)
	}
	c.run(5 * time.Second)
	for n := Node(1); n <= 3; n++ {
		for range 3 {
			c.rights(n, 1).Open(c.now)
		}
	}
	c.run(11 * time.Second)
	holders, free := c.grantor.Status(1)
	waiting, held, used, denied := 0, int64(0), int64(0), int64(0)
	for _, h := range holders {
		held += h.Ceiling.Amount
		used, denied = used+h.Used, denied+h.Denied
		if h.WaitsForASeat {
			waiting++
		}
		if !h.Heard || h.Demand != 2 {
			t.Errorf("%+v", h)
		}
	}
	if len(holders) != 3 || waiting != 1 || held != 2 || !free.zero() || used != 2 || denied != 7 {
		t.Errorf("%d holders, %d wait, %d held, %v free, %d used, %d denied", len(holders), waiting, held, free, used, denied)
	}
	if holders, _ := c.grantor.Status(9); holders != nil {
		t.Errorf("an unknown limit has %v", holders)
	}
}

// TestPartsAreForgotten: a leader keeps nothing of who neither has nor wants
// anything, and takes no more than its bounds.
func TestPartsAreForgotten(t *testing.T) {
	c := newCluster(t, 5, rateLimit(1, 100, 20), slotLimit(2, 10))
	for n := Node(1); n <= 5; n++ {
		c.want(n, 1, 50_000)
		c.want(n, 2, 5)
	}
	c.run(12 * time.Second)
	if c.grantor.parts != 10 {
		t.Errorf("%d parts, want 10", c.grantor.parts)
	}
	for n := Node(1); n <= 5; n++ {
		c.want(n, 1, 0)
		c.want(n, 2, 0)
	}
	c.run(30 * time.Second)
	if c.grantor.parts != 0 || len(c.grantor.byID[1].entries) != 0 || len(c.grantor.nodes[0].entries) != 0 {
		t.Errorf("%d parts are kept of relays that want nothing", c.grantor.parts)
	}
	c.grantor.parts = MaxHolders
	c.want(1, 1, 50_000)
	c.run(12 * time.Second)
	if got := c.usable(1, 1); !got.zero() {
		t.Errorf("above the bound a relay got %v", got)
	}
}
