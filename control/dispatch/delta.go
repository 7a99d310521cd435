package dispatch

import (
	"crypto/sha256"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

const (
	maxEncodings     = 8         // revisions kept to make deltas from
	maxEncodingBytes = 128 << 20 // of all of them; the newest is kept whatever its size
	maxDeltas        = 16        // kept, since many relays go the same way
)

// held is the view a relay has, as far as this session knows.
type held struct {
	generation uint64
	revision   uint64
	sum        string
	ours       bool // we sent it: the sum needs no check
	draining   bool // of the one that we sent
}

// encoding is a view of one revision, encoded for no node in particular: views
// of one revision differ in the node and in whether it drains, so two encodings
// serve all relays.
type encoding struct {
	generation uint64
	revision   uint64
	draining   bool
	head, tail []byte // around the record of the node
}

// of returns the encoding for one node.
func (e *encoding) of(node ids.Node) []byte {
	return slices.Concat(e.head, nodeRecord(node), e.tail)
}

// sum returns the checksum of the encoding for one node.
func (e *encoding) sum(node ids.Node) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, part := range [][]byte{e.head, nodeRecord(node), e.tail} {
		_, _ = h.Write(part) // documented never to return an error
	}
	h.Sum(sum[:0])
	return sum
}

func nodeRecord(node ids.Node) []byte {
	record, err := proto.Marshal(&wire.View{NodeId: node[:]})
	if err != nil {
		panic("dispatch: an id does not encode: " + err.Error())
	}
	return record
}

// encodings keeps the newest revisions, and the deltas between them.
type encodings struct {
	mu     sync.Mutex
	kept   []*encoding // oldest first
	deltas []delta     // oldest first
}

type delta struct {
	from, to version
	encoded  []byte
}

// version names an encoding.
type version struct {
	generation, revision uint64
	draining             bool
}

// of returns the encoding of a view's revision.
func (c *encodings) of(view *policy.View) (*encoding, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.find(version{view.Generation, view.Revision, view.Draining}); e != nil {
		return e, nil
	}
	anyone := *view
	anyone.Node = ids.Node{}
	encoded, err := wire.EncodeView(&anyone)
	if err != nil {
		return nil, err
	}
	cut, err := wire.NodeOffset(encoded)
	if err != nil {
		return nil, err
	}
	e := &encoding{generation: view.Generation, revision: view.Revision, draining: view.Draining, head: encoded[:cut:cut], tail: encoded[cut:]}
	c.kept = append(c.kept, e)
	total := 0
	for i := len(c.kept) - 1; i >= 0; i-- {
		total += len(c.kept[i].head) + len(c.kept[i].tail)
		if i < len(c.kept)-1 && (total > maxEncodingBytes || len(c.kept)-i > maxEncodings) {
			c.kept = append([]*encoding(nil), c.kept[i+1:]...)
			break
		}
	}
	return e, nil
}

func (c *encodings) find(v version) *encoding {
	for _, e := range c.kept {
		if (version{e.generation, e.revision, e.draining}) == v {
			return e
		}
	}
	return nil
}

// base returns the encoding that a relay holds; nil if it is not kept.
func (c *encodings) base(node ids.Node, from held) *encoding {
	if from.ours {
		return c.find(version{from.generation, from.revision, from.draining})
	}
	for _, draining := range []bool{false, true} {
		if e := c.find(version{from.generation, from.revision, draining}); e != nil {
			if sum := e.sum(node); string(sum[:]) == from.sum {
				return e
			}
		}
	}
	return nil
}

// between returns the delta from what a relay holds to a view; nil if it cannot
// be made or would save nothing.
func (c *encodings) between(node ids.Node, from held, to offer) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.base(node, from)
	if old == nil || from.revision == to.revision && from.generation == to.generation {
		return nil, nil
	}
	way := delta{from: version{old.generation, old.revision, old.draining}, to: version{to.generation, to.revision, to.shared.draining}}
	for _, d := range c.deltas {
		if d.from == way.from && d.to == way.to {
			return d.encoded, nil
		}
	}
	var err error
	next := to.shared.of(node)
	if way.encoded, err = wire.DiffViews(old.of(node), next); err != nil {
		return nil, err
	}
	if len(way.encoded) > len(next)/2 {
		way.encoded = nil
	}
	if len(c.deltas) == maxDeltas {
		c.deltas = append([]delta(nil), c.deltas[1:]...)
	}
	c.deltas = append(c.deltas, way)
	return way.encoded, nil
}

// exchange sends a view, as a delta if the relay can take one, and returns its
// answer and how many bytes went out.
func (n *session) exchange(stream link.Stream, conn *wire.Conn, view offer) (answer proto.Message, sent int, err error) {
	const op = "dispatch.exchange"
	if n.deltas {
		change, err := n.server.encodings.between(n.node, n.base, view)
		if err != nil {
			return nil, 0, err
		}
		if change != nil {
			begin := &wire.DeltaBegin{
				From: &wire.Revision{Generation: n.base.generation, Index: n.base.revision}, FromSha256: []byte(n.base.sum), To: view.named(), ToSha256: view.sum[:],
			}
			if err := wire.SendDelta(conn, begin, change); err != nil {
				return nil, 0, err
			}
			answer, err := conn.Receive()
			if _, again := answer.(*wire.Resync); err != nil || !again {
				return answer, len(change), err
			}
			n.server.resyncs.Inc()
			n.log.Warn("the relay does not hold the view that a change starts from: it gets the whole view", "revision", view.revision)
			if err := stream.SetDeadline(time.Now().Add(ackTimeout)); err != nil {
				return nil, 0, err
			}
		}
	}
	encoded := view.shared.of(n.node)
	if err := wire.SendView(conn, view.named(), encoded); err != nil {
		return nil, 0, err
	}
	answer, err = conn.Receive()
	if _, again := answer.(*wire.Resync); again {
		return nil, len(encoded), fault.New(fault.Invalid, op, "the relay asked for the whole view in answer to the whole view")
	}
	return answer, len(encoded), err
}
