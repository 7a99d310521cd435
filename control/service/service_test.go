package service

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/auth"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
)

func TestInit(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	a, err := f.Authenticate(f.init.APIKey)
	if err != nil || a.Role != control.RoleAdmin || a.Name != "admin" {
		t.Fatalf("the key of init is %+v, %v", a, err)
	}
	o := f.state.Read().OperatorByName("admin")
	if !auth.CheckPassword(o.PasswordHash, f.init.AdminPassword) || auth.CheckPassword(o.PasswordHash, f.init.AdminPassword+"x") {
		t.Error("the password of init does not open the account")
	}
	if p := must[PoolView](t)(f.Pool(viewer, control.DefaultPool)); p.Kind != policy.PoolShared {
		t.Errorf("got %+v", p)
	}
	if i := f.Info(); i.Version != "1.2.3" || !i.Leader || i.Cluster.IsZero() || i.Index != f.log.index {
		t.Errorf("got %+v", i)
	}
}

func TestAuthenticateRefuses(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	stranger, _ := auth.NewAPIKey(ids.Key{7})
	for name, key := range map[string]string{"empty": "", "cut": f.init.APIKey[:len(f.init.APIKey)-1], "unknown": stranger, "other form": "rk2" + f.init.APIKey[3:]} {
		if _, err := f.Authenticate(key); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: %v", name, err)
		} else if key != "" && strings.Contains(err.Error(), key[len(key)-20:]) {
			t.Errorf("%s: the error repeats the secret", name)
		}
	}
	id, _, err := auth.ParseAPIKey(f.init.APIKey)
	if err != nil {
		t.Fatal(err)
	}
	row := *f.state.Read().APIKey(id)
	row.Revoked = true
	if _, err := f.log.Propose(ctx, &command.APIKeyPut{Expect: row.Revision, Key: command.APIKeyRecord(&row)}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Authenticate(f.init.APIKey); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("revoked: %v", err)
	}
}

func TestTheDoor(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.refused(t, fault.Denied, "", func() error { _, err := f.AddTenant(ctx, viewer, "acme", Change{}); return err })
	f.refused(t, fault.Denied, "", func() error { _, err := f.Tenants(Actor{}); return err })
	f.refused(t, fault.Denied, "", func() error {
		_, _, err := f.CreateToken(ctx, operator, TokenRequest{Role: control.NodeControl}, Change{})
		return err
	})
	f.log.stale = true
	if _, err := f.Tenants(viewer); !errors.Is(err, control.ErrNoLeader) {
		t.Errorf("a stale server answers: %v", err)
	}
	if _, err := f.Authenticate(f.init.APIKey); !errors.Is(err, control.ErrNoLeader) {
		t.Errorf("a stale server judges keys: %v", err)
	}
	f.log.stale, f.log.unsound = false, errors.New("diverged")
	if _, err := f.Tenants(viewer); !fault.Is(err, fault.Unavailable) {
		t.Errorf("an unsound server answers: %v", err)
	}
	if _, err := f.ViewFor(ctx, ids.Node{1}); err == nil {
		t.Error("an unsound server builds views")
	}
}

