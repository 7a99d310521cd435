package lease

import (
	"testing"
	"time"
)

// cluster is one leader and some relays without a network between them: what is
// said is heard at once, and only time passes.
type cluster struct {
	t       testing.TB
	cfg     Config
	now     Instant
	table   *Table
	grantor *Grantor
	term    uint64
	relays  []*relay
	entries int // commands committed
	deaf    map[Node]bool
}

type relay struct {
	*Holder
	next Instant
}

func newCluster(t testing.TB, relays int, limits ...Limit) *cluster {
	t.Helper()
	c := &cluster{t: t, cfg: DefaultConfig(), now: Instant(time.Hour), table: NewTable(), deaf: make(map[Node]bool)}
	for _, l := range limits {
		if err := c.table.PutLimit(l); err != nil {
			t.Fatal(err)
		}
	}
	c.elect()
	for i := range relays {
		c.relays = append(c.relays, &relay{Holder: NewHolder(c.cfg, Node(i+1), 1, 1, nil, c.now), next: c.now})
		c.grantor.Hello(c.now, c.relays[i].Hello())
	}
	c.tick()
	return c
}

func (c *cluster) elect() {
	c.term++
	c.grantor = NewGrantor(c.cfg, c.table, 1, c.term, c.now)
}

func (c *cluster) tick() {
	c.t.Helper()
	command, grants := c.grantor.Tick(c.now)
	c.deliver(grants)
	if command == nil {
		return
	}
	c.entries++
	refused := c.table.Apply(command)
	for _, r := range refused {
		c.t.Fatalf("the table refused %+v: %s", r.Change, r.Why)
	}
	_, grants = c.grantor.Committed(c.now, refused)
	c.deliver(grants)
	c.check()
}

func (c *cluster) deliver(grants []Grant) {
	for i := range grants {
		if g := &grants[i]; !c.deaf[g.Node] {
			c.relays[g.Node-1].Grant(c.now, g)
		}
	}
}

// check asserts that nobody uses more than the table says, nor the table more
// than the limit.
func (c *cluster) check() {
	c.t.Helper()
	for _, l := range c.table.Limits() {
		sum := Share{}
		for _, h := range c.table.Holdings(l.ID) {
			sum = sum.add(h.Ceiling).add(h.Floor)
		}
		if sum != c.table.Sum(l.ID) {
			c.t.Fatalf("limit %d: the sum is kept as %v, it is %v", l.ID, c.table.Sum(l.ID), sum)
		}
		for _, r := range c.relays {
			may := c.table.Holding(l.ID, r.node)
			if has := r.Rights(l.ID, l.Kind, l.Per).Usable(c.now); !has.within(may.Ceiling.add(may.Floor)) {
				c.t.Fatalf("relay %d uses %v of limit %d, the table allows %v", r.node, has, l.ID, may)
			}
		}
	}
}

// run lets time pass in steps of a tick.
func (c *cluster) run(d time.Duration) {
	c.t.Helper()
	for end := c.now.Add(d); c.now < end; {
		c.now = c.now.Add(250 * time.Millisecond)
		for _, r := range c.relays {
			if due := r.ReportAt(500); c.now >= due && !c.deaf[r.node] {
				report := r.Report(c.now)
				c.grantor.Report(c.now, &report)
			}
		}
		c.tick()
	}
}

func (c *cluster) rights(n Node, id LimitID) *Rights {
	l, ok := c.table.Limit(id)
	if !ok {
		c.t.Fatalf("no limit %d", id)
	}
	return c.relays[n-1].Rights(id, l.Kind, l.Per)
}

func (c *cluster) want(n Node, id LimitID, demand int64) {
	c.relays[n-1].SetDemand(c.rights(n, id), demand)
}

func (c *cluster) usable(n Node, id LimitID) Share { return c.rights(n, id).Usable(c.now) }

func rateLimit(id LimitID, perSecond, burst int64) Limit {
	return Limit{ID: id, Kind: Rate, Max: perSecond * Milli, Per: time.Second, Burst: burst, ReservePercent: 5}
}

func slotLimit(id LimitID, slots int64) Limit { return Limit{ID: id, Kind: Slots, Max: slots} }
