package queue

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

type queueMetrics struct {
	accepted     prometheus.Counter
	messagesDone prometheus.Counter
	finished     *prometheus.CounterVec
	results      [relay.StateMoved + 1]prometheus.Counter
	inDoubt      prometheus.Counter
	violations   prometheus.Counter
	orphans      prometheus.Counter
	pages        prometheus.Counter
	trims        prometheus.Counter
}

func newMetrics() *queueMetrics {
	count := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_relay_queue_" + name, Help: help})
	}
	m := &queueMetrics{
		accepted:     count("accepted_recipients_total", "Recipients taken over."),
		messagesDone: count("finished_messages_total", "Messages whose last recipient became final."),
		finished:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "relais_relay_queue_results_total", Help: "Recorded states of recipients."}, []string{"state"}),
		inDoubt:      count("in_doubt_recipients_total", "Recipients whose last attempt's end a crash hid."),
		violations:   count("violations_total", "Broken invariants; anything but 0 is a defect."),
		orphans:      count("orphans_total", "Waiting recipients without a message, removed; anything but 0 is a defect."),
		pages:        count("pages_total", "Reads of a work queue's head from disk."),
		trims:        count("trims_total", "Times that windows were cut to stay within max_memory_recipients."),
	}
	for s := range m.results {
		m.results[s] = m.finished.WithLabelValues(relay.State(s).String())
	}
	return m
}

func (q *Queue) register(r prometheus.Registerer) error {
	gauge := func(name, help string, value func(Summary) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_relay_queue_" + name, Help: help}, func() float64 { return value(q.Summary()) })
	}
	m := q.metrics
	for _, c := range []prometheus.Collector{
		m.accepted, m.messagesDone, m.finished, m.inDoubt, m.violations, m.orphans, m.pages, m.trims,
		gauge("waiting_recipients", "Recipients with a next time.", func(s Summary) float64 { return float64(s.Waiting) }),
		gauge("held_recipients", "Held recipients, which wait for a person or the end of a rule.", func(s Summary) float64 { return float64(s.Held) }),
		gauge("set_aside_messages", "Damaged messages that are passed over until relais-relay queue fsck repairs them.", func(s Summary) float64 { return float64(s.SetAside) }),
		gauge("memory_recipients", "Waiting recipients in memory.", func(s Summary) float64 { return float64(s.InMemory) }),
		gauge("in_flight_recipients", "Recipients being tried.", func(s Summary) float64 { return float64(s.InFlight) }),
		gauge("work_queues", "Work queues in the table.", func(s Summary) float64 { return float64(s.Queues) }),
		gauge("oldest_overdue_seconds", "How long the most overdue message outlived its deadline.", func(s Summary) float64 { return s.OldestOverdue.Seconds() }),
	} {
		if err := r.Register(c); err != nil {
			return fault.Wrap(err, fault.Internal, "queue.Open", "metrics are registered twice")
		}
	}
	return nil
}