func TestTenantsAndProjects(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	acme := must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{Reason: "contract 7"}))
	if p := must[[]*control.Project](t)(f.Projects(viewer, "acme")); len(p) != 1 || p[0].Name != control.DefaultProject || p[0].Tenant != acme.ID {
		t.Errorf("got %+v", p)
	}
	f.refused(t, fault.Exists, "name", func() error { _, err := f.AddTenant(ctx, operator, "acme", Change{}); return err })
	f.refused(t, fault.Invalid, "name", func() error { _, err := f.AddTenant(ctx, operator, "a me", Change{}); return err })
	f.refused(t, fault.NotFound, "tenant", func() error { _, err := f.AddProject(ctx, operator, "nobody", "shop", Change{}); return err })
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.SuspendTenant(ctx, operator, "acme", true, Change{Expect: acme.Revision + 100})
		return err
	})
	if s := must[*control.Tenant](t)(f.SuspendTenant(ctx, operator, acme.ID.String(), true, Change{})); !s.Suspended {
		t.Errorf("got %+v", s)
	}
	tail := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 3}))
	if tail[0].Actor != "olga" || !strings.Contains(tail[0].After, "suspended=true") || tail[1].Reason != "contract 7" {
		t.Errorf("the audit tail says %+v", tail)
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	network := netip.MustParsePrefix("198.51.100.77/24")
	row, text, err := f.CreateToken(ctx, operator, TokenRequest{Role: control.NodeRelay, Uses: 2, CIDRs: []netip.Prefix{network}, Labels: map[string]string{"pool": "eu"}}, Change{})
	if err != nil {
		t.Fatal(err)
	}
	token, err := pki.ParseJoinToken(text)
	if err != nil || token.Role != pki.RoleRelay || token.ID != row.ID || !slices.Equal(token.Pins, []pki.Pin{f.pin}) {
		t.Fatalf("the token reads %+v, %v", token, err)
	}
	if h, err := f.TokenSecretHash(ctx, row.ID); err != nil || h != token.SecretHash() {
		t.Errorf("the stored hash is not the token's: %v", err)
	}
	if strings.Contains(string(f.log.bytes), token.Secret) {
		t.Error("the secret is in the log")
	}
	if _, err := f.TokenSecretHash(ctx, ids.Token{1}); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("an unknown token: %v", err)
	}
	req := RedeemRequest{TokenID: row.ID, CSRHash: [32]byte{1}, Role: "relay", Name: "edge-1.example.net", RemoteAddr: netip.MustParseAddr("::ffff:198.51.100.9"), Labels: map[string]string{"disk": "ssd"}, Addresses: []netip.Addr{netip.MustParseAddr("198.51.100.9")}}
	node, st, err := f.RedeemToken(ctx, req)
	if err != nil || st != "active" {
		t.Fatal(st, err)
	}
	if again, _, err := f.RedeemToken(ctx, req); err != nil || again != node {
		t.Errorf("the same request became %s, %v", again, err)
	}
	wrong := req
	wrong.CSRHash, wrong.RemoteAddr = [32]byte{2}, netip.MustParseAddr("203.0.113.1")
	f.refused(t, fault.Invalid, "cidr", func() error { _, _, err := f.RedeemToken(ctx, wrong); return err })
	wrong.RemoteAddr, wrong.Role = req.RemoteAddr, "control"
	f.refused(t, fault.Invalid, "role", func() error { _, _, err := f.RedeemToken(ctx, wrong); return err })
	wrong.Role, wrong.Name = "relay", "not a name"
	f.refused(t, fault.Invalid, "name", func() error { _, _, err := f.RedeemToken(ctx, wrong); return err })

	if err := f.SetNodeCert(ctx, node, "ab12", make([]byte, 32), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if n := must[*control.Node](t)(f.NodeByID(ctx, node)); n.CertSerial != "ab12" || len(n.Labels) != 2 || n.State != control.NodeActive {
		t.Errorf("got %+v", n)
	}
	for name, req := range map[string]TokenRequest{
		"ttl":  {Role: control.NodeRelay, TTL: 25 * time.Hour},
		"uses": {Role: control.NodeRelay, Uses: 1001},
		"role": {Role: "boss"},
	} {
		f.refused(t, fault.Invalid, name, func() error { _, _, err := f.CreateToken(ctx, admin, req, Change{}); return err })
	}
	if r := must[*control.JoinToken](t)(f.RevokeToken(ctx, operator, row.ID.String(), Change{})); !r.Revoked {
		t.Errorf("got %+v", r)
	}
	f.refused(t, fault.NotFound, "token", func() error { _, err := f.RevokeToken(ctx, operator, "tok_x", Change{}); return err })
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "rival", Change{}))
	must[*control.Project](t)(f.AddProject(ctx, operator, "rival", "shop", Change{}))
	c, secret, err := f.CreateCredential(ctx, operator, CredentialRequest{Tenant: "acme", Stream: "bulk"}, Change{})
	if err != nil || !strings.HasPrefix(secret, "rs1_") || len(secret) < 52 {
		t.Fatalf("got secret of %d bytes, %v", len(secret), err)
	}
	if strings.Contains(string(f.log.bytes), secret) {
		t.Error("the secret is in the log")
	}
	v := must[*policy.View](t)(f.ViewFor(ctx, ids.Node{1}))
	mac := hmac.New(sha256.New, v.CredentialKey[:])
	mac.Write([]byte(secret))
	if len(v.Credentials) != 1 || !hmac.Equal(mac.Sum(nil), v.Credentials[0].SecretHash[:]) || v.Credentials[0].ID != c.ID || v.Credentials[0].Stream != "bulk" {
		t.Errorf("a relay could not check the secret: %+v", v.Credentials)
	}
	f.refused(t, fault.NotFound, "project", func() error {
		_, _, err := f.CreateCredential(ctx, operator, CredentialRequest{Tenant: "acme", Project: "shop"}, Change{})
		return err
	})
	f.refused(t, fault.Invalid, "not_after", func() error {
		_, _, err := f.CreateCredential(ctx, operator, CredentialRequest{Tenant: "acme", NotAfter: time.Now().Add(-time.Hour)}, Change{})
		return err
	})
	must[*control.Credential](t)(f.RevokeCredential(ctx, operator, c.ID.String(), Change{}))
	if v := must[*policy.View](t)(f.ViewFor(ctx, ids.Node{1})); len(v.Credentials) != 0 {
		t.Error("a revoked credential is in the view")
	}
	if rows := must[[]*control.Credential](t)(f.Credentials(viewer, "acme")); len(rows) != 1 || !rows[0].Revoked {
		t.Errorf("got %+v", rows)
	}
}

