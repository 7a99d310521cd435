package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

var update = flag.Bool("update", false, "write the golden files")

func TestCompareAndSwap(t *testing.T) {
	w := newWorld(t)
	first := w.tenant(1, "acme")
	if first.Revision != w.index {
		t.Errorf("revision %d, want the index %d", first.Revision, w.index)
	}
	change := &command.Tenant{Id: id(1), Name: "acme2", OwnershipToken: "ownacme"}
	w.refused(&command.TenantPut{Expect: first.Revision + 1, Tenant: change}, fault.Conflict, "")
	w.refused(&command.TenantPut{Tenant: change}, fault.Exists, "")
	w.refused(&command.TenantPut{Expect: 5, Tenant: &command.Tenant{Id: id(9), Name: "x", OwnershipToken: "x"}}, fault.NotFound, "")
	second := w.ok(&command.TenantPut{Expect: first.Revision, Tenant: change}).(*control.Tenant)
	if second.Revision != w.index || w.store.Read().TenantByName("acme2") == nil || w.store.Read().TenantByName("acme") != nil {
		t.Errorf("the change did not take: %+v", second)
	}
	// The very same command again, as after an unknown outcome.
	again := w.ok(&command.TenantPut{Expect: first.Revision, Tenant: change}).(*control.Tenant)
	if again.Revision != second.Revision {
		t.Errorf("repeating a change made a new revision %d", again.Revision)
	}
}

func TestNamesAreTaken(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.tenant(2, "other")
	w.project(3, id(1), "shop")
	w.project(4, id(2), "shop") // names are the tenant's own
	w.pool(5, "eu", nil)
	w.refused(&command.TenantPut{Tenant: &command.Tenant{Id: id(9), Name: "acme", OwnershipToken: "x"}}, fault.Exists, "name")
	w.refused(&command.ProjectPut{Project: &command.Project{Id: id(9), Tenant: id(1), Name: "shop"}}, fault.Exists, "name")
	w.refused(&command.ProjectPut{Project: &command.Project{Id: id(9), Tenant: id(8), Name: "shop"}}, fault.Invalid, "tenant")
	w.refused(&command.PoolPut{Pool: &command.Pool{Id: id(9), Name: "eu", Kind: "shared"}}, fault.Exists, "name")
	w.refused(&command.PoolPut{Pool: &command.Pool{Id: id(9), Name: "us", Kind: "dedicated", Tenant: id(8)}}, fault.Invalid, "tenant")
	w.refused(&command.CredentialPut{Credential: &command.Credential{Id: id(9), Tenant: id(1), Project: id(4), SecretHash: sum(1)}}, fault.Invalid, "project")
}

func TestTenantStartsWithAProject(t *testing.T) {
	w := newWorld(t)
	put := &command.TenantPut{Tenant: &command.Tenant{Id: id(1), Name: "acme", OwnershipToken: "x"}, DefaultProject: id(2)}
	w.ok(put)
	w.ok(put) // again, as after an unknown outcome
	if p := w.store.Read().Projects(*ofTenant(1)); len(p) != 1 || p[0].Name != control.DefaultProject {
		t.Errorf("got %+v", p)
	}
	put = &command.TenantPut{Tenant: &command.Tenant{Id: id(3), Name: "acme", OwnershipToken: "x"}, DefaultProject: id(4)}
	w.refused(put, fault.Exists, "name") // and its project is not made either
	put.Tenant.Name, put.DefaultProject = "other", id(2)
	w.refused(put, fault.Exists, "")
}

