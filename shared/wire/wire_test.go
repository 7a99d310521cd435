package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

var update = flag.Bool("update", false, "write the golden files anew")

func fill(n int) (b [32]byte) {
	for i := range b {
		b[i] = byte(n + i)
	}
	return b
}

func id[K ids.Kind](n byte) ids.ID[K] {
	return ids.Make[K](time.UnixMilli(1_700_000_000_000+int64(n)), [10]byte{n, 1, 2, 3, 4, 5, 6, 7, 8, 9})
}

// set gives out an id of its own type.
func set[K ids.Kind](out *ids.ID[K], n byte) { *out = id[K](n) }

func sampleView() *policy.View {
	v := &policy.View{
		Generation: 2, Revision: 4711,
		Sections:       map[string]string{"queue": "retry_max = \"4h\"\n", "delivery": "max_sessions = 100\n"},
		Tenants:        []policy.Tenant{{Name: "acme"}, {Name: "globex", Suspended: true}},
		Projects:       []policy.Project{{Name: "default"}},
		Domains:        []policy.Domain{{Name: "acme.example", ReturnPath: "rp.acme.example", DKIM: []policy.DKIMKey{{Selector: "r1", Algorithm: "rsa-sha256", Private: []byte{0x30, 1, 2, 3}}}}},
		Credentials:    []policy.Credential{{SecretHash: fill(7), Stream: "transactional", NotAfter: time.UnixMilli(1_800_000_000_123).UTC()}, {SecretHash: fill(9)}},
		Pools:          []policy.Pool{{Name: "default", Kind: policy.PoolShared}, {Name: "acme", Kind: policy.PoolDedicated}},
		Sources:        []policy.Source{{Bind: netip.MustParseAddr("10.0.0.1"), Public: netip.MustParseAddr("192.0.2.1"), EHLO: "mx1.example", Epoch: 12, Pinned: true}, {Bind: netip.MustParseAddr("2001:db8::1"), Public: netip.MustParseAddr("2001:db8::1"), EHLO: "mx2.example"}},
		ReturnPathKeys: []policy.ReturnPathKey{{ID: 3, Key: fill(50)}},
		CredentialKey:  fill(100),
	}
	set(&v.Cluster, 1)
	set(&v.Node, 2)
	set(&v.Tenants[0].ID, 3)
	set(&v.Tenants[1].ID, 4)
	set(&v.Projects[0].ID, 5)
	v.Projects[0].Tenant, v.Domains[0].Tenant = v.Tenants[0].ID, v.Tenants[0].ID
	set(&v.Credentials[0].ID, 6)
	set(&v.Credentials[1].ID, 7)
	v.Credentials[0].Tenant, v.Credentials[0].Project = v.Tenants[0].ID, v.Projects[0].ID
	set(&v.Pools[0].ID, 8)
	set(&v.Pools[1].ID, 9)
	v.Pools[1].Tenant = v.Tenants[0].ID
	set(&v.Sources[0].ID, 10)
	set(&v.Sources[1].ID, 11)
	v.Sources[0].Pool, v.Sources[0].Owner = v.Pools[0].ID, v.Node
	return v
}

