package brake

import (
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

var start = time.Date(2026, 5, 4, 8, 0, 0, 0, time.UTC)

var (
	own     = ids.Node{1}
	pool    = ids.Pool{2}
	sourceA = ids.Source{3}
	sourceB = ids.Source{4}
	tenant  = ids.Tenant{5}
	other   = ids.Tenant{6}
)

// world has a keeper and what it set.
type world struct {
	t       *testing.T
	k       *Keeper
	now     time.Time
	trusted bool
	dir     *policy.Directory
	gates   map[schedule.GateID]schedule.Gate
	recalls []string
}

func (w *world) SetGates(gates ...schedule.Gate) {
	for _, g := range gates {
		w.gates[g.ID] = g
	}
}

func (w *world) KeepGates(owner string, numbers map[uint64]bool) {
	for id := range w.gates {
		if id.Owner == owner && !numbers[id.Number] {
			delete(w.gates, id)
		}
	}
}

func (w *world) Recall(name string) { w.recalls = append(w.recalls, name) }

func newWorld(t *testing.T, brakes ...policy.Brake) *world {
	w := &world{t: t, now: start, trusted: true, gates: make(map[schedule.GateID]schedule.Gate)}
	w.view(brakes...)
	var err error
	w.k, err = New(Config{Directory: func() *policy.Directory { return w.dir }, Now: func() time.Time { return w.now }, ClockTrusted: func() bool { return w.trusted },
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	w.k.Attach(w)
	return w
}

// view gives the relay a view with these brakes.
func (w *world) view(brakes ...policy.Brake) {
	w.t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	v := &policy.View{Cluster: ids.Cluster{9}, Node: own, Document: doc, Brakes: brakes,
		Tenants: []policy.Tenant{{ID: tenant, Name: "acme"}, {ID: other, Name: "other"}},
		Pools:   []policy.Pool{{ID: pool, Name: "default", Kind: policy.PoolShared}},
	}
	for i, id := range []ids.Source{sourceA, sourceB} {
		addr := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
		v.Sources = append(v.Sources, policy.Source{ID: id, Bind: addr, Public: addr, EHLO: "mta.example.net", Pool: pool, Owner: own, Epoch: 1, Pinned: true})
	}
	if w.dir, err = policy.Compile(v); err != nil {
		w.t.Fatal(err)
	}
	if w.k != nil {
		w.k.Changed()
		w.k.look()
	}
}

// session opens one for mail of a tenant; nil if it is refused.
func (w *world) session(source ids.Source, provider string, of ids.Tenant, domain mailaddr.Domain) (*engine.Place, engine.Hold) {
	p := &engine.Place{Lane: schedule.Lane{Source: source, Provider: provider}, Key: schedule.Key{Tenant: of, Pool: pool, Domain: domain}}
	if h := w.k.Connect(w.now, p); h.Reason != "" {
		return nil, h
	}
	w.k.look()
	return p, engine.Hold{}
}

// send has a session carry a message to an answer.
func (w *world) send(p *engine.Place, status relay.Status, reply relay.Reply) engine.Hold {
	if h := w.k.Begin(w.now, p); h.Reason != "" {
		return h
	}
	began := w.now
	w.now = w.now.Add(50 * time.Millisecond)
	outcomes := []relay.Outcome{{Status: status, Phase: relay.PhaseRCPT, Reply: reply}}
	w.k.Done(w.now, p, outcomes)
	w.k.Observe(&relay.Attempt{Source: p.Lane.Source, Provider: p.Lane.Provider, StartedAt: began, EndedAt: w.now, Outcomes: outcomes})
	w.k.look()
	return engine.Hold{}
}

var (
	slower = relay.Reply{Code: 421, Enhanced: "4.7.28", Text: "an unusual rate of mail"}
	no     = relay.Reply{Code: 550, Enhanced: "5.7.1", Text: "very low reputation of the sending IP address"}
	ok     = relay.Reply{Code: 250, Text: "OK"}
)

// only returns the one gate there is.
func (w *world) only() schedule.Gate {
	w.t.Helper()
	if len(w.gates) != 1 {
		w.t.Fatalf("%d gates, want one: %+v", len(w.gates), w.gates)
	}
	for _, g := range w.gates {
		return g
	}
	panic("no gate")
}

func TestTheReflexSlowsOneLaneDown(t *testing.T) {
	w := newWorld(t)
	a, _ := w.session(sourceA, "google", tenant, "gmail.example")
	b, _ := w.session(sourceB, "google", tenant, "gmail.example")
	for range 100 {
		w.send(a, relay.Delivered, ok)
		w.send(b, relay.Delivered, ok)
	}
	if len(w.gates) != 0 {
		t.Fatalf("%+v", w.gates)
	}
	for range 3 {
		w.send(a, relay.Deferred, slower)
	}
	g := w.only()
	if g.Match != (schedule.Match{Source: sourceA, Provider: "google"}) || g.Reason != "reflex" || g.Messages.Max < 60 || g.Messages.Max >= 36_000 || g.Messages.Per != time.Hour || g.Sessions != 1 || g.NoMessages {
		t.Errorf("%+v", g)
	}
	text := w.k.DescribeLane(a.Lane)
	if !strings.Contains(text, `/min on 1 connection after "421 4.7.28 an unusual rate of mail" (throttled) at 08:00:`) || !strings.Contains(text, "next step at 08:00:") || strings.Count(text, " UTC") != 2 {
		t.Errorf("%q", text)
	}
	if h, known := w.k.Explain(g.ID); !known || h.Text != "reflex: "+text || h.Reason != "reflex" {
		t.Errorf("%+v", h)
	}
	if text := w.k.DescribeLane(b.Lane); text != "" {
		t.Errorf("the other lane: %q", text)
	}
	before := g.Messages.Max
	for range 3 {
		w.send(a, relay.Delivered, ok)
	}
	w.now = w.now.Add(10 * time.Second)
	w.k.look()
	if g := w.only(); g.Messages.Max <= before {
		t.Errorf("no step up: %d, it was %d", g.Messages.Max, before)
	}
	if long := w.k.Long(10); len(long) != 0 {
		t.Errorf("%+v", long)
	}
	w.now = w.now.Add(longReflex)
	if long := w.k.Long(10); len(long) != 1 || long[0].Source != sourceA || long[0].Class != "throttled" {
		t.Errorf("%+v", long)
	}
	if long := w.k.Long(0); len(long) != 0 {
		t.Errorf("%+v", long)
	}
}

func TestABlockHoldsTheLaneAndAPersonFreesIt(t *testing.T) {
	w := newWorld(t)
	a, _ := w.session(sourceA, "google", tenant, "gmail.example")
	for range 3 {
		w.send(a, relay.Failed, no)
	}
	g := w.only()
	if !g.NoMessages || !g.NoSessions || g.Until.Sub(w.now) > 67*time.Second || g.Until.Sub(w.now) < 59*time.Second {
		t.Fatalf("%+v", g)
	}
	released := policy.Brake{ID: ids.Brake{7}, Source: sourceA, Provider: "google", Released: w.now.Add(-time.Minute), Node: own}
	w.view(released)
	if len(w.gates) != 1 {
		t.Error("freed by a word from before the cause")
	}
	released.Released, released.Node = w.now.Add(time.Second), ids.Node{99}
	w.view(released)
	if len(w.gates) != 1 {
		t.Error("freed by a word for another relay")
	}
	released.Node = own
	w.view(released)
	if len(w.gates) != 0 || w.k.DescribeLane(a.Lane) != "" {
		t.Errorf("%+v", w.gates)
	}
}

func TestHostsThatCannotBeReached(t *testing.T) {
	w := newWorld(t)
	for range 9 {
		p, _ := w.session(sourceA, "mx:example.net", tenant, "example.net")
		at := w.now
		w.now = w.now.Add(time.Second)
		w.k.Observe(&relay.Attempt{Source: sourceA, Provider: "mx:example.net", StartedAt: at, EndedAt: w.now,
			Outcomes: []relay.Outcome{{Status: relay.Deferred, Phase: relay.PhaseConnect, Reply: relay.Reply{Enhanced: "4.4.1", Text: "no answer"}}}})
		w.k.Closed(w.now, p)
		w.k.look()
	}
	if g := w.only(); g.Sessions > 1 && !g.NoSessions {
		t.Errorf("%+v", g)
	}
}

func TestBrakesBecomeGates(t *testing.T) {
	brake := policy.Brake{ID: ids.Brake{7}, Provider: "google", Cause: "complaints", Owner: "anna", CreatedAt: start}
	change := func(f func(*policy.Brake)) policy.Brake {
		b := brake
		f(&b)
		return b
	}
	for _, c := range []struct {
		name  string
		brake policy.Brake
		want  []schedule.Gate
	}{
		{"all mail to a provider", brake, []schedule.Gate{{Match: schedule.Match{Provider: "google"}, Slots: true, NoMessages: true, NoSessions: true}}},
		{"a tenant's", change(func(b *policy.Brake) { b.Tenant = tenant }), []schedule.Gate{{Match: schedule.Match{Provider: "google", Tenant: tenant}, NoMessages: true}}},
		{"a source", change(func(b *policy.Brake) { b.Provider, b.Source = "", sourceA }), []schedule.Gate{{Match: schedule.Match{Source: sourceA}, Slots: true, NoMessages: true, NoSessions: true}}},
		{"a quarter of two lanes", change(func(b *policy.Brake) { b.Percent = 25 }), []schedule.Gate{
			{Match: schedule.Match{Source: sourceA, Provider: "google"}, Slots: true, Messages: schedule.Rate{Max: 15_000, Per: time.Hour, Burst: 4}, Sessions: 1},
			{Match: schedule.Match{Source: sourceB, Provider: "google"}, Slots: true, Messages: schedule.Rate{Max: 15_000, Per: time.Hour, Burst: 4}, Sessions: 1}}},
		{"a tenth for a domain", change(func(b *policy.Brake) { b.Percent, b.Domain = 10, "gmail.example" }), []schedule.Gate{
			{Match: schedule.Match{Provider: "google", Domain: "gmail.example"}, Messages: schedule.Rate{Max: 12_000, Per: time.Hour, Burst: 3}}}},
		{"a tenant's on one source", change(func(b *policy.Brake) { b.Tenant, b.Source = tenant, sourceA }), []schedule.Gate{
			{Match: schedule.Match{Provider: "google", Tenant: tenant, Source: sourceA}, NoMessages: true}}},
		{"a tenth for a domain on one source", change(func(b *policy.Brake) { b.Percent, b.Domain, b.Source = 10, "gmail.example", sourceA }), []schedule.Gate{
			{Match: schedule.Match{Source: sourceA, Provider: "google", Domain: "gmail.example"}, Messages: schedule.Rate{Max: 6_000, Per: time.Hour, Burst: 1}}}},
		{"of another provider", change(func(b *policy.Brake) { b.Provider, b.Percent = "yahoo", 10 }), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.brake)
			w.session(sourceA, "google", other, "other.example")
			w.session(sourceB, "google", tenant, "gmail.example")
			if len(w.gates) != len(c.want) {
				t.Fatalf("%+v", w.gates)
			}
			for id, g := range w.gates {
				if h, known := w.k.Explain(id); !known || h.Name != c.brake.ID.String() || !strings.Contains(h.Text, "complaints") || g.Reason != "brake" {
					t.Errorf("%+v %+v", g, h)
				}
				found := false
				g.ID, g.Reason = schedule.GateID{}, ""
				for _, want := range c.want {
					found = found || g == want
				}
				if !found {
					t.Errorf("%+v", g)
				}
			}
			w.view()
			if len(w.gates) != 0 || len(w.recalls) != 1 {
				t.Errorf("it is gone: %+v, recalled %v", w.gates, w.recalls)
			}
		})
	}
}

// A brake that holds some mail of one source refuses that mail there, and only there,
// should it come before the gate.
func TestBrakesOfSomeMailOfASource(t *testing.T) {
	w := newWorld(t, policy.Brake{ID: ids.Brake{7}, Source: sourceA, Tenant: tenant, Cause: "complaints", Owner: "anna"})
	if _, h := w.session(sourceA, "google", tenant, "gmail.example"); h.Reason != "brake" || h.Look.Sub(w.now) != mixedWait || !h.Until.IsZero() {
		t.Errorf("%+v", h)
	}
	for _, c := range []struct {
		source ids.Source
		tenant ids.Tenant
	}{{sourceB, tenant}, {sourceA, other}} {
		if p, h := w.session(c.source, "google", c.tenant, "gmail.example"); p == nil || w.send(p, relay.Delivered, ok).Reason != "" {
			t.Errorf("%+v: %+v", c, h)
		}
	}
}

// Cut off, a brake stays an hour beyond its time, and for as long as the clock is
// not to be trusted.
func TestABrakeOutlivesItsTimeOnARelayThatIsCutOff(t *testing.T) {
	w := newWorld(t, policy.Brake{ID: ids.Brake{7}, Provider: "google", Cause: "x", Owner: "anna", CreatedAt: start, Until: start.Add(time.Minute)})
	for _, c := range []struct {
		at      time.Duration
		trusted bool
		gates   int
	}{{time.Minute, true, 1}, {time.Hour, true, 1}, {2 * time.Hour, false, 1}, {2 * time.Hour, true, 0}} {
		w.now, w.trusted = start.Add(c.at), c.trusted
		w.k.look()
		if len(w.gates) != c.gates {
			t.Errorf("after %v: %d gates", c.at, len(w.gates))
		}
		for id := range w.gates {
			h, _ := w.k.Explain(id)
			if !h.Until.IsZero() && !h.Until.After(w.now) {
				t.Errorf("after %v mail can go at %v, which is over", c.at, h.Until)
			}
			for _, part := range []string{"its time ended at 2026-05-04T08:01:00Z", "until control is heard, or until 2026-05-04T09:01:00Z"} {
				if c.trusted && !strings.Contains(h.Text, part) {
					t.Errorf("after %v: %q lacks %q", c.at, h.Text, part)
				}
			}
		}
	}
}

// A source that is moved to another pool is slowed down by the brakes of that.
func TestASourceMovesToAnotherPool(t *testing.T) {
	to := ids.Pool{8}
	w := newWorld(t, policy.Brake{ID: ids.Brake{7}, Pool: to, Percent: 10, Cause: "x", Owner: "anna", CreatedAt: start})
	w.session(sourceA, "google", tenant, "gmail.example")
	if len(w.gates) != 0 {
		t.Fatalf("mail of another pool is slowed down: %+v", w.gates)
	}
	p := &engine.Place{Lane: schedule.Lane{Source: sourceA, Provider: "google"}, Key: schedule.Key{Tenant: tenant, Pool: to, Domain: "gmail.example"}}
	if h := w.k.Connect(w.now, p); h.Reason != "" {
		t.Fatal(h)
	}
	w.k.look()
	if g := w.only(); g.Match.Source != sourceA || g.Messages.Max == 0 {
		t.Errorf("%+v", g)
	}
	w.session(sourceA, "google", tenant, "gmail.example")
	if len(w.gates) != 0 {
		t.Errorf("it is back, and still slowed down: %+v", w.gates)
	}
}

func TestPolicySwitchesTheReflexOff(t *testing.T) {
	w := newWorld(t)
	a, _ := w.session(sourceA, "google", tenant, "gmail.example")
	for range 3 {
		w.send(a, relay.Failed, no)
	}
	w.only()
	old := w.dir
	v := *old.View()
	v.Document.Providers.ReflexOf = []policy.ReflexOf{{Provider: "google", Reflex: policy.Reflex{Off: true}}}
	var err error
	if w.dir, err = policy.Compile(&v); err != nil {
		t.Fatal(err)
	}
	w.k.Changed()
	w.k.look()
	if len(w.gates) != 0 {
		t.Errorf("%+v", w.gates)
	}
	for range 5 {
		w.send(a, relay.Failed, no)
	}
	if len(w.gates) != 0 {
		t.Errorf("%+v", w.gates)
	}
}
