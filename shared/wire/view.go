package wire

import (
	"cmp"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// ViewFormat is the version of the View message.
const ViewFormat = 1

// EncodeView returns the wire form of a view. Equal views give equal bytes.
// View.Document is not in it: it follows from Sections.
func EncodeView(v *policy.View) ([]byte, error) {
	out := &View{
		Format:        ViewFormat,
		ClusterId:     EncodeID(v.Cluster),
		Revision:      &Revision{Generation: v.Generation, Index: v.Revision},
		NodeId:        EncodeID(v.Node),
		CredentialKey: v.CredentialKey[:],
		Draining:      v.Draining,
		CaBundle:      v.Trust.CAs,
		RefusedCas:    v.Trust.RefusedCAs,
	}
	for i := range v.Trust.RevokedServers {
		r := &v.Trust.RevokedServers[i]
		out.RevokedServers = append(out.RevokedServers, &RevokedServer{ServerId: EncodeID(r.Server), Serials: r.Serials})
	}
	for name, text := range v.Sections {
		out.Sections = append(out.Sections, &Section{Name: name, Text: text})
	}
	slices.SortFunc(out.Sections, func(a, b *Section) int { return cmp.Compare(a.Name, b.Name) })
	encodeOwners(out, v)
	for i := range v.Pools {
		p := &v.Pools[i]
		out.Pools = append(out.Pools, &Pool{Id: EncodeID(p.ID), Name: p.Name, Kind: string(p.Kind), TenantId: EncodeID(p.Tenant)})
	}
	for i := range v.Sources {
		s := &v.Sources[i]
		source := &Source{
			Id: EncodeID(s.ID), Bind: encodeAddress(s.Bind), Public: encodeAddress(s.Public), Ehlo: s.EHLO,
			PoolId: EncodeID(s.Pool), OwnerId: EncodeID(s.Owner), Epoch: s.Epoch, Pinned: s.Pinned,
		}
		if s.Leased {
			out.LeasedSources = append(out.LeasedSources, source)
			continue
		}
		out.Sources = append(out.Sources, source)
	}
	for i := range v.ReturnPathKeys {
		k := &v.ReturnPathKeys[i]
		out.ReturnPathKeys = append(out.ReturnPathKeys, &ReturnPathKey{Id: uint32(k.ID), Key: k.Key[:]})
	}
	encodeShared(out, v)
	encodeWarm(out, v)
	encodePeers(out, v)
	encodeLeaving(out, v)
	encodeBrakes(out, v)
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(out)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "wire.EncodeView", "cannot encode the view")
	}
	if len(encoded) > MaxViewBytes {
		return nil, fault.New(fault.TooLarge, "wire.EncodeView", "the view of %s has %d bytes, the limit is %d", v.Node, len(encoded), MaxViewBytes)
	}
	return encoded, nil
}

// encodeOwners encodes tenants and what belongs to them.
func encodeOwners(out *View, v *policy.View) {
	for i := range v.Tenants {
		t := &v.Tenants[i]
		out.Tenants = append(out.Tenants, &Tenant{Id: EncodeID(t.ID), Name: t.Name, Suspended: t.Suspended})
	}
	for i := range v.Projects {
		p := &v.Projects[i]
		out.Projects = append(out.Projects, &Project{Id: EncodeID(p.ID), TenantId: EncodeID(p.Tenant), Name: p.Name})
	}
	for i := range v.Domains {
		d := &v.Domains[i]
		domain := &Domain{Name: string(d.Name), TenantId: EncodeID(d.Tenant), ReturnPath: string(d.ReturnPath)}
		for j := range d.DKIM {
			k := &d.DKIM[j]
			key := &DKIMKey{Selector: k.Selector, Algorithm: k.Algorithm, Private: k.Private}
			if k.Algorithm == policy.AlgorithmRSA {
				domain.Dkim = append(domain.Dkim, key)
			} else {
				domain.OtherDkim = append(domain.OtherDkim, key)
			}
		}
		out.Domains = append(out.Domains, domain)
	}
	for i := range v.Credentials {
		c := &v.Credentials[i]
		credential := &Credential{
			Id: EncodeID(c.ID), TenantId: EncodeID(c.Tenant), ProjectId: EncodeID(c.Project),
			SecretHash: c.SecretHash[:], Stream: c.Stream, NotAfterMs: encodeTime(c.NotAfter),
		}
		if !c.PreviousUntil.IsZero() {
			credential.PreviousHash, credential.PreviousUntilMs = c.PreviousHash[:], encodeTime(c.PreviousUntil)
		}
		if credential.Scope = encodeScope(&c.Scope); credential.Scope != nil {
			out.ScopedCredentials = append(out.ScopedCredentials, credential)
			continue
		}
		out.Credentials = append(out.Credentials, credential)
	}
}

