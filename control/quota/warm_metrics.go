package quota

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
)

// maxWarmSeries bounds the subjects times classes that are shown; those that began
// to warm up first are.
const maxWarmSeries = 1000

var (
	ofSubject        = []string{"kind", "subject"}
	ofClass          = []string{"kind", "subject", "class"}
	descWarmQuota    = prometheus.NewDesc("relais_control_warmup_quota_recipients", "Recipients that may be sent to on the present day.", ofClass, nil)
	descWarmReserved = prometheus.NewDesc("relais_control_warmup_reserved_recipients", "Recipients of it that relays have reserved, or spent.", ofClass, nil)
	descWarmUsed     = prometheus.NewDesc("relais_control_warmup_used_recipients", "Recipients of it that relays have told to be spent.", ofClass, nil)
	descWarmStage    = prometheus.NewDesc("relais_control_warmup_stage", "The stage of the plan.", ofClass, nil)
	descWarmDay      = prometheus.NewDesc("relais_control_warmup_day", "The day of the warm-up; its first is 1.", ofSubject, nil)
	descWarmHeld     = prometheus.NewDesc("relais_control_warmup_held", "1 while an operator holds the warm-up at its stages.", ofSubject, nil)
	descWarmStart    = prometheus.NewDesc("relais_control_warmup_day_start_seconds", "Unix time at which the present day began.", nil, nil)
	descWarmSubjects = prometheus.NewDesc("relais_control_warmup_subjects", "What warms up, by kind.", []string{"kind"}, nil)
	descWarmLeftOut  = prometheus.NewDesc("relais_control_warmup_left_out", "Subjects and classes that are not shown, for there are too many.", nil, nil)
)

// Describe implements prometheus.Collector.
func (w *Warm) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descWarmQuota, descWarmReserved, descWarmUsed, descWarmStage, descWarmDay, descWarmHeld, descWarmStart, descWarmSubjects, descWarmLeftOut} {
		out <- d
	}
}

// Collect implements prometheus.Collector: what the ledger has of today, on the
// server that leads.
func (w *Warm) Collect(out chan<- prometheus.Metric) {
	if !w.leads.Load() {
		return
	}
	r := w.o.State.Read()
	cal := r.WarmCalendar()
	if cal == nil {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descWarmStart, float64(cal.Today.Date().Unix()))
	kinds := map[control.WarmKind]int{}
	shown, leftOut := 0, 0
	for _, s := range r.WarmSubjects() {
		if !s.Warms() {
			continue
		}
		kinds[s.Kind]++
		if shown+len(s.Tracks) > maxWarmSeries {
			leftOut += len(s.Tracks)
			continue
		}
		shown += len(s.Tracks)
		kind, name := string(s.Kind), r.WarmName(s)
		gauge(descWarmDay, float64(cal.Today-s.StartDay+1), kind, name)
		held := 0.0
		if s.Hold != "" {
			held = 1
		}
		gauge(descWarmHeld, held, kind, name)
		day := r.WarmDay(s, cal.Today)
		for i := range s.Tracks {
			t := &s.Tracks[i]
			class := cal.ClassName(t.Class)
			quota, reserved, used := day.Totals(s.Number, t.Class, cal.Today)
			gauge(descWarmQuota, float64(quota), kind, name, class)
			gauge(descWarmReserved, float64(reserved), kind, name, class)
			gauge(descWarmUsed, float64(used), kind, name, class)
			gauge(descWarmStage, float64(t.Stage), kind, name, class)
		}
	}
	for _, kind := range control.WarmKinds {
		gauge(descWarmSubjects, float64(kinds[control.WarmKind(kind)]), kind)
	}
	gauge(descWarmLeftOut, float64(leftOut))
}