func TestDomainOwnership(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.tenant(2, "rival")
	w.ok(domainPut("example.com", id(1)))
	w.ok(domainPut("mail.example.com", id(1))) // below one's own
	w.ok(domainPut("sub.example.org", id(1)))
	w.refused(domainPut("example.com", id(2)), fault.Exists, "")
	w.refused(domainPut("deep.mail.example.com", id(2)), fault.Denied, "domain")
	w.refused(domainPut("example.org", id(2)), fault.Denied, "domain") // above another's
	w.ok(domainPut("notexample.com", id(2)))                           // a suffix of letters is no parent
	w.ok(domainPut("example.com.example.net", id(2)))
	stolen := domainPut("rival.net", id(2))
	stolen.Domain.ReturnPath = "rp.example.com"
	w.refused(stolen, fault.Denied, "return_path")
	own := domainPut("acme.net", id(1))
	own.Domain.ReturnPath = "bounce.elsewhere.net"
	w.ok(own)
	stolen.Domain.ReturnPath = "bounce.elsewhere.net"
	w.refused(stolen, fault.Denied, "return_path")
	w.refused(domainPut("elsewhere.net", id(2)), fault.Denied, "domain") // acme's reports arrive below it
	r := w.store.Read()
	taken := domainPut("example.com", id(2))
	taken.Expect = r.Domain("example.com").Revision
	w.refused(taken, fault.Denied, "domain")
	if n := len(r.Domains(*ofTenant(2))); n != 2 {
		t.Errorf("rival has %d domains, want 2", n)
	}
}

func ofTenant(b byte) *ids.Tenant {
	var t ids.Tenant
	copy(t[:], id(b))
	return &t
}

func TestAddresses(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	w.pool(2, "shared", nil)
	w.pool(3, "own", id(1))
	w.node(4)
	w.ok(tokenCreate(5, nil))
	w.ok(redeem(5, 5, 5))
	w.source(6, 1)
	w.refused(sourcePut(7, 1), fault.Exists, "bind")
	public := sourcePut(7, 2)
	public.Source.Public = []byte{198, 51, 100, 1}
	w.refused(public, fault.Exists, "public")
	owned := sourcePut(7, 2)
	owned.Source.Owner, owned.Source.State = id(4), "assigned"
	w.refused(owned, fault.Invalid, "owner")

	placed := sourcePut(70, 70)
	placed.Node, placed.Pool = id(4), id(99)
	w.refused(placed, fault.Invalid, "pool") // and the address is not added either
	placed.Pool = id(3)
	if s := w.ok(placed).(*control.Source); s.Epoch != w.index || s.Owner != [16]byte(id(4)) || s.Pool != [16]byte(id(3)) {
		t.Errorf("an address added with its place: %+v", s)
	}

	w.refused(&command.IPAssign{Source: id(6), Node: id(99)}, fault.Invalid, "node")
	w.refused(&command.IPAssign{Source: id(6), Pool: id(99)}, fault.Invalid, "pool")
	w.refused(&command.IPAssign{Source: id(99), Pool: id(2)}, fault.NotFound, "")
	a := w.ok(&command.IPAssign{Source: id(6), Node: id(4), Pool: id(2)}).(*control.Source)
	if a.Epoch != w.index || a.State != control.SourceAssigned {
		t.Errorf("after assignment: %+v at index %d", a, w.index)
	}
	// A1: a machine that may still use the address keeps it.
	w.refused(&command.IPAssign{Source: id(6), Node: id(5)}, fault.Conflict, "node")
	b := w.ok(&command.IPAssign{Source: id(6), Node: id(5), OldOwnerIsOff: true}).(*control.Source)
	if b.Epoch <= a.Epoch { // A2
		t.Errorf("the epoch went from %d to %d", a.Epoch, b.Epoch)
	}
	if c := w.ok(&command.IPAssign{Source: id(6), Node: id(5)}).(*control.Source); c.Epoch != b.Epoch {
		t.Errorf("the same owner got another epoch %d", c.Epoch)
	}
	// A3: addresses do not pass between tenants' mail.
	w.refused(&command.IPAssign{Source: id(6), Pool: id(3)}, fault.Conflict, "pool")
	w.refused(&command.PoolPut{Expect: w.store.Read().PoolByName("own").Revision, Pool: &command.Pool{Id: id(3), Name: "own", Kind: "shared"}}, fault.Invalid, "kind")
	w.ok(&command.NodeSetState{Node: id(4), State: "evicted"})
	w.source(8, 3)
	w.refused(&command.IPAssign{Source: id(8), Node: id(4)}, fault.Invalid, "node")
}

