package telemetry

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of the server. A CPU profile may take as long as responseTimeout.
const (
	maxConnections      = 64
	maxHeaderBytes      = 64 << 10
	headerTimeout       = 10 * time.Second
	responseTimeout     = 5 * time.Minute
	idleTimeout         = 2 * time.Minute
	shutdownTimeout     = 2 * time.Second
	maxScrapesInFlight  = 4
	maxScrapeTime       = 30 * time.Second
	contentTypeJSON     = "application/json; charset=utf-8"
	contentTypePlain    = "text/plain; charset=utf-8"
	maxProfilesInFlight = 2
)

// NewRegistry returns a registry that already holds the metrics of the Go
// runtime, the process, the build (relais_SIDE_build_info) and the health.
// Side is "relay" or "control".
func NewRegistry(side string, h *Health) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := buildinfo.Get()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "relais_" + side + "_build_info",
		Help:        "Always 1; the labels describe the running build.",
		ConstLabels: prometheus.Labels{"version": info.Version, "revision": info.Revision, "go": info.Go},
	})
	build.Set(1)
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build, h.Collector(side))
	return reg
}

// Handler serves
//
//	/metrics       Prometheus metrics
//	/healthz       200 as long as the process answers at all
//	/readyz        200 when the node takes work, else 503 and the reason
//	/health        all checks as JSON; 503 when one is critical
//	/debug/pprof/  profiles
//
// It shows no secret, but profiles and metrics tell a lot: serve it on
// loopback only.
func Handler(metrics prometheus.Gatherer, h *Health, logger *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelError), ErrorHandling: promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapesInFlight, Timeout: maxScrapeTime,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if ok, why := h.Ready(); !ok {
			plain(w, http.StatusServiceUnavailable, "not ready: "+why)
			return
		}
		plain(w, http.StatusOK, "ready")
	})
	mux.HandleFunc("GET /health", h.serve)
	profiles := make(chan struct{}, maxProfilesInFlight)
	bounded := func(f http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			select {
			case profiles <- struct{}{}:
				defer func() { <-profiles }()
				f(w, r)
			default:
				plain(w, http.StatusTooManyRequests, "other profiles are being taken, try again")
			}
		}
	}
	mux.HandleFunc("GET /debug/pprof/", bounded(pprof.Index))
	mux.HandleFunc("GET /debug/pprof/cmdline", bounded(pprof.Cmdline))
	mux.HandleFunc("GET /debug/pprof/profile", bounded(pprof.Profile))
	mux.HandleFunc("GET /debug/pprof/symbol", bounded(pprof.Symbol))
	mux.HandleFunc("GET /debug/pprof/trace", bounded(pprof.Trace))
	return mux
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", contentTypePlain)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text + "\n")) // the peer may be gone
}

// report is the answer of /health.
type report struct {
	Status        Severity       `json:"status"` // the worst of the checks
	Ready         bool           `json:"ready"`
	NotReady      string         `json:"not_ready,omitempty"`
	Build         buildinfo.Info `json:"build"`
	UptimeSeconds int64          `json:"uptime_seconds"`
	Checks        []Check        `json:"checks"`
}

func (h *Health) serve(w http.ResponseWriter, _ *http.Request) {
	checks, worst := h.Checks()
	ready, why := h.Ready()
	body, err := json.MarshalIndent(report{
		Status: worst, Ready: ready, NotReady: why, Build: buildinfo.Get(),
		UptimeSeconds: int64(h.now().Sub(h.up) / time.Second), Checks: checks,
	}, "", "  ")
	if err != nil {
		plain(w, http.StatusInternalServerError, "the health cannot be written")
		return
	}
	w.Header().Set("Content-Type", contentTypeJSON)
	w.Header().Set("Cache-Control", "no-store")
	if worst == Critical {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = w.Write(append(body, '\n')) // the peer may be gone
}

// Serve answers on a listener until ctx ends; it then lets running answers
// finish for two seconds, cuts the rest off and returns nil. It closes the
// listener.
func Serve(ctx context.Context, ln net.Listener, handler http.Handler, logger *slog.Logger) error {
	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headerTimeout, ReadTimeout: headerTimeout,
		WriteTimeout: responseTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		ErrorLog:       slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(netutil.LimitListener(ln, maxConnections)) }()
	select {
	case err := <-done:
		return fault.Wrap(err, fault.Unavailable, "telemetry.Serve", "the metrics listener %v failed", ln.Addr())
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil {
		_ = srv.Close() // only running profiles are left
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fault.Wrap(err, fault.Unavailable, "telemetry.Serve", "the metrics listener %v failed", ln.Addr())
	}
	return nil
}
