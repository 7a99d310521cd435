package command

import (
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lease"
)

var update = flag.Bool("update", false, "write the golden files")

var goldenTime = time.UnixMilli(1_767_225_600_123)

func id(b byte) []byte { return []byte(strings.Repeat(string([]byte{b}), 16)) }

func sum(b byte) []byte { return []byte(strings.Repeat(string([]byte{b}), 32)) }

// samples holds one command of every type with every field set.
func samples() []Command {
	meta := &Meta{Actor: "admin", Reason: "golden"}
	return slices.Concat(firstSamples(meta), brakeSamples(meta), warmSamples(meta), ownSamples(meta))
}

func firstSamples(meta *Meta) []Command {
	label := []*Label{{Key: "pool", Value: "eu"}, {Key: "zone", Value: "a"}}
	return []Command{
		&ClusterInit{Meta: meta, Cluster: &Cluster{Id: id(1), Generation: 1, FsmVersion: 1, CreatedMs: 1000, CaBundle: []byte("pem"), CaSealed: []byte("s"), KekId: "kek", RecoverySealed: []byte("r"), CredentialKeySealed: []byte("c")}},
		&TokenCreate{Meta: meta, Token: &JoinToken{Id: id(2), Role: "relay", SecretHash: sum(3), UsesMax: 5, UsesLeft: 5, NotAfterMs: 2000, Labels: label, Cidrs: []string{"198.51.100.0/24"}, NameGlob: "edge-*", CreatedMs: 1000}},
		&TokenRedeem{Meta: meta, Token: id(2), CsrHash: sum(4), Role: "relay", Node: id(5), Name: "edge-1", Remote: []byte{198, 51, 100, 7}, Labels: label, Version: "1", Addresses: [][]byte{{198, 51, 100, 7}}},
		&TokenRevoke{Meta: meta, Token: id(2)},
		&NodeUpsert{Meta: meta, Expect: 7, Node: &Node{Id: id(5), Name: "edge-1", State: "active", Zone: "a", Labels: label, Version: "1", CertSerial: "ab", CertSpki: sum(6), CertNotAfterMs: 3000, Addresses: [][]byte{{198, 51, 100, 7}}, Token: id(2), JoinedMs: 1500}},
		&NodeSetState{Meta: meta, Expect: 8, Node: id(5), State: "draining"},
		&ServerUpsert{Meta: meta, Expect: 9, Server: &Server{Id: id(7), Name: "c1", RaftAddress: "10.0.0.1:7444", LinkAddress: "10.0.0.1:7443", HttpAddress: "10.0.0.1:8443", Version: "1", MaxFsmVersion: 1, Zone: "a", Spki: sum(8), State: "active"}},
		&TenantPut{Meta: meta, Expect: 10, Tenant: &Tenant{Id: id(9), Name: "acme", Suspended: true, OwnershipToken: "own", CreatedMs: 1000}, DefaultProject: id(10)},
		&ProjectPut{Meta: meta, Expect: 11, Project: &Project{Id: id(10), Tenant: id(9), Name: "default", CreatedMs: 1000}},
		&DomainPut{Meta: meta, Expect: 12, Domain: &Domain{Name: "example.com", Tenant: id(9), ReturnPath: "rp.example.com", Dkim: []*DKIMKey{{Selector: "r1", Algorithm: "rsa-sha256", Public: []byte("p"), PrivateSealed: []byte("s")}}, CreatedMs: 1000}},
		&CredentialPut{Meta: meta, Expect: 13, Credential: &Credential{Id: id(11), Tenant: id(9), Project: id(10), Name: "web", SecretHash: sum(12), Stream: "bulk", NotAfterMs: 4000, Revoked: true, CreatedMs: 1000}},
		&CredentialRevoke{Meta: meta, Credential: id(11)},
		&PoolPut{Meta: meta, Expect: 14, Pool: &Pool{Id: id(13), Name: "own", Kind: "dedicated", Tenant: id(9), CreatedMs: 1000}},
		&IPPut{Meta: meta, Expect: 15, Source: &Source{Id: id(14), Bind: []byte{10, 0, 0, 7}, Public: []byte{198, 51, 100, 7}, Ehlo: "mta.example.net", Ptr: "mta.example.net", Pool: id(13), Owner: id(5), Epoch: 16, Pinned: true, State: "assigned", CreatedMs: 1000}, Node: id(5), Pool: id(13)},
		&IPAssign{Meta: meta, Expect: 16, Source: id(14), Node: id(5), Pool: id(13), OldOwnerIsOff: true},
		&PolicyPut{Meta: meta, Expect: 17, Sections: []*PolicySection{{Name: "delivery", Text: "max_sessions = 7\n"}, {Name: "queue", Text: ""}}},
		&OperatorPut{Meta: meta, Expect: 18, Operator: &Operator{Id: id(15), Name: "admin", Role: "admin", PasswordHash: "$argon2id$", Disabled: true, CreatedMs: 1000}},
		&APIKeyPut{Meta: meta, Expect: 19, Key: &APIKey{Id: id(16), Operator: id(15), Name: "init", SecretHash: sum(17), NotAfterMs: 5000, Revoked: true, CreatedMs: 1000}},
		&ReturnPathKeyPut{Meta: meta, Expect: 20, Key: &ReturnPathKey{Id: 2, KeySealed: []byte("k"), CreatedMs: 1000}},
		&FSMVersionSet{Meta: meta, Version: 1},
		&StateHash{Meta: meta, Index: 4096, Hash: sum(18)},
		&NodeDrain{Meta: meta, Expect: 21, Node: id(5), Draining: true},
		&CredentialRotate{Meta: meta, Expect: 22, Credential: id(11), SecretHash: sum(19), PreviousUntilMs: 6000},
		&IPVerify{Meta: meta, Expect: 23, Source: id(14), Reverse: "failed", Detail: "no PTR record", Override: OverrideOn},
		&DomainVerify{Meta: meta, Expect: 24, Domain: "example.com"},
		&ClusterRecover{Meta: meta, Generation: 2, Cause: "restore", Server: &Server{Id: id(7), Name: "c1", RaftAddress: "10.0.0.1:7444", LinkAddress: "10.0.0.1:7443", HttpAddress: "10.0.0.1:8443", Version: "1", MaxFsmVersion: 2, State: "active"}},
		&RecoveryEnd{Meta: meta, Generation: 2},
		&CARotate{Meta: meta, Next: &IssuingCA{KeyId: "ab12", Certificate: []byte("pem"), Sealed: []byte("s"), NotAfterMs: 7000}, AtOnce: true, OldKeyId: "cd34", OldNotAfterMs: 6000},
		&CAAck{Meta: meta, Rotation: "ab12", Phase: "distribute", Members: [][]byte{id(5), id(7)}},
		&CAAdvance{Meta: meta, Rotation: "ab12", Phase: "sign", Force: true},
		&CASkip{Meta: meta, Rotation: "ab12", Member: id(5)},
		&CARollback{Meta: meta, Rotation: "ab12"},
		&CAPrune{Meta: meta},
		&IPRelease{Meta: meta, Expect: 25, Source: id(14), OldOwnerIsOff: true},
		&CredentialPutScoped{Meta: meta, Expect: 28, Credential: &Credential{Id: id(11), Tenant: id(3), Project: id(5), SecretHash: sum(19), CreatedMs: 7000,
			Scope: &CredentialScope{Domains: []string{"shop.example"}, Networks: []string{"192.0.2.0/24"}, MessagesPerHour: 100, Certificates: [][]byte{sum(20)}}}},
		&DomainKeysAdd{Meta: meta, Expect: 26, Domain: "example.com", Keys: []*DKIMKey{{Selector: "e1", Algorithm: "ed25519-sha256", Public: []byte("p"), PrivateSealed: []byte("s")}}},
		&DomainKeyStep{Meta: meta, Domain: "example.com", Selector: "e1", Step: "seen"},
		&DomainKeysRollback{Meta: meta, Expect: 27, Domain: "example.com"},
		&LimitsSet{Meta: meta, Put: []*SharedLimit{{Name: "orange", Kind: 1, Max: 600_000, PerMs: 60_000, Burst: 20, FloorPercent: 20, ReservePercent: 5, SoftFloor: true, Provider: "orange", Tenant: "acme", Domain: "example.com", Pool: "own"}}, Drop: []uint64{7}, Config: LeaseConfigRecord(lease.DefaultConfig())},
		&LeaseBegin{Meta: meta, Settled: true},
		&LeaseNumber{Meta: meta, Nodes: [][]byte{id(5)}},
		NewLeaseTick(99, []lease.Session{{Node: 1, Incarnation: 2}}, []lease.Change{{Limit: 7, Node: 1, Incarnation: 2, Ceiling: lease.Share{Amount: 1000, Burst: 1}, Floor: lease.Share{Amount: 2000, Burst: 2}, Why: lease.Raised}}),
		&LeaseDeclare{Meta: meta, Node: id(5), Limits: []uint64{7}, Floors: []int64{2000}, FloorBursts: []int64{2}},
	}
}

