package service

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// dkimBits is the size of RSA signing keys: RFC 8301 section 3.2 asks signers
// for at least 1024 and recommends 2048, which every verifier handles.
const dkimBits = 2048

// How often the leader looks at the record of a key that does not only sign.
const (
	firstKeyLook = 2 * time.Second // of a new key, doubling
	lastKeyLook  = 5 * time.Minute
	seenKeyLook  = time.Minute // of a new key that DNS shows
	overKeyLook  = time.Hour   // of a record that may go
)

// Bounds of one round.
const (
	maxKeyLooks     = 16 // at once
	maxKeyRotations = 4  // begun by the schedule; an RSA key takes a tenth of a second
)

// KeyView is a signing key and what it waits for.
type KeyView struct {
	control.DKIMKey
	Waits string // empty: for nothing
}

func keyViews(d *control.Domain, hold time.Duration) []KeyView {
	out := make([]KeyView, 0, len(d.DKIM))
	for i := range d.DKIM {
		out = append(out, KeyView{DKIMKey: d.DKIM[i], Waits: d.DKIM[i].KeyWait(hold)})
	}
	return out
}

// otherSelector returns the selector of the Ed25519 key beside that of an RSA
// key: r20260102 has e20260102, any other has one by the date.
func otherSelector(selector string, at time.Time) string {
	if day := at.Format("20060102"); selector != "e"+day {
		return "e" + day
	}
	return "ed" + at.Format("20060102")
}

// newDKIMKeys makes an RSA key and, if the cluster's rules know of other
// algorithms, an Ed25519 key.
func (s *Service) newDKIMKeys(r *state.Reader, d mailaddr.Domain, rsaSelector, edSelector string) ([]control.DKIMKey, error) {
	key, err := s.newDKIMKey(d, rsaSelector, policy.AlgorithmRSA)
	if err != nil || r.Cluster().FSMVersion < control.KeysVersion {
		return []control.DKIMKey{key}, err
	}
	other, err := s.newDKIMKey(d, edSelector, policy.AlgorithmEd25519)
	return []control.DKIMKey{key, other}, err
}

// newDKIMKey makes a key whose private part leaves this function sealed.
func (s *Service) newDKIMKey(d mailaddr.Domain, selector, algorithm string) (control.DKIMKey, error) {
	const op = "service.newDKIMKey"
	var private, public any
	if algorithm == policy.AlgorithmEd25519 {
		pub, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return control.DKIMKey{}, fault.Wrap(err, fault.Internal, op, "no signing key could be made")
		}
		private, public = key, pub
	} else {
		key, err := rsa.GenerateKey(rand.Reader, dkimBits)
		if err != nil {
			return control.DKIMKey{}, fault.Wrap(err, fault.Internal, op, "no signing key could be made")
		}
		private, public = key, &key.PublicKey
	}
	encoded, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return control.DKIMKey{}, fault.Wrap(err, fault.Internal, op, "the signing key cannot be encoded")
	}
	plain, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return control.DKIMKey{}, fault.Wrap(err, fault.Internal, op, "the signing key cannot be encoded")
	}
	sealed, err := s.sealer.Seal(plain, state.DKIMPurpose(d, selector))
	if err != nil {
		return control.DKIMKey{}, fault.Wrap(err, fault.Internal, op, "the signing key cannot be sealed")
	}
	return control.DKIMKey{Selector: selector, Algorithm: algorithm, Public: encoded, PrivateSealed: sealed}, nil
}

// freeSelector returns the first of prefix, prefixb, prefixc… that the domain
// does not use.
func freeSelector(d *control.Domain, prefix string) string {
	name := prefix
	for c := 'b'; d.Key(name) != nil; c++ {
		name = prefix + string(c)
	}
	return name
}

// RotateKeys gives a domain new signing keys, one of each algorithm. They sign
// once DNS has shown their records as long as the policy asks.
func (s *Service) RotateKeys(ctx context.Context, a Actor, name string, c Change) (DomainView, error) {
	const op = "service.RotateKeys"
	row, err := s.domainForKeys(a, op, name)
	if err != nil {
		return DomainView{}, err
	}
	out, err := s.rotateKeys(ctx, row, c.meta(a), c.Expect)
	if err != nil {
		return DomainView{}, err
	}
	return s.domainView(s.state.Read(), out)
}

func (s *Service) domainForKeys(a Actor, op, name string) (*control.Domain, error) {
	if err := s.enter(a, control.RoleOperator, op); err != nil {
		return nil, err
	}
	d, err := parseDomain("domain", name)
	if err != nil {
		return nil, err
	}
	r := s.state.Read()
	if have := r.Cluster().FSMVersion; have < control.KeysVersion {
		return nil, fault.New(fault.Unavailable, op, "the rotation of signing keys needs version %d of the rules, the cluster has %d: upgrade all control servers first", control.KeysVersion, have)
	}
	row := r.Domain(d)
	if row == nil {
		return nil, notFound("domain", "domain", name)
	}
	return row, nil
}

