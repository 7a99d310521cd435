package fleet

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// Event is one event of a relay, as its admin socket tells it.
type Event struct {
	Seq       uint64    `json:"seq"`
	Type      string    `json:"type"`
	At        time.Time `json:"at"`
	Message   string    `json:"message"`
	Recipient uint16    `json:"recipient"`
	Address   string    `json:"address"`
	Provider  string    `json:"provider"`
	Class     string    `json:"class"`
	Actor     string    `json:"actor"`
	Reply     string    `json:"reply"`
}

// Final reports whether the event ends its recipient.
func (e *Event) Final() bool {
	switch e.Type {
	case "delivered", "bounced", "expired", "unknown", "purged":
		return true
	}
	return false
}

// QueueSummary is a relay's queue in numbers.
type QueueSummary struct {
	Waiting  int64 `json:"waiting"` // recipients, those being delivered included
	InFlight int64 `json:"in_flight"`
	Counted  *bool `json:"counted"` // false: Waiting lacks what was there at the start; nil: of a release that does not tell
}

// Events returns the events behind after, oldest first, as many as one answer holds.
func (r *Relay) Events(ctx context.Context, after uint64) ([]Event, error) {
	var events []Event
	err := r.ask(ctx, "/v1/events?after="+strconv.FormatUint(after, 10), &events)
	return events, err
}

// countTimeout bounds the wait for a relay that counts what is on its disk.
const countTimeout = 60 * time.Second

// Queue returns the queue in numbers. A relay that was started a moment ago is
// still counting what it had: its numbers are waited for, since without them a
// full queue looks empty.
func (r *Relay) Queue(ctx context.Context) (QueueSummary, error) {
	ctx, cancel := context.WithTimeout(ctx, countTimeout)
	defer cancel()
	for {
		var s QueueSummary
		if err := r.ask(ctx, "/v1/queue/summary", &s); err != nil || s.Counted == nil || *s.Counted {
			return s, err
		}
		select {
		case <-ctx.Done():
			return s, fault.New(fault.Timeout, "fleet.Queue", "%s has not counted its queue", r.Name)
		case <-time.After(pollInterval):
		}
	}
}

func (r *Relay) ask(ctx context.Context, path string, v any) error {
	const op = "fleet.ask"
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(r.Dir, "admin.sock"))
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://relay"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, op, "%s does not answer on its admin socket", r.Name)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16*maxOutputBytes))
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "%s broke off its answer", r.Name)
	}
	if resp.StatusCode != http.StatusOK {
		return fault.New(fault.Internal, op, "%s answered %s: %.200s", r.Name, resp.Status, body)
	}
	return json.Unmarshal(body, v)
}
