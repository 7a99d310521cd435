package agent

import (
	"crypto/sha256"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// sendDelta sends what changes from one view to another.
func (s *relaySession) sendDelta(t *testing.T, from, to *policy.View) proto.Message {
	t.Helper()
	var encoded [2][]byte
	var err error
	for i, v := range []*policy.View{from, to} {
		if encoded[i], err = wire.EncodeView(v); err != nil {
			t.Fatal(err)
		}
	}
	change, err := wire.DiffViews(encoded[0], encoded[1])
	if err != nil {
		t.Fatal(err)
	}
	fromSum, toSum := sha256.Sum256(encoded[0]), sha256.Sum256(encoded[1])
	if err := wire.SendDelta(s.views, &wire.DeltaBegin{
		From: &wire.Revision{Generation: from.Generation, Index: from.Revision}, FromSha256: fromSum[:],
		To: &wire.Revision{Generation: to.Generation, Index: to.Revision}, ToSha256: toSum[:],
	}, change); err != nil {
		t.Fatal(err)
	}
	answer, err := s.views.Receive()
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// TestDeltaIsMergedAndStored sends changes to an agent: it works with the merged
// view, keeps it over a restart, and asks for the whole view when a change does
// not fit what it holds.
func TestDeltaIsMergedAndStored(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, stop := running(t, dir)
	s := c.next()
	if c.prefaces[0].GetCapabilities()&wire.CapabilityDelta == 0 {
		t.Fatal("the agent does not announce deltas")
	}
	first := c.view(node, 5)
	if resync, ok := s.sendDelta(t, first, c.view(node, 6)).(*wire.Resync); !ok || resync.GetHeld() != nil {
		t.Fatalf("a change for a relay without a view is answered by %v", resync)
	}
	answer, err := s.send(first)
	mustAck(t, answer, err, 5)

	second := c.view(node, 6)
	second.Sources = second.Sources[1:]
	second.Sources[0].EHLO = "changed.example"
	mustAck(t, s.sendDelta(t, first, second), nil, 6)
	if v := a.Directory().View(); v.Revision != 6 || len(v.Sources) != 1 || v.Sources[0].EHLO != "changed.example" {
		t.Errorf("the merged view is %+v", v)
	}

	// A gap: the change starts from a view that the relay never had.
	if resync, ok := s.sendDelta(t, c.view(node, 7), c.view(node, 8)).(*wire.Resync); !ok || resync.GetHeld().GetIndex() != 6 {
		t.Errorf("a gap is answered by %v", resync)
	}
	// A view that is refused: the last good one stays.
	bad := c.view(pkitest.NewNode(), 9)
	if nack, ok := s.sendDelta(t, second, bad).(*wire.Nack); !ok {
		t.Errorf("a view for another node is answered by %v", nack)
	}
	if v := a.Directory().View(); v.Revision != 6 {
		t.Errorf("revision %d is in use", v.Revision)
	}
	stop()
	again, _ := running(t, dir)
	if v := again.Directory().View(); v.Revision != 6 || v.Sources[0].EHLO != "changed.example" {
		t.Errorf("after a restart: %+v", v)
	}
}