func TestTokens(t *testing.T) {
	w := newWorld(t)
	w.refused(redeem(1, 1, 1), fault.Unauthenticated, "")
	w.ok(tokenCreate(1, func(j *command.JoinToken) {
		j.Cidrs, j.NameGlob = []string{"198.51.100.0/24"}, "edge-*"
		j.Labels = []*command.Label{{Key: "pool", Value: "eu"}}
	}))
	outside := redeem(1, 1, 2)
	outside.Remote = []byte{203, 0, 113, 1}
	w.refused(outside, fault.Invalid, "cidr")
	server := redeem(1, 1, 2)
	server.Role = "control"
	w.refused(server, fault.Invalid, "role")
	named := redeem(1, 1, 2)
	named.Name = "core-1"
	w.refused(named, fault.Invalid, "name")

	mapped := redeem(1, 1, 2) // the same address as IPv6 sees it
	mapped.Remote = append(append(make([]byte, 10), 0xff, 0xff), 198, 51, 100, 7)
	mapped.Labels = []*command.Label{{Key: "disk", Value: "ssd"}, {Key: "pool", Value: "mine"}}
	n := w.ok(mapped).(*control.Node)
	if n.State != control.NodeActive || fmt.Sprint(n.Labels) != "[{disk ssd} {pool eu}]" {
		t.Errorf("got %+v", n)
	}
	again := w.ok(redeem(1, 1, 3)).(*control.Node)
	if again.ID != n.ID {
		t.Errorf("the same request became another node %s", again.ID)
	}
	w.refused(redeem(1, 2, 3), fault.Denied, "") // used up
	if tok := w.store.Read().Tokens()[0]; tok.UsesLeft != 0 || len(tok.Redemptions) != 1 {
		t.Errorf("got %+v", tok)
	}
	w.ok(tokenCreate(5, nil))
	w.now = w.now.Add(2 * time.Hour)
	w.refused(redeem(5, 9, 9), fault.Denied, "") // expired
	w.now = w.now.Add(-3 * time.Hour)            // a leader whose clock is behind
	w.refused(redeem(5, 9, 9), fault.Denied, "")
	w.now = w.now.Add(3 * time.Hour)
	w.ok(tokenCreate(6, func(j *command.JoinToken) { j.NotAfterMs = w.now.Add(time.Hour).UnixMilli() }))
	w.ok(&command.TokenRevoke{Token: id(6)})
	w.refused(redeem(6, 9, 9), fault.Denied, "")
	w.ok(&command.NodeSetState{Node: n.ID[:], State: "evicted"})
	w.refused(redeem(1, 1, 3), fault.Denied, "")
	w.refused(&command.NodeSetState{Node: n.ID[:], State: "active"}, fault.Conflict, "")

	w.now = w.now.Add(48 * time.Hour)
	w.ok(tokenCreate(7, nil))
	if n := len(w.store.Read().Tokens()); n != 1 {
		t.Errorf("%d tokens are kept, want the new one only", n)
	}
}

func TestTablesAreBounded(t *testing.T) {
	w := newWorld(t)
	for i := range maxReturnPathKeys {
		w.ok(&command.ReturnPathKeyPut{Key: &command.ReturnPathKey{Id: uint32(i), KeySealed: []byte("k")}})
	}
	w.refused(&command.ReturnPathKeyPut{Key: &command.ReturnPathKey{Id: 200, KeySealed: []byte("k")}}, fault.Exhausted, "")
	w.refused(&command.ReturnPathKeyPut{Expect: 1, Key: &command.ReturnPathKey{Id: 0, KeySealed: []byte("x")}}, fault.Exists, "")
	if k := w.store.Read().ReturnPathKeys()[0]; k.ID != maxReturnPathKeys-1 {
		t.Errorf("key %d signs, want the newest", k.ID)
	}
}