// DecodeView reads what EncodeView made. Names and references are checked by
// policy.Compile, not here; View.Document is left for the caller to parse.
func DecodeView(encoded []byte) (*policy.View, error) {
	const op = "wire.DecodeView"
	if len(encoded) > MaxViewBytes {
		return nil, fault.New(fault.TooLarge, op, "the view has %d bytes, the limit is %d", len(encoded), MaxViewBytes)
	}
	var in View
	if err := proto.Unmarshal(encoded, &in); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the view is damaged")
	}
	if in.GetFormat() != ViewFormat {
		return nil, fault.New(fault.Invalid, op, "the view has format %d, this version knows %d: upgrade the relay", in.GetFormat(), ViewFormat)
	}
	d := viewDecoder{view: &policy.View{
		Generation: in.GetRevision().GetGeneration(),
		Revision:   in.GetRevision().GetIndex(),
		Draining:   in.GetDraining(),
	}}
	d.note(DecodeID(in.GetClusterId(), &d.view.Cluster))
	d.note(DecodeID(in.GetNodeId(), &d.view.Node))
	d.hash(in.GetCredentialKey(), &d.view.CredentialKey, "credential key")
	if n := len(in.GetSections()); n > 0 {
		d.view.Sections = make(map[string]string, n)
	}
	for _, s := range in.GetSections() {
		d.view.Sections[s.GetName()] = s.GetText()
	}
	d.owners(&in)
	d.sources(&in)
	d.shared(&in)
	d.warm(&in)
	d.peers(&in)
	d.leaving(&in)
	d.brakes(&in)
	d.view.Trust = policy.Trust{CAs: in.GetCaBundle(), RefusedCAs: in.GetRefusedCas(), RevokedServers: sized[policy.RevokedServer](len(in.GetRevokedServers()))}
	for i, r := range in.GetRevokedServers() {
		d.view.Trust.RevokedServers[i].Serials = r.GetSerials()
		d.note(DecodeID(r.GetServerId(), &d.view.Trust.RevokedServers[i].Server))
	}
	if d.err != nil {
		return nil, fault.Wrap(d.err, fault.Invalid, op, "the view is damaged")
	}
	return d.view, nil
}

// viewDecoder gathers the first error, so that decoding reads as a list.
type viewDecoder struct {
	view *policy.View
	err  error
}

func (d *viewDecoder) note(err error) {
	if d.err == nil && err != nil {
		d.err = err
	}
}

func (d *viewDecoder) hash(b []byte, out *[32]byte, what string) {
	if len(b) != len(out) {
		d.note(fault.New(fault.Invalid, "wire.DecodeView", "a %s has %d bytes, want %d", what, len(b), len(out)))
		return
	}
	copy(out[:], b)
}

