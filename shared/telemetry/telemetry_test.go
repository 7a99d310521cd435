package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/fault"
)

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

// clock is a time that only the test moves.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newHandler(t *testing.T) (*clock, *Health, http.Handler) {
	t.Helper()
	c := &clock{time.Unix(1_700_000_000, 0).UTC()}
	h := NewHealth(c.now)
	return c, h, Handler(NewRegistry("relay", h), h, slog.New(slog.DiscardHandler))
}

func TestReadiness(t *testing.T) {
	_, h, mux := newHandler(t)
	if code, _ := get(t, mux, "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz = %d: a starting node is alive", code)
	}
	if code, body := get(t, mux, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "starting") {
		t.Errorf("/readyz = %d %q, want 503 starting", code, body)
	}
	h.SetReady(true, "")
	if code, _ := get(t, mux, "/readyz"); code != http.StatusOK {
		t.Errorf("/readyz = %d, want 200", code)
	}
	h.SetReady(false, "draining")
	if code, body := get(t, mux, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "draining") {
		t.Errorf("/readyz = %d %q, want 503 draining", code, body)
	}
}

func TestHealthReport(t *testing.T) {
	c, h, mux := newHandler(t)
	began := c.t
	h.Set("queue-space", OK, "")
	h.Set("control-link", Warning, "no contact for %s", "1m0s")
	state := OK
	h.Watch("clock", func() (Severity, string) { return state, "asked" })

	type answer struct {
		Status, NotReady string
		Ready            bool
		UptimeSeconds    int64 `json:"uptime_seconds"`
		Build            struct{ Version string }
		Checks           []struct {
			Name, Severity, Message string
			Since                   time.Time
		}
	}
	look := func() (int, answer) {
		t.Helper()
		code, body := get(t, mux, "/health")
		var a answer
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
		return code, a
	}

	c.t = began.Add(90 * time.Second)
	code, a := look()
	if code != http.StatusOK || a.Status != "warning" || a.UptimeSeconds != 90 || a.Build.Version == "" || len(a.Checks) != 3 {
		t.Fatalf("%d %+v", code, a)
	}
	if first := a.Checks[0]; first.Name != "control-link" || first.Message != "no contact for 1m0s" || !first.Since.Equal(began) {
		t.Errorf("the worst check comes first: %+v", first)
	}

	h.Set("control-link", Warning, "still away")
	state = Critical
	c.t = began.Add(2 * time.Minute)
	code, a = look()
	if code != http.StatusServiceUnavailable || a.Status != "critical" || a.Checks[0].Name != "clock" || !a.Checks[0].Since.Equal(c.t) {
		t.Errorf("%d %+v", code, a)
	}
	if link := a.Checks[1]; link.Message != "still away" || !link.Since.Equal(began) {
		t.Errorf("since moves only with the severity: %+v", link)
	}
	h.Clear("clock")
	h.Clear("control-link")
	if code, a = look(); code != http.StatusOK || a.Status != "ok" || len(a.Checks) != 1 {
		t.Errorf("after clear: %d %+v", code, a)
	}
}

func TestHealthIsBounded(t *testing.T) {
	_, h, _ := newHandler(t)
	for i := range maxChecks + 10 {
		h.Set(fmt.Sprintf("check-%d", i), OK, "")
	}
	checks, worst := h.Checks()
	if len(checks) > maxChecks+1 || worst != Critical || checks[0].Name != "health-checks" {
		t.Errorf("%d checks, worst %v, first %+v", len(checks), worst, checks[0])
	}
	h.Set("check-0", Warning, strings.Repeat("é", maxMessageBytes))
	checks, _ = h.Checks()
	if n := len(checks[1].Message); n > maxMessageBytes+len("…") {
		t.Errorf("a message of %d bytes was kept", n)
	}
}

