package state

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// draw makes a command over a small world, so that names, addresses and ids
// collide often.
func draw(t *rapid.T, r *Reader) command.Command {
	b := func(label string) []byte { return id(rapid.ByteRange(1, 3).Draw(t, label)) }
	name := func() string { return rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name") }
	expect := func(revision uint64) uint64 {
		if rapid.IntRange(0, 3).Draw(t, "stale") == 0 {
			return rapid.Uint64Range(0, 40).Draw(t, "expect")
		}
		return revision
	}
	switch rapid.SampledFrom([]int{0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9}).Draw(t, "command") {
	case 0:
		c := &command.TenantPut{Tenant: &command.Tenant{Id: b("tenant"), Name: name(), OwnershipToken: "own", Suspended: rapid.Bool().Draw(t, "suspended")}}
		if old := r.Tenant(ids.Tenant(c.Tenant.Id)); old != nil {
			c.Expect = expect(old.Revision)
		}
		return c
	case 1:
		return &command.ProjectPut{Project: &command.Project{Id: b("project"), Tenant: b("tenant"), Name: name()}}
	case 2:
		c := domainPut(rapid.SampledFrom([]string{"example.com", "a.example.com", "b.a.example.com", "example.org", "xexample.com"}).Draw(t, "domain"), b("tenant"))
		c.Domain.ReturnPath = rapid.SampledFrom([]string{"rp." + c.Domain.Name, "rp.example.com", "bounce.net.test"}).Draw(t, "return path")
		if old := r.Domain(mailaddr.Domain(c.Domain.Name)); old != nil {
			c.Expect = expect(old.Revision)
		}
		return c
	case 3:
		kind, tenant := "shared", []byte(nil)
		if rapid.Bool().Draw(t, "dedicated") {
			kind, tenant = "dedicated", b("tenant")
		}
		return &command.PoolPut{Pool: &command.Pool{Id: b("pool"), Name: name(), Kind: kind, Tenant: tenant}}
	case 4:
		return sourcePut(rapid.ByteRange(1, 6).Draw(t, "source"), rapid.ByteRange(1, 4).Draw(t, "address"))
	case 5:
		return &command.IPAssign{Source: b("source"), Node: b("node"), Pool: b("pool"), OldOwnerIsOff: rapid.Bool().Draw(t, "off")}
	case 6:
		return tokenCreate(rapid.ByteRange(1, 6).Draw(t, "token"), func(j *command.JoinToken) { j.UsesMax, j.UsesLeft = 2, 2 })
	case 7:
		return redeem(rapid.ByteRange(1, 6).Draw(t, "token"), rapid.ByteRange(1, 6).Draw(t, "csr"), rapid.ByteRange(1, 6).Draw(t, "node"))
	case 8:
		return &command.NodeSetState{Node: b("node"), State: rapid.SampledFrom([]string{"active", "draining", "evicted"}).Draw(t, "state")}
	}
	return &command.PolicyPut{Expect: expect(r.Policy().Revision), Sections: []*command.PolicySection{{Name: name(), Text: rapid.SampledFrom([]string{"", "x = 1\n", "x = 2\n"}).Draw(t, "text")}}}
}

// invariants are checked against all rows, without the indexes.
func invariants(r *Reader) error {
	names, addrs := map[string]bool{}, map[string]bool{}
	for _, t := range r.Tenants() {
		if names[t.Name] {
			return fmt.Errorf("two tenants %q", t.Name)
		}
		names[t.Name] = true
	}
	domains := r.Domains(ids.Tenant{})
	for _, a := range domains {
		for _, b := range domains {
			if a.Tenant != b.Tenant && (a.Name.IsSubdomainOf(b.Name) || a.ReturnPath == b.ReturnPath || a.ReturnPath.IsSubdomainOf(b.Name)) {
				return fmt.Errorf("%s of %s and %s of %s overlap", a.Name, a.Tenant, b.Name, b.Tenant)
			}
		}
	}
	for _, s := range r.Sources() {
		for _, key := range []string{"bind " + s.Bind.String(), "public " + s.Public.String()} {
			if addrs[key] {
				return fmt.Errorf("two sources with %s", key)
			}
			addrs[key] = true
		}
		if s.Owner.IsZero() != (s.Epoch == 0) || s.Epoch > r.Index() {
			return fmt.Errorf("source %s has owner %s and epoch %d", s.Bind, s.Owner, s.Epoch)
		}
	}
	for _, t := range r.Tokens() {
		if int(t.UsesMax-t.UsesLeft) != len(t.Redemptions) {
			return fmt.Errorf("token %s: %d of %d uses left, %d redemptions", t.ID, t.UsesLeft, t.UsesMax, len(t.Redemptions))
		}
	}
	return nil
}

// TestApplySnapshotRestore: whatever is applied, the rules hold, the hash that
// is kept row by row is the sum over all rows, and a state that went through a
// snapshot goes on exactly like one that did not.
func TestApplySnapshotRestore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		direct, applied := New(), 0
		var restored *Store
		epochs := map[ids.Source]uint64{}
		steps := rapid.IntRange(1, 60).Draw(t, "steps")
		cut := rapid.IntRange(0, steps).Draw(t, "cut")
		seed := &world{t: t, store: direct, now: start}
		for n := byte(1); n <= 3; n++ { // so that most commands have something to refer to
			seed.tenant(n, fmt.Sprint("tenant", n))
		}
		for i := range steps {
			if i == cut {
				restored = throughSnapshot(t, direct)
			}
			c := draw(t, direct.Read())
			b, err := command.Encode(c, start.Add(time.Duration(i)*time.Second), 1)
			if err != nil {
				t.Fatal(err)
			}
			e, err := command.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			got := direct.Apply(seed.index+uint64(i+1), e)
			if got.Err == nil {
				applied++
			}
			if restored != nil {
				if again := restored.Apply(seed.index+uint64(i+1), e); fmt.Sprint(again.Err) != fmt.Sprint(got.Err) {
					t.Fatalf("%s: %v after a restore, %v without", e.Type, again.Err, got.Err)
				}
			}
			r := direct.Read()
			if err := invariants(r); err != nil {
				t.Fatalf("after %s: %v", e.Type, err)
			}
			for _, s := range r.Sources() {
				if s.Epoch < epochs[s.ID] { // A2
					t.Fatalf("the epoch of %s fell from %d to %d", s.Bind, epochs[s.ID], s.Epoch)
				}
				epochs[s.ID] = s.Epoch
			}
		}
		if restored != nil && snapshot(t, restored) != snapshot(t, direct) {
			t.Fatal("a restored state went on differently")
		}
		throughSnapshot(t, direct) // checks the hash against all rows
	})
}

func snapshot(t fataler, s *Store) string {
	var b bytes.Buffer
	if _, err := s.Read().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func throughSnapshot(t fataler, s *Store) *Store {
	out := New()
	if err := out.Restore(bytes.NewReader([]byte(snapshot(t, s)))); err != nil {
		t.Fatal(err)
	}
	return out
}
