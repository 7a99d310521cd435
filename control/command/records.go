package command

import (
	"net/netip"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// The functions below turn rows into records and back. The way back checks the
// form of ids and addresses, since the state relies on it.

// scan gathers the first error of a conversion, so that the conversions read
// as plain lists of fields.
type scan struct{ err error }

func (s *scan) fail(field, public string, args ...any) {
	if s.err == nil {
		s.err = fault.Field("command.decode", field, public, args...)
	}
}

// setID reads an id that must be there.
func setID[K ids.Kind](s *scan, field string, dst *ids.ID[K], b []byte) {
	id, err := ids.FromBytes[K](b)
	if err != nil || id.IsZero() {
		s.fail(field, "an id of %d bytes is missing", ids.Size)
		return
	}
	*dst = id
}

// setOptionalID reads an id that may be empty.
func setOptionalID[K ids.Kind](s *scan, field string, dst *ids.ID[K], b []byte) {
	if len(b) > 0 {
		setID(s, field, dst, b)
	}
}

// optionalID returns nil for the zero id.
func optionalID[K ids.Kind](id ids.ID[K]) []byte {
	if id.IsZero() {
		return nil
	}
	return id[:]
}

func (s *scan) hash(field string, b []byte) (h [32]byte) {
	if len(b) != len(h) {
		s.fail(field, "a hash has 32 bytes, this one has %d", len(b))
		return h
	}
	copy(h[:], b)
	return h
}

func (s *scan) addr(field string, b []byte) netip.Addr {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		s.fail(field, "an address has 4 or 16 bytes, this one has %d", len(b))
	}
	return a.Unmap()
}