func TestIPs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	edge1, edge2 := f.join(t, "edge-1"), f.join(t, "edge-2")
	bind := netip.MustParseAddr("198.51.100.1")
	req := IPRequest{Bind: bind, EHLO: "mta1.example.net", Node: "edge-1", Pool: "default"}
	for field, bad := range map[string]IPRequest{"pool": {Bind: bind, EHLO: req.EHLO, Node: "edge-1", Pool: "none"}, "node": {Bind: bind, EHLO: req.EHLO, Node: "none"}} {
		f.refused(t, fault.NotFound, field, func() error { _, err := f.AddIP(ctx, operator, bad, Change{}); return err })
	}
	a := must[*control.Source](t)(f.AddIP(ctx, operator, req, Change{}))
	if a.Owner != edge1 || a.Epoch == 0 || !a.Pinned {
		t.Errorf("got %+v", a)
	}
	f.refused(t, fault.Exists, "bind", func() error { _, err := f.AddIP(ctx, operator, req, Change{}); return err })
	f.refused(t, fault.Conflict, "node", func() error {
		_, err := f.AssignIP(ctx, operator, "198.51.100.1", AssignRequest{Node: "edge-2"}, Change{})
		return err
	})
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.AssignIP(ctx, operator, "198.51.100.1", AssignRequest{Node: "edge-2", OldOwnerIsOff: true}, Change{Expect: 1})
		return err
	})
	b := must[*control.Source](t)(f.AssignIP(ctx, operator, a.ID.String(), AssignRequest{Node: "edge-2", OldOwnerIsOff: true}, Change{Expect: a.Revision}))
	if b.Owner != edge2 || b.Epoch <= a.Epoch {
		t.Errorf("got %+v after %+v", b, a)
	}
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.OwnerName != "edge-2" || v.PoolName != "default" || v.Present != nil {
		t.Errorf("got %+v", v)
	}
	f.NodeSeen(ctx, edge2, HelloInfo{Addresses: []netip.Addr{bind}})
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Present == nil || !*v.Present {
		t.Errorf("got %+v", v)
	}
	f.NodeReported(edge2, ReportInfo{Generation: f.Generation(), Revision: f.Revision(), Missing: []ids.Source{b.ID}})
	if v := must[IPView](t)(f.IPView(ctx, viewer, "198.51.100.1")); v.Present == nil || *v.Present {
		t.Error("a missing address is shown as present")
	}
}

