package service

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// CertificateState is what a relay or server says of whom it believes and of
// the certificate it presents.
type CertificateState struct {
	BundleSum []byte // of the CAs it believes; empty: a release that does not tell
	Issuer    string // key id of the CA that its certificate is of
	Revision  uint64 // a relay: of the view it works with
}

// CertificateStateOf returns what a holder believes and presents.
func CertificateStateOf(h *pki.Holder) CertificateState {
	sum := pki.BundleSum(h.Bundle())
	return CertificateState{BundleSum: sum[:], Issuer: pki.IssuerKeyID(h.Leaf())}
}

// SetCertificateState tells the service how to ask for this server's own.
func (s *Service) SetCertificateState(own func() CertificateState) { s.ownCertificate = own }

// CAView is the cluster's CA, and where the change of its issuing key stands.
type CAView struct {
	Bundle    []*x509.Certificate // the issuing CA that signs first, the root last
	Supported bool                // every server can change the issuing key
	Rotation  *control.Rotation   // the change that runs or the last one; nil: there was none
	Members   []CAMember          // everybody whose acknowledgement counts while it runs
	RotatesAt time.Time           // when the cluster changes the key by itself
	Refused   []*control.RefusedCA
	Revoked   []*control.RevokedServer
}

// Signer returns the issuing CA that signs.
func (v *CAView) Signer() *x509.Certificate { return v.Bundle[0] }

// Root returns the root.
func (v *CAView) Root() *x509.Certificate { return v.Bundle[len(v.Bundle)-1] }

// CAMember is one who holds a certificate, and what a change waits for.
type CAMember struct {
	control.RotationMember
	Acked     bool
	Skip      *control.RotationSkip // nil: it is waited for
	Connected bool                  // a relay: it is linked
	Heard     time.Time             // a relay: last contact; zero: none since the servers started
	Why       string                // why it has not acknowledged
}

// CA returns the cluster's CA and where the change of its key stands.
func (s *Service) CA(ctx context.Context, a Actor) (CAView, error) {
	if err := s.enter(a, control.RoleViewer, "service.CA"); err != nil {
		return CAView{}, err
	}
	return s.caView(ctx)
}

func (s *Service) caView(ctx context.Context) (CAView, error) {
	r := s.state.Read()
	cluster := r.Cluster()
	if cluster == nil {
		_, err := s.Cluster()
		return CAView{}, err
	}
	bundle, err := pki.ParseCertificates(cluster.CABundle)
	if err != nil {
		return CAView{}, err
	}
	v := CAView{Bundle: bundle, Supported: cluster.FSMVersion >= control.RotationVersion, Rotation: r.Rotation(), Refused: r.RefusedCAs(), Revoked: r.RevokedServers()}
	v.RotatesAt = v.Signer().NotAfter.Add(-ca.RotateBefore)
	if v.Rotation == nil || !v.Rotation.Phase.Running() {
		return v, nil
	}
	states := s.certificateStates(ctx, r)
	heard := s.seenAnywhere()
	now := time.Now()
	for _, m := range r.RotationMembers() {
		if !m.Gates(now) {
			continue
		}
		one := CAMember{RotationMember: m, Acked: v.Rotation.HasAcked(m.ID), Skip: v.Rotation.Skip(m.ID), Connected: heard[m.ID].Connected, Heard: heard[m.ID].LastContact}
		if !one.Acked && one.Skip == nil {
			one.Why = whyNot(v.Rotation, one, states[m.ID])
		}
		v.Members = append(v.Members, one)
	}
	return v, nil
}

// whyNot words what a member has not done yet.
func whyNot(r *control.Rotation, m CAMember, st CertificateState) string {
	switch {
	case m.Server && m.State == control.NodePending:
		return "it has joined and never started: start it, or remove it"
	case m.Server && st.Issuer == "":
		return "it does not answer: start it, or remove it"
	case !m.Server && !m.Connected && m.Heard.IsZero():
		return "it is not linked"
	case !m.Server && !m.Connected:
		return "it is not linked since " + m.Heard.UTC().Format(time.RFC3339)
	case len(st.BundleSum) == 0:
		return "its release does not know of changes of the issuing key: upgrade it"
	case r.Phase == control.PhaseDistribute:
		return "it has not said yet that it believes the new CA"
	}
	return "it has not said yet that it renewed its certificate"
}