func TestAuditTail(t *testing.T) {
	w := newWorld(t)
	w.ok(&command.TenantPut{Meta: &command.Meta{Actor: "ann", Reason: "new customer"}, Tenant: &command.Tenant{Id: id(1), Name: "acme", OwnershipToken: "x"}})
	w.ok(&command.TenantPut{Meta: &command.Meta{Actor: "bob"}, Expect: w.index, Tenant: &command.Tenant{Id: id(1), Name: "acme", OwnershipToken: "x", Suspended: true}})
	got := w.store.Read().Audit(10)
	if len(got) != 2 || got[1].Actor != "ann" || got[1].Reason != "new customer" || got[1].Before != "" || got[0].Actor != "bob" || got[0].Before != "name=acme suspended=false" || got[0].After != "name=acme suspended=true" || got[0].Action != "tenant.put" {
		t.Fatalf("got %+v %+v", got[0], got[1])
	}
	before := w.store.Read().Hash()
	for range maxAuditEntries {
		row := w.store.Read().Tenant(*ofTenant(1))
		w.ok(&command.TenantPut{Expect: row.Revision, Tenant: &command.Tenant{Id: id(1), Name: "acme", OwnershipToken: "x", Suspended: !row.Suspended}})
	}
	r := w.store.Read()
	if n := len(r.Audit(maxAuditEntries + 10)); n != maxAuditEntries {
		t.Errorf("the tail has %d entries, want %d", n, maxAuditEntries)
	}
	if r.Hash() == before {
		t.Error("the hash does not show a new revision")
	}
}

func TestWatch(t *testing.T) {
	w := newWorld(t)
	isClosed := func(ch <-chan struct{}) bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	any, views := w.store.Watch(), w.store.WatchViews()
	w.ok(tokenCreate(1, nil)) // relays do not hear of tokens
	if !isClosed(any) || isClosed(views) {
		t.Errorf("after a token: change seen %t, view change seen %t", isClosed(any), isClosed(views))
	}
	w.tenant(2, "acme")
	if !isClosed(views) {
		t.Error("a tenant did not wake the views")
	}
	if r := w.store.Read(); r.ViewRevision() != w.index || r.Index() != w.index {
		t.Errorf("view revision %d, index %d, want %d", r.ViewRevision(), r.Index(), w.index)
	}
}

func TestReadersKeepTheirMoment(t *testing.T) {
	w := newWorld(t)
	w.tenant(1, "acme")
	r := w.store.Read()
	w.tenant(2, "other")
	if len(r.Tenants()) != 1 || len(w.store.Read().Tenants()) != 2 {
		t.Error("a reader saw a later change")
	}
}

func TestCheckpoints(t *testing.T) {
	build := func() *world {
		w := newWorld(t)
		w.tenant(1, "acme")
		for w.index < CheckpointEvery+3 {
			w.ok(&command.TokenRevoke{Token: w.token()})
		}
		return w
	}
	w := build()
	cp, ok := w.store.Read().LastCheckpoint()
	if !ok || cp.Index != CheckpointEvery {
		t.Fatalf("got checkpoint %+v, want one at %d", cp, CheckpointEvery)
	}
	w.ok(&command.StateHash{Index: cp.Index, Hash: cp.Hash[:]})
	if d := w.store.Diverged(); d != nil {
		t.Fatalf("equal hashes are taken for different: %v", d)
	}
	w.ok(&command.StateHash{Index: 77, Hash: sum(1)}) // of a checkpoint that is forgotten
	if d := w.store.Diverged(); d != nil {
		t.Fatalf("a forgotten checkpoint raised an alarm: %v", d)
	}
	w.ok(&command.StateHash{Index: cp.Index, Hash: sum(1)})
	if d := w.store.Diverged(); d == nil || d.Index != cp.Index || d.Got != cp.Hash {
		t.Fatalf("different hashes are taken for equal: %v", d)
	}
	// The alarm is local: the state itself is the same as without it.
	calm := build()
	for range 3 {
		calm.ok(&command.StateHash{Index: cp.Index, Hash: cp.Hash[:]})
	}
	if calm.store.Read().Hash() != w.store.Read().Hash() {
		t.Error("an alarm changed the state")
	}
}