// frames is one message of every type, each field set.
func frames() []proto.Message {
	hash := fill(1)
	sixteen := hash[:16]
	revision := &Revision{Generation: 2, Index: 4711}
	return []proto.Message{
		&Preface{ProtocolMin: 1, ProtocolMax: 1, Capabilities: 5, ClusterId: sixteen, Generation: 2, Incarnation: 9, BootNonce: sixteen, Version: "1.0.0"},
		&Error{Kind: uint32(fault.Denied), Field: "token", Text: "used up", RetryAfterMs: 1500},
		&StreamStart{Purpose: Purpose_PURPOSE_VIEW},
		&JoinChallenge{ClusterId: sixteen, ServerTimeMs: 1_700_000_000_000},
		&JoinRequest{TokenId: sixteen, Role: "relay", Csr: []byte{1, 2}, Proof: hash[:], Name: "relay7", Version: "1.0.0", Labels: map[string]string{"a": "1", "b": "2"}, Addresses: [][]byte{{10, 0, 0, 1}}},
		&JoinReply{NodeId: sixteen, State: "active", Chain: [][]byte{{3}}, Bundle: [][]byte{{4}}, Servers: []string{"192.0.2.1:7443"}, ClusterId: sixteen, Generation: 2},
		&RenewRequest{Csr: []byte{1, 2}},
		&Hello{Held: revision, HeldSha256: hash[:], LocalAddresses: [][]byte{{10, 0, 0, 1}}, Name: "relay7"},
		&Welcome{ServerTimeMs: 1_700_000_000_000, ReportIntervalMs: 10_000, Servers: []string{"192.0.2.1:7443"}, State: "active"},
		&Redirect{Servers: []string{"192.0.2.2:7443"}, Reason: "stopping"},
		&Report{Nonce: 8, SentTimeMs: 5, Applied: revision, WaitingRecipients: 1, InFlightRecipients: 2, HeldRecipients: 3, QueueBytes: 4, FreeBytes: 5, Sources: []*HeldSource{{SourceId: sixteen, Epoch: 12, Present: true}}, Problems: []string{"disk is full"}},
		&Pong{Nonce: 8, ServerTimeMs: 6},
		&Probe{Nonce: 9},
		&ProbeReply{Nonce: 9},
		&ViewBegin{Revision: revision, TotalBytes: 3},
		&ViewChunk{Data: []byte{1, 2, 3}},
		&ViewEnd{Sha256: hash[:]},
		&Ack{Revision: revision},
		&DeltaBegin{From: revision, FromSha256: hash[:], To: &Revision{Generation: 2, Index: 4712}, ToSha256: hash[:], TotalBytes: 3},
		&Resync{Held: revision},
		&Nack{Revision: revision, Error: &Error{Kind: 1, Text: "no"}},
		&QuotaUp{Kind: 2, Body: []byte{8, 7}},
		&QuotaDown{Kind: 5, Body: []byte{8, 7}},
	}
}

// golden compares got with a file of hexadecimal digits.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".hex")
	text := hex.EncodeToString(got) + "\n"
	if *update {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != text {
		t.Errorf("%s changed on the wire:\n got %s\nwant %s", name, text, want)
	}
}

func TestFramesKeepTheirBytes(t *testing.T) {
	seen := make(map[Type]bool)
	for _, message := range frames() {
		frame, err := AppendFrame(nil, message)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.ToLower(strings.TrimPrefix(reflect.TypeOf(message).String(), "*wire."))
		golden(t, name, frame)
		seen[TypeOf(message)] = true
		got, err := NewConn(bytes.NewBuffer(frame), MaxFrameBytes).Receive()
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, message) {
			t.Errorf("%s: got %v, want %v", name, got, message)
		}
	}
	for n := range Type(64) {
		if newMessage(n) != nil && !seen[n] {
			t.Errorf("type %d has no golden frame", n)
		}
	}
}

func TestViewBothWays(t *testing.T) {
	view := sampleView()
	encoded, err := EncodeView(view)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "view", encoded)
	got, err := DecodeView(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, view) {
		t.Errorf("got  %+v\nwant %+v", got, view)
	}
	rotated := sampleView() // what was added later, beside the golden bytes
	rotated.Draining = true
	rotated.Credentials[0].PreviousHash, rotated.Credentials[0].PreviousUntil = fill(33), time.UnixMilli(1_800_000_000_456).UTC()
	if encoded, err = EncodeView(rotated); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeView(encoded); err != nil || !reflect.DeepEqual(got, rotated) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, rotated)
	}
	scoped := sampleView()
	narrow := scoped.Credentials[0]
	set(&narrow.ID, 77)
	narrow.Scope = policy.CredentialScope{Domains: []mailaddr.Domain{"shop.example"}, Networks: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, MessagesPerHour: 9, Certificates: [][32]byte{fill(34)}}
	scoped.Credentials = append(scoped.Credentials, narrow)
	if encoded, err = EncodeView(scoped); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeView(encoded); err != nil || !reflect.DeepEqual(got, scoped) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, scoped)
	}
	// A relay that does not know scopes must not know the credential either.
	var message View
	if err := proto.Unmarshal(encoded, &message); err != nil || len(message.Credentials) != len(scoped.Credentials)-1 {
		t.Errorf("%d credentials are for everybody, %v", len(message.Credentials), err)
	}
	message.Credentials, message.ScopedCredentials = message.ScopedCredentials, message.Credentials
	if encoded, err = proto.Marshal(&message); err != nil {
		t.Fatal(err)
	}
	if _, err = DecodeView(encoded); !fault.Is(err, fault.Invalid) {
		t.Errorf("credentials in the wrong lists: %v", err)
	}
	trusting := sampleView()
	trusting.Trust = policy.Trust{CAs: [][]byte{{0x30, 1}, {0x30, 2}}, RefusedCAs: []string{"ab12"}, RevokedServers: []policy.RevokedServer{{Serials: []string{"7f", "80"}}, {}}}
	set(&trusting.Trust.RevokedServers[0].Server, 60)
	set(&trusting.Trust.RevokedServers[1].Server, 61)
	if encoded, err = EncodeView(trusting); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeView(encoded); err != nil || !reflect.DeepEqual(got, trusting) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, trusting)
	}
	limited := sampleView()
	limited.Lease = lease.DefaultConfig()
	limited.SharedLimits = []policy.SharedLimit{
		{Limit: lease.Limit{ID: 7, Kind: lease.Rate, Max: 600_000, Per: time.Minute, Burst: 10, FloorPercent: 20, ReservePercent: 5, SoftFloor: true}, Name: "orange", Provider: "orange"},
		{Limit: lease.Limit{ID: 8, Kind: lease.Slots, Max: 2}, Name: "own", Tenant: limited.Tenants[0].ID, Domain: "example.net", Pool: limited.Pools[0].ID},
	}
	if encoded, err = EncodeView(limited); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeView(encoded); err != nil || !reflect.DeepEqual(got, limited) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, limited)
	}
	empty := &policy.View{}
	if encoded, err = EncodeView(empty); err != nil {
		t.Fatal(err)
	}
	if got, err = DecodeView(encoded); err != nil || !reflect.DeepEqual(got, empty) {
		t.Errorf("empty view: got %+v, %v", got, err)
	}
}