// TestGoldenBytes pins what is in logs: a change here breaks every old log.
func TestGoldenBytes(t *testing.T) {
	var got strings.Builder
	seen := map[Type]bool{}
	for _, c := range samples() {
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", TypeOf(c), err)
		}
		b, err := Encode(c, goldenTime, 3)
		if err != nil {
			t.Fatal(err)
		}
		seen[TypeOf(c)] = true
		fmt.Fprintf(&got, "%d %s %s\n", TypeOf(c), TypeOf(c), hex.EncodeToString(b))
		e, err := Decode(b)
		if err != nil || e.Type != TypeOf(c) || !e.Time.Equal(goldenTime) || e.Term != 3 || e.FSMVersion != Since(e.Type) {
			t.Fatalf("%s decodes to %+v, %v", TypeOf(c), e, err)
		}
		again, err := Encode(e.Body, e.Time, e.Term)
		if err != nil || string(again) != string(b) {
			t.Errorf("%s changes when it is decoded and encoded again", TypeOf(c))
		}
	}
	for _, r := range registry {
		if !seen[r.typ] {
			t.Errorf("%s has no sample", r.name)
		}
		if typ := TypeOf(r.make()); typ != r.typ {
			t.Errorf("%s makes a command of type %s", r.name, typ)
		}
	}
	path := filepath.Join("testdata", "golden.txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got.String() {
		t.Errorf("the bytes of commands changed, so old logs would not apply:\n%s", got.String())
	}
}

