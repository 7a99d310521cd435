package wire

import (
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
)

const (
	// MaxQuotaBytes bounds the body of a QuotaUp or QuotaDown, so that it passes
	// between servers in one request, in which it is a third longer.
	MaxQuotaBytes = 640 << 10
	// MaxLeaseLines bounds the limits in one report, grant or greeting. A report
	// speaks of all limits at once and cannot be split.
	MaxLeaseLines = 10_000
)

// quotaKinds are the messages that QuotaUp and QuotaDown carry. Numbers are
// append-only: 1 to 9 shared limits, 10 to 19 warm-up, 20 to 29 addresses, 30 to
// 39 brakes.
var quotaKinds = []struct {
	kind uint32
	of   proto.Message
}{
	{1, (*LeaseHello)(nil)},
	{2, (*LeaseReport)(nil)},
	{3, (*LeaseRelease)(nil)},
	{4, (*LeaseWelcome)(nil)},
	{5, (*LeaseGrant)(nil)},
	{6, (*LeaseHelloWanted)(nil)},
	{10, (*WarmUp)(nil)},
	{11, (*WarmDown)(nil)},
	{20, (*AddressReport)(nil)},
	{21, (*AddressAnswer)(nil)},
}

// quotaBody returns the kind and the encoding of a message.
func quotaBody(message proto.Message) (uint32, []byte, error) {
	const op = "wire.NewQuota"
	name := message.ProtoReflect().Descriptor()
	for _, k := range quotaKinds {
		if k.of.ProtoReflect().Descriptor() != name {
			continue
		}
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
		if err != nil {
			return 0, nil, fault.Wrap(err, fault.Internal, op, "cannot encode a %T", message)
		}
		if len(body) > MaxQuotaBytes {
			return 0, nil, fault.New(fault.TooLarge, op, "a %T of %d bytes is over the limit of %d", message, len(body), MaxQuotaBytes)
		}
		return k.kind, body, nil
	}
	return 0, nil, fault.New(fault.Internal, op, "%T is not carried by QuotaUp and QuotaDown", message)
}

// quotaMessage decodes a body. A kind that is not known gives nil.
func quotaMessage(kind uint32, body []byte) (proto.Message, error) {
	const op = "wire.Quota"
	if len(body) > MaxQuotaBytes {
		return nil, fault.New(fault.TooLarge, op, "a message of kind %d has %d bytes, the limit is %d", kind, len(body), MaxQuotaBytes)
	}
	for _, k := range quotaKinds {
		if k.kind != kind {
			continue
		}
		message := k.of.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(body, message); err != nil {
			return nil, fault.Wrap(err, fault.Invalid, op, "the peer sent a damaged %T", message)
		}
		return message, nil
	}
	return nil, nil
}

// NewQuotaUp returns the frame that carries a message of a relay.
func NewQuotaUp(message proto.Message) (*QuotaUp, error) {
	kind, body, err := quotaBody(message)
	if err != nil {
		return nil, err
	}
	return &QuotaUp{Kind: kind, Body: body}, nil
}

// NewQuotaDown returns the frame that carries a message of the leader.
func NewQuotaDown(message proto.Message) (*QuotaDown, error) {
	kind, body, err := quotaBody(message)
	if err != nil {
		return nil, err
	}
	return &QuotaDown{Kind: kind, Body: body}, nil
}

// Message returns what the frame carries, nil if its kind is not known.
func (q *QuotaUp) Message() (proto.Message, error) { return quotaMessage(q.GetKind(), q.GetBody()) }

// Message returns what the frame carries, nil if its kind is not known.
func (q *QuotaDown) Message() (proto.Message, error) { return quotaMessage(q.GetKind(), q.GetBody()) }

// tooMany refuses a list that is longer than MaxLeaseLines.
func tooMany(n int, what string) error {
	if n > MaxLeaseLines {
		return fault.New(fault.TooLarge, "wire.Lease", "%d %s, at most %d", n, what, MaxLeaseLines)
	}
	return nil
}

func encodeStamp(s lease.Stamp) *LeaseStamp {
	if s == (lease.Stamp{}) {
		return nil
	}
	return &LeaseStamp{Generation: s.Generation, Term: s.Term, Seq: s.Seq}
}

func decodeStamp(s *LeaseStamp) lease.Stamp {
	return lease.Stamp{Generation: s.GetGeneration(), Term: s.GetTerm(), Seq: s.GetSeq()}
}

// EncodeLeaseHello returns the wire form of a greeting, with the floors that the
// relay's disk holds.
func EncodeLeaseHello(h lease.Hello, floors []lease.Floor) *LeaseHello {
	out := &LeaseHello{Incarnation: h.Incarnation}
	for _, f := range floors {
		out.Floors = append(out.Floors, &LeaseFloor{Limit: uint64(f.Limit), Amount: f.Share.Amount, Burst: f.Share.Burst})
	}
	return out
}

// DeclaredFloor is what a relay says that its disk holds of a limit.
type DeclaredFloor struct {
	Limit lease.LimitID
	Share lease.Share
}

// DecodeLeaseHello reads the greeting of a relay.
func DecodeLeaseHello(n lease.Node, in *LeaseHello) (lease.Hello, []DeclaredFloor, error) {
	h := lease.Hello{Node: n, Incarnation: in.GetIncarnation()}
	if err := tooMany(len(in.GetFloors()), "floors"); err != nil {
		return h, nil, err
	}
	floors := sized[DeclaredFloor](len(in.GetFloors()))
	for i, f := range in.GetFloors() {
		floors[i] = DeclaredFloor{lease.LimitID(f.GetLimit()), lease.Share{Amount: f.GetAmount(), Burst: f.GetBurst()}}
	}
	return h, floors, nil
}

