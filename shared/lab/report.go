package lab

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Report is what the farm saw so far.
type Report struct {
	Seed    uint64    `json:"seed"`
	Mode    Mode      `json:"mode"`
	Started time.Time `json:"started"`
	At      time.Time `json:"at"`

	Accepted   int64 `json:"accepted"`   // messages
	Recipients int64 `json:"recipients"` // of accepted messages
	Rejected   int64 `json:"rejected"`   // 5xx: per recipient, or once where the message or connection was refused
	Deferred   int64 `json:"deferred"`   // 4xx, counted the same way
	Dropped    int64 `json:"dropped"`    // connections a provider closed without a reply
	NullSender int64 `json:"null_sender"`

	Duplicated        int64 `json:"duplicated"`           // arrivals of a (Message-ID, recipient) beyond its first
	DuplicatedExcused int64 `json:"duplicated_excused"`   // of those, after a copy whose 250 was withheld
	WithoutMessageID  int64 `json:"without_message_id"`   // recipients whose mail had none: not in Duplicated
	Untracked         int64 `json:"untracked_recipients"` // beyond what the lab keeps count of

	DKIM           DKIMReport      `json:"dkim"`
	LimitBreaches  int64           `json:"limit_breaches"`
	Breaches       []Breach        `json:"breaches"` // at most 1000 per provider
	ProtocolFaults []ProtocolFault `json:"protocol_faults"`
	Lanes          []LaneReport    `json:"lanes"`
	DNSQueries     int64           `json:"dns_queries"`
}

// DKIMReport counts verdicts. They lag behind acceptance: Complete says that
// every accepted mail has one.
type DKIMReport struct {
	Enabled  bool  `json:"enabled"`
	Pass     int64 `json:"pass"`
	Fail     int64 `json:"fail"`
	None     int64 `json:"none"`
	Pending  int64 `json:"pending"`
	Complete bool  `json:"complete"`
}

// ProtocolFault is something SMTP forbids that a client did.
type ProtocolFault struct {
	Provider string     `json:"provider"`
	Kind     string     `json:"kind"`
	Count    int64      `json:"count"`
	Source   netip.Addr `json:"source"` // of the last one
	Detail   string     `json:"detail,omitempty"`
}

// LaneReport is what one source address did at one provider.
type LaneReport struct {
	Source           netip.Addr `json:"source"`
	Provider         string     `json:"provider"`
	Hello            []string   `json:"hello"`
	Connections      int64      `json:"connections"`
	ConnectionsNow   int        `json:"connections_now"`
	MaxConnections   int        `json:"max_connections"`
	MaxPerConnection int        `json:"max_messages_per_connection"`
	Accepted         int64      `json:"accepted"`
	OverTLS          int64      `json:"accepted_over_tls"`
	Recipients       int64      `json:"recipients"`
	Rejected         int64      `json:"rejected"`
	Deferred         int64      `json:"deferred"`
	Dropped          int64      `json:"dropped"`
	PeakPerSecond    uint32     `json:"peak_per_second"`
	Breaches         int64      `json:"breaches"`
}

// Arrivals is the histogram of one lane: accepted messages in each second
// since the lab started.
type Arrivals struct {
	Source    netip.Addr `json:"source"`
	Provider  string     `json:"provider"`
	PerSecond []uint32   `json:"per_second"`
}

// Report returns what the farm saw so far. Counters of different lanes are
// read one after the other, not at one instant.
func (l *Lab) Report() Report {
	r := Report{
		Seed: l.cfg.Seed, Mode: l.cfg.Mode, Started: l.start, At: time.Now(),
		Breaches: []Breach{}, ProtocolFaults: []ProtocolFault{}, Lanes: []LaneReport{},
		DNSQueries: l.dns.total.Load(),
	}
	for _, p := range l.farm.order {
		for _, lane := range p.report(&r) {
			lr := lane.report()
			lr.Provider = p.profile.Name
			r.Accepted += lr.Accepted
			r.Recipients += lr.Recipients
			r.Rejected += lr.Rejected
			r.Deferred += lr.Deferred
			r.Dropped += lr.Dropped
			r.Lanes = append(r.Lanes, lr)
		}
	}
	slices.SortFunc(r.Breaches, func(a, b Breach) int { return a.At.Compare(b.At) })
	slices.SortFunc(r.ProtocolFaults, func(a, b ProtocolFault) int {
		return cmp.Or(cmp.Compare(a.Provider, b.Provider), cmp.Compare(a.Kind, b.Kind))
	})
	slices.SortFunc(r.Lanes, func(a, b LaneReport) int {
		return cmp.Or(cmp.Compare(a.Provider, b.Provider), a.Source.Compare(b.Source))
	})
	l.deliveries.report(&r)
	if v := l.verifier; v != nil {
		// What is verified is read before what was accepted: Pending may be
		// one too many for a moment, never one too few.
		d := DKIMReport{Enabled: true, Pass: v.pass.Load(), Fail: v.fail.Load(), None: v.none.Load()}
		for _, p := range l.farm.order {
			d.Pending += int64(p.store.count())
		}
		d.Pending -= d.Pass + d.Fail + d.None
		d.Complete = d.Pending == 0
		r.DKIM = d
	}
	return r
}

// report adds a provider's own lists to r and returns its lanes.
func (p *provider) report(r *Report) []*lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.LimitBreaches += p.breached
	r.Breaches = append(r.Breaches, p.breaches...)
	for _, f := range p.faults {
		r.ProtocolFaults = append(r.ProtocolFaults, *f)
	}
	lanes := make([]*lane, 0, len(p.lanes))
	for _, l := range p.lanes {
		lanes = append(lanes, l)
	}
	return lanes
}

func (l *lane) report() LaneReport {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := LaneReport{
		Source: l.source, Hello: slices.Clone(l.helo),
		Connections: l.connections, ConnectionsNow: l.open, MaxConnections: l.maxOpen, MaxPerConnection: l.maxPerConn,
		Accepted: l.accepted, OverTLS: l.overTLS, Recipients: l.recipients,
		Rejected: l.rejected, Deferred: l.deferred, Dropped: l.dropped, Breaches: l.breaches,
	}
	if len(l.arrivals) > 0 {
		r.PeakPerSecond = slices.Max(l.arrivals)
	}
	return r
}

func (d *deliveries) report(r *Report) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r.Duplicated, r.DuplicatedExcused = d.extra, d.excused
	r.WithoutMessageID, r.Untracked, r.NullSender = d.withoutID, d.untracked, d.nullSender
}

// Arrivals returns the histograms of all lanes, ordered as in Report.
func (l *Lab) Arrivals() []Arrivals {
	var out []Arrivals
	for _, p := range l.farm.order {
		p.mu.Lock()
		for _, lane := range p.lanes {
			lane.mu.Lock()
			out = append(out, Arrivals{Source: lane.source, Provider: p.profile.Name, PerSecond: slices.Clone(lane.arrivals)})
			lane.mu.Unlock()
		}
		p.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b Arrivals) int {
		return cmp.Or(cmp.Compare(a.Provider, b.Provider), a.Source.Compare(b.Source))
	})
	return out
}