// token makes a token once and returns its id.
func (w *world) token() []byte {
	if len(w.store.Read().Tokens()) == 0 {
		w.ok(tokenCreate(200, nil))
	}
	return id(200)
}

// goldenLog applies commands of every type, some refused, to an empty state.
func goldenLog(t *testing.T) *world {
	w := newWorld(t)
	meta := &command.Meta{Actor: "admin", Reason: "golden"}
	w.ok(&command.ClusterInit{Meta: meta, Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 1, CaBundle: []byte("pem"), CredentialKeySealed: []byte("key")}})
	w.ok(&command.ServerUpsert{Server: &command.Server{Id: id(101), Name: "c1", RaftAddress: "10.0.0.1:7444", State: "active", MaxFsmVersion: 1}})
	w.ok(&command.OperatorPut{Operator: &command.Operator{Id: id(102), Name: "admin", Role: "admin"}})
	w.ok(&command.APIKeyPut{Key: &command.APIKey{Id: id(103), Operator: id(102), Name: "init", SecretHash: sum(3)}})
	w.ok(&command.ReturnPathKeyPut{Key: &command.ReturnPathKey{Id: 1, KeySealed: []byte("k")}})
	w.tenant(1, "acme")
	w.tenant(2, "rival")
	w.project(3, id(1), "default")
	w.pool(4, "default", nil)
	w.pool(5, "own", id(1))
	w.ok(domainPut("example.com", id(1)))
	w.refused(domainPut("sub.example.com", id(2)), fault.Denied, "domain")
	w.ok(&command.CredentialPut{Credential: &command.Credential{Id: id(6), Tenant: id(1), Project: id(3), SecretHash: sum(6), Stream: "bulk"}})
	w.ok(&command.CredentialRevoke{Meta: meta, Credential: id(6)})
	w.node(7)
	w.ok(&command.NodeUpsert{Expect: w.store.Read().Nodes()[0].Revision, Node: &command.Node{Id: id(7), Name: "edge-1", State: "active", CertSerial: "ab", CertSpki: sum(7), Token: id(7)}})
	w.source(8, 1)
	w.ok(&command.IPAssign{Source: id(8), Node: id(7), Pool: id(4)})
	w.refused(sourcePut(9, 1), fault.Exists, "bind")
	w.ok(&command.PolicyPut{Sections: []*command.PolicySection{{Name: "delivery", Text: "max_sessions = 7\n"}, {Name: "queue", Text: "retry_jitter_percent = 10\n"}}})
	w.ok(&command.PolicyPut{Expect: w.index, Sections: []*command.PolicySection{{Name: "queue", Text: ""}}})
	w.ok(tokenCreate(10, nil))
	w.ok(&command.TokenRevoke{Token: id(10)})
	w.ok(&command.NodeSetState{Node: id(7), State: "draining"})
	w.ok(&command.FSMVersionSet{Version: 1})
	h := w.store.Read().Hash()
	w.ok(&command.StateHash{Index: 1, Hash: h[:]})
	return w
}

