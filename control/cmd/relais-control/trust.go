package main

import (
	"context"
	"crypto/x509"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/telemetry"
)

const (
	// rotationPeriod is how often the leader looks who has acknowledged a phase of
	// a change of the issuing key.
	rotationPeriod = time.Second
	renewalRetry   = 10 * time.Second // after a certificate could not be renewed
)

// authority is the CA as the newest state has it: the issuing key changes while
// the server runs. It implements enroll.Signer.
type authority struct{ current atomic.Pointer[ca.Authority] }

// Sign implements enroll.Signer.
func (a *authority) Sign(csr []byte, role pki.Role, node ids.Node, now time.Time) ([]*x509.Certificate, error) {
	return a.current.Load().Sign(csr, role, node, now)
}

// Bundle implements enroll.Signer.
func (a *authority) Bundle() []*x509.Certificate { return a.current.Load().Bundle() }

// knowsKey accepts a peer whose key is on record, whichever CA signed.
func knowsKey(st *state.Store) func(pki.Identity, *x509.Certificate) bool {
	return func(identity pki.Identity, leaf *x509.Certificate) bool {
		return service.KnowsKey(st.Read(), identity, leaf)
	}
}

// useState takes over who signs and who is believed from the state.
func (s *server) useState() error {
	r := s.state.Read()
	row := r.Cluster()
	if row == nil || row.ID != s.file.Cluster {
		return nil // not there yet, or of a mixed-up directory, which is refused later
	}
	next, err := openCA(row, s.sealer)
	if err != nil {
		return err
	}
	if old := s.authority.current.Load(); old == nil || pki.BundleSum(old.Bundle()) != pki.BundleSum(next.Bundle()) {
		s.authority.current.Store(next)
	}
	if row.FSMVersion < control.RotationVersion {
		return nil
	}
	trust := pki.Trust{Bundle: next.Bundle()}
	for _, one := range r.RefusedCAs() {
		trust.Refused = append(trust.Refused, one.KeyID)
	}
	for _, one := range r.RevokedServers() {
		trust.Revoked = append(trust.Revoked, pki.RevokedServer{Server: one.Server, Serials: one.Serials})
	}
	changed := pki.BundleSum(trust.Bundle) != pki.BundleSum(s.holder.Bundle())
	s.holder.SetTrust(trust)
	if changed {
		return pki.WriteFile(s.paths.bundle(), pki.EncodeCertificates(trust.Bundle), 0o644)
	}
	return nil
}

// keepTrust follows the state in whom this server believes.
func (s *server) keepTrust(ctx context.Context) {
	for {
		changed := s.state.WatchViews()
		if err := s.useState(); err != nil {
			s.logger.Error("the cluster's CA cannot be used as the state has it", "error", err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// renew replaces this server's certificate when a third of its life is over,
// when its names no longer fit the configuration, or when another issuing CA
// signs. It is recorded before it is used.
func (s *server) renew(ctx context.Context) error {
	signs := s.authority.current.Load()
	leaf := s.holder.Leaf()
	fits := pki.IssuerKeyID(leaf) == pki.KeyID(signs.Issuing())
	for _, a := range names(s.file.Advertise, s.conf).Addresses {
		fits = fits && leaf.VerifyHostname(a.String()) == nil
	}
	if fits && time.Now().Before(pki.RenewAt(leaf, 0)) {
		return s.recordCertificate(ctx, leaf)
	}
	cert, err := makeOwn(s.paths, signs, s.file, s.conf)
	if err != nil {
		return err
	}
	if err := s.recordCertificate(ctx, cert.Leaf); err != nil {
		return err
	}
	if err := saveOwn(s.paths, signs, cert); err != nil {
		return err
	}
	if err := s.holder.Reload(); err != nil {
		return err
	}
	s.logger.Info("certificate renewed", "not_after", s.holder.Leaf().NotAfter, "issuer", pki.IssuerKeyID(s.holder.Leaf()))
	return s.useState() // the files may be older than the state by now
}

func (s *server) recordCertificate(ctx context.Context, leaf *x509.Certificate) error {
	pin := pki.PinOf(leaf)
	return s.service.SetServerCert(ctx, s.file.Server, pki.Serial(leaf), pin[:], leaf.NotAfter)
}

func (s *server) keepRenewed(ctx context.Context) {
	for {
		changed := s.state.WatchViews()
		err := s.useState()
		if err == nil {
			err = s.renew(ctx)
		}
		wait := renewalCheckPeriod
		if err != nil && ctx.Err() == nil {
			wait = renewalRetry
			s.logger.Warn("the certificate was not renewed", "error", err, "retry_in", wait.String())
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// onCertificate tells another server whom this one believes and what it presents.
func (s *server) onCertificate(context.Context, ids.Node, []byte) (any, error) {
	return service.CertificateStateOf(s.holder), nil
}

// watchCA runs the leader's part in changes of the issuing key, and shows in
// health and metrics how they stand.
func (s *server) watchCA(ctx context.Context, group *errgroup.Group) error {
	s.health.Watch("ca", func() (telemetry.Severity, string) {
		if problem := s.service.CAHealth(time.Now()); problem != "" {
			return telemetry.Warning, problem
		}
		return telemetry.OK, ""
	})
	for _, c := range []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_control_ca_issuing_ends_seconds", Help: "Unix time at which the issuing CA that signs ends."}, func() float64 {
			return float64(s.service.IssuingEnds().Unix())
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "relais_control_ca_rotation_waiting", Help: "Members that a change of the issuing key waits for, 0 when none runs."}, func() float64 {
			r := s.state.Read()
			if rotation := r.Rotation(); rotation != nil {
				return float64(len(rotation.Waits(r.RotationMembers(), time.Now())))
			}
			return 0
		}),
	} {
		if err := s.registry.Register(c); err != nil {
			return fault.Wrap(err, fault.Internal, "relais-control.serve", "metrics cannot be registered")
		}
	}
	group.Go(func() error {
		tick := time.NewTicker(rotationPeriod)
		defer tick.Stop()
		watch := s.service.NewRotation()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				if !s.cluster.Ready() {
					watch = s.service.NewRotation()
					continue
				}
				if err := watch.Step(ctx, now); err != nil && ctx.Err() == nil {
					s.logger.Warn("the change of the issuing key did not go on", "error", err)
				}
			}
		}
	})
	return nil
}