func TestMetrics(t *testing.T) {
	c := &clock{time.Unix(1_700_000_000, 0)}
	h := NewHealth(c.now)
	h.Set("queue-space", Critical, "full")
	h.SetReady(true, "")
	reg := NewRegistry("control", h)
	n := prometheus.NewCounter(prometheus.CounterOpts{Name: "relais_control_things_total", Help: "Things."})
	reg.MustRegister(n)
	n.Add(3)
	_, body := get(t, Handler(reg, h, slog.New(slog.DiscardHandler)), "/metrics")
	for _, want := range []string{
		"relais_control_things_total 3", `relais_control_health_severity{check="queue-space"} 2`, "relais_control_ready 1",
		"relais_control_build_info{", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("metrics lack %q", want)
		}
	}
}

func TestOnlyKnownPaths(t *testing.T) {
	_, _, mux := newHandler(t)
	for _, path := range []string{"/", "/metrics/x", "/debug", "/debug/vars"} {
		if code, _ := get(t, mux, path); code != http.StatusNotFound {
			t.Errorf("%s = %d, want 404", path, code)
		}
	}
	if code, body := get(t, mux, "/debug/pprof/goroutine?debug=1"); code != http.StatusOK || !strings.Contains(body, "goroutine profile") {
		t.Errorf("goroutine profile: %d", code)
	}
}

func TestServeUntilCancelled(t *testing.T) {
	_, h, mux := newHandler(t)
	h.SetReady(true, "")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, mux, slog.New(slog.DiscardHandler)) }()
	resp, err := http.Get("http://" + ln.Addr().String() + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || resp.StatusCode != http.StatusOK || string(body) != "ready\n" {
		t.Errorf("%d %q %v", resp.StatusCode, body, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve returned %v after its context ended", err)
	}
	if err := ln.(*net.TCPListener).SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) { // its port may be another program's by now
		t.Errorf("the listener is still open: %v", err)
	}
}

// TestReadyIsAsked takes a node that runs out of work and into it again.
func TestReadyIsAsked(t *testing.T) {
	h := NewHealth(time.Now)
	why := "the disk is full"
	h.WatchReady(func() string { return why })
	if ok, got := h.Ready(); ok || got != "starting" {
		t.Errorf("while it starts: %v %q", ok, got)
	}
	h.SetReady(true, "")
	if ok, got := h.Ready(); ok || got != why {
		t.Errorf("with a full disk: %v %q", ok, got)
	}
	why = ""
	if ok, got := h.Ready(); !ok || got != "" {
		t.Errorf("afterwards: %v %q", ok, got)
	}
	why = "drains"
	h.SetReady(false, "stopping")
	if ok, got := h.Ready(); ok || got != "stopping" {
		t.Errorf("while it stops: %v %q", ok, got)
	}
}

func TestServeTellsWhyItStopped(t *testing.T) {
	_, _, mux := newHandler(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	if err := Serve(context.Background(), ln, mux, slog.New(slog.DiscardHandler)); !fault.Is(err, fault.Unavailable) {
		t.Errorf("Serve on a closed listener: %v", err)
	}
}

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	var level slog.LevelVar
	log := NewLogger(&out, &level)
	log.Debug("hidden")
	log.Info("shown", "message", "msg_1")
	level.Set(slog.LevelDebug)
	log.Debug("now shown")
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %s", len(lines), out.String())
	}
	var rec map[string]any
	if err := json.Unmarshal([]byte(lines[0]), &rec); err != nil || rec["message"] != "msg_1" || rec["level"] != "INFO" || !strings.HasSuffix(rec["time"].(string), "Z") {
		t.Errorf("%v in %s", err, lines[0])
	}
	for text, want := range map[string]slog.Level{"debug": slog.LevelDebug, "INFO": slog.LevelInfo, "Warn": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := ParseLevel(text); err != nil || got != want {
			t.Errorf("ParseLevel(%q) = %v, %v", text, got, err)
		}
	}
	if _, err := ParseLevel("loud"); !fault.Is(err, fault.Invalid) {
		t.Errorf("ParseLevel(loud): %v", err)
	}
}
