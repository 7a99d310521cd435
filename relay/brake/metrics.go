package brake

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/reflex"
	"github.com/relais-mta/relais/shared/fault"
)

type metrics struct {
	decreases *prometheus.CounterVec // by provider and signal
}

func newMetrics(reg prometheus.Registerer, k *Keeper) (*metrics, error) {
	m := &metrics{decreases: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "relais_relay_reflex_decreases_total", Help: "Times that a lane was slowed down or held by its reflex, by provider and signal.",
	}, []string{"provider", "signal"})}
	if reg == nil {
		return m, nil
	}
	collectors := []prometheus.Collector{m.decreases, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "relais_relay_brakes", Help: "Brakes of control in force.",
	}, func() float64 { return float64(k.Brakes()) })}
	for _, phase := range []reflex.Phase{reflex.Slowed, reflex.Held, reflex.Probing} {
		collectors = append(collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "relais_relay_reflex_lanes", Help: "Lanes that are slowed down, held or probed by their reflex.", ConstLabels: prometheus.Labels{"phase": phase.String()},
		}, func() float64 { return float64(k.count(phase)) }))
	}
	for _, c := range collectors {
		if err := reg.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, "brake.New", "metrics could not be registered")
		}
	}
	return m, nil
}

func (k *Keeper) count(phase reflex.Phase) (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range k.slowed {
		if l.state.Allowance().Phase == phase {
			n++
		}
	}
	return n
}