func (s *Service) rotateKeys(ctx context.Context, row *control.Domain, meta *command.Meta, expect uint64) (*control.Domain, error) {
	// A key of which DNS shows nothing yet stays as it is: some never publish
	// Ed25519. Refused before a key is made, as that takes a while.
	day := now().Format("20060102")
	wanted := []control.DKIMKey{{Algorithm: policy.AlgorithmRSA, Selector: freeSelector(row, "r"+day)}}
	if !slices.ContainsFunc(row.DKIM, func(k control.DKIMKey) bool {
		return k.State == control.KeyNew && k.Algorithm == policy.AlgorithmEd25519
	}) {
		wanted = append(wanted, control.DKIMKey{Algorithm: policy.AlgorithmEd25519, Selector: freeSelector(row, "e"+day)})
	}
	if _, err := row.WithNewKeys(wanted, now()); err != nil {
		return nil, err
	}
	keys := make([]control.DKIMKey, 0, len(wanted))
	for _, k := range wanted {
		key, err := s.newDKIMKey(row.Name, k.Selector, k.Algorithm)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	cmd := &command.DomainKeysAdd{Meta: meta, Expect: expect, Domain: string(row.Name)}
	for i := range keys {
		cmd.Keys = append(cmd.Keys, command.DKIMKeyRecord(&keys[i]))
	}
	return propose[control.Domain](ctx, s, cmd)
}

// RollbackKeys gives up new keys that do not sign yet, or else lets the former
// ones sign again; their records must still be in DNS, unless forced.
func (s *Service) RollbackKeys(ctx context.Context, a Actor, name string, force bool, c Change) (DomainView, error) {
	const op = "service.RollbackKeys"
	row, err := s.domainForKeys(a, op, name)
	if err != nil {
		return DomainView{}, err
	}
	_, again := row.RollbackKeys()
	if !force {
		for _, selector := range again {
			dns, err := s.resolver()
			if err != nil {
				return DomainView{}, err
			}
			if f, _ := dns.Key(ctx, string(row.Name), keyFacts(row.Key(selector))); f.Status != FindingOK {
				return DomainView{}, fault.New(fault.Conflict, op, "the key %s cannot sign again, because receivers would not find it: %s: %s; publish its record, or use --force", selector, f.Name, f.Detail)
			}
		}
	}
	out, err := propose[control.Domain](ctx, s, &command.DomainKeysRollback{Meta: c.meta(a), Expect: c.revision(row.Revision), Domain: string(row.Name)})
	if err != nil {
		return DomainView{}, err
	}
	return s.domainView(s.state.Read(), out)
}

// Keys takes signing keys through their lives. It belongs to one goroutine of
// the leader; all it remembers is when to look at DNS again.
type Keys struct {
	service *Service
	looks   map[string]*keyLook // by domain and selector; only of what exists
}

type keyLook struct {
	next time.Time
	wait time.Duration
	seen bool // in this round
}

// NewKeys returns the watch of a server that leads.
func (s *Service) NewKeys() *Keys { return &Keys{service: s, looks: map[string]*keyLook{}} }

// keyWork is a key that may be due for a step.
type keyWork struct {
	domain *control.Domain
	key    *control.DKIMKey
	look   *keyLook
}

// Step makes every step that is due. Whatever it does is a command, so a leader
// that takes over goes on where it was.
func (t *Keys) Step(ctx context.Context, now time.Time) error {
	s := t.service
	r := s.state.Read()
	if cluster := r.Cluster(); cluster == nil || cluster.FSMVersion < control.KeysVersion {
		return nil
	}
	base, err := s.baseView()
	if err != nil {
		return err
	}
	delivery := &base.Document.Delivery
	rotations := 0
	var works []keyWork
	retiring := false
	for _, d := range r.Domains(ids.Tenant{}) {
		if rotations < maxKeyRotations && rotationDue(d, delivery.DKIMRotateEvery.D(), now) {
			rotations++
			if _, err := s.rotateKeys(ctx, d, &command.Meta{Actor: System.Name, Reason: "the schedule of the policy"}, d.Revision); err != nil {
				s.logger.Warn("new signing keys were not made", "domain", string(d.Name), "error", err)
			} else {
				s.logger.Warn("new signing keys wait to be published", "domain", string(d.Name))
			}
			continue
		}
		for i := range d.DKIM {
			k := &d.DKIM[i]
			if k.State == control.KeySigning {
				continue
			}
			if look := t.due(string(d.Name)+" "+k.Selector, now); look != nil {
				works = append(works, keyWork{d, k, look})
				retiring = retiring || k.State == control.KeyRetiring
			}
		}
	}
	t.forget()
	var heard map[ids.Node]Seen
	if retiring {
		heard = s.seenAnywhere()
	}
	var group errgroup.Group
	group.SetLimit(maxKeyLooks)
	for _, w := range works {
		group.Go(func() error {
			if err := s.stepKey(ctx, w, heard, delivery.DKIMPublishHold.D(), now); err != nil && ctx.Err() == nil {
				s.logger.Warn("a signing key did not go on", "domain", string(w.domain.Name), "selector", w.key.Selector, "error", err)
			}
			return nil
		})
	}
	return group.Wait()
}

// rotationDue reports whether the schedule asks for new keys: an RSA key has
// signed for long enough and nothing waits.
func rotationDue(d *control.Domain, every time.Duration, now time.Time) bool {
	if every <= 0 {
		return false
	}
	due := false
	for i := range d.DKIM {
		k := &d.DKIM[i]
		since := k.Since
		if since.IsZero() {
			since = d.CreatedAt
		}
		switch {
		case k.Algorithm != policy.AlgorithmRSA:
		case k.State == control.KeyNew:
			return false
		case k.State == control.KeySigning:
			due = due || now.Sub(since) >= every
		}
	}
	return due
}

// due returns what is remembered of a key if it is to be looked at now.
func (t *Keys) due(name string, now time.Time) *keyLook {
	l := t.looks[name]
	if l == nil {
		l = &keyLook{wait: firstKeyLook}
		t.looks[name] = l
	}
	l.seen = true
	if now.Before(l.next) {
		return nil
	}
	l.next = now.Add(l.wait)
	l.wait = min(2*l.wait, lastKeyLook)
	return l
}

// forget drops what is remembered of keys that are gone.
func (t *Keys) forget() {
	for name, l := range t.looks {
		if !l.seen {
			delete(t.looks, name)
		}
		l.seen = false
	}
}

// stepKey makes the step of one key that is due, if any.
func (s *Service) stepKey(ctx context.Context, w keyWork, heard map[ids.Node]Seen, hold time.Duration, now time.Time) error {
	k := w.key
	switch k.State {
	case control.KeyNew:
		return s.stepNewKey(ctx, w, hold, now)
	case control.KeyRetiring:
		w.look.wait = firstKeyLook
		for _, n := range s.state.Read().Nodes() {
			if n.State.Connects() && heard[n.ID].Acked < w.domain.Revision {
				return nil // it may sign with the key still
			}
		}
		return s.proposeStep(ctx, w, control.StepRetire, "every relay works with a view without it")
	case control.KeyRetired:
		if now.Before(k.OverAt()) {
			return nil
		}
		return s.proposeStep(ctx, w, control.StepOver, "its last signature is over")
	case control.KeyOver:
		w.look.next = now.Add(overKeyLook)
		dns, err := s.resolver()
		if err != nil {
			return err
		}
		if _, published := dns.Key(ctx, string(w.domain.Name), keyFacts(k)); !published {
			return s.proposeStep(ctx, w, control.StepForget, "DNS shows its record no more")
		}
	}
	return nil
}

func (s *Service) stepNewKey(ctx context.Context, w keyWork, hold time.Duration, now time.Time) error {
	dns, err := s.resolver()
	if err != nil {
		return err
	}
	k := w.key
	f, _ := dns.Key(ctx, string(w.domain.Name), keyFacts(k))
	switch {
	case f.Status == FindingUnknown:
		return nil // a key that DNS has shown is not forgotten for a time-out
	case f.Status != FindingOK && k.SeenAt.IsZero():
		return nil
	case f.Status != FindingOK:
		w.look.wait = firstKeyLook
		return s.proposeStep(ctx, w, control.StepUnseen, clipText(f.Detail))
	}
	w.look.wait = firstKeyLook
	if k.SeenAt.IsZero() {
		w.look.next = now.Add(min(hold, seenKeyLook))
		return s.proposeStep(ctx, w, control.StepSeen, "DNS shows its record")
	}
	if left := hold - now.Sub(k.SeenAt); left > 0 {
		w.look.next = now.Add(min(left, seenKeyLook))
		return nil
	}
	return s.proposeStep(ctx, w, control.StepSign, "DNS has shown its record for "+hold.String())
}

func (s *Service) proposeStep(ctx context.Context, w keyWork, step control.KeyStep, why string) error {
	_, err := propose[control.Domain](ctx, s, &command.DomainKeyStep{Meta: &command.Meta{Actor: System.Name, Reason: why}, Domain: string(w.domain.Name), Selector: w.key.Selector, Step: string(step)})
	if err == nil {
		s.logger.Info("a signing key goes on", "domain", string(w.domain.Name), "selector", w.key.Selector, "step", string(step), "why", why)
	}
	return err
}