// EncodeLeaseReport returns the wire form of a report.
func EncodeLeaseReport(r *lease.Report) *LeaseReport {
	out := &LeaseReport{Incarnation: r.Incarnation, Nonce: r.Nonce, Weight: r.Weight, Lines: make([]*LeaseLine, len(r.Lines))}
	lines := make([]LeaseLine, len(r.Lines))
	for i := range r.Lines {
		l, m := &r.Lines[i], &lines[i]
		m.Limit, m.Demand, m.Held, m.Stamp, m.Used, m.Denied = uint64(l.Limit), l.Demand, l.Held, encodeStamp(l.Stamp), l.Used, l.Denied
		out.Lines[i] = m
	}
	return out
}

// DecodeLeaseReport reads a relay's report.
func DecodeLeaseReport(n lease.Node, in *LeaseReport) (*lease.Report, error) {
	if err := tooMany(len(in.GetLines()), "limits in a report"); err != nil {
		return nil, err
	}
	out := &lease.Report{Node: n, Incarnation: in.GetIncarnation(), Nonce: in.GetNonce(), Weight: in.GetWeight(), Lines: sized[lease.Line](len(in.GetLines()))}
	for i, l := range in.GetLines() {
		out.Lines[i] = lease.Line{Limit: lease.LimitID(l.GetLimit()), Demand: l.GetDemand(), Held: l.GetHeld(), Stamp: decodeStamp(l.GetStamp()), Used: l.GetUsed(), Denied: l.GetDenied()}
	}
	return out, nil
}

// EncodeLeaseRelease returns the wire form of a release.
func EncodeLeaseRelease(r lease.Release) *LeaseRelease {
	return &LeaseRelease{Incarnation: r.Incarnation, Limit: uint64(r.Limit), Stamp: encodeStamp(r.Stamp)}
}

// DecodeLeaseRelease reads a relay's release.
func DecodeLeaseRelease(n lease.Node, in *LeaseRelease) lease.Release {
	return lease.Release{Node: n, Incarnation: in.GetIncarnation(), Limit: lease.LimitID(in.GetLimit()), Stamp: decodeStamp(in.GetStamp())}
}

// EncodeLeaseWelcome returns the wire form of a welcome.
func EncodeLeaseWelcome(w lease.Welcome) *LeaseWelcome {
	return &LeaseWelcome{Incarnation: w.Incarnation, Generation: w.Generation, Term: w.Term}
}

// DecodeLeaseWelcome reads a welcome to the relay n.
func DecodeLeaseWelcome(n lease.Node, in *LeaseWelcome) lease.Welcome {
	return lease.Welcome{Node: n, Incarnation: in.GetIncarnation(), Generation: in.GetGeneration(), Term: in.GetTerm()}
}

// EncodeLeaseGrant returns the wire form of a grant.
func EncodeLeaseGrant(g *lease.Grant) *LeaseGrant {
	out := &LeaseGrant{Incarnation: g.Incarnation, Generation: g.Generation, Term: g.Term, Nonce: g.Nonce, Reply: g.Reply, Lines: make([]*LeaseGrantLine, len(g.Lines))}
	lines := make([]LeaseGrantLine, len(g.Lines))
	for i := range g.Lines {
		l, m := &g.Lines[i], &lines[i]
		m.Limit, m.Kind, m.PerMs, m.Seq = uint64(l.Limit), uint32(l.Kind), l.Per.Milliseconds(), l.Seq
		m.Amount, m.Burst, m.FloorAmount, m.FloorBurst, m.Soft = l.Share.Amount, l.Share.Burst, l.Floor.Amount, l.Floor.Burst, l.Soft
		out.Lines[i] = m
	}
	return out
}

// DecodeLeaseGrant reads a grant to the relay n.
func DecodeLeaseGrant(n lease.Node, in *LeaseGrant) (*lease.Grant, error) {
	const op = "wire.DecodeLeaseGrant"
	if err := tooMany(len(in.GetLines()), "limits in a grant"); err != nil {
		return nil, err
	}
	out := &lease.Grant{Node: n, Incarnation: in.GetIncarnation(), Generation: in.GetGeneration(), Term: in.GetTerm(), Nonce: in.GetNonce(), Reply: in.GetReply(), Lines: sized[lease.GrantLine](len(in.GetLines()))}
	for i, l := range in.GetLines() {
		kind, per := lease.Kind(l.GetKind()), l.GetPerMs()
		if l.GetKind() != uint32(lease.Rate) && l.GetKind() != uint32(lease.Slots) {
			return nil, fault.New(fault.Invalid, op, "limit %d is of kind %d, known are 1 and 2", l.GetLimit(), l.GetKind())
		}
		if per < 0 || per > lease.MaxPer.Milliseconds() || kind == lease.Rate && per == 0 {
			return nil, fault.New(fault.Invalid, op, "limit %d counts within %d ms, allowed are 1 to %d", l.GetLimit(), per, lease.MaxPer.Milliseconds())
		}
		if l.GetAmount() < 0 || l.GetBurst() < 0 || l.GetFloorAmount() < 0 || l.GetFloorBurst() < 0 {
			return nil, fault.New(fault.Invalid, op, "a share of limit %d is negative", l.GetLimit())
		}
		out.Lines[i] = lease.GrantLine{Limit: lease.LimitID(l.GetLimit()), Kind: kind, Per: time.Duration(per) * time.Millisecond, Seq: l.GetSeq(),
			Share: lease.Share{Amount: l.GetAmount(), Burst: l.GetBurst()}, Floor: lease.Share{Amount: l.GetFloorAmount(), Burst: l.GetFloorBurst()}, Soft: l.GetSoft()}
	}
	return out, nil
}
