package wire

import (
	"encoding/binary"
	"errors"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

// The application protocols (ALPN, RFC 7301), one per kind of connection. The
// number is the version of what both ends may assume before the first frame.
const (
	ALPNJoin     = "relais-join/1"     // a new node, without a certificate
	ALPNLink     = "relais-link/1"     // relay to control
	ALPNRenew    = "relais-renew/1"    // a node whose certificate is due or over
	ALPNRaft     = "relais-raft/1"     // between control servers
	ALPNPeer     = "relais-peer/1"     // requests of one control server to another
	ALPNHandover = "relais-handover/1" // between relays
)

// ProtocolMin and ProtocolMax are the versions this code speaks.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

// The capabilities that a Preface announces. Bits are append-only; a bit that
// is not known is ignored.
const (
	CapabilityProbe uint64 = 1 << 0 // answers Probe on the control stream of a link
	CapabilityDelta uint64 = 1 << 1 // takes DeltaBegin where a view is due
	CapabilityQuota uint64 = 1 << 2 // passes QuotaUp and QuotaDown on the control stream of a link
)

const (
	// MaxFrameBytes bounds a frame with its head.
	MaxFrameBytes = 1 << 20
	// MaxJoinFrameBytes bounds a frame of a peer that has not proved anything.
	MaxJoinFrameBytes = 64 << 10
	headBytes         = 6
)

// Type is the number of a message in its frame. Numbers are append-only. A
// receiver that does not know a type ends the stream, unless the type has the
// Optional bit, which says that ignoring it is harmless.
type Type uint16

// Optional marks types that may be ignored.
const Optional Type = 0x8000

// The types.
const (
	TypePreface       Type = 1
	TypeError         Type = 2
	TypeStreamStart   Type = 3
	TypeJoinChallenge Type = 16
	TypeJoinRequest   Type = 17
	TypeJoinReply     Type = 18
	TypeRenewRequest  Type = 19
	TypeHello         Type = 32
	TypeWelcome       Type = 33
	TypeRedirect      Type = 34
	TypeReport        Type = 35
	TypePong          Type = 36
	TypeProbe         Type = 37
	TypeProbeReply    Type = 38
	TypeViewBegin     Type = 48
	TypeViewChunk     Type = 49
	TypeViewEnd       Type = 50
	TypeAck           Type = 51
	TypeNack          Type = 52
	TypeDeltaBegin    Type = 53
	TypeResync        Type = 54
	TypeQuotaUp       Type = 64
	TypeQuotaDown     Type = 65

	TypeHandoverOpen      Type = 80
	TypeHandoverReady     Type = 81
	TypeHandoverAsk       Type = 82
	TypeHandoverHas       Type = 83
	TypeHandoverBatch     Type = 84
	TypeHandoverData      Type = 85
	TypeHandoverTaken     Type = 86
	TypeHandoverForget    Type = 87
	TypeHandoverForgotten Type = 88
)

// TypeOf returns the frame type of a message, 0 if it is never a frame.
func TypeOf(message proto.Message) Type {
	switch message.(type) {
	case *Preface:
		return TypePreface
	case *Error:
		return TypeError
	case *StreamStart:
		return TypeStreamStart
	case *JoinChallenge:
		return TypeJoinChallenge
	case *JoinRequest:
		return TypeJoinRequest
	case *JoinReply:
		return TypeJoinReply
	case *RenewRequest:
		return TypeRenewRequest
	case *Hello:
		return TypeHello
	case *Welcome:
		return TypeWelcome
	case *Redirect:
		return TypeRedirect
	case *Report:
		return TypeReport
	case *Pong:
		return TypePong
	case *Probe:
		return TypeProbe
	case *ProbeReply:
		return TypeProbeReply
	case *ViewBegin:
		return TypeViewBegin
	case *ViewChunk:
		return TypeViewChunk
	case *ViewEnd:
		return TypeViewEnd
	case *Ack:
		return TypeAck
	case *Nack:
		return TypeNack
	case *DeltaBegin:
		return TypeDeltaBegin
	case *Resync:
		return TypeResync
	case *QuotaUp:
		return TypeQuotaUp
	case *QuotaDown:
		return TypeQuotaDown
	}
	return handoverType(message)
}

// newMessage returns an empty message of a type, nil if the type is unknown.
func newMessage(t Type) proto.Message {
	switch t {
	case TypePreface:
		return &Preface{}
	case TypeError:
		return &Error{}
	case TypeStreamStart:
		return &StreamStart{}
	case TypeJoinChallenge:
		return &JoinChallenge{}
	case TypeJoinRequest:
		return &JoinRequest{}
	case TypeJoinReply:
		return &JoinReply{}
	case TypeRenewRequest:
		return &RenewRequest{}
	case TypeHello:
		return &Hello{}
	case TypeWelcome:
		return &Welcome{}
	case TypeRedirect:
		return &Redirect{}
	case TypeReport:
		return &Report{}
	case TypePong:
		return &Pong{}
	case TypeProbe:
		return &Probe{}
	case TypeProbeReply:
		return &ProbeReply{}
	case TypeViewBegin:
		return &ViewBegin{}
	case TypeViewChunk:
		return &ViewChunk{}
	case TypeViewEnd:
		return &ViewEnd{}
	case TypeAck:
		return &Ack{}
	case TypeNack:
		return &Nack{}
	case TypeDeltaBegin:
		return &DeltaBegin{}
	case TypeResync:
		return &Resync{}
	case TypeQuotaUp:
		return &QuotaUp{}
	case TypeQuotaDown:
		return &QuotaDown{}
	}
	return newHandover(t)
}

// Conn reads and writes frames on a stream. One goroutine may send while
// another receives; neither method is safe for two at once.
type Conn struct {
	stream   io.ReadWriter
	maxBytes int
	out      []byte
	in       []byte
}

// NewConn returns a Conn that refuses frames over maxFrameBytes, its head
// included, in both directions.
func NewConn(stream io.ReadWriter, maxFrameBytes int) *Conn {
	return &Conn{stream: stream, maxBytes: min(maxFrameBytes, MaxFrameBytes)}
}

// AppendFrame appends the frame of message to b.
func AppendFrame(b []byte, message proto.Message) ([]byte, error) {
	const op = "wire.AppendFrame"
	t := TypeOf(message)
	if t == 0 {
		return b, fault.New(fault.Internal, op, "%T is not a frame", message)
	}
	start := len(b)
	b = append(b, 0, 0, 0, 0, 0, 0)
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, message)
	if err != nil {
		return b[:start], fault.Wrap(err, fault.Internal, op, "cannot encode a %T", message)
	}
	size := len(b) - start
	if size > MaxFrameBytes {
		return b[:start], fault.New(fault.TooLarge, op, "a %T of %d bytes is over the frame limit of %d", message, size, MaxFrameBytes)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(size-headBytes))
	binary.BigEndian.PutUint16(b[start+4:], uint16(t))
	return b, nil
}

