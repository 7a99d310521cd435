package submission

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/policy"
)

// TestPriorityOfAMessage: the header orders a message among those of its stream
// and does not go out; what cannot be is refused with the header and its range,
// and the session goes on.
func TestPriorityOfAMessage(t *testing.T) {
	w := newWorld(t, func(v *policy.View) {
		most, least := 60, 10
		for i := range v.Document.Streams.Stream {
			if s := &v.Document.Streams.Stream[i]; s.Name == "bulk" {
				s.MessagePriorityMin, s.MessagePriorityMax = &least, &most
			}
		}
	})
	p := w.login(t)
	for _, tt := range []struct {
		header   string
		priority int    // -1: refused
		reply    string // of a refusal
	}{
		{"", 50, ""},
		{"X-Relais-Priority: 100\n", 100, ""},
		{"x-relais-PRIORITY:\n 0\n", 0, ""},
		{"X-Relais-Priority: 007\n", 7, ""},
		{"X-Relais-Stream: bulk\nX-Relais-Priority: 60\n", 60, ""},
		{"X-Relais-Stream: bulk\n", 50, ""},
		{"X-Relais-Priority: 101\n", -1, "550 5.6.0 X-Relais-Priority: has a whole number from 0 to 100"},
		{"X-Relais-Priority: -1\n", -1, "550 5.6.0 X-Relais-Priority: has a whole number from 0 to 100"},
		{"X-Relais-Priority: high\n", -1, "550 5.6.0 X-Relais-Priority: has a whole number from 0 to 100"},
		{"X-Relais-Priority:\n", -1, "550 5.6.0 X-Relais-Priority: has a whole number from 0 to 100"},
		{"X-Relais-Priority: 80\nX-Relais-Priority: 80\n", -1, "550 5.6.0 X-Relais-Priority: occurs once at most"},
		{"X-Relais-Stream: bulk\nX-Relais-Priority: 61\n", -1, "550 5.6.0 X-Relais-Priority: is from 10 to 60 in mail of stream bulk"},
		{"X-Relais-Stream: bulk\nX-Relais-Priority: 9\n", -1, "550 5.6.0 X-Relais-Priority: is from 10 to 60 in mail of stream bulk"},
	} {
		before := w.spool.count()
		if tt.priority < 0 {
			if got := p.mail(tt.header+goodMessage, "550"); !strings.HasPrefix(got, tt.reply) {
				t.Errorf("%q was answered %q, want %q", tt.header, got, tt.reply)
			}
			if w.spool.count() != before {
				t.Errorf("%q was refused and stored", tt.header)
			}
			continue
		}
		p.mail(tt.header+goodMessage, "250")
		got := w.spool.last(t)
		if n := got.env.Priority.Number(); n != tt.priority || strings.Contains(strings.ToLower(got.text), "x-relais") {
			t.Errorf("%q: priority %d, want %d, of %q", tt.header, n, tt.priority, got.text)
		}
	}
}
