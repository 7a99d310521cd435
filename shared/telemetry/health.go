package telemetry

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Severity grades a health check.
type Severity uint8

// The severities.
const (
	OK       Severity = 0
	Warning  Severity = 1 // works, but a person should look at it
	Critical Severity = 2 // does not do its work
)

var severityNames = [...]string{"ok", "warning", "critical"}

// String returns the name of the severity.
func (s Severity) String() string {
	if int(s) < len(severityNames) {
		return severityNames[s]
	}
	return "?"
}

// MarshalText implements encoding.TextMarshaler.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Bounds of what health holds.
const (
	maxChecks       = 256
	maxMessageBytes = 1024
)

// Check is the state of one named check.
type Check struct {
	Name     string    `json:"name"` // lower-case words joined by hyphens: "queue-space"
	Severity Severity  `json:"severity"`
	Message  string    `json:"message,omitempty"` // what is wrong and what helps; holds no secret
	Since    time.Time `json:"since"`             // when the severity last changed
}

// Health gathers the checks of a node. Parts of the node set theirs when
// something changes, or are asked at each look. It is safe for use by many
// goroutines.
type Health struct {
	now func() time.Time
	up  time.Time

	mu       sync.Mutex
	checks   map[string]Check
	watches  map[string]func() (Severity, string)
	ready    bool
	notReady string
	idle     func() string // why the node takes no work although it is ready; nil: nobody says so
}

// NewHealth returns the health of a node that is not ready yet.
func NewHealth(now func() time.Time) *Health {
	return &Health{
		now: now, up: now(), notReady: "starting",
		checks: make(map[string]Check), watches: make(map[string]func() (Severity, string)),
	}
}

// Set states a check. The message says what is wrong and what helps.
func (h *Health) Set(name string, s Severity, message string, args ...any) {
	if len(args) > 0 {
		message = fmt.Sprintf(message, args...)
	}
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.set(name, s, message, now)
}

func (h *Health) set(name string, s Severity, message string, now time.Time) {
	if len(message) > maxMessageBytes {
		message = strings.ToValidUTF8(message[:maxMessageBytes], "") + "…"
	}
	old, known := h.checks[name]
	if !known && len(h.checks) >= maxChecks {
		// Names come from code, so this is a defect; say so where it is seen.
		name, s, message = "health-checks", Critical, "a part made more checks than the node can hold; report this defect"
		old, known = h.checks[name]
	}
	c := Check{Name: name, Severity: s, Message: message, Since: now}
	if known && old.Severity == s {
		c.Since = old.Since
	}
	h.checks[name] = c
}

// Clear removes a check whose subject is gone.
func (h *Health) Clear(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.checks, name)
	delete(h.watches, name)
}

// Watch asks f at each look at the health. It must answer at once and must not
// call Health.
func (h *Health) Watch(name string, f func() (Severity, string)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.watches) < maxChecks {
		h.watches[name] = f
	}
}

// SetReady says whether the node takes work; why tells the reason when it does
// not. A node that drains is not ready and healthy.
func (h *Health) SetReady(ready bool, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ready, h.notReady = ready, why
}

// WatchReady asks f at each look whether a node that was set ready takes work
// now; f returns why it does not, empty if it does. It must answer at once and
// must not call Health.
func (h *Health) WatchReady(f func() string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.idle = f
}

// Ready reports whether the node takes work, and the reason when it does not.
func (h *Health) Ready() (bool, string) {
	h.mu.Lock()
	ready, why, idle := h.ready, h.notReady, h.idle
	h.mu.Unlock()
	if !ready {
		return false, why
	}
	if idle != nil { // asked without the lock: it may wait for a lock of its part
		why = idle()
		return why == "", why
	}
	return true, ""
}

// Checks returns all checks, the worst first, and the worst severity.
func (h *Health) Checks() ([]Check, Severity) {
	now := h.now()
	h.mu.Lock()
	watches := make(map[string]func() (Severity, string), len(h.watches))
	for name, f := range h.watches {
		watches[name] = f
	}
	h.mu.Unlock()
	// Asked without the lock: f may wait for a lock of its part.
	answers := make(map[string]Check, len(watches))
	for name, f := range watches {
		s, message := f()
		answers[name] = Check{Severity: s, Message: message}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, a := range answers {
		if h.watches[name] != nil { // not cleared meanwhile
			h.set(name, a.Severity, a.Message, now)
		}
	}
	list := make([]Check, 0, len(h.checks))
	worst := OK
	for _, c := range h.checks {
		list = append(list, c)
		worst = max(worst, c.Severity)
	}
	slices.SortFunc(list, func(a, b Check) int {
		if a.Severity != b.Severity {
			return int(b.Severity) - int(a.Severity)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return list, worst
}

// healthCollector shows the checks as metrics.
type healthCollector struct {
	health   *Health
	severity *prometheus.Desc
	ready    *prometheus.Desc
}

// Collector returns the checks as metrics of a side, "relay" or "control":
// relais_SIDE_health_severity{check} is 0 for ok, 1 for warning, 2 for
// critical; relais_SIDE_ready is 1 when the node takes work.
func (h *Health) Collector(side string) prometheus.Collector {
	return healthCollector{
		health:   h,
		severity: prometheus.NewDesc("relais_"+side+"_health_severity", "Severity of a health check: 0 ok, 1 warning, 2 critical.", []string{"check"}, nil),
		ready:    prometheus.NewDesc("relais_"+side+"_ready", "1 when the node takes work.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c healthCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.severity
	ch <- c.ready
}

// Collect implements prometheus.Collector.
func (c healthCollector) Collect(ch chan<- prometheus.Metric) {
	checks, _ := c.health.Checks()
	for _, k := range checks {
		ch <- prometheus.MustNewConstMetric(c.severity, prometheus.GaugeValue, float64(k.Severity), k.Name)
	}
	ready := 0.0
	if ok, _ := c.health.Ready(); ok {
		ready = 1
	}
	ch <- prometheus.MustNewConstMetric(c.ready, prometheus.GaugeValue, ready)
}
