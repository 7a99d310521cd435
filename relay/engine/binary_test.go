package engine

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/shared/lab"
)

// TestBinaryMailIsRefusedHere: no host of the lab takes BINARYMIME, so such mail
// fails before it is offered, and its report goes by DATA: without the body,
// which no text part could hold.
func TestBinaryMailIsRefusedHere(t *testing.T) {
	w := newWorld(t, nil, first)
	if err := w.lab.HostDomain(lab.Free, "brand.test"); err != nil {
		t.Fatal(err)
	}
	env := w.accept(func(e *relay.Envelope) { e.BinaryMIME, e.RetFull = true, true }, w.at(lab.Google, 0, lab.Accept))
	if e := w.event(env, outbox.Bounced); e.Reply.Enhanced != "5.6.3" || e.Phase != relay.PhaseLocal {
		t.Errorf("event %+v", e)
	}
	w.gone(env)
	w.until("the report", func() bool { return len(w.arrived(lab.Free)) == 1 })
	_, text, err := w.lab.Mail(lab.Free, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "5.6.3") || strings.Contains(string(text), "\r\nHello\r\n") {
		t.Errorf("report\n%s", text)
	}
	if n := len(w.arrived(lab.Google)); n != 0 {
		t.Errorf("%d mails arrived at the host", n)
	}
}
