package engine

import (
	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/schedule"
)

// Observer is an Admitter that is told the end of every attempt at a host, those
// included that did not get as far as a session. It must not block and must not
// keep the attempt.
type Observer interface {
	Observe(a *relay.Attempt)
}

// Describer is an Admitter that has something to say about lanes.
type Describer interface {
	DescribeLane(lane schedule.Lane) string
}

func (e *Engine) observe(a *relay.Attempt) {
	if a.Source.IsZero() {
		return // it had no lane
	}
	for _, admit := range e.cfg.Admit {
		if o, ok := admit.(Observer); ok {
			o.Observe(a)
		}
	}
}

func (e *Engine) describe(lane schedule.Lane) string {
	for _, admit := range e.cfg.Admit {
		if d, ok := admit.(Describer); ok {
			if text := d.DescribeLane(lane); text != "" {
				return text
			}
		}
	}
	return ""
}

// ReplyText is a reply as people write it.
func ReplyText(r *relay.Reply) string { return replyText(r) }

// ProviderLabel is what a provider is called in metrics: those without a profile
// share one label.
func ProviderLabel(name string) string { return providerLabel(name) }
