package wire

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/policy"
)

// handoverFrames is one message of every type that relays send each other, each
// field set.
func handoverFrames() []proto.Message {
	hash := fill(1)
	transfers := []*HandoverTransfer{{MessageId: hash[:16], Hop: 2}}
	return []proto.Message{
		&HandoverOpen{Session: 7},
		&HandoverReady{MaxBatches: 4},
		&HandoverAsk{Transfers: transfers},
		&HandoverHas{Has: []bool{true, false}},
		&HandoverBatch{Number: 3, Messages: 200},
		&HandoverData{Data: []byte{1, 2, 3}, Last: true},
		&HandoverTaken{Number: 3, Refused: []*HandoverRefusal{{Index: 9, Reason: HandoverRefusal_REASON_POOL, Text: "no source"}}},
		&HandoverForget{Transfers: transfers},
		&HandoverForgotten{},
	}
}

func TestHandoverFramesKeepTheirBytes(t *testing.T) {
	for i, message := range handoverFrames() {
		frame, err := AppendFrame(nil, message)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, strings.ToLower(strings.TrimPrefix(reflect.TypeOf(message).String(), "*wire.")), frame)
		if got, err := NewConn(bytes.NewBuffer(frame), MaxFrameBytes).Receive(); err != nil || !proto.Equal(got, message) {
			t.Errorf("got %v, %v, want %v", got, err, message)
		}
		if want := TypeHandoverOpen + Type(i); TypeOf(message) != want {
			t.Errorf("%T has type %d, want %d", message, TypeOf(message), want)
		}
	}
	if got := newMessage(TypeHandoverForgotten + 1); got != nil {
		t.Errorf("type %d is a %T without a golden frame", TypeHandoverForgotten+1, got)
	}
}

func TestViewNamesPeers(t *testing.T) {
	view := sampleView()
	pin := fill(3)
	view.Peers = []policy.Peer{{Name: "edge-1", KeyPin: pin[:], Address: "192.0.2.9:7445", Draining: true}, {Name: "edge-2"}}
	set(&view.Peers[0].Node, 20)
	set(&view.Peers[1].Node, 21)
	encoded, err := EncodeView(view)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeView(encoded); err != nil || !reflect.DeepEqual(got, view) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, view)
	}
}