func TestDecodeRefuses(t *testing.T) {
	whole, err := Encode(&TokenRevoke{Token: id(1)}, goldenTime, 1)
	if err != nil {
		t.Fatal(err)
	}
	change := func(at int, b byte) []byte {
		c := append([]byte(nil), whole...)
		c[at] = b
		return c
	}
	for name, b := range map[string][]byte{
		"empty":             nil,
		"cut in the header": whole[:headerBytes-1],
		"cut in the body":   whole[:len(whole)-3],
		"unknown type":      change(0, 127),
		"newer version":     change(2, 9),
	} {
		if _, err := Decode(b); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v, want ErrUnknown", name, err)
		}
	}
	e, err := Decode(change(0, 127|byte(IgnorableBit)))
	if err != nil || e.Body != nil {
		t.Errorf("an unknown type that may be skipped: %+v, %v", e, err)
	}
}

func TestEncodeRefuses(t *testing.T) {
	if _, err := Encode(&PolicyPut{Sections: []*PolicySection{{Name: "q", Text: strings.Repeat("x", MaxBytes)}}}, goldenTime, 1); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a command over the limit: %v", err)
	}
	if _, err := Encode(&TenantPut{Tenant: &Tenant{Name: "\xff"}}, goldenTime, 1); !fault.Is(err, fault.Invalid) {
		t.Errorf("a text that is not UTF-8: %v", err)
	}
}