func (s *scan) domain(field, text string) mailaddr.Domain {
	d, err := mailaddr.ParseDomain(text)
	if err != nil {
		s.fail(field, "%s", fault.Public(err))
	}
	return d
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMillis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func labelsOf(in []control.Label) []*Label {
	out := make([]*Label, 0, len(in))
	for _, l := range in {
		out = append(out, &Label{Key: l.Key, Value: l.Value})
	}
	return out
}

func fromLabels(in []*Label) []control.Label {
	out := make([]control.Label, 0, len(in))
	for _, l := range in {
		out = append(out, control.Label{Key: l.GetKey(), Value: l.GetValue()})
	}
	return out
}

// Labels returns the labels of a redemption request.
func (c *TokenRedeem) LabelRows() []control.Label { return fromLabels(c.GetLabels()) }

// ClusterRecord returns the record of the row.
func ClusterRecord(c *control.Cluster) *Cluster {
	return &Cluster{Id: optionalID(c.ID), Generation: c.Generation, FsmVersion: uint32(c.FSMVersion), CreatedMs: millis(c.CreatedAt),
		CaBundle: c.CABundle, CaSealed: c.CASealed, KekId: c.KEKID, RecoverySealed: c.RecoverySealed, CredentialKeySealed: c.CredentialKeySealed}
}

// Row returns the row of the record.
func (r *Cluster) Row() (*control.Cluster, error) {
	var s scan
	c := &control.Cluster{Generation: r.GetGeneration(), FSMVersion: uint16(r.GetFsmVersion()), CreatedAt: fromMillis(r.GetCreatedMs()),
		CABundle: r.GetCaBundle(), CASealed: r.GetCaSealed(), KEKID: r.GetKekId(), RecoverySealed: r.GetRecoverySealed(), CredentialKeySealed: r.GetCredentialKeySealed()}
	setID(&s, "cluster", &c.ID, r.GetId())
	return c, s.err
}

// ServerRecord returns the record of the row.
func ServerRecord(v *control.Server) *Server {
	r := &Server{Id: optionalID(v.ID), Name: v.Name, RaftAddress: v.RaftAddress, LinkAddress: v.LinkAddress, HttpAddress: v.HTTPAddress,
		Version: v.Version, MaxFsmVersion: uint32(v.MaxFSMVersion), Zone: v.Zone, Spki: v.SPKI, State: string(v.State)}
	for _, c := range v.Certificates {
		r.Certificates = append(r.Certificates, &ServerCertificate{Serial: c.Serial, NotAfterMs: millis(c.NotAfter)})
	}
	return r
}

// Row returns the row of the record.
func (r *Server) Row() (*control.Server, error) {
	var s scan
	v := &control.Server{Name: r.GetName(), RaftAddress: r.GetRaftAddress(), LinkAddress: r.GetLinkAddress(), HTTPAddress: r.GetHttpAddress(),
		Version: r.GetVersion(), MaxFSMVersion: uint16(r.GetMaxFsmVersion()), Zone: r.GetZone(), SPKI: r.GetSpki(), State: control.NodeState(r.GetState())}
	setID(&s, "server", &v.ID, r.GetId())
	for _, c := range r.GetCertificates() {
		v.Certificates = append(v.Certificates, control.ServerCertificate{Serial: c.GetSerial(), NotAfter: fromMillis(c.GetNotAfterMs())})
	}
	return v, s.err
}

// NodeRecord returns the record of the row.
func NodeRecord(n *control.Node) *Node {
	r := &Node{Id: optionalID(n.ID), Name: n.Name, State: string(n.State), Zone: n.Zone, Labels: labelsOf(n.Labels), Version: n.Version,
		CertSerial: n.CertSerial, CertSpki: n.CertSPKI, CertNotAfterMs: millis(n.CertNotAfter), Token: optionalID(n.Token), JoinedMs: millis(n.JoinedAt), HandoverAddress: n.Handover, LeaseProcess: n.LeaseProcess}
	for _, a := range n.Addresses {
		r.Addresses = append(r.Addresses, a.AsSlice())
	}
	return r
}

// Row returns the row of the record.
func (r *Node) Row() (*control.Node, error) {
	var s scan
	n := &control.Node{Name: r.GetName(), State: control.NodeState(r.GetState()), Zone: r.GetZone(), Labels: fromLabels(r.GetLabels()), Version: r.GetVersion(),
		CertSerial: r.GetCertSerial(), CertSPKI: r.GetCertSpki(), CertNotAfter: fromMillis(r.GetCertNotAfterMs()), JoinedAt: fromMillis(r.GetJoinedMs()), Handover: r.GetHandoverAddress(), LeaseProcess: r.GetLeaseProcess()}
	setID(&s, "node", &n.ID, r.GetId())
	setOptionalID(&s, "token", &n.Token, r.GetToken())
	for _, b := range r.GetAddresses() {
		n.Addresses = append(n.Addresses, s.addr("addresses", b))
	}
	return n, s.err
}

// JoinTokenRecord returns the record of the row.
func JoinTokenRecord(t *control.JoinToken) *JoinToken {
	r := &JoinToken{Id: optionalID(t.ID), Role: string(t.Role), SecretHash: t.SecretHash[:], UsesMax: t.UsesMax, UsesLeft: t.UsesLeft,
		NotAfterMs: millis(t.NotAfter), Labels: labelsOf(t.Labels), NameGlob: t.NameGlob, Approve: t.Approve, Revoked: t.Revoked, CreatedMs: millis(t.CreatedAt)}
	for _, p := range t.CIDRs {
		r.Cidrs = append(r.Cidrs, p.String())
	}
	for i := range t.Redemptions {
		r.Redemptions = append(r.Redemptions, &Redemption{CsrHash: t.Redemptions[i].CSRHash[:], Node: optionalID(t.Redemptions[i].Node)})
	}
	return r
}

// Row returns the row of the record.
func (r *JoinToken) Row() (*control.JoinToken, error) {
	var s scan
	t := &control.JoinToken{Role: control.NodeRole(r.GetRole()), SecretHash: s.hash("secret_hash", r.GetSecretHash()), UsesMax: r.GetUsesMax(), UsesLeft: r.GetUsesLeft(),
		NotAfter: fromMillis(r.GetNotAfterMs()), Labels: fromLabels(r.GetLabels()), NameGlob: r.GetNameGlob(), Approve: r.GetApprove(), Revoked: r.GetRevoked(), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "token", &t.ID, r.GetId())
	for _, text := range r.GetCidrs() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			s.fail("cidr", "%q is not a network such as 198.51.100.0/24", text)
		}
		t.CIDRs = append(t.CIDRs, p)
	}
	for _, red := range r.GetRedemptions() {
		row := control.Redemption{CSRHash: s.hash("csr_hash", red.GetCsrHash())}
		setID(&s, "node", &row.Node, red.GetNode())
		t.Redemptions = append(t.Redemptions, row)
	}
	return t, s.err
}

// TenantRecord returns the record of the row.
func TenantRecord(t *control.Tenant) *Tenant {
	return &Tenant{Id: optionalID(t.ID), Name: t.Name, Suspended: t.Suspended, OwnershipToken: t.OwnershipToken, CreatedMs: millis(t.CreatedAt)}
}

// Row returns the row of the record.
func (r *Tenant) Row() (*control.Tenant, error) {
	var s scan
	t := &control.Tenant{Name: r.GetName(), Suspended: r.GetSuspended(), OwnershipToken: r.GetOwnershipToken(), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "tenant", &t.ID, r.GetId())
	return t, s.err
}