// TestGoldenLog replays a log that was written once and for all: it must still
// lead to the state hash and the snapshot it led to then.
func TestGoldenLog(t *testing.T) {
	logPath, sumPath := filepath.Join("testdata", "golden.log"), filepath.Join("testdata", "golden.sums")
	if *update {
		w := goldenLog(t)
		var text strings.Builder
		for _, b := range w.log {
			fmt.Fprintln(&text, hex.EncodeToString(b))
		}
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(logPath, []byte(text.String()), 0o644), os.WriteFile(sumPath, []byte(sums(t, w.store)), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(logPath)
	if err != nil {
		t.Fatal(err)
	}
	s := New()
	types := map[command.Type]bool{}
	for i, line := range strings.Fields(string(text)) {
		b, err := hex.DecodeString(line)
		if err != nil {
			t.Fatal(err)
		}
		e, err := command.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		types[e.Type] = true
		s.Apply(uint64(i+1), e)
	}
	want, err := os.ReadFile(sumPath)
	if err != nil {
		t.Fatal(err)
	}
	if got := sums(t, s); got != string(want) {
		t.Errorf("the golden log leads to\n%swant\n%s", got, want)
	}
	for _, c := range []command.Type{command.TypeClusterInit, command.TypeIPAssign, command.TypePolicyPut, command.TypeStateHash} {
		if !types[c] {
			t.Errorf("the golden log has no %s", c)
		}
	}
}

func sums(t *testing.T, s *Store) string {
	var snap bytes.Buffer
	if _, err := s.Read().WriteTo(&snap); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("state %x\nsnapshot %x\n", s.Read().Hash(), sha256.Sum256(snap.Bytes()))
}

func TestSnapshotRestore(t *testing.T) {
	w := goldenLog(t)
	var snap bytes.Buffer
	n, err := w.store.Read().WriteTo(&snap)
	if err != nil || n != int64(snap.Len()) {
		t.Fatalf("wrote %d of %d bytes: %v", n, snap.Len(), err)
	}
	s := New()
	watch := s.WatchViews()
	if err := s.Restore(bytes.NewReader(snap.Bytes())); err != nil {
		t.Fatal(err)
	}
	select {
	case <-watch:
	default:
		t.Error("a restore did not wake the views")
	}
	if sums(t, s) != sums(t, w.store) {
		t.Errorf("restored\n%swant\n%s", sums(t, s), sums(t, w.store))
	}
	a, b := s.Read(), w.store.Read()
	if a.Index() != b.Index() || a.ViewRevision() != b.ViewRevision() || !a.Time().Equal(b.Time()) || len(a.Audit(100)) != len(b.Audit(100)) {
		t.Error("the restored state does not know its place in the log")
	}
	if d := a.Domain(mailaddr.Domain("example.com")); d == nil || d.DKIM[0].Selector != "r1" || d.Revision != b.Domain("example.com").Revision {
		t.Errorf("got %+v", d)
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	w := goldenLog(t)
	var buf bytes.Buffer
	if _, err := w.store.Read().WriteTo(&buf); err != nil {
		t.Fatal(err)
	}
	snap := buf.Bytes()
	s := New()
	check := func(what string, b []byte) {
		t.Helper()
		if err := s.Restore(bytes.NewReader(b)); err == nil {
			t.Fatalf("%s was restored", what)
		}
		if s.Read().Index() != 0 {
			t.Fatalf("%s was half restored", what)
		}
	}
	check("nothing", nil)
	check("something else", []byte("this is a text, not a snapshot"))
	for n := 0; n < len(snap); n += 97 {
		check(fmt.Sprintf("a snapshot cut at %d", n), snap[:n])
	}
	for n := 0; n < len(snap); n += 13 {
		bad := bytes.Clone(snap)
		bad[n] ^= 0x40
		check(fmt.Sprintf("a snapshot with a bit flipped at %d", n), bad)
	}
	newer := bytes.Clone(snap)
	newer[5] = 9
	if err := s.Restore(bytes.NewReader(newer)); !strings.Contains(fault.Public(err), "newer release") {
		t.Errorf("a newer format: %v", err)
	}
}
