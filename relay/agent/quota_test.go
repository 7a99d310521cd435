package agent

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/wire"
)

func TestMessagesForTheLeader(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	c.capabilities |= wire.CapabilityQuota
	dir, _ := c.joined()
	grants, links := make(chan *wire.LeaseGrant, 10), make(chan bool, 10)
	a, stop := running(t, dir, func(a *Agent) {
		a.HandleQuota(&wire.LeaseGrant{}, func(m proto.Message) { grants <- m.(*wire.LeaseGrant) })
		a.NoteQuotaLink(func(linked bool) { links <- linked })
	})
	s := c.next()
	if !await(t, links, "the link") {
		t.Error("the first notice says that there is no link")
	}
	if err := a.SendQuota(&wire.LeaseReport{Incarnation: a.Incarnation(), Nonce: 7}); err != nil {
		t.Fatal(err)
	}
	message, err := await(t, s.quota, "the report").Message()
	if report, ok := message.(*wire.LeaseReport); err != nil || !ok || report.GetNonce() != 7 || report.GetIncarnation() != 1 {
		t.Errorf("arrived %v, %v", message, err)
	}
	// A kind of a newer server, one without a handler here, and one with.
	for _, down := range []*wire.QuotaDown{{Kind: 999, Body: []byte("x")}, quotaDown(t, &wire.LeaseWelcome{Term: 1}), quotaDown(t, &wire.LeaseGrant{Term: 3})} {
		if err := s.say(down); err != nil {
			t.Fatal(err)
		}
	}
	if g := await(t, grants, "the grant"); g.GetTerm() != 3 {
		t.Errorf("arrived %v", g)
	}
	// A damaged one ends the session; the next one carries on.
	if err := s.say(&wire.QuotaDown{Kind: 5, Body: []byte{0xff}}); err != nil {
		t.Fatal(err)
	}
	if await(t, links, "the end of the link") {
		t.Error("a damaged message was taken")
	}
	c.next()
	if !await(t, links, "the next link") {
		t.Error("the relay did not come back")
	}
	stop()
	if await(t, links, "the end") {
		t.Error("linked after the end")
	}
	if err := a.SendQuota(&wire.LeaseReport{}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("without a link: %v", err)
	}
	if err := a.SendQuota(&wire.Probe{}); !fault.Is(err, fault.Internal) {
		t.Errorf("what is not carried: %v", err)
	}
}

// A server of a release before would end the session at a frame it does not know.
func TestNothingForTheLeaderByAnOlderServer(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, _ := c.joined()
	a, _ := running(t, dir, func(a *Agent) {
		a.NoteQuotaLink(func(bool) { t.Error("it is taken for a link") })
	})
	s := c.next()
	waitFor(t, "the link", a.Connected)
	if err := a.SendQuota(&wire.LeaseHello{}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("%v", err)
	}
	await(t, s.reports, "a report")
	if len(s.quota) > 0 {
		t.Error("it was sent")
	}
}

func quotaDown(t *testing.T, m proto.Message) *wire.QuotaDown {
	t.Helper()
	down, err := wire.NewQuotaDown(m)
	if err != nil {
		t.Fatal(err)
	}
	return down
}

// await receives from a channel.
func await[T any](t *testing.T, from <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatalf("waited in vain: %s", what)
	}
	return v
}
