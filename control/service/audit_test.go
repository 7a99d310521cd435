package service

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
)

// TestEveryChangeIsAudited: each use case that changes something leaves an
// entry with who and why, and no entry holds a secret.
func TestEveryChangeIsAudited(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.SetDNS(&fakeDNS{verdict: control.ReverseConfirmed, owned: FindingOK})
	node := f.join(t, "edge-1").String()
	var credential, token string
	secrets := []string{f.init.APIKey, f.init.AdminPassword}
	why := Change{Reason: "because"}
	for _, step := range []struct {
		action string
		do     func() error
	}{
		{"tenant.put", func() error { _, err := f.AddTenant(ctx, operator, "acme", why); return err }},
		{"tenant.put", func() error { _, err := f.SuspendTenant(ctx, operator, "acme", true, why); return err }},
		{"project.put", func() error { _, err := f.AddProject(ctx, operator, "acme", "shop", why); return err }},
		{"domain.put", func() error {
			_, err := f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com"}, why)
			return err
		}},
		{"credential.put", func() error {
			row, secret, err := f.CreateCredential(ctx, operator, CredentialRequest{Tenant: "acme"}, why)
			credential, secrets = row.ID.String(), append(secrets, secret)
			return err
		}},
		{"credential.rotate", func() error {
			_, secret, err := f.RotateCredential(ctx, operator, credential, DefaultRotationOverlap, why)
			secrets = append(secrets, secret)
			return err
		}},
		{"credential.revoke", func() error { _, err := f.RevokeCredential(ctx, operator, credential, why); return err }},
		{"pool.put", func() error { _, err := f.AddPool(ctx, operator, "other", "", "", why); return err }},
		{"ip.put", func() error {
			_, err := f.AddIP(ctx, operator, IPRequest{Bind: netip.MustParseAddr("198.51.100.1"), EHLO: "mta1.example.net"}, why)
			return err
		}},
		{"ip.assign", func() error {
			_, err := f.AssignIP(ctx, operator, "198.51.100.1", AssignRequest{Node: node, Pool: "default"}, why)
			return err
		}},
		{"ip.verify", func() error { _, err := f.CheckIP(ctx, operator, "198.51.100.1", why); return err }},
		{"ip.verify", func() error { _, err := f.OverrideIP(ctx, operator, "198.51.100.1", true, why); return err }},
		{"policy.put", func() error {
			_, err := f.PutPolicy(ctx, operator, map[string]string{"queue": "retry_max = \"7h\"\n"}, nil, why)
			return err
		}},
		{"policy.put", func() error { _, err := f.RollbackPolicy(ctx, operator, 0, nil, why); return err }},
		{"token.create", func() error {
			row, text, err := f.CreateToken(ctx, operator, TokenRequest{Role: control.NodeRelay}, why)
			token, secrets = row.ID.String(), append(secrets, text[strings.LastIndexByte(text, '.')+1:])
			return err
		}},
		{"token.revoke", func() error { _, err := f.RevokeToken(ctx, operator, token, why); return err }},
		{"node.drain", func() error { _, err := f.SetNodeState(ctx, operator, node, control.NodeDraining, why); return err }},
		{"node.set-state", func() error { _, err := f.SetNodeState(ctx, operator, node, control.NodeEvicted, why); return err }},
	} {
		index := f.state.Read().Index()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.action, err)
		}
		e := must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1}))[0]
		if e.Index <= index || e.Action != step.action || e.Actor != operator.Name || !strings.Contains(e.Reason, "because") || e.Object == "" || e.Before+e.After == "" {
			t.Errorf("%s left %+v", step.action, e)
		}
	}
	for _, e := range must[[]*control.AuditEntry](t)(f.Audit(operator, AuditFilter{Limit: 1000})) {
		for _, secret := range secrets {
			if text := e.Object + e.Reason + e.Before + e.After; strings.Contains(text, secret) {
				t.Errorf("%s holds a secret: %+v", e.Action, e)
			}
		}
	}
	if _, err := f.Audit(viewer, AuditFilter{Limit: 1}); !fault.Is(err, fault.Denied) {
		t.Errorf("a viewer reads the audit tail: %v", err)
	}
}