// ProjectRecord returns the record of the row.
func ProjectRecord(p *control.Project) *Project {
	return &Project{Id: optionalID(p.ID), Tenant: optionalID(p.Tenant), Name: p.Name, CreatedMs: millis(p.CreatedAt)}
}

// Row returns the row of the record.
func (r *Project) Row() (*control.Project, error) {
	var s scan
	p := &control.Project{Name: r.GetName(), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "project", &p.ID, r.GetId())
	setID(&s, "tenant", &p.Tenant, r.GetTenant())
	return p, s.err
}

// DomainRecord returns the record of the row.
func DomainRecord(d *control.Domain) *Domain {
	r := &Domain{Name: string(d.Name), Tenant: optionalID(d.Tenant), ReturnPath: string(d.ReturnPath), CreatedMs: millis(d.CreatedAt), VerifiedMs: millis(d.VerifiedAt)}
	for _, k := range d.DKIM {
		r.Dkim = append(r.Dkim, DKIMKeyRecord(&k))
	}
	return r
}

// Row returns the row of the record.
func (r *Domain) Row() (*control.Domain, error) {
	var s scan
	d := &control.Domain{Name: s.domain("domain", r.GetName()), ReturnPath: s.domain("return_path", r.GetReturnPath()), CreatedAt: fromMillis(r.GetCreatedMs()), VerifiedAt: fromMillis(r.GetVerifiedMs())}
	setID(&s, "tenant", &d.Tenant, r.GetTenant())
	for _, k := range r.GetDkim() {
		d.DKIM = append(d.DKIM, k.Row())
	}
	return d, s.err
}

// CredentialRecord returns the record of the row.
func CredentialRecord(c *control.Credential) *Credential {
	r := &Credential{Id: optionalID(c.ID), Tenant: optionalID(c.Tenant), Project: optionalID(c.Project), Name: c.Name, SecretHash: c.SecretHash[:],
		Stream: c.Stream, NotAfterMs: millis(c.NotAfter), Revoked: c.Revoked, CreatedMs: millis(c.CreatedAt), PreviousUntilMs: millis(c.PreviousUntil)}
	if !c.PreviousUntil.IsZero() {
		r.PreviousHash = c.PreviousHash[:]
	}
	r.Scope = scopeRecord(&c.Scope)
	return r
}

// Row returns the row of the record.
func (r *Credential) Row() (*control.Credential, error) {
	var s scan
	c := &control.Credential{Name: r.GetName(), SecretHash: s.hash("secret_hash", r.GetSecretHash()), Stream: r.GetStream(),
		NotAfter: fromMillis(r.GetNotAfterMs()), Revoked: r.GetRevoked(), CreatedAt: fromMillis(r.GetCreatedMs()), PreviousUntil: fromMillis(r.GetPreviousUntilMs())}
	if !c.PreviousUntil.IsZero() {
		c.PreviousHash = s.hash("previous_hash", r.GetPreviousHash())
	}
	c.Scope = s.scope(r.GetScope())
	setID(&s, "credential", &c.ID, r.GetId())
	setID(&s, "tenant", &c.Tenant, r.GetTenant())
	setID(&s, "project", &c.Project, r.GetProject())
	return c, s.err
}

// PoolRecord returns the record of the row.
func PoolRecord(p *control.Pool) *Pool {
	return &Pool{Id: optionalID(p.ID), Name: p.Name, Kind: string(p.Kind), Tenant: optionalID(p.Tenant), CreatedMs: millis(p.CreatedAt)}
}

// Row returns the row of the record.
func (r *Pool) Row() (*control.Pool, error) {
	var s scan
	p := &control.Pool{Name: r.GetName(), Kind: policy.PoolKind(r.GetKind()), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "pool", &p.ID, r.GetId())
	setOptionalID(&s, "tenant", &p.Tenant, r.GetTenant())
	return p, s.err
}

// SourceRecord returns the record of the row.
func SourceRecord(v *control.Source) *Source {
	return &Source{Id: optionalID(v.ID), Bind: v.Bind.AsSlice(), Public: v.Public.AsSlice(), Ehlo: v.EHLO, Ptr: v.PTR, Pool: optionalID(v.Pool),
		Owner: optionalID(v.Owner), Epoch: v.Epoch, Pinned: v.Pinned, State: string(v.State), CreatedMs: millis(v.CreatedAt),
		Reverse: string(v.Reverse), ReverseDetail: v.ReverseDetail, ReverseMs: millis(v.ReverseAt), Overridden: v.Overridden, Quarantine: v.Quarantine, Leased: v.Leased}
}