// certificateStates asks all servers what they and their relays believe and
// present.
func (s *Service) certificateStates(ctx context.Context, r *state.Reader) map[ids.Node]CertificateState {
	out := map[ids.Node]CertificateState{}
	for id, seen := range s.seenAnywhere() {
		if seen.Report != nil {
			st := seen.Report.Certificate
			st.Revision = seen.Report.Revision
			out[id] = st
		}
	}
	ctx, cancel := context.WithTimeout(ctx, seenTimeout)
	defer cancel()
	type answer struct {
		id ids.Node
		st CertificateState
	}
	answers := make(chan answer)
	asked := 0
	for _, row := range r.Servers() {
		switch {
		case row.ID == s.self && s.ownCertificate != nil:
			out[row.ID] = s.ownCertificate()
		case row.State == control.NodeActive && s.membership != nil:
			asked++
			go func() { // ends with its answer, which is always taken
				var st CertificateState
				if err := s.membership.Ask(ctx, row.RaftAddress, "certificate", &st); err != nil {
					s.logger.Debug("another server does not say whom it believes", "server", row.ID.String(), "error", err)
				}
				answers <- answer{row.ID, st}
			}()
		}
	}
	for range asked {
		one := <-answers
		out[one.id] = one.st
	}
	return out
}

// acknowledges reports whether a member has done what the phase asks: to
// believe the bundle, and in the later phases to have a certificate of the one
// that signs. What a relay said before it worked with the view of this phase, of
// the given revision, does not count: two phases have the same bundle.
func acknowledges(r *control.Rotation, bundleSum []byte, revision uint64, m control.RotationMember, st CertificateState) bool {
	if string(st.BundleSum) != string(bundleSum) || !m.Server && st.Revision < revision {
		return false
	}
	return r.Phase == control.PhaseDistribute || st.Issuer == r.Signer().KeyID
}

// RotateCA begins the change to a new issuing key. It goes on by itself as the
// members acknowledge.
func (s *Service) RotateCA(ctx context.Context, a Actor, c Change) (CAView, error) {
	const op = "service.RotateCA"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return CAView{}, err
	}
	if err := s.canRotate(op); err != nil {
		return CAView{}, err
	}
	if err := s.beginRotation(ctx, c.meta(a), false); err != nil {
		return CAView{}, err
	}
	return s.caView(ctx)
}

// canRotate refuses while a server may not know the commands.
func (s *Service) canRotate(op string) error {
	r := s.state.Read()
	if r.Cluster() == nil {
		_, err := s.Cluster()
		return err
	}
	if r.Cluster().FSMVersion >= control.RotationVersion {
		return nil
	}
	var old []string
	for _, srv := range r.Servers() {
		if srv.State != control.NodeEvicted && srv.MaxFSMVersion < control.RotationVersion {
			old = append(old, fmt.Sprintf("%s (release %s)", srv.Name, srv.Version))
		}
	}
	if len(old) > 0 {
		return fault.New(fault.Conflict, op, "the issuing key can be changed when every server can follow: upgrade or remove %s; ten minutes after the last one the cluster is ready", strings.Join(old, ", "))
	}
	return fault.New(fault.Conflict, op, "every server was upgraded, and the cluster works at the new version %s after that: try again then", StableBeforeUpgrade)
}

func material(c *control.Cluster) ca.Material {
	return ca.Material{Bundle: c.CABundle, Sealed: c.CASealed, KEKID: c.KEKID, RecoverySealed: c.RecoverySealed}
}

func (s *Service) beginRotation(ctx context.Context, meta *command.Meta, atOnce bool) error {
	cluster, err := s.Cluster()
	if err != nil {
		return err
	}
	authority, err := ca.Open(material(cluster), cluster.ID, s.sealer)
	if err != nil {
		return err
	}
	next, err := ca.NextIssuing(material(cluster), cluster.ID, s.sealer, time.Now())
	if err != nil {
		return err
	}
	old := authority.Issuing()
	_, err = propose[control.Rotation](ctx, s, &command.CARotate{Meta: meta, AtOnce: atOnce, OldKeyId: pki.KeyID(old), OldNotAfterMs: old.NotAfter.UnixMilli(),
		Next: &command.IssuingCA{KeyId: pki.KeyID(next.Certificate), Certificate: pki.EncodeCertificates([]*x509.Certificate{next.Certificate}), Sealed: next.Sealed, NotAfterMs: next.Certificate.NotAfter.UnixMilli()}})
	return err
}

// RenewCA lets a fresh issuing key sign at once, after a restore: relays may
// have dropped the one of the backup, and believe a newer one.
func (s *Service) RenewCA(ctx context.Context, reason string) (*control.Cluster, error) {
	if err := s.beginRotation(ctx, &command.Meta{Actor: System.Name, Reason: reason}, true); err != nil {
		return nil, err
	}
	return s.Cluster()
}

// rotating returns the change that runs.
func (s *Service) rotating(op string) (*control.Rotation, error) {
	r := s.state.Read().Rotation()
	if r == nil || !r.Phase.Running() {
		return nil, fault.New(fault.Conflict, op, "the issuing key is not being changed now: begin with `relais-control ca rotate`")
	}
	return r, nil
}

