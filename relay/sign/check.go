package sign

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/emersion/go-msgauth/dkim"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// CheckVerdict is what a check of a signature came to.
type CheckVerdict uint8

// The verdicts.
const (
	CheckGood    CheckVerdict = 1
	CheckBad     CheckVerdict = 2 // a verifier would find it bad for good
	CheckUnknown CheckVerdict = 3 // DNS did not answer
)

// CheckFault is what is wrong with a signature.
type CheckFault uint8

// The faults.
const (
	FaultNone   CheckFault = iota
	FaultKey               // the record in DNS: it is missing, revoked, of another key or cannot be read
	FaultSigned            // the record is that of our key, and the signature still does not verify
)

// Finding is the check of one signature.
type Finding struct {
	Selector string
	Verdict  CheckVerdict
	Fault    CheckFault
	Words    string        // what DNS, or the verifier, said
	Testing  bool          // the record says t=y: verifiers may treat the mail as unsigned (RFC 6376 section 3.6.1)
	TTL      time.Duration // how long DNS may be remembered to have said so
}

// KeyRecord is what DNS says about the record of a key.
type KeyRecord struct {
	Records []string
	Missing string // without records: how DNS says so
	TTL     time.Duration
	Err     error // nothing was said
}

// checkKey is what a check must know of a key.
type checkKey struct {
	selector, algorithm string
	public              []byte // as in p=
}

func (k *signingKey) check() checkKey {
	c := checkKey{selector: k.selector, algorithm: AlgorithmRSA}
	if k.rsa != nil {
		c.public, _ = x509.MarshalPKIXPublicKey(&k.rsa.PublicKey) // an RSA key can always be written
		return c
	}
	c.algorithm = AlgorithmEd25519
	c.public = k.ed25519.Public().(ed25519.PublicKey)
	return c
}

// Check verifies the signatures that Sign made with the keys of the wanted
// algorithms, and which stand first in the message, as a receiver would, with
// the records that look returns for a DNS name. The verifier shares no code with
// the signer. There is one finding per signature, in their order.
func (s *Signer) Check(message []byte, want Algorithms, look func(name string) KeyRecord) []Finding {
	var keys []checkKey
	want = s.used(want)
	for i := range s.keys {
		if s.keys[i].kind&want != 0 {
			keys = append(keys, s.keys[i].check())
		}
	}
	findings := make([]Finding, len(keys))
	records := make(map[string]KeyRecord, len(keys))
	for i, k := range keys {
		name := k.selector + "._domainkey." + string(s.domain)
		r, known := records[name]
		if !known {
			r = look(name)
			records[name] = r
		}
		findings[i] = Finding{Selector: k.selector, TTL: r.TTL, Testing: len(r.Records) == 1 && isTesting(r.Records[0])}
	}
	verified, err := dkim.VerifyWithOptions(bytes.NewReader(message), &dkim.VerifyOptions{
		MaxVerifications: len(keys), // others may be the client's
		LookupTXT: func(name string) ([]string, error) {
			r := records[name]
			if r.Err != nil {
				return nil, temporary{r.Err}
			}
			return r.Records, nil
		},
	})
	for i := range findings {
		f := &findings[i]
		r := records[f.Selector+"._domainkey."+string(s.domain)]
		switch {
		case r.Err != nil:
			f.Verdict, f.Words = CheckUnknown, r.Err.Error()
		case err != nil && !errors.Is(err, dkim.ErrTooManySignatures) || i >= len(verified) || verified[i].Domain != string(s.domain):
			f.Verdict, f.Fault, f.Words = CheckBad, FaultSigned, "the message cannot be read by a verifier"
		case verified[i].Err == nil:
			f.Verdict = CheckGood
		default:
			f.Verdict = CheckBad
			f.Fault, f.Words = faultOf(&keys[i], &r, s.domain, verified[i].Err)
		}
	}
	return findings
}

// used are the algorithms that Sign uses for those that are wanted.
func (s *Signer) used(want Algorithms) Algorithms {
	if want &= s.kinds; want == 0 {
		want = s.kinds // a signature that the provider does not like beats none
	}
	return want
}

// Domain returns the signing domain.
func (s *Signer) Domain() mailaddr.Domain { return s.domain }

// temporary is an answer that DNS did not give, as the verifier knows it.
type temporary struct{ error }

func (temporary) Temporary() bool { return true }
func (temporary) Timeout() bool   { return true }

