package state

import (
	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// OpenFunc decrypts a secret that was sealed for the given purpose.
type OpenFunc func(sealed, purpose []byte) ([]byte, error)

// The purposes that bind a sealed secret to its place in the state, so that
// ciphertext copied from one row to another does not open.

// DKIMPurpose is the purpose of a domain's private signing key.
func DKIMPurpose(d mailaddr.Domain, selector string) []byte {
	return []byte("dkim/" + string(d) + "/" + selector)
}

// CredentialKeyPurpose is the purpose of the key that hashes credentials.
func CredentialKeyPurpose(c ids.Cluster) []byte { return []byte("credential-key/" + c.String()) }

// ReturnPathKeyPurpose is the purpose of a return-path key.
func ReturnPathKeyPurpose(id uint8) []byte { return append([]byte("return-path-key/"), id) }

// View builds what one relay knows of the cluster. Revoked credentials are
// left out; a suspended tenant is told, so that its queue goes on.
func (r *Reader) View(node ids.Node, open OpenFunc) (*policy.View, error) {
	const op = "state.View"
	cluster := r.Cluster()
	if cluster == nil {
		return nil, fault.New(fault.Unavailable, op, "the cluster is not initialised")
	}
	v := &policy.View{Cluster: cluster.ID, Generation: cluster.Generation, Revision: r.ViewRevision(), Node: node, Draining: r.Draining(node), Sections: map[string]string{}}
	for _, s := range r.Policy().Sections {
		if policy.ForRelays(s.Name) {
			v.Sections[s.Name] = s.Text
		}
	}
	var err error
	if v.Document, err = policy.Parse(v.Sections); err != nil {
		return nil, err
	}
	key, err := open(cluster.CredentialKeySealed, CredentialKeyPurpose(cluster.ID))
	if err != nil || len(key) != len(v.CredentialKey) {
		return nil, fault.Wrap(orCut(err), fault.Internal, op, "the credential key cannot be opened")
	}
	copy(v.CredentialKey[:], key)
	if err := r.viewKeys(v, open); err != nil {
		return nil, err
	}
	if err := r.viewDomains(v, open); err != nil {
		return nil, err
	}
	r.viewWarm(v)
	r.viewTenants(v)
	r.viewSources(v)
	r.viewTrust(v)
	r.viewLimits(v)
	r.viewPeers(v)
	r.viewLeaving(v)
	r.viewBrakes(v)
	return v, nil
}

// Draining reports whether a node takes no new mail.
func (r *Reader) Draining(node ids.Node) bool {
	n := r.Node(node)
	return n != nil && (n.State == control.NodeDraining || n.State == control.NodeDrained)
}

// orCut stands in for the missing cause when a secret opened to a wrong length.
func orCut(err error) error {
	if err == nil {
		return fault.New(fault.Internal, "state.View", "a sealed secret has a wrong length")
	}
	return err
}

func (r *Reader) viewKeys(v *policy.View, open OpenFunc) error {
	for _, k := range r.ReturnPathKeys() {
		row := policy.ReturnPathKey{ID: k.ID}
		plain, err := open(k.KeySealed, ReturnPathKeyPurpose(k.ID))
		if err != nil || len(plain) != len(row.Key) {
			return fault.Wrap(orCut(err), fault.Internal, "state.View", "return-path key %d cannot be opened", k.ID)
		}
		copy(row.Key[:], plain)
		v.ReturnPathKeys = append(v.ReturnPathKeys, row)
	}
	return nil
}

func (r *Reader) viewDomains(v *policy.View, open OpenFunc) error {
	rows := r.Domains(ids.Tenant{})
	v.Domains = make([]policy.Domain, 0, len(rows))
	for _, d := range rows {
		if v.Document.Submission.RequireOwnership && d.VerifiedAt.IsZero() {
			continue
		}
		row := policy.Domain{Name: d.Name, Tenant: d.Tenant, ReturnPath: d.ReturnPath}
		for _, k := range d.DKIM {
			if k.State != control.KeySigning {
				continue
			}
			private, err := open(k.PrivateSealed, DKIMPurpose(d.Name, k.Selector))
			if err != nil {
				return fault.Wrap(err, fault.Internal, "state.View", "the signing key %s of %s cannot be opened", k.Selector, d.Name)
			}
			row.DKIM = append(row.DKIM, policy.DKIMKey{Selector: k.Selector, Algorithm: k.Algorithm, Private: private})
		}
		v.Domains = append(v.Domains, row)
	}
	return nil
}

func (r *Reader) viewTenants(v *policy.View) {
	for _, t := range r.Tenants() {
		v.Tenants = append(v.Tenants, policy.Tenant{ID: t.ID, Name: t.Name, Suspended: t.Suspended})
	}
	for _, p := range r.Projects(ids.Tenant{}) {
		v.Projects = append(v.Projects, policy.Project{ID: p.ID, Tenant: p.Tenant, Name: p.Name})
	}
	for _, c := range r.Credentials(ids.Tenant{}) {
		if !c.Revoked {
			v.Credentials = append(v.Credentials, policy.Credential{ID: c.ID, Tenant: c.Tenant, Project: c.Project, SecretHash: c.SecretHash, Stream: c.Stream, NotAfter: c.NotAfter,
				PreviousHash: c.PreviousHash, PreviousUntil: c.PreviousUntil, Scope: c.Scope})
		}
	}
}

func (r *Reader) viewSources(v *policy.View) {
	for _, p := range r.Pools() {
		v.Pools = append(v.Pools, policy.Pool{ID: p.ID, Name: p.Name, Kind: p.Kind, Tenant: p.Tenant})
	}
	for _, s := range r.Sources() {
		if !r.offered(s) || s.State == control.SourceQuarantined || s.State == control.SourceReleasing {
			continue // a relay must not even try it
		}
		v.Sources = append(v.Sources, policy.Source{ID: s.ID, Bind: s.Bind, Public: s.Public, EHLO: s.EHLO, Pool: s.Pool, Owner: s.Owner, Epoch: s.Epoch, Pinned: s.Pinned, Leased: s.Leased})
	}
}

// offered reports whether mail may leave from an address, as far as that is not a
// matter of who has it.
func (r *Reader) offered(s *control.Source) bool {
	return r.Cluster().FSMVersion < reverseVersion || s.Usable()
}
