package control

import (
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"slices"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// KeysVersion is the version of the commands that brought signing keys with a
// life of their own, and other algorithms than RSA.
const KeysVersion = 3

// MaxDomainKeys bounds the signing keys of a domain, those included that sign
// no more: three rotations of two keys within the life of a signature, and two
// that wait.
const MaxDomainKeys = 8

// KeyState is where a signing key stands in its life.
type KeyState string

// The states, in their order. A key only goes on, but for a rollback, which
// lets a retiring or retired key sign again.
const (
	KeyNew      KeyState = "new"      // to be published; signs once DNS has shown it long enough
	KeySigning  KeyState = ""         // in the relays' view; keys of before KeysVersion were always in it
	KeyRetiring KeyState = "retiring" // out of the view, but a relay may not have heard of that
	KeyRetired  KeyState = "retired"  // nobody signs with it; its signatures are still good
	KeyOver     KeyState = "over"     // no signature of it is good any more: its record may go, its private part is gone
)

// String returns the word that people read.
func (s KeyState) String() string {
	if s == KeySigning {
		return "signing"
	}
	return string(s)
}

// KeyStep is one step of a key's life, the content of a command.
type KeyStep string

// The steps.
const (
	StepSeen   KeyStep = "seen"   // DNS shows the record of a new key
	StepUnseen KeyStep = "unseen" // it does not any more
	StepSign   KeyStep = "sign"   // a new key signs, its predecessors retire
	StepRetire KeyStep = "retire" // every relay has heard that a retiring key does not sign
	StepOver   KeyStep = "over"   // the last signature of a retired key is over
	StepForget KeyStep = "forget" // the record of a key that is over is gone from DNS
)

// KeySteps are all steps.
var KeySteps = []string{string(StepSeen), string(StepUnseen), string(StepSign), string(StepRetire), string(StepOver), string(StepForget)}

// OverAt returns when a retired key's last signature is over.
func (k *DKIMKey) OverAt() time.Time { return k.Since.Add(policy.SignatureLifetime) }

// RecordText returns what the key's TXT record says (RFC 6376 section 3.6.1).
func (k *DKIMKey) RecordText() string {
	kind, public := k.RecordKey()
	return "v=DKIM1; k=" + kind + "; p=" + base64.StdEncoding.EncodeToString(public)
}

// ed25519Prefix is what stands before the 32 bytes of the key in a
// SubjectPublicKeyInfo (RFC 8410 section 4).
const ed25519Prefix = 12

// RecordKey returns the values of k= and p= of the record, the latter decoded.
func (k *DKIMKey) RecordKey() (kind string, public []byte) {
	if k.Algorithm == policy.AlgorithmEd25519 && len(k.Public) > ed25519Prefix {
		return "ed25519", k.Public[ed25519Prefix:] // RFC 8463 section 4: the bare key
	}
	return "rsa", k.Public
}

// Bits returns the size of the key, 0 if it cannot be read.
func (k *DKIMKey) Bits() int {
	public, err := x509.ParsePKIXPublicKey(k.Public)
	if err != nil {
		return 0
	}
	if sized, ok := public.(interface{ Size() int }); ok {
		return 8 * sized.Size()
	}
	return 256
}

// Key returns the key of a selector, or nil.
func (d *Domain) Key(selector string) *DKIMKey {
	for i := range d.DKIM {
		if d.DKIM[i].Selector == selector {
			return &d.DKIM[i]
		}
	}
	return nil
}

// keyConflict refuses a change of the keys.
func keyConflict(format string, args ...any) error {
	return fault.New(fault.Conflict, "control.keys", format, args...)
}

// WithNewKeys returns the domain with keys that wait to be published. Keys that
// are over make room. It is refused while a new key of the same algorithm waits.
func (d *Domain) WithNewKeys(keys []DKIMKey, now time.Time) (*Domain, error) {
	out := *d
	out.DKIM = slices.Clone(d.DKIM)
	for _, k := range keys {
		if d.Key(k.Selector) != nil {
			return nil, keyConflict("the selector %s of %s is in use: choose another one", k.Selector, d.Name)
		}
		for _, old := range d.DKIM {
			if old.State == KeyNew && old.Algorithm == k.Algorithm {
				return nil, keyConflict("the key %s of %s waits to be published already: publish it, or give it up with `relais-control domain dkim rollback %s`", old.Selector, d.Name, d.Name)
			}
		}
		k.State, k.CreatedAt, k.Since, k.SeenAt = KeyNew, now, now, time.Time{}
		out.DKIM = append(out.DKIM, k)
	}
	for len(out.DKIM) > MaxDomainKeys {
		i := slices.IndexFunc(out.DKIM, func(k DKIMKey) bool { return k.State == KeyOver })
		if i < 0 {
			return nil, keyConflict("%s has %d signing keys, its limit, and none of them is over yet: signatures of the oldest are good for up to %s more", d.Name, MaxDomainKeys, policy.SignatureLifetime)
		}
		out.DKIM = slices.Delete(out.DKIM, i, i+1)
	}
	return &out, nil
}

// WithStep returns the domain after one step of one key. It returns the domain
// itself for a step that was made already, and refuses one that is not due.
func (d *Domain) WithStep(selector string, step KeyStep, now time.Time) (*Domain, error) {
	old := d.Key(selector)
	if old == nil {
		if step == StepForget {
			return d, nil
		}
		return nil, keyConflict("%s has no key %s any more", d.Name, selector)
	}
	out := *d
	out.DKIM = slices.Clone(d.DKIM)
	k := out.Key(selector)
	enter := func(k *DKIMKey, s KeyState) { k.State, k.Since = s, now }
	switch {
	case step == StepSeen && k.State == KeyNew && k.SeenAt.IsZero():
		k.SeenAt = now
	case step == StepUnseen && k.State == KeyNew && !k.SeenAt.IsZero():
		k.SeenAt = time.Time{}
	case step == StepSeen && k.State == KeyNew, step == StepUnseen && k.State == KeyNew,
		step == StepSign && k.State == KeySigning, step == StepRetire && k.State == KeyRetired, step == StepOver && k.State == KeyOver:
		return d, nil
	case step == StepSign && k.State == KeyNew && !k.SeenAt.IsZero():
		for i := range out.DKIM {
			if other := &out.DKIM[i]; other.State == KeySigning && other.Algorithm == k.Algorithm {
				enter(other, KeyRetiring)
			}
		}
		enter(k, KeySigning)
	case step == StepRetire && k.State == KeyRetiring:
		enter(k, KeyRetired)
	case step == StepOver && k.State == KeyRetired && !now.Before(k.OverAt()):
		enter(k, KeyOver)
		k.PrivateSealed = nil
	case step == StepForget && k.State == KeyOver:
		out.DKIM = slices.DeleteFunc(out.DKIM, func(k DKIMKey) bool { return k.Selector == selector })
	default:
		return nil, keyConflict("the step %q is not due for the key %s of %s, which is %s since %s", step, selector, d.Name, k.State, k.Since.UTC().Format(time.RFC3339))
	}
	return &out, nil
}

// RollbackKeys returns the selectors that a rollback gives up, and those that
// sign again after it: while new keys wait they are given up; else the newest
// key of each algorithm that has stopped signing signs again.
func (d *Domain) RollbackKeys() (giveUp, again []string) {
	for _, k := range d.DKIM {
		if k.State == KeyNew {
			giveUp = append(giveUp, k.Selector)
		}
	}
	if len(giveUp) > 0 {
		return giveUp, nil
	}
	newest := map[string]*DKIMKey{}
	for i := range d.DKIM {
		k := &d.DKIM[i]
		if k.State != KeyRetiring && k.State != KeyRetired {
			continue
		}
		if best := newest[k.Algorithm]; best == nil || cmp.Or(k.Since.Compare(best.Since), k.CreatedAt.Compare(best.CreatedAt)) > 0 {
			newest[k.Algorithm] = k
		}
	}
	for _, k := range d.DKIM {
		if newest[k.Algorithm] != nil && newest[k.Algorithm].Selector == k.Selector {
			again = append(again, k.Selector)
		}
	}
	return nil, again
}

// WithRollback returns the domain after a rollback.
func (d *Domain) WithRollback(now time.Time) (*Domain, error) {
	giveUp, again := d.RollbackKeys()
	out := *d
	out.DKIM = slices.Clone(d.DKIM)
	if len(giveUp) > 0 {
		out.DKIM = slices.DeleteFunc(out.DKIM, func(k DKIMKey) bool { return slices.Contains(giveUp, k.Selector) })
		return &out, nil
	}
	if len(again) == 0 {
		return nil, keyConflict("there is no way back: %s has no other key whose record must still be in DNS", d.Name)
	}
	for _, selector := range again {
		k := out.Key(selector)
		for i := range out.DKIM {
			if other := &out.DKIM[i]; other.State == KeySigning && other.Algorithm == k.Algorithm {
				other.State, other.Since = KeyRetiring, now
			}
		}
		k.State, k.Since = KeySigning, now
	}
	return &out, nil
}

// KeyWait words what a key waits for, empty if for nothing; hold is how long DNS
// must show a new key before it signs.
func (k *DKIMKey) KeyWait(hold time.Duration) string {
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch {
	case k.State == KeyNew && k.SeenAt.IsZero():
		return "its record, which DNS does not show yet: publish it"
	case k.State == KeyNew:
		return fmt.Sprintf("its record to be in DNS until %s; it is since %s", at(k.SeenAt.Add(hold)), at(k.SeenAt))
	case k.State == KeyRetiring:
		return "every relay to hear that it signs no more; leave its record in DNS"
	case k.State == KeyRetired:
		return fmt.Sprintf("its last signature to be over at %s; leave its record in DNS", at(k.OverAt()))
	case k.State == KeyOver:
		return "its record to be removed from DNS, which may be done now"
	}
	return ""
}
