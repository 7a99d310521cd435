package limits

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/schedule"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/policy"
)

// scope says whom a limit counts together.
func scope(d *policy.Directory, lim *policy.SharedLimit) string {
	var of []string
	if lim.Domain != "" {
		of = append(of, "domain "+string(lim.Domain))
	}
	if !lim.Tenant.IsZero() {
		name := lim.Tenant.String()
		if t, ok := d.Tenant(lim.Tenant); ok {
			name = t.Name
		}
		of = append(of, "tenant "+name)
	}
	if !lim.Pool.IsZero() {
		name := lim.Pool.String()
		if p, ok := d.Pool(lim.Pool); ok {
			name = p.Name
		}
		of = append(of, "pool "+name)
	}
	if lim.Provider != "" {
		of = append(of, "provider "+lim.Provider)
	}
	if len(of) == 0 {
		of = append(of, "all mail")
	}
	return strings.Join(of, ", ") + ", all relays"
}

// amount words an amount of a limit.
func (lim *limit) amount(n int64) string {
	if lim.Kind == lease.Slots {
		return strconv.FormatInt(n, 10)
	}
	text := strconv.FormatFloat(float64(n)/lease.Milli, 'f', 1, 64)
	return strings.TrimSuffix(text, ".0")
}

// words says who may use how much of a limit. l.mu is held.
func (l *Limits) words(lim *limit, now time.Time, at lease.Instant) string {
	var b strings.Builder
	fmt.Fprintf(&b, "the limit %s allows %s %s", lim.Name, lim.amount(lim.Max), lim.Counts())
	if lim.Kind == lease.Rate {
		fmt.Fprintf(&b, " in %s", policy.Duration(lim.Per))
	}
	fmt.Fprintf(&b, " for %s; ", lim.scope)
	usable := lim.usable(at)
	if lim.rights == nil || lim.rights.Stamp() == (lease.Stamp{}) && usable.Amount == 0 {
		b.WriteString("this relay has no share of it yet")
	} else {
		share, until, floor := lim.rights.Lease()
		fmt.Fprintf(&b, "this relay may use %s", lim.amount(usable.Amount))
		if lim.Kind == lease.Slots {
			fmt.Fprintf(&b, " and has %d open", lim.rights.Opened())
		}
		if share.Amount = min(share.Amount, usable.Amount); share.Amount > 0 {
			fmt.Fprintf(&b, " (%s of it until %s UTC)", lim.amount(share.Amount), now.Add(until.Sub(at)).UTC().Format(time.TimeOnly))
		} else if floor.Amount > 0 {
			b.WriteString(" (its floor)")
		}
	}
	if !l.linked {
		b.WriteString("; cut off from control, it has its floor alone when its lease is over")
	} else if !l.welcomed {
		b.WriteString("; the leader of the control servers has not answered yet")
	}
	return b.String()
}

// Explain words what a gate lets pass.
func (l *Limits) Explain(id schedule.GateID) (engine.Hold, bool) {
	lim := l.table.Load().byNumber[lease.LimitID(id.Number)]
	if id.Owner != Owner || lim == nil {
		return engine.Hold{}, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now, at := time.Now(), l.cfg.Clock()
	wait := time.Duration(-1)
	if lim.rights != nil && lim.Kind == lease.Rate {
		_, wait = lim.rights.Peek(at, 1)
	}
	h := hold(lim, now, wait)
	h.Text = l.words(lim, now, at)
	return h, true
}

// maxSeries bounds the limits that are shown as metrics.
const maxSeries = 1000

// collector exports limits, by name and what they count.
type collector struct{ l *Limits }

var (
	descShare  = prometheus.NewDesc("relais_relay_limit_share", "What this relay may use of a shared limit now: messages in the limit's span, or connections.", []string{"limit", "counts"}, nil)
	descFloor  = prometheus.NewDesc("relais_relay_limit_floor", "The part of that which it has when it is cut off.", []string{"limit", "counts"}, nil)
	descDemand = prometheus.NewDesc("relais_relay_limit_waiting_recipients", "Recipients known to be due that a shared limit counts.", []string{"limit", "counts"}, nil)
	descUsed   = prometheus.NewDesc("relais_relay_limit_used_total", "Messages begun, or connections opened, under a shared limit.", []string{"limit", "counts"}, nil)
	descDenied = prometheus.NewDesc("relais_relay_limit_denied_total", "Times that a shared limit refused work where it was to begin.", []string{"limit", "counts"}, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descShare, descFloor, descDemand, descUsed, descDenied} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	l := c.l
	limits := l.table.Load().limits
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.cfg.Clock()
	for _, lim := range limits[:min(len(limits), maxSeries)] {
		unit := 1.0
		if lim.Kind == lease.Rate {
			unit = lease.Milli
		}
		usable, floor := lim.usable(now), lease.Share{}
		if lim.rights != nil {
			_, _, floor = lim.rights.Lease()
		}
		gauge := func(d *prometheus.Desc, kind prometheus.ValueType, v float64) {
			out <- prometheus.MustNewConstMetric(d, kind, v, lim.Name, lim.Counts())
		}
		gauge(descShare, prometheus.GaugeValue, float64(usable.Amount)/unit)
		gauge(descFloor, prometheus.GaugeValue, float64(floor.Amount)/unit)
		gauge(descDemand, prometheus.GaugeValue, float64(lim.waiting))
		gauge(descUsed, prometheus.CounterValue, float64(lim.used))
		gauge(descDenied, prometheus.CounterValue, float64(lim.denied))
	}
}