func (d *viewDecoder) owners(in *View) {
	v := d.view
	v.Tenants = sized[policy.Tenant](len(in.GetTenants()))
	for i, t := range in.GetTenants() {
		out := &v.Tenants[i]
		out.Name, out.Suspended = t.GetName(), t.GetSuspended()
		d.note(DecodeID(t.GetId(), &out.ID))
	}
	v.Projects = sized[policy.Project](len(in.GetProjects()))
	for i, p := range in.GetProjects() {
		out := &v.Projects[i]
		out.Name = p.GetName()
		d.note(DecodeID(p.GetId(), &out.ID))
		d.note(DecodeID(p.GetTenantId(), &out.Tenant))
	}
	v.Domains = sized[policy.Domain](len(in.GetDomains()))
	for i, domain := range in.GetDomains() {
		out := &v.Domains[i]
		out.Name, out.ReturnPath = mailaddr.Domain(domain.GetName()), mailaddr.Domain(domain.GetReturnPath())
		d.note(DecodeID(domain.GetTenantId(), &out.Tenant))
		out.DKIM = sized[policy.DKIMKey](len(domain.GetDkim()) + len(domain.GetOtherDkim()))
		for j, k := range slices.Concat(domain.GetDkim(), domain.GetOtherDkim()) {
			out.DKIM[j] = policy.DKIMKey{Selector: k.GetSelector(), Algorithm: k.GetAlgorithm(), Private: k.GetPrivate()}
		}
	}
	v.Credentials = sized[policy.Credential](len(in.GetCredentials()) + len(in.GetScopedCredentials()))
	for i, c := range slices.Concat(in.GetCredentials(), in.GetScopedCredentials()) {
		out := &v.Credentials[i]
		d.scope(c.GetScope(), &out.Scope, i >= len(in.GetCredentials()))
		out.Stream, out.NotAfter = c.GetStream(), decodeTime(c.GetNotAfterMs())
		d.note(DecodeID(c.GetId(), &out.ID))
		d.note(DecodeID(c.GetTenantId(), &out.Tenant))
		d.note(DecodeID(c.GetProjectId(), &out.Project))
		d.hash(c.GetSecretHash(), &out.SecretHash, "credential's hash")
		if out.PreviousUntil = decodeTime(c.GetPreviousUntilMs()); !out.PreviousUntil.IsZero() {
			d.hash(c.GetPreviousHash(), &out.PreviousHash, "credential's previous hash")
		}
	}
}

func (d *viewDecoder) sources(in *View) {
	v := d.view
	v.Pools = sized[policy.Pool](len(in.GetPools()))
	for i, p := range in.GetPools() {
		out := &v.Pools[i]
		out.Name, out.Kind = p.GetName(), policy.PoolKind(p.GetKind())
		d.note(DecodeID(p.GetId(), &out.ID))
		d.note(DecodeID(p.GetTenantId(), &out.Tenant))
	}
	v.Sources = sized[policy.Source](len(in.GetSources()) + len(in.GetLeasedSources()))
	for i, s := range slices.Concat(in.GetSources(), in.GetLeasedSources()) {
		out := &v.Sources[i]
		out.Leased = i >= len(in.GetSources())
		out.EHLO, out.Epoch, out.Pinned = s.GetEhlo(), s.GetEpoch(), s.GetPinned()
		d.note(DecodeID(s.GetId(), &out.ID))
		d.note(DecodeID(s.GetPoolId(), &out.Pool))
		d.note(DecodeID(s.GetOwnerId(), &out.Owner))
		var err error
		out.Bind, err = decodeAddress(s.GetBind())
		d.note(err)
		out.Public, err = decodeAddress(s.GetPublic())
		d.note(err)
	}
	v.ReturnPathKeys = sized[policy.ReturnPathKey](len(in.GetReturnPathKeys()))
	for i, k := range in.GetReturnPathKeys() {
		out := &v.ReturnPathKeys[i]
		if k.GetId() > 255 {
			d.note(fault.New(fault.Invalid, "wire.DecodeView", "a return-path key has id %d, at most 255", k.GetId()))
		}
		out.ID = uint8(k.GetId())
		d.hash(k.GetKey(), &out.Key, "return-path key")
	}
}

// sized returns n zero values, nil for none: decoding what was encoded from a
// nil slice gives a nil slice again.
func sized[T any](n int) []T {
	if n == 0 {
		return nil
	}
	return make([]T, n)
}

func encodeTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func decodeTime(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}
