package service

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// keysFixture has a domain, a relay that works with every view, and a DNS that
// shows nothing.
type keysFixture struct {
	*fixture
	t     *testing.T
	node  ids.Node
	dns   *fakeDNS
	watch *Keys
	now   time.Time
}

func newKeysFixture(t *testing.T) *keysFixture {
	f := &keysFixture{fixture: newFixture(t), t: t, dns: &fakeDNS{}, now: time.Now()}
	f.SetDNS(f.dns)
	f.node = f.join(t, "edge-1")
	must[*control.Tenant](t)(f.AddTenant(ctx, operator, "acme", Change{}))
	must[DomainView](t)(f.AddDomain(ctx, operator, DomainRequest{Tenant: "acme", Name: "example.com", Selector: "r1"}, Change{}))
	f.watch = f.NewKeys()
	return f
}

// step lets time pass and the watch look.
func (f *keysFixture) step(d time.Duration) {
	f.t.Helper()
	f.now = f.now.Add(d)
	if err := f.watch.Step(ctx, f.now); err != nil {
		f.t.Fatal(err)
	}
}

func (f *keysFixture) domain() DomainView {
	return must[DomainView](f.t)(f.Domain(viewer, "example.com"))
}

// expect compares the states of the keys, RSA and Ed25519, in their order.
func (f *keysFixture) expect(states string) {
	f.t.Helper()
	var got []string
	for _, k := range f.domain().Keys {
		got = append(got, strings.TrimSuffix(k.Algorithm, "-sha256")+" "+k.State.String())
	}
	if strings.Join(got, ", ") != states {
		f.t.Fatalf("keys are %s, want %s", strings.Join(got, ", "), states)
	}
}

func (f *keysFixture) signs() (out []string) {
	v := must[*policy.View](f.t)(f.ViewFor(ctx, f.node))
	for _, k := range v.Domains[0].DKIM {
		out = append(out, k.Selector)
	}
	return out
}

func TestNewDomainSignsWithEd25519OncePublished(t *testing.T) {
	t.Parallel()
	f := newKeysFixture(t)
	f.expect("rsa signing, ed25519 new")
	d := f.domain()
	selector := d.Keys[1].Selector
	record := ""
	for _, r := range d.Records {
		if strings.HasPrefix(r.Name, selector+"._domainkey.") {
			record = strings.Join(r.Values, "")
			if r.Required {
				t.Error("a key that does not sign is required")
			}
		}
	}
	f.step(time.Second)
	f.expect("rsa signing, ed25519 new")
	f.dns.publish(selector, FindingOK)
	f.step(lastKeyLook)
	if k := f.domain().Keys[1]; k.SeenAt.IsZero() || !strings.Contains(k.Waits, "to be in DNS until") {
		t.Fatalf("the key is %+v", k)
	}
	f.dns.publish(selector, FindingUnknown)
	f.step(lastKeyLook)
	if f.domain().Keys[1].SeenAt.IsZero() {
		t.Error("a time-out made the key unseen")
	}
	f.dns.publish(selector, FindingWrong)
	f.step(lastKeyLook)
	if !f.domain().Keys[1].SeenAt.IsZero() {
		t.Error("a record that went away is still seen")
	}
	f.dns.publish(selector, FindingOK)
	f.step(lastKeyLook)
	f.step(2 * time.Minute)
	f.expect("rsa signing, ed25519 new") // an hour is not over
	f.step(2 * time.Hour)
	f.expect("rsa signing, ed25519 signing")
	v := must[*policy.View](t)(f.ViewFor(ctx, f.node))
	parsed, err := x509.ParsePKCS8PrivateKey(v.Domains[0].DKIM[1].Private)
	if err != nil {
		t.Fatal(err)
	}
	public := parsed.(ed25519.PrivateKey).Public().(ed25519.PublicKey)
	if want := "v=DKIM1; k=ed25519; p=" + base64.StdEncoding.EncodeToString(public); record != want {
		t.Errorf("the record to publish was %q, want %q", record, want)
	}
}

func TestRotateKeys(t *testing.T) {
	t.Parallel()
	f := newKeysFixture(t)
	f.dns.publish("r1", FindingOK)
	d := must[DomainView](t)(f.RotateKeys(ctx, operator, "example.com", Change{Reason: "yearly"}))
	f.expect("rsa signing, ed25519 new, rsa new") // the Ed25519 key that waits stays
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.RotateKeys(ctx, operator, "example.com", Change{})
		return err
	})
	f.refused(t, fault.Denied, "", func() error {
		_, err := f.RotateKeys(ctx, viewer, "example.com", Change{})
		return err
	})
	next := d.Keys[2].Selector
	f.dns.publish(next, FindingOK)
	f.step(time.Second)
	f.step(2 * time.Hour)
	f.expect("rsa retiring, ed25519 new, rsa signing")
	if got := f.signs(); len(got) != 1 || got[0] != next {
		t.Fatalf("relays sign with %v", got)
	}
	f.step(time.Hour)
	f.expect("rsa retiring, ed25519 new, rsa signing") // the relay has not said that it heard
	f.AckView(f.node, f.Info().Revision)
	f.step(time.Hour)
	f.expect("rsa retired, ed25519 new, rsa signing")
	if d := f.domain(); !strings.Contains(d.Keys[0].Waits, "last signature to be over") {
		t.Errorf("it waits for %q", d.Keys[0].Waits)
	}

	// Rolled back, the former key signs again, if receivers can find it.
	f.dns.publish(d.Keys[1].Selector, FindingOK)
	f.step(time.Hour)
	f.step(2 * time.Hour)
	f.expect("rsa retired, ed25519 signing, rsa signing")
	f.dns.publish("r1", FindingWrong)
	f.refused(t, fault.Conflict, "", func() error {
		_, err := f.RollbackKeys(ctx, operator, "example.com", false, Change{})
		return err
	})
	f.dns.publish("r1", FindingOK)
	must[DomainView](t)(f.RollbackKeys(ctx, operator, "example.com", false, Change{}))
	f.expect("rsa signing, ed25519 signing, rsa retiring")
	f.AckView(f.node, f.Info().Revision)
	f.step(time.Hour)
	f.expect("rsa signing, ed25519 signing, rsa retired")
}

func TestScheduleRotates(t *testing.T) {
	t.Parallel()
	f := newKeysFixture(t)
	f.step(400 * 24 * time.Hour)
	f.expect("rsa signing, ed25519 new") // off by default
	if _, err := f.PutPolicy(ctx, operator, map[string]string{"delivery": "dkim_rotate_every = \"180d\"\n"}, nil, Change{}); err != nil {
		t.Fatal(err)
	}
	f.step(time.Second)
	f.expect("rsa signing, ed25519 new, rsa new")
	f.step(24 * time.Hour)
	f.expect("rsa signing, ed25519 new, rsa new") // once is enough
	must[DomainView](t)(f.RollbackKeys(ctx, operator, "example.com", false, Change{}))
	f.expect("rsa signing")
	_, err := f.PutPolicy(ctx, operator, map[string]string{"delivery": "dkim_rotate_every = \"1d\"\n"}, nil, Change{})
	if !fault.Is(err, fault.Invalid) {
		t.Errorf("a schedule of a day: %v", err)
	}
}