// faultOf says what is wrong with a signature that does not verify.
func faultOf(k *checkKey, r *KeyRecord, domain mailaddr.Domain, cause error) (CheckFault, string) {
	name := k.selector + "._domainkey." + string(domain)
	switch len(r.Records) {
	case 0:
		return FaultKey, fmt.Sprintf("there is no key at %s (%s)", name, r.Missing)
	case 1:
	default:
		// RFC 6376 section 3.6.2.2: the outcome is undefined.
		return FaultKey, fmt.Sprintf("there are %d text records at %s, where one must be", len(r.Records), name)
	}
	tags := keyTags(r.Records[0])
	p, there := tags["p"]
	switch public, err := base64.StdEncoding.DecodeString(p); {
	case there && p == "":
		return FaultKey, fmt.Sprintf("the key at %s is revoked (empty p=)", name) // RFC 6376 section 3.6.1
	case there && err == nil && !k.is(public):
		return FaultKey, fmt.Sprintf("the key at %s is another one than mail is signed with", name)
	case dkim.IsPermFail(cause):
		return FaultKey, fmt.Sprintf("the record at %s is not that of a usable key: %s", name, strings.TrimPrefix(cause.Error(), "dkim: "))
	}
	return FaultSigned, fmt.Sprintf("the key at %s is right, but: %s", name, strings.TrimPrefix(cause.Error(), "dkim: "))
}

// is reports whether a value of p= is this key, in either of the two forms in
// which RSA keys are published.
func (k *checkKey) is(public []byte) bool {
	if bytes.Equal(public, k.public) {
		return true
	}
	if k.algorithm != AlgorithmRSA {
		return false
	}
	theirs, err := x509.ParsePKCS1PublicKey(public)
	if err != nil {
		return false
	}
	ours, err := x509.ParsePKIXPublicKey(k.public)
	if err != nil {
		return false
	}
	rsaKey, ok := ours.(*rsa.PublicKey)
	return ok && rsaKey.Equal(theirs)
}

// keyTags reads the tags of a key record (RFC 6376 section 3.2).
func keyTags(record string) map[string]string {
	tags := make(map[string]string)
	for part := range strings.SplitSeq(record, ";") {
		if name, value, ok := strings.Cut(part, "="); ok {
			tags[strings.TrimSpace(name)] = strings.Join(strings.Fields(value), "")
		}
	}
	return tags
}

func isTesting(record string) bool {
	for flag := range strings.SplitSeq(keyTags(record)["t"], ":") {
		if flag == "y" {
			return true
		}
	}
	return false
}

// Judgement is what the signatures of a message come to.
type Judgement struct {
	Verdict CheckVerdict
	Decided Finding // the finding that decided
	Note    string  // something else to tell: a bad signature beside a good one, or a key in testing
}

// Judge says what the findings about one message mean to its receivers. Every
// verifier knows RSA (RFC 8301 section 3.1), and one good signature is enough
// (RFC 6376 section 6.1), so a good RSA signature decides; that of an algorithm
// which not all know decides only where there is no RSA signature.
func Judge(findings []Finding, algorithms func(selector string) Algorithms) Judgement {
	deciding := make([]Finding, 0, len(findings))
	for _, f := range findings {
		if algorithms(f.Selector) == UseRSA {
			deciding = append(deciding, f)
		}
	}
	if len(deciding) == 0 {
		deciding = findings
	}
	j := Judgement{Verdict: CheckUnknown}
	for _, verdict := range []CheckVerdict{CheckGood, CheckUnknown, CheckBad} {
		for _, f := range deciding {
			if j.Decided.Verdict == 0 && f.Verdict == verdict {
				j.Verdict, j.Decided = verdict, f
			}
		}
	}
	for _, f := range findings {
		switch {
		case j.Note != "" || j.Verdict != CheckGood:
		case f.Verdict == CheckBad:
			j.Note = "selector " + f.Selector + ": " + f.Words
		case f.Testing:
			j.Note = "selector " + f.Selector + ": the record says t=y, so verifiers may ignore the signature"
		}
	}
	return j
}

// AlgorithmOf returns the algorithm of a selector's key.
func (s *Signer) AlgorithmOf(selector string) Algorithms {
	for i := range s.keys {
		if s.keys[i].selector == selector {
			return s.keys[i].kind
		}
	}
	return 0
}

// Due reports whether a message that is signed now with the keys of the wanted
// algorithms is to be checked: the first of each key, then one in each time of
// every. It takes an atomic load or two, and gives each turn away once.
func (s *Signer) Due(want Algorithms, now time.Time, every time.Duration) bool {
	want = s.used(want)
	at, due := now.UnixNano(), false
	for i := range s.keys {
		k := &s.keys[i]
		if k.kind&want == 0 {
			continue
		}
		if next := k.next.Load(); at >= next && k.next.CompareAndSwap(next, at+int64(every)) {
			due = true
		}
	}
	return due
}

// SetDue makes the next check of a signature due at a time.
func (s *Signer) SetDue(at time.Time) {
	for i := range s.keys {
		s.keys[i].next.Store(at.UnixNano())
	}
}