func TestValidateNamesTheField(t *testing.T) {
	src := func(change func(*Source)) Command {
		s := &Source{Id: id(1), Bind: []byte{10, 0, 0, 7}, Public: []byte{10, 0, 0, 7}, Ehlo: "mta.example.net", State: "free"}
		change(s)
		return &IPPut{Source: s}
	}
	for _, tc := range []struct {
		field string
		c     Command
	}{
		{"cluster", &ClusterInit{}},
		{"token", &TokenCreate{}},
		{"uses", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "relay", SecretHash: sum(1), NotAfterMs: 1}}},
		{"cidr", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "relay", SecretHash: sum(1), NotAfterMs: 1, UsesMax: 1, Cidrs: []string{"10.0.0.0/99"}}}},
		{"role", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "boss", SecretHash: sum(1), NotAfterMs: 1, UsesMax: 1}}},
		{"ttl", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "relay", SecretHash: sum(1), UsesMax: 1}}},
		{"name", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "relay", SecretHash: sum(1), NotAfterMs: 1, UsesMax: 1, NameGlob: "[a"}}},
		{"label", &TokenCreate{Token: &JoinToken{Id: id(1), Role: "relay", SecretHash: sum(1), NotAfterMs: 1, UsesMax: 1, Labels: []*Label{{Key: "a"}, {Key: "a"}}}}},
		{"name", &TenantPut{Tenant: &Tenant{Id: id(1), Name: "a b", OwnershipToken: "x"}}},
		{"name", &TenantPut{Tenant: &Tenant{Id: id(1), OwnershipToken: "x"}}},
		{"name", &TenantPut{Tenant: &Tenant{Id: id(1), Name: strings.Repeat("a", 64), OwnershipToken: "x"}}},
		{"tenant", &TenantPut{Tenant: &Tenant{Id: []byte("short"), Name: "a", OwnershipToken: "x"}}},
		{"reason", &TenantPut{Meta: &Meta{Reason: "two\nlines"}, Tenant: &Tenant{Id: id(1), Name: "a", OwnershipToken: "x"}}},
		{"domain", &DomainPut{Domain: &Domain{Name: "com", ReturnPath: "rp.example.com", Tenant: id(1)}}},
		{"return_path", &DomainPut{Domain: &Domain{Name: "example.com", ReturnPath: "[192.0.2.1]", Tenant: id(1)}}},
		{"selector", &DomainPut{Domain: &Domain{Name: "example.com", ReturnPath: "rp.example.com", Tenant: id(1), Dkim: []*DKIMKey{{Selector: "A_", Algorithm: "rsa-sha256"}}}}},
		{"algorithm", &DomainPut{Domain: &Domain{Name: "example.com", ReturnPath: "rp.example.com", Tenant: id(1), Dkim: []*DKIMKey{{Selector: "a", Algorithm: "rsa-sha1"}}}}},
		{"tenant", &PoolPut{Pool: &Pool{Id: id(1), Name: "p", Kind: "dedicated"}}},
		{"tenant", &PoolPut{Pool: &Pool{Id: id(1), Name: "p", Kind: "shared", Tenant: id(2)}}},
		{"kind", &PoolPut{Pool: &Pool{Id: id(1), Name: "p", Kind: "private"}}},
		{"bind", src(func(s *Source) { s.Bind = []byte{1, 2} })},
		{"bind", src(func(s *Source) { s.Bind = []byte{0, 0, 0, 0} })},
		{"public", src(func(s *Source) { s.Public = make([]byte, 16) })},
		{"ehlo", src(func(s *Source) { s.Ehlo = "mta" })},
		{"ehlo", src(func(s *Source) { s.Ehlo = "MTA.example.net" })},
		{"node", &IPAssign{Source: id(1)}},
		{"pool", &IPAssign{Source: id(1), Node: id(2), Pool: []byte("x")}},
		{"sections", &PolicyPut{}},
		{"sections", &PolicyPut{Sections: []*PolicySection{{Name: "b"}, {Name: "a"}}}},
		{"stream", &CredentialPut{Credential: &Credential{Id: id(1), Tenant: id(2), Project: id(3), SecretHash: sum(1), Stream: "a b"}}},
		{"scope", &CredentialPut{Credential: &Credential{Id: id(1), Tenant: id(2), Project: id(3), SecretHash: sum(1), Scope: &CredentialScope{MessagesPerHour: 1}}}},
		{"scope", scopedSample(nil)},
		{"scope", scopedSample(&CredentialScope{})},
		{"domains", scopedSample(&CredentialScope{Domains: []string{"Shop.example"}})},
		{"networks", scopedSample(&CredentialScope{Networks: []string{"192.0.2.1/24"}})},
		{"networks", scopedSample(&CredentialScope{Networks: []string{"all"}})},
		{"certificates", scopedSample(&CredentialScope{Certificates: [][]byte{{1}}})},
		{"messages_per_hour", scopedSample(&CredentialScope{MessagesPerHour: 10_000_001})},
		{"state", &NodeSetState{Node: id(1), State: "sleeping"}},
		{"id", &ReturnPathKeyPut{Key: &ReturnPathKey{Id: 300, KeySealed: []byte("k")}}},
		{"version", &FSMVersionSet{Version: 999}},
		{"hash", &StateHash{Hash: []byte("x")}},
	} {
		err := tc.c.Validate()
		var f *fault.Error
		if !errors.As(err, &f) || f.Field != tc.field || f.Kind != fault.Invalid {
			t.Errorf("%v: got %v, want an error about %s", tc.c, err, tc.field)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, c := range samples() {
		b, err := Encode(c, goldenTime, 3)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Decode(b)
		if err != nil || e.Body == nil {
			return
		}
		_ = e.Body.Validate() // must not panic
		if _, err := Encode(e.Body, e.Time, e.Term); err != nil && !fault.Is(err, fault.TooLarge) {
			t.Errorf("what was decoded does not encode: %v", err)
		}
	})
}

func scopedSample(scope *CredentialScope) *CredentialPutScoped {
	return &CredentialPutScoped{Credential: &Credential{Id: id(1), Tenant: id(2), Project: id(3), SecretHash: sum(1), Scope: scope}}
}
