package handover

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/ids"
)

// maxNamed is how many relays or problems a text names.
const maxNamed = 3

// Status says how far giving is.
type Status struct {
	Given     uint64 // recipients handed over since the start
	PerSecond uint64 // of late
	Flying    int    // messages offered to other relays that are not answered
	Pools     int    // whose mail goes to other relays
}

// Status returns how far giving is.
func (s *Service) Status() Status {
	var out Status
	out.Given, out.PerSecond = s.given.read(s.cfg.Now())
	out.Pools = len(s.plan.Load().wanted)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.workers {
		w.mu.Lock()
		out.Flying += w.flying
		w.mu.Unlock()
	}
	return out
}

// Problem says what keeps mail from going to other relays, one sentence; empty:
// nothing does.
func (s *Service) Problem() string {
	p := s.plan.Load()
	var said []string
	s.mu.Lock()
	defer s.mu.Unlock()
	for node, w := range s.workers {
		w.mu.Lock()
		if w.problem != "" && len(said) < maxNamed {
			said = append(said, "relay "+p.name(node)+": "+w.problem)
		}
		w.mu.Unlock()
	}
	slices.Sort(said)
	return strings.Join(said, "; ")
}

func (p *plan) name(node ids.Node) string {
	if peer := p.peers[node]; peer != nil && peer.Name != "" {
		return peer.Name
	}
	return node.String()
}

// Explanation says where a pool's mail goes.
type Explanation struct {
	Text  string
	Since time.Time
}

// Explain says to which relays a pool's mail is handed over, and why it waits.
// False: it is not.
func (s *Service) Explain(pool ids.Pool) (Explanation, bool) {
	p := s.plan.Load()
	peers := p.wanted[pool]
	if len(peers) == 0 {
		return Explanation{}, false
	}
	names := make([]string, 0, maxNamed)
	var problems []string
	for i, peer := range peers {
		if i < maxNamed {
			names = append(names, peer.Name)
		}
		s.mu.Lock()
		w := s.workers[peer.Node]
		s.mu.Unlock()
		if w == nil || len(problems) == maxNamed {
			continue
		}
		w.mu.Lock()
		if w.problem != "" {
			text := "relay " + peer.Name + ": " + w.problem
			if !w.linked && w.again.After(s.cfg.Now()) {
				text += ", tried again at " + w.again.UTC().Format(time.RFC3339)
			}
			problems = append(problems, text)
		}
		w.mu.Unlock()
	}
	more := ""
	if n := len(peers) - len(names); n > 0 {
		more = fmt.Sprintf(" or one of %d others", n)
	}
	why := "no source address of the pool can be used here"
	if p.draining {
		why = "this relay drains"
	}
	x := Explanation{Text: "it is handed over to relay " + strings.Join(names, " or ") + more + ", because " + why, Since: p.since[pool]}
	if len(problems) > 0 {
		x.Text += "; " + strings.Join(problems, "; ")
	}
	return x, true
}

// Flight says to which relay a message is on its way. False: to none.
func (s *Service) Flight(id ids.Message) (Explanation, bool) {
	node, ok := s.cfg.Queue.Giving(id)
	if !ok {
		return Explanation{}, false
	}
	name := s.plan.Load().name(node)
	x := Explanation{Text: "it was offered to relay " + name + ", whose answer is awaited"}
	s.mu.Lock()
	w := s.workers[node]
	s.mu.Unlock()
	if w != nil {
		w.mu.Lock()
		if w.problem != "" {
			x.Text += ": " + w.problem
		}
		w.mu.Unlock()
	}
	return x, true
}

type metrics struct {
	given      prometheus.Counter
	givenBytes prometheus.Counter
	returned   *prometheus.CounterVec
	refused    *prometheus.CounterVec
	taken      prometheus.Counter
	gauges     []prometheus.Collector
}

func newMetrics(s *Service) *metrics {
	count := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_handover_" + name, Help: help})
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_relay_handover_" + name, Help: help}, value)
	}
	return &metrics{
		given:      count("given_messages_total", "Messages that another relay has taken."),
		givenBytes: count("given_bytes_total", "Bytes of messages that another relay has taken."),
		returned:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_relay_handover_returned_messages_total", Help: "Messages offered to another relay that stay here, by reason (refused, settled, in-doubt)."}, []string{"reason"}),
		refused:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_relay_handover_refused_messages_total", Help: "Messages that another relay refused, by what it refuses (message, pool, relay)."}, []string{"what"}),
		taken:      count("taken_messages_total", "Messages of other relays that are on stable storage here."),
		gauges: []prometheus.Collector{
			gauge("offered_messages", "Messages offered to other relays and not answered.", func() float64 { return float64(s.Status().Flying) }),
			gauge("pools", "Pools whose mail goes to other relays.", func() float64 { return float64(s.Status().Pools) }),
			gauge("takers", "Relays that hand over mail to this one.", func() float64 {
				s.mu.Lock()
				defer s.mu.Unlock()
				return float64(len(s.takers))
			}),
		},
	}
}

func (m *metrics) all() []prometheus.Collector {
	return append([]prometheus.Collector{m.given, m.givenBytes, m.returned, m.refused, m.taken}, m.gauges...)
}