func TestNodes(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	id := f.join(t, "edge-1")
	f.NodeSeen(ctx, id, HelloInfo{Version: "2", Generation: f.Generation(), Revision: 3})
	f.AckView(id, 9)
	f.NackView(id, 10, strings.Repeat("x", 5000))
	n := must[NodeView](t)(f.Node(viewer, "edge-1"))
	if !n.Seen.Connected || n.Seen.Acked != 9 || n.Seen.Refused != 10 || len(n.Seen.RefusedWhy) != maxRefusalBytes || n.Seen.Version != "2" {
		t.Errorf("got %+v", n.Seen)
	}
	f.NodeGone(id)
	if must[NodeView](t)(f.Node(viewer, id.String())).Seen.Connected {
		t.Error("a node that went is shown as connected")
	}
	f.NodeSeen(ctx, ids.Node{9}, HelloInfo{}) // never joined
	if len(f.seen) != 1 {
		t.Error("strangers are remembered")
	}
	twin := f.join(t, "edge-2")
	row := *f.state.Read().Node(twin)
	row.Name = "edge-1"
	if _, err := f.log.Propose(ctx, &command.NodeUpsert{Expect: row.Revision, Node: command.NodeRecord(&row)}); err != nil {
		t.Fatal(err)
	}
	f.refused(t, fault.Invalid, "node", func() error { _, err := f.Node(viewer, "edge-1"); return err })
	must[*control.Node](t)(f.SetNodeState(ctx, operator, id.String(), control.NodeEvicted, Change{Reason: "lost disk"}))
	if n := must[NodeView](t)(f.Node(viewer, "edge-1")); n.ID != twin {
		t.Errorf("the name leads to %s", n.ID)
	}
	if got := must[[]string](t)(f.LinkServers(ctx)); len(got) != 1 || got[0] != "10.0.0.1:7443" {
		t.Errorf("got %v", got)
	}
	server := f.state.Read().Servers()[0].ID
	for range 2 { // the second time nothing is left to record
		if err := f.AnnounceServer(ctx, server, "10.0.0.1:9443", "10.0.0.1:8443", "2"); err != nil {
			t.Fatal(err)
		}
	}
	if s := f.state.Read().Servers()[0]; s.LinkAddress != "10.0.0.1:9443" || s.Version != "2" || s.Revision != f.log.index {
		t.Errorf("got %+v at index %d", s, f.log.index)
	}
	f.refused(t, fault.NotFound, "", func() error { return f.AnnounceServer(ctx, ids.Node{9}, "a:1", "b:1", "2") })
}

