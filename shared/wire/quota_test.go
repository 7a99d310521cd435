package wire

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
)

func quotaSamples() []proto.Message {
	stamp := lease.Stamp{Generation: 2, Term: 3, Seq: 4}
	return []proto.Message{
		EncodeLeaseHello(lease.Hello{Incarnation: 7}, []lease.Floor{{Limit: 1, Share: lease.Share{Amount: 1000, Burst: 1}}}),
		EncodeLeaseReport(&lease.Report{Incarnation: 7, Nonce: 8, Weight: 1, Lines: []lease.Line{{Limit: 1, Demand: 5000, Held: 1000, Stamp: stamp, Used: 3, Denied: 2}, {Limit: 2}}}),
		EncodeLeaseRelease(lease.Release{Incarnation: 7, Limit: 1, Stamp: stamp}),
		EncodeLeaseWelcome(lease.Welcome{Incarnation: 7, Generation: 2, Term: 3}),
		EncodeLeaseGrant(&lease.Grant{Incarnation: 7, Generation: 2, Term: 3, Nonce: 8, Reply: true, Lines: []lease.GrantLine{
			{Limit: 1, Kind: lease.Rate, Per: time.Minute, Seq: 9, Share: lease.Share{Amount: 600_000, Burst: 10}, Floor: lease.Share{Amount: 1000, Burst: 1}, Soft: true},
			{Limit: 2, Kind: lease.Slots, Seq: 10, Share: lease.Share{Amount: 2}}}}),
		&LeaseHelloWanted{},
		&AddressReport{Incarnation: 7, Nonce: 8},
		&AddressAnswer{Incarnation: 7, Nonce: 8, Leased: []*LeasedSource{{SourceId: []byte("0123456789abcdef"), Epoch: 9}}},
	}
}

func TestQuotaCarriesEveryMessage(t *testing.T) {
	for _, message := range quotaSamples() {
		up, err := NewQuotaUp(message)
		if err != nil {
			t.Fatal(err)
		}
		down, err := NewQuotaDown(message)
		if err != nil {
			t.Fatal(err)
		}
		for _, carried := range []func() (proto.Message, error){up.Message, down.Message} {
			if got, err := carried(); err != nil || !proto.Equal(got, message) {
				t.Errorf("%T came out as %v, %v", message, got, err)
			}
		}
	}
	if _, err := NewQuotaUp(&Pong{}); err == nil {
		t.Error("a frame of the link was carried")
	}
	if got, err := (&QuotaUp{Kind: 9999, Body: []byte{0xff}}).Message(); got != nil || err != nil {
		t.Errorf("an unknown kind: %v, %v", got, err)
	}
	if _, err := (&QuotaUp{Kind: 2, Body: []byte{0xff}}).Message(); !fault.Is(err, fault.Invalid) {
		t.Errorf("a damaged body: %v", err)
	}
	if _, err := (&QuotaDown{Kind: 5, Body: make([]byte, MaxQuotaBytes+1)}).Message(); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a body over the limit: %v", err)
	}
}

func TestLeaseMessagesComeBack(t *testing.T) {
	const n = lease.Node(5)
	stamp := lease.Stamp{Generation: 2, Term: 3, Seq: 4}
	report := &lease.Report{Node: n, Incarnation: 7, Nonce: 8, Weight: 1, Lines: []lease.Line{{Limit: 1, Demand: 5000, Held: 1000, Stamp: stamp, Used: 3, Denied: 2}, {Limit: 2}}}
	if got, err := DecodeLeaseReport(n, EncodeLeaseReport(report)); err != nil || !reflect.DeepEqual(got, report) {
		t.Errorf("report: %+v, %v", got, err)
	}
	grant := &lease.Grant{Node: n, Incarnation: 7, Generation: 2, Term: 3, Nonce: 8, Reply: true, Lines: []lease.GrantLine{
		{Limit: 1, Kind: lease.Rate, Per: time.Minute, Seq: 9, Share: lease.Share{Amount: 600_000, Burst: 10}, Floor: lease.Share{Amount: 1000, Burst: 1}, Soft: true}}}
	if got, err := DecodeLeaseGrant(n, EncodeLeaseGrant(grant)); err != nil || !reflect.DeepEqual(got, grant) {
		t.Errorf("grant: %+v, %v", got, err)
	}
	release := lease.Release{Node: n, Incarnation: 7, Limit: 1, Stamp: stamp}
	if got := DecodeLeaseRelease(n, EncodeLeaseRelease(release)); got != release {
		t.Errorf("release: %+v", got)
	}
	welcome := lease.Welcome{Node: n, Incarnation: 7, Generation: 2, Term: 3}
	if got := DecodeLeaseWelcome(n, EncodeLeaseWelcome(welcome)); got != welcome {
		t.Errorf("welcome: %+v", got)
	}
	hello, floors, err := DecodeLeaseHello(n, EncodeLeaseHello(lease.Hello{Node: n, Incarnation: 7}, []lease.Floor{{Limit: 1, Share: lease.Share{Amount: 9, Burst: 2}}}))
	if err != nil || hello != (lease.Hello{Node: n, Incarnation: 7}) || len(floors) != 1 || floors[0] != (DeclaredFloor{1, lease.Share{Amount: 9, Burst: 2}}) {
		t.Errorf("hello: %+v %v, %v", hello, floors, err)
	}
}