// Send writes one message as one frame.
func (c *Conn) Send(message proto.Message) error {
	frame, err := AppendFrame(c.out[:0], message)
	if err != nil {
		return err
	}
	c.out = frame
	if len(frame) > c.maxBytes {
		return fault.New(fault.TooLarge, "wire.Conn.Send", "a %T of %d bytes is over this stream's limit of %d", message, len(frame), c.maxBytes)
	}
	_, err = c.stream.Write(frame)
	return fault.Wrap(err, fault.Unavailable, "wire.Conn.Send", "the connection broke while sending")
}

// Receive reads the next message whose type is known, passing over optional
// ones that are not. A stream that ends between frames gives io.EOF.
func (c *Conn) Receive() (proto.Message, error) {
	const op = "wire.Conn.Receive"
	for {
		var head [headBytes]byte
		if _, err := io.ReadFull(c.stream, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil, io.EOF
			}
			return nil, fault.Wrap(err, fault.Unavailable, op, "the connection broke while receiving")
		}
		size := binary.BigEndian.Uint32(head[:])
		t := Type(binary.BigEndian.Uint16(head[4:]))
		if int64(size)+headBytes > int64(c.maxBytes) {
			return nil, fault.New(fault.TooLarge, op, "the peer announces a frame of %d bytes, the limit is %d", int64(size)+headBytes, c.maxBytes)
		}
		if cap(c.in) < int(size) {
			c.in = make([]byte, size)
		}
		body := c.in[:size]
		if _, err := io.ReadFull(c.stream, body); err != nil {
			return nil, fault.Wrap(err, fault.Unavailable, op, "the connection broke within a frame")
		}
		message := newMessage(t)
		if message == nil {
			if t&Optional != 0 {
				continue
			}
			return nil, fault.New(fault.Invalid, op, "the peer sent a message of type %d, which version %d does not have", t, ProtocolMax)
		}
		if err := proto.Unmarshal(body, message); err != nil {
			return nil, fault.Wrap(err, fault.Invalid, op, "the peer sent a damaged %T", message)
		}
		return message, nil
	}
}

// Expect receives one message of the type T. An Error frame in its place is
// returned as the fault that it carries.
func Expect[T proto.Message](c *Conn) (T, error) {
	const op = "wire.Expect"
	var want T
	message, err := c.Receive()
	if errors.Is(err, io.EOF) {
		return want, fault.Wrap(io.ErrUnexpectedEOF, fault.Unavailable, op, "the peer closed the stream where a %T was due", want)
	}
	if err != nil {
		return want, err
	}
	if refused, ok := message.(*Error); ok {
		if _, wanted := any(want).(*Error); !wanted {
			return want, refused.Fault()
		}
	}
	got, ok := message.(T)
	if !ok {
		return want, fault.New(fault.Invalid, op, "the peer sent a %T where a %T was due", message, want)
	}
	return got, nil
}
