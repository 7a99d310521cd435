// Package telemetry is how a running node is seen from outside: its log, its
// metrics, its health and its profiles. Both binaries use it, so that an
// operator finds the same things at the same places on either.
package telemetry

import (
	"io"
	"log/slog"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// ParseLevel reads "debug", "info", "warn" or "error" in any case.
func ParseLevel(text string) (slog.Level, error) {
	switch strings.ToLower(text) {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fault.Field("telemetry.ParseLevel", "log.level", "is %q, write debug, info, warn or error", text)
}

// NewLogger returns a logger that writes one JSON object a line to w, standard
// error in both binaries. The level may be changed while it runs. Times are in
// UTC, so that logs of several nodes sort together.
func NewLogger(w io.Writer, level slog.Leveler) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey && a.Value.Kind() == slog.KindTime {
				a.Value = slog.TimeValue(a.Value.Time().UTC())
			}
			return a
		},
	}))
}
