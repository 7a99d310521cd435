package wire

import (
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of what relays say to each other.
const (
	MaxTransfers         = 4096      // in one question
	MaxHandoverMessages  = 1024      // in one batch
	MaxHandoverDataBytes = 256 << 10 // in one frame
)

// handoverType returns the frame type of what relays say to each other.
func handoverType(message proto.Message) Type {
	switch message.(type) {
	case *HandoverOpen:
		return TypeHandoverOpen
	case *HandoverReady:
		return TypeHandoverReady
	case *HandoverAsk:
		return TypeHandoverAsk
	case *HandoverHas:
		return TypeHandoverHas
	case *HandoverBatch:
		return TypeHandoverBatch
	case *HandoverData:
		return TypeHandoverData
	case *HandoverTaken:
		return TypeHandoverTaken
	case *HandoverForget:
		return TypeHandoverForget
	case *HandoverForgotten:
		return TypeHandoverForgotten
	}
	return 0
}

func newHandover(t Type) proto.Message {
	switch t {
	case TypeHandoverOpen:
		return &HandoverOpen{}
	case TypeHandoverReady:
		return &HandoverReady{}
	case TypeHandoverAsk:
		return &HandoverAsk{}
	case TypeHandoverHas:
		return &HandoverHas{}
	case TypeHandoverBatch:
		return &HandoverBatch{}
	case TypeHandoverData:
		return &HandoverData{}
	case TypeHandoverTaken:
		return &HandoverTaken{}
	case TypeHandoverForget:
		return &HandoverForget{}
	case TypeHandoverForgotten:
		return &HandoverForgotten{}
	}
	return nil
}

// encodePeers encodes who may hand over mail.
func encodePeers(out *View, v *policy.View) {
	for i := range v.Peers {
		p := &v.Peers[i]
		out.Peers = append(out.Peers, &Peer{NodeId: EncodeID(p.Node), Name: p.Name, KeyPin: p.KeyPin, Address: p.Address, Draining: p.Draining})
	}
}

func (d *viewDecoder) peers(in *View) {
	d.view.Peers = sized[policy.Peer](len(in.GetPeers()))
	for i, p := range in.GetPeers() {
		out := &d.view.Peers[i]
		out.Name, out.KeyPin, out.Address, out.Draining = p.GetName(), p.GetKeyPin(), p.GetAddress(), p.GetDraining()
		d.note(DecodeID(p.GetNodeId(), &out.Node))
	}
}