func TestDecodeViewRefuses(t *testing.T) {
	good := func() *View {
		encoded, err := EncodeView(sampleView())
		if err != nil {
			t.Fatal(err)
		}
		var v View
		if err := proto.Unmarshal(encoded, &v); err != nil {
			t.Fatal(err)
		}
		return &v
	}
	cases := map[string]struct {
		change func(*View)
		want   string
	}{
		"newer format":       {func(v *View) { v.Format = 2 }, "upgrade the relay"},
		"short id":           {func(v *View) { v.Tenants[0].Id = []byte{1} }, "1 bytes"},
		"short key":          {func(v *View) { v.CredentialKey = nil }, "credential key"},
		"short hash":         {func(v *View) { v.Credentials[1].SecretHash = []byte{1} }, "credential's hash"},
		"bad address":        {func(v *View) { v.Sources[0].Bind = []byte{1, 2, 3} }, "3 bytes"},
		"key id over a byte": {func(v *View) { v.ReturnPathKeys[0].Id = 256 }, "at most 255"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			v := good()
			c.change(v)
			encoded, err := proto.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			if _, err = DecodeView(encoded); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
	if _, err := DecodeView([]byte{0xff}); !fault.Is(err, fault.Invalid) {
		t.Errorf("damaged bytes: %v", err)
	}
}

func TestReceiveRefuses(t *testing.T) {
	frame := func(size uint32, kind Type, body string) string {
		return string([]byte{byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size), byte(kind >> 8), byte(kind)}) + body
	}
	cases := map[string]struct {
		in   string
		want string
	}{
		"too large":    {frame(MaxFrameBytes-headBytes+1, TypePong, ""), "the limit is 1048576"},
		"huge":         {frame(0xffffffff, TypePong, ""), "the limit is 1048576"},
		"cut head":     {"\x00\x00", "broke while receiving"},
		"cut body":     {frame(5, TypePong, "ab"), "broke within a frame"},
		"unknown type": {frame(0, 999, ""), "type 999"},
		"damaged":      {frame(1, TypePong, "\xff"), "damaged"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, err := NewConn(bytes.NewBufferString(c.in), MaxFrameBytes).Receive()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
	conn := NewConn(bytes.NewBufferString(frame(2, Optional|999, "xy")+frame(0, TypePong, "")), MaxFrameBytes)
	if message, err := conn.Receive(); err != nil || TypeOf(message) != TypePong {
		t.Errorf("an unknown optional frame was not passed over: %v, %v", message, err)
	}
	if _, err := conn.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("end between frames: %v", err)
	}
}

func TestJoinLimitHoldsBothWays(t *testing.T) {
	big := &JoinReply{Chain: [][]byte{make([]byte, MaxJoinFrameBytes)}}
	var stream bytes.Buffer
	if err := NewConn(&stream, MaxJoinFrameBytes).Send(big); !fault.Is(err, fault.TooLarge) || stream.Len() != 0 {
		t.Errorf("send: %v, %d bytes written", err, stream.Len())
	}
	if err := NewConn(&stream, MaxFrameBytes).Send(big); err != nil {
		t.Fatal(err)
	}
	if _, err := NewConn(&stream, MaxJoinFrameBytes).Receive(); !fault.Is(err, fault.TooLarge) {
		t.Errorf("receive: %v", err)
	}
}

func TestExpect(t *testing.T) {
	var stream bytes.Buffer
	conn := NewConn(&stream, MaxFrameBytes)
	send := func(message proto.Message) {
		t.Helper()
		if err := conn.Send(message); err != nil {
			t.Fatal(err)
		}
	}
	send(NewError(fault.Field("x", "token", "used up")))
	if _, err := Expect[*Welcome](conn); !fault.Is(err, fault.Invalid) || fault.Public(err) != "token: used up" {
		t.Errorf("an error frame: %v", err)
	}
	send(&Pong{})
	if _, err := Expect[*Welcome](conn); err == nil || !strings.Contains(err.Error(), "*wire.Pong") {
		t.Errorf("another frame: %v", err)
	}
	if _, err := Expect[*Welcome](conn); !fault.Is(err, fault.Unavailable) {
		t.Errorf("the end: %v", err)
	}
}

func TestNewErrorGivesNothingAway(t *testing.T) {
	if got := NewError(errors.New("secret path /x")); got.Text != "internal error, see the log" || got.Kind != uint32(fault.Internal) {
		t.Errorf("got %v", got)
	}
}

func TestNegotiate(t *testing.T) {
	for _, c := range []struct {
		min, max, want uint32
	}{{1, 1, 1}, {1, 9, 1}, {2, 3, 0}, {0, 1, 0}, {3, 2, 0}} {
		got, err := Negotiate(&Preface{ProtocolMin: c.min, ProtocolMax: c.max})
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%d to %d: got %d, %v", c.min, c.max, got, err)
		}
	}
}

func TestTransfer(t *testing.T) {
	revision := &Revision{Generation: 1, Index: 2}
	for _, size := range []int{0, 1, chunkBytes, chunkBytes + 1, 10 << 20} {
		data := bytes.Repeat([]byte("relais view "), size/12+1)[:size]
		var stream bytes.Buffer
		conn := NewConn(&stream, MaxFrameBytes)
		if err := SendView(conn, revision, data); err != nil {
			t.Fatal(err)
		}
		begin, err := Expect[*ViewBegin](conn)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ReceiveView(conn, begin)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}
}

func TestTransferRefuses(t *testing.T) {
	sum := fill(0)
	cases := map[string]struct {
		total    uint64
		messages []proto.Message
		want     string
	}{
		"too large":      {MaxViewBytes + 1, nil, "the limit is"},
		"longer":         {2, []proto.Message{&ViewChunk{Data: []byte("abc")}}, "longer than"},
		"shorter":        {4, []proto.Message{&ViewChunk{Data: []byte("abc")}, &ViewEnd{}}, "3 bytes of the 4"},
		"wrong checksum": {3, []proto.Message{&ViewChunk{Data: []byte("abc")}, &ViewEnd{Sha256: sum[:]}}, "checksum"},
		"foreign frame":  {3, []proto.Message{&Pong{}}, "within a view"},
		"cut":            {3, nil, "broke within a view"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			var stream bytes.Buffer
			conn := NewConn(&stream, MaxFrameBytes)
			for _, message := range c.messages {
				if err := conn.Send(message); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := ReceiveView(conn, &ViewBegin{TotalBytes: c.total}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to say %q", err, c.want)
			}
		})
	}
}

// FuzzReceive holds that no bytes of a peer make the reader fail in another way
// than with an error, and that what it accepts can be sent again unchanged.
func FuzzReceive(f *testing.F) {
	for _, message := range frames() {
		frame, err := AppendFrame(nil, message)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		conn := NewConn(bytes.NewBuffer(data), MaxJoinFrameBytes)
		for {
			message, err := conn.Receive()
			if err != nil {
				return
			}
			frame, err := AppendFrame(nil, message)
			if err != nil {
				t.Fatalf("accepted but not sendable: %v", err)
			}
			again, err := NewConn(bytes.NewBuffer(frame), MaxFrameBytes).Receive()
			if err != nil || !proto.Equal(again, message) {
				t.Fatalf("%v became %v, %v", message, again, err)
			}
		}
	})
}

// FuzzDecodeView holds that a view that decodes also encodes to one that
// decodes the same.
func FuzzDecodeView(f *testing.F) {
	encoded, err := EncodeView(sampleView())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(t *testing.T, data []byte) {
		view, err := DecodeView(data)
		if err != nil {
			return
		}
		encoded, err := EncodeView(view)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeView(encoded)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(again, view) {
			t.Fatalf("%+v became %+v", view, again)
		}
	})
}
