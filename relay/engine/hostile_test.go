package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/policy"
)

// TestHostileHosts sends one mail to every host of the corpus of transcripts at
// once, and one to a good host among them: each gets its reason, and nobody
// holds up the good one.
func TestHostileHosts(t *testing.T) {
	corpus, err := lab.Transcripts()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorldOf(t, func(c *lab.Config) { c.Hostile, c.Pace = true, 200*time.Millisecond }, first)
	w.view(func(d *policy.Document) {
		const patient = policy.Duration(4 * time.Second) // a busy machine takes its time, too; a drip takes longer
		v := &d.Delivery
		v.GreetingTimeout, v.EHLOTimeout, v.MailTimeout, v.RcptTimeout = patient, patient, patient, patient
		v.DataTimeout, v.BlockTimeout, v.FinalDotTimeout = patient, patient, patient
		d.Queue.Retry = []policy.Duration{policy.Duration(time.Hour)}
		d.Queue.InDoubtRetry = policy.Duration(time.Hour)
	}, first)
	envs := make([]*relay.Envelope, len(corpus))
	for i := range corpus {
		envs[i] = w.accept(nil, "somebody@"+corpus[i].HostileDomain())
	}
	good := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	w.event(good, outbox.Delivered)
	for i := range corpus {
		h := &corpus[i]
		status, phase, _ := strings.Cut(h.Expect, "/")
		phase, _, _ = strings.Cut(phase, "/")
		e := w.event(envs[i], map[string]outbox.Type{
			"delivered": outbox.Delivered, "deferred": outbox.Deferred, "failed": outbox.Bounced, "doubt": outbox.InDoubt}[status])
		if e.Phase.String() != phase || !strings.Contains(e.Reply.Text, h.Reason) {
			t.Errorf("%s: %s with %q, want %s with %q", h.Name, e.Phase, e.Reply.Text, h.Expect, h.Reason)
		}
	}
}