func TestRotateCredential(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	row, first, err := f.CreateCredential(ctx, operator, CredentialRequest{Tenant: "acme"}, Change{})
	if err != nil {
		t.Fatal(err)
	}
	rotated, second, err := f.RotateCredential(ctx, operator, row.ID.String(), time.Hour, Change{Reason: "yearly"})
	if err != nil || second == first || rotated.ID != row.ID || rotated.PreviousHash != row.SecretHash || time.Until(rotated.PreviousUntil) < 59*time.Minute {
		t.Fatalf("got %+v, %v", rotated, err)
	}
	c := must[*policy.View](t)(f.ViewFor(ctx, ids.Node{1})).Credentials[0]
	if c.SecretHash != rotated.SecretHash || c.PreviousHash != row.SecretHash || !c.PreviousUntil.Equal(rotated.PreviousUntil) {
		t.Errorf("the view has %+v", c)
	}
	if strings.Contains(string(f.log.bytes), second) {
		t.Error("the secret is in the log")
	}
	for name, tc := range map[string]struct {
		ref     string
		overlap time.Duration
		kind    fault.Kind
		field   string
	}{
		"too long": {row.ID.String(), MaxRotationOverlap + 1, fault.Invalid, "overlap"},
		"negative": {row.ID.String(), -1, fault.Invalid, "overlap"},
		"unknown":  {"crd_nobody", 0, fault.NotFound, "credential"},
	} {
		t.Run(name, func(t *testing.T) {
			f.refused(t, tc.kind, tc.field, func() error {
				_, _, err := f.RotateCredential(ctx, operator, tc.ref, tc.overlap, Change{})
				return err
			})
		})
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	node, other := f.join(t, "edge-1"), f.join(t, "edge-2")
	watch := f.WatchRevision()
	row := must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge-1", control.NodeDraining, Change{Reason: "new disk"}))
	select {
	case <-watch:
	default:
		t.Error("relays do not hear of it")
	}
	a, b := must[*policy.View](t)(f.ViewFor(ctx, node)), must[*policy.View](t)(f.ViewFor(ctx, other))
	if row.State != control.NodeDraining || !a.Draining || b.Draining {
		t.Errorf("%s: the views say %t and %t", row.State, a.Draining, b.Draining)
	}
	must[*control.Node](t)(f.SetNodeState(ctx, operator, "edge-1", control.NodeActive, Change{}))
	if must[*policy.View](t)(f.ViewFor(ctx, node)).Draining {
		t.Error("it still drains")
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	put := func(sections map[string]string, expect *uint64) error {
		_, err := f.PutPolicy(ctx, operator, sections, expect, Change{})
		return err
	}
	zero, stale := uint64(0), uint64(3)
	for name, tc := range map[string]struct {
		sections map[string]string
		expect   *uint64
		kind     fault.Kind
		text     string
	}{
		"unknown section": {map[string]string{"quueue": ""}, nil, fault.Invalid, "quueue"},
		"unknown key":     {map[string]string{"queue": "retri = 1\n"}, nil, fault.Invalid, "queue.retri"},
		"out of range":    {map[string]string{"queue": "retry_jitter_percent = 900\n"}, nil, fault.Invalid, "retry_jitter_percent"},
		"not TOML":        {map[string]string{"queue": "[["}, nil, fault.Invalid, "queue"},
		"unknown pool":    {map[string]string{"streams": "[[stream]]\ntenant = \"*\"\nproject = \"*\"\nname = \"news\"\nkind = \"bulk\"\npool = \"nowhere\"\n"}, nil, fault.Invalid, "nowhere"},
		"one bad of two":  {map[string]string{"queue": "retry_jitter_percent = 10\n", "delivery": "max_sessions = -1\n"}, nil, fault.Invalid, "max_sessions"},
		"stale":           {map[string]string{"queue": "retry_jitter_percent = 10\n"}, &stale, fault.Conflict, "revision"},
		"too long":        {map[string]string{"queue": strings.Repeat("#", policy.MaxSectionBytes+1)}, nil, fault.TooLarge, "bytes"},
		"nothing":         {nil, nil, fault.Invalid, "sections"},
	} {
		before := f.state.Read().Hash()
		err := put(tc.sections, tc.expect)
		if !fault.Is(err, tc.kind) || !strings.Contains(fault.Public(err), tc.text) {
			t.Errorf("%s: got %v", name, err)
		}
		if f.state.Read().Hash() != before {
			t.Errorf("%s: something was half applied", name)
		}
	}
	if err := put(map[string]string{"queue": "retry_jitter_percent = 10\n"}, &zero); err != nil {
		t.Fatal(err)
	}
	v := must[PolicyView](t)(f.Policy(viewer))
	if v.Revision != f.log.index || len(v.Sections) != len(policy.SectionNames()) {
		t.Errorf("got %+v", v)
	}
	if view := must[*policy.View](t)(f.ViewFor(ctx, ids.Node{1})); view.Document.Queue.RetryJitterPercent != 10 || view.Revision != v.Revision {
		t.Errorf("the view has %d at revision %d", view.Document.Queue.RetryJitterPercent, view.Revision)
	}
	if err := put(map[string]string{"queue": ""}, &v.Revision); err != nil {
		t.Fatal(err)
	}
	v = must[PolicyView](t)(f.Policy(viewer))
	if i := slices.IndexFunc(v.Sections, func(s SectionView) bool { return s.Name == "queue" }); !v.Sections[i].Default {
		t.Error("an empty text did not bring the default back")
	}
}

func TestViewsCompileAndAreSharedPerRevision(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	watch := f.WatchRevision()
	node := f.join(t, "edge-1")
	select {
	case <-watch:
		t.Error("a joining node is no change of the views")
	default:
	}
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	select {
	case <-watch:
	default:
		t.Error("a tenant is a change of the views")
	}
	must[*control.Source](t)(f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.1"), EHLO: "mta1.example.net", Node: "edge-1", Pool: "default"}, Change{}))
	must[IPView](t)(f.OverrideIP(ctx, operator, "198.51.100.1", true, Change{Reason: "test"}))
	must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, Change{}))
	a, b := must[*policy.View](t)(f.ViewFor(ctx, node)), must[*policy.View](t)(f.ViewFor(ctx, ids.Node{2}))
	if a.Node != node || b.Node == node || &a.Domains[0] != &b.Domains[0] {
		t.Error("views of one revision do not share what they have in common")
	}
	d, err := policy.Compile(a)
	if err != nil {
		t.Fatal(err)
	}
	pool, ok := d.PoolByName("default")
	if !ok || len(d.LocalSources(pool.ID)) != 1 {
		t.Error("the relay does not find its own source")
	}
	if len(a.ReturnPathKeys) != 1 || a.ReturnPathKeys[0].Key == [32]byte{} || a.Generation != 1 {
		t.Errorf("got %+v", a.ReturnPathKeys)
	}
}