// SkipCA lets the change go on without one member, a relay or a server by id or
// name.
func (s *Service) SkipCA(ctx context.Context, a Actor, ref string, c Change) (CAView, error) {
	const op = "service.SkipCA"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return CAView{}, err
	}
	r, err := s.rotating(op)
	if err != nil {
		return CAView{}, err
	}
	if strings.TrimSpace(c.Reason) == "" {
		return CAView{}, fault.Field(op, "reason", "is missing: say why %s is not waited for", ref)
	}
	var found []control.RotationMember
	for _, m := range s.state.Read().RotationMembers() {
		if (m.Name == ref || m.ID.String() == ref) && m.Gates(time.Now()) {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 0:
		e := fault.New(fault.NotFound, op, "the change does not wait for %q: see `relais-control ca status`", ref)
		e.Field = "node"
		return CAView{}, e
	case 1:
	default:
		return CAView{}, fault.Field(op, "node", "%d members are named %q: name one by its id, such as %s", len(found), ref, found[0].ID)
	}
	if _, err := propose[control.Rotation](ctx, s, &command.CASkip{Meta: c.meta(a), Rotation: r.New.KeyID, Member: found[0].ID[:]}); err != nil {
		return CAView{}, err
	}
	return s.caView(ctx)
}

// ForceCA goes on to the next phase without those that have not acknowledged.
func (s *Service) ForceCA(ctx context.Context, a Actor, c Change) (CAView, error) {
	const op = "service.ForceCA"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return CAView{}, err
	}
	r, err := s.rotating(op)
	if err != nil {
		return CAView{}, err
	}
	if strings.TrimSpace(c.Reason) == "" {
		return CAView{}, fault.Field(op, "reason", "is missing: say why nobody is waited for")
	}
	if _, err := propose[control.Rotation](ctx, s, &command.CAAdvance{Meta: c.meta(a), Rotation: r.New.KeyID, Phase: string(r.Phase), Force: true}); err != nil {
		return CAView{}, err
	}
	return s.caView(ctx)
}

// RollbackCA goes back to the old issuing key.
func (s *Service) RollbackCA(ctx context.Context, a Actor, c Change) (CAView, error) {
	const op = "service.RollbackCA"
	if err := s.enter(a, control.RoleAdmin, op); err != nil {
		return CAView{}, err
	}
	r, err := s.rotating(op)
	if err != nil {
		return CAView{}, err
	}
	if _, err := propose[control.Rotation](ctx, s, &command.CARollback{Meta: c.meta(a), Rotation: r.New.KeyID}); err != nil {
		return CAView{}, err
	}
	return s.caView(ctx)
}

// SetServerCert records a certificate that a server was given, or is about to
// make for itself: were the server removed, relays would have to refuse it.
func (s *Service) SetServerCert(ctx context.Context, id ids.Node, serial string, spki []byte, notAfter time.Time) error {
	for try := 1; ; try++ {
		cluster, err := s.Cluster()
		if err != nil {
			return err
		}
		old, err := s.ServerByID(id)
		if err != nil {
			return err
		}
		row := *old
		row.SPKI = spki
		if cluster.FSMVersion >= control.RotationVersion { // an older server would lose the list
			row.Certificates = withCertificate(old.Certificates, control.ServerCertificate{Serial: serial, NotAfter: notAfter.UTC().Truncate(time.Second)})
		}
		if string(row.SPKI) == string(old.SPKI) && slices.Equal(row.Certificates, old.Certificates) {
			return nil
		}
		_, err = propose[control.Server](ctx, s, &command.ServerUpsert{Meta: &command.Meta{Actor: "ca", Reason: "certificate"}, Expect: old.Revision, Server: command.ServerRecord(&row)})
		if !fault.Is(err, fault.Conflict) || try == maxCertTries {
			return err
		}
	}
}

// withCertificate adds a certificate that is not on the list yet, and leaves out
// those that cannot even be renewed any more.
func withCertificate(list []control.ServerCertificate, c control.ServerCertificate) []control.ServerCertificate {
	if slices.Contains(list, c) {
		return list
	}
	out := slices.DeleteFunc(slices.Clone(list), func(c control.ServerCertificate) bool { return time.Since(c.NotAfter) > control.RenewGrace })
	out = append(out, c)
	return out[max(0, len(out)-command.MaxServerCertificates):]
}

// KnowsKey reports whether a certificate's key is the one on record for who it
// names: such a one may renew though its issuing CA was dropped.
func (s *Service) KnowsKey(identity pki.Identity, leaf *x509.Certificate) bool {
	return KnowsKey(s.state.Read(), identity, leaf)
}

// KnowsKey is Service.KnowsKey of a state.
func KnowsKey(r *state.Reader, identity pki.Identity, leaf *x509.Certificate) bool {
	var known []byte
	if n := r.Node(identity.Node); n != nil && identity.Role == pki.RoleRelay {
		known = n.CertSPKI
	}
	if srv := r.Server(identity.Node); srv != nil && identity.Role == pki.RoleControl {
		known = srv.SPKI
	}
	pin := pki.PinOf(leaf)
	return len(known) > 0 && string(known) == string(pin[:])
}