// Row returns the row of the record.
func (r *Source) Row() (*control.Source, error) {
	var s scan
	v := &control.Source{Bind: s.addr("bind", r.GetBind()), Public: s.addr("public", r.GetPublic()), EHLO: r.GetEhlo(), PTR: r.GetPtr(),
		Epoch: r.GetEpoch(), Pinned: r.GetPinned(), State: control.SourceState(r.GetState()), CreatedAt: fromMillis(r.GetCreatedMs()),
		Reverse: control.ReverseVerdict(r.GetReverse()), ReverseDetail: r.GetReverseDetail(), ReverseAt: fromMillis(r.GetReverseMs()), Overridden: r.GetOverridden(), Quarantine: r.GetQuarantine(), Leased: r.GetLeased()}
	setID(&s, "source", &v.ID, r.GetId())
	setOptionalID(&s, "pool", &v.Pool, r.GetPool())
	setOptionalID(&s, "node", &v.Owner, r.GetOwner())
	return v, s.err
}

// PolicyRecord returns the record of the row.
func PolicyRecord(p *control.Policy) *Policy {
	r := &Policy{}
	for _, sec := range p.Sections {
		r.Sections = append(r.Sections, &PolicySection{Name: sec.Name, Text: sec.Text})
	}
	return r
}

// Row returns the row of the record.
func (r *Policy) Row() (*control.Policy, error) {
	p := &control.Policy{}
	for _, sec := range r.GetSections() {
		p.Sections = append(p.Sections, control.PolicySection{Name: sec.GetName(), Text: sec.GetText()})
	}
	return p, nil
}

// OperatorRecord returns the record of the row.
func OperatorRecord(o *control.Operator) *Operator {
	return &Operator{Id: optionalID(o.ID), Name: o.Name, Role: string(o.Role), PasswordHash: o.PasswordHash, Disabled: o.Disabled, CreatedMs: millis(o.CreatedAt)}
}

// Row returns the row of the record.
func (r *Operator) Row() (*control.Operator, error) {
	var s scan
	o := &control.Operator{Name: r.GetName(), Role: control.Role(r.GetRole()), PasswordHash: r.GetPasswordHash(), Disabled: r.GetDisabled(), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "operator", &o.ID, r.GetId())
	return o, s.err
}

// APIKeyRecord returns the record of the row.
func APIKeyRecord(k *control.APIKey) *APIKey {
	return &APIKey{Id: optionalID(k.ID), Operator: optionalID(k.Operator), Name: k.Name, SecretHash: k.SecretHash[:], NotAfterMs: millis(k.NotAfter), Revoked: k.Revoked, CreatedMs: millis(k.CreatedAt)}
}

// Row returns the row of the record.
func (r *APIKey) Row() (*control.APIKey, error) {
	var s scan
	k := &control.APIKey{Name: r.GetName(), SecretHash: s.hash("secret_hash", r.GetSecretHash()), NotAfter: fromMillis(r.GetNotAfterMs()), Revoked: r.GetRevoked(), CreatedAt: fromMillis(r.GetCreatedMs())}
	setID(&s, "key", &k.ID, r.GetId())
	setID(&s, "operator", &k.Operator, r.GetOperator())
	return k, s.err
}

// ReturnPathKeyRecord returns the record of the row.
func ReturnPathKeyRecord(k *control.ReturnPathKey) *ReturnPathKey {
	return &ReturnPathKey{Id: uint32(k.ID), KeySealed: k.KeySealed, CreatedMs: millis(k.CreatedAt)}
}

// Row returns the row of the record.
func (r *ReturnPathKey) Row() (*control.ReturnPathKey, error) {
	var s scan
	if r.GetId() > 255 {
		s.fail("id", "a return-path key has a number from 0 to 255, not %d", r.GetId())
	}
	return &control.ReturnPathKey{ID: uint8(r.GetId()), KeySealed: r.GetKeySealed(), CreatedAt: fromMillis(r.GetCreatedMs())}, s.err
}

// AuditRecord returns the record of the row.
func AuditRecord(a *control.AuditEntry) *AuditEntry {
	return &AuditEntry{Index: a.Index, TimeMs: millis(a.Time), Actor: a.Actor, Reason: a.Reason, Action: a.Action, Object: a.Object, Before: a.Before, After: a.After}
}

// Row returns the row of the record.
func (r *AuditEntry) Row() (*control.AuditEntry, error) {
	return &control.AuditEntry{Index: r.GetIndex(), Time: fromMillis(r.GetTimeMs()), Actor: r.GetActor(), Reason: r.GetReason(), Action: r.GetAction(),
		Object: r.GetObject(), Before: r.GetBefore(), After: r.GetAfter()}, nil
}
