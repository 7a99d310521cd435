package warm

import (
	"cmp"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/warmup"
)

// Bounds of what is shown. Those with the lowest numbers are: the oldest warm-ups.
const (
	maxSeries    = 1000 // subjects times classes
	maxOverflows = 1000 // pools times classes
)

// spill is where mail that finds no room at an address goes on from others.
type spill struct {
	pool     ids.Pool
	provider string
}

// spilling is that addresses of a pool are held towards a provider.
type spilling struct {
	held  int
	class string
}

// overflow names mail that went on from warm addresses.
type overflow struct {
	pool  ids.Pool
	class string
}

// countOverflow counts mail that begins from an address that does not warm up, while
// another of its pool is held. k.mu is held.
func (k *Keeper) countOverflow(p *engine.Place, n uint32) {
	s, held := k.spills[spill{p.Key.Pool, p.Lane.Provider}]
	if !held {
		return
	}
	of := overflow{p.Key.Pool, s.class}
	if _, known := k.spilled[of]; known || len(k.spilled) < maxOverflows {
		k.spilled[of] += uint64(n)
	}
}

// unspill takes it that an address is not held any more. k.mu is held.
func (k *Keeper) unspill(of spill) {
	if s, held := k.spills[of]; held && s.held > 1 {
		k.spills[of] = spilling{s.held - 1, s.class}
	} else {
		delete(k.spills, of)
	}
}

// collector exports the present day's reservations by what they are of and class of
// providers.
type collector struct{ k *Keeper }

var (
	ofClass      = []string{"kind", "subject", "class"}
	descQuota    = prometheus.NewDesc("relais_relay_warmup_quota_recipients", "Recipients that all relays together may be sent to that day, as the leader said last.", ofClass, nil)
	descReserved = prometheus.NewDesc("relais_relay_warmup_reserved_recipients", "Recipients of it that this relay has reserved.", ofClass, nil)
	descUsed     = prometheus.NewDesc("relais_relay_warmup_used_recipients", "Recipients of it that this relay has offered to hosts.", ofClass, nil)
	descStage    = prometheus.NewDesc("relais_relay_warmup_stage", "The stage of the plan.", ofClass, nil)
	descRefused  = prometheus.NewDesc("relais_relay_warmup_refused_total", "Times that mail found no room, by what was used up: the quota of the day, or this relay's part of the hour.", append(slices.Clone(ofClass), "of"), nil)
	descOverflow = prometheus.NewDesc("relais_relay_warmup_overflow_recipients_total", "Recipients offered from warm addresses of a pool while another of its addresses had no room.", []string{"pool", "class"}, nil)
	descDay      = prometheus.NewDesc("relais_relay_warmup_day_start_seconds", "Unix time at which the day began that is counted on.", nil, nil)
	descLeftOut  = prometheus.NewDesc("relais_relay_warmup_left_out", "Subjects and classes that are not shown, for there are too many.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descQuota, descReserved, descUsed, descStage, descRefused, descOverflow, descDay, descLeftOut} {
		out <- d
	}
}

// line is what is shown of a subject and a class.
type line struct {
	subject        warmup.Subject
	class          warmup.Class
	heard          bool
	quota, stage   uint32
	reserved, used uint64
	day, hour      uint64 // times without room
}

// Collect implements prometheus.Collector. Without anything that warms up there is
// nothing to show.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	dir := c.k.cfg.Directory()
	if dir == nil || !dir.Warming() {
		return
	}
	today, lines, spilled := c.k.lines(dir)
	out <- prometheus.MustNewConstMetric(descDay, prometheus.GaugeValue, float64(today.Date().Unix()))
	subjects := map[warmup.Subject]*policy.WarmSubject{}
	for _, s := range dir.WarmHere() {
		subjects[warmup.Subject(s.Number)] = s
	}
	view := dir.View()
	binds := map[ids.Source]string{}
	for i := range view.Sources {
		binds[view.Sources[i].ID] = view.Sources[i].Bind.String()
	}
	shown := 0
	for _, l := range lines {
		s := subjects[l.subject]
		if s == nil || int(l.class) >= len(view.Warm.Classes) {
			continue // not in the view any more
		}
		if shown++; shown > maxSeries {
			continue
		}
		kind, name := labels(dir, s, binds)
		show := func(d *prometheus.Desc, of prometheus.ValueType, v float64, more ...string) {
			out <- prometheus.MustNewConstMetric(d, of, v, append([]string{kind, name, view.Warm.Classes[l.class]}, more...)...)
		}
		show(descReserved, prometheus.GaugeValue, float64(l.reserved))
		show(descUsed, prometheus.GaugeValue, float64(l.used))
		show(descRefused, prometheus.CounterValue, float64(l.day), "day")
		show(descRefused, prometheus.CounterValue, float64(l.hour), "hour")
		if l.heard {
			show(descQuota, prometheus.GaugeValue, float64(l.quota))
			show(descStage, prometheus.GaugeValue, float64(l.stage))
		}
	}
	out <- prometheus.MustNewConstMetric(descLeftOut, prometheus.GaugeValue, float64(max(0, shown-maxSeries)))
	byName := map[[2]string]uint64{}
	for of, n := range spilled {
		name := of.pool.String()
		if p, ok := dir.Pool(of.pool); ok {
			name = p.Name
		}
		byName[[2]string{name, of.class}] += n
	}
	for of, n := range byName {
		out <- prometheus.MustNewConstMetric(descOverflow, prometheus.CounterValue, float64(n), of[0], of[1])
	}
}

// lines returns what is reserved of the present day, by subject and class. What an
// address has under several epochs is one line.
func (k *Keeper) lines(dir *policy.Directory) (today warmup.Day, lines []line, spilled map[overflow]uint64) {
	k.mu.Lock()
	today = k.day(k.cfg.Now(), dir)
	type of struct {
		subject warmup.Subject
		class   warmup.Class
	}
	at := make(map[of]int)
	for key, s := range k.slots {
		if key.Day != today {
			continue
		}
		i, there := at[of{key.Subject, key.Class}]
		if !there {
			i = len(lines)
			at[of{key.Subject, key.Class}] = i
			lines = append(lines, line{subject: key.Subject, class: key.Class})
		}
		l := &lines[i]
		used, amount := s.spender.Peek()
		l.used, l.reserved = l.used+uint64(used), l.reserved+uint64(amount)
		l.day, l.hour = l.day+s.refusals.day, l.hour+s.refusals.hour
		if s.heard && (!s.over || !l.heard) {
			l.heard, l.quota, l.stage = true, s.quota, s.stage
		}
	}
	spilled = make(map[overflow]uint64, len(k.spilled))
	for of, n := range k.spilled {
		spilled[of] = n
	}
	k.mu.Unlock()
	slices.SortFunc(lines, func(a, b line) int {
		return cmp.Or(cmp.Compare(a.subject, b.subject), cmp.Compare(a.class, b.class))
	})
	return today, lines, spilled
}

// labels returns what warms up, and its name.
func labels(dir *policy.Directory, s *policy.WarmSubject, binds map[ids.Source]string) (kind, name string) {
	switch {
	case !s.Source.IsZero():
		return "source", cmp.Or(binds[s.Source], s.Source.String())
	case s.Domain != "":
		return "domain", string(s.Domain)
	}
	if pool, ok := dir.Pool(s.Pool); ok {
		return "pool", pool.Name
	}
	return "pool", s.Pool.String()
}
