package dispatch

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// relay is the far end of a session.
type relay struct {
	t       *testing.T
	node    ids.Node
	link    link.Session
	control *wire.Conn
	views   *wire.Conn

	answering chan error  // not nil: it answers probes
	mute      atomic.Bool // from now on it does not
}

// dial connects a node and says hello; the answer is left to be read.
func (w *world) dial(node ids.Node, incarnation uint64, hello *wire.Hello) *relay {
	w.t.Helper()
	return w.dialAs(&wire.Preface{ProtocolMin: 1, ProtocolMax: 1, ClusterId: w.ca.Cluster[:], Incarnation: incarnation, Version: "test"}, node, hello)
}

// dialAs connects a node with a preface of the test's.
func (w *world) dialAs(preface *wire.Preface, node ids.Node, hello *wire.Hello) *relay {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	session, err := w.dialer.Dial(ctx, w.address, pki.ClientConfig(w.ca.Node(pki.RoleRelay, node), pki.Peer{Cluster: w.ca.Cluster, Role: pki.RoleControl}, wire.ALPNLink))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { session.Close(link.CodeDone, "") }) // or the stopping server would wait for it
	stream, err := session.OpenStream(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	r := &relay{t: w.t, node: node, link: session, control: wire.NewConn(stream, wire.MaxFrameBytes)}
	if err := r.control.Send(preface); err != nil {
		w.t.Fatal(err)
	}
	if err := r.control.Send(hello); err != nil {
		w.t.Fatal(err)
	}
	return r
}

// welcomed connects an active node.
func (w *world) welcomed(node ids.Node, incarnation uint64, hello *wire.Hello) *relay {
	w.t.Helper()
	w.nodes.setState(node, control.NodeActive)
	r := w.dial(node, incarnation, hello)
	if _, err := wire.Expect[*wire.Preface](r.control); err != nil {
		w.t.Fatal(err)
	}
	welcome, err := wire.Expect[*wire.Welcome](r.control)
	if err != nil {
		w.t.Fatal(err)
	}
	if welcome.GetReportIntervalMs() != 250 || len(welcome.GetServers()) != 2 || welcome.GetState() != "active" {
		w.t.Errorf("welcome %v", welcome)
	}
	<-w.nodes.connected
	return r
}

// receive takes the next view without answering.
func (r *relay) receive() (*wire.Revision, []byte) {
	r.t.Helper()
	if r.views == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		stream, err := r.link.AcceptStream(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		r.views = wire.NewConn(stream, wire.MaxFrameBytes)
		if start, err := wire.Expect[*wire.StreamStart](r.views); err != nil || start.GetPurpose() != wire.Purpose_PURPOSE_VIEW {
			r.t.Fatalf("stream start %v, %v", start, err)
		}
	}
	begin, err := wire.Expect[*wire.ViewBegin](r.views)
	if err != nil {
		r.t.Fatal(err)
	}
	encoded, err := wire.ReceiveView(r.views, begin)
	if err != nil {
		r.t.Fatal(err)
	}
	return begin.GetRevision(), encoded
}

func (r *relay) ack(revision *wire.Revision) {
	r.t.Helper()
	if err := r.views.Send(&wire.Ack{Revision: revision}); err != nil {
		r.t.Fatal(err)
	}
}

// closed waits for the end of the session and returns its code.
func (r *relay) closed() *link.CloseError {
	r.t.Helper()
	select {
	case <-r.link.Done():
	case <-time.After(patience):
		r.t.Fatal("the session goes on")
	}
	closed, ok := link.ClosedByPeer(r.link.Err())
	if !ok {
		r.t.Fatalf("ended by %v", r.link.Err())
	}
	return closed
}

func within[T any](t *testing.T, channel <-chan T) T {
	t.Helper()
	select {
	case v := <-channel:
		return v
	case <-time.After(patience):
		t.Fatal("waited in vain")
		panic("unreachable")
	}
}