func TestLeaseMessagesAreBounded(t *testing.T) {
	// The largest report that is allowed passes in one message, and so does the
	// grant that answers it.
	report := lease.Report{Incarnation: 1 << 30, Nonce: 1 << 40, Weight: 1000, Lines: make([]lease.Line, MaxLeaseLines)}
	grant := lease.Grant{Incarnation: 1 << 30, Generation: 1 << 31, Term: 1 << 40, Nonce: 1 << 40, Lines: make([]lease.GrantLine, MaxLeaseLines)}
	for i := range report.Lines {
		id := lease.LimitID(1<<50 + i)
		report.Lines[i] = lease.Line{Limit: id, Demand: 1_000_000_000, Held: 1_000_000_000, Stamp: lease.Stamp{Generation: 1 << 31, Term: 1 << 40, Seq: 1 << 34}, Used: 1_000_000, Denied: 1_000_000}
		grant.Lines[i] = lease.GrantLine{Limit: id, Kind: lease.Rate, Per: lease.MaxPer, Seq: 1 << 34, Share: lease.Share{Amount: 1_000_000_000, Burst: lease.MaxBurst}, Floor: lease.Share{Amount: 1_000_000_000, Burst: lease.MaxBurst}, Soft: true}
	}
	for _, message := range []proto.Message{EncodeLeaseReport(&report), EncodeLeaseGrant(&grant)} {
		if _, err := NewQuotaUp(message); err != nil {
			t.Errorf("%T of %d lines: %v", message, MaxLeaseLines, err)
		}
	}
	more := EncodeLeaseReport(&report)
	more.Lines = append(more.Lines, &LeaseLine{Limit: 1 << 60})
	if _, err := DecodeLeaseReport(1, more); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a report of too many lines: %v", err)
	}
}

func TestDecodeLeaseGrantRefuses(t *testing.T) {
	for want, line := range map[string]*LeaseGrantLine{
		"of kind 3":   {Limit: 1, Kind: 3},
		"of kind 257": {Limit: 1, Kind: 257},
		"within 0 ms": {Limit: 1, Kind: 1},
		"negative":    {Limit: 1, Kind: 2, Amount: -1},
	} {
		if _, err := DecodeLeaseGrant(1, &LeaseGrant{Lines: []*LeaseGrantLine{line}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want it to say %q", line, err, want)
		}
	}
}

// FuzzQuota holds that no body of a peer makes the decoders fail in another way
// than with an error, and that what they accept encodes to the same.
func FuzzQuota(f *testing.F) {
	for _, message := range quotaSamples() {
		up, err := NewQuotaUp(message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(up.GetKind(), up.GetBody())
	}
	f.Fuzz(func(t *testing.T, kind uint32, body []byte) {
		message, err := (&QuotaUp{Kind: kind, Body: body}).Message()
		if err != nil || message == nil {
			return
		}
		switch in := message.(type) {
		case *LeaseReport:
			r, err := DecodeLeaseReport(1, in)
			if err != nil {
				return
			}
			if again, err := DecodeLeaseReport(1, EncodeLeaseReport(r)); err != nil || !reflect.DeepEqual(again, r) {
				t.Fatalf("%+v became %+v, %v", r, again, err)
			}
		case *LeaseGrant:
			g, err := DecodeLeaseGrant(1, in)
			if err != nil {
				return
			}
			if again, err := DecodeLeaseGrant(1, EncodeLeaseGrant(g)); err != nil || !reflect.DeepEqual(again, g) {
				t.Fatalf("%+v became %+v, %v", g, again, err)
			}
		case *LeaseHello:
			if _, _, err := DecodeLeaseHello(1, in); err != nil && !fault.Is(err, fault.TooLarge) {
				t.Fatal(err)
			}
		}
	})
}
