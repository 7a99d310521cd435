package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/emersion/go-msgauth/dkim"
)

// Verdict is what verification of a mail's DKIM signatures found.
type Verdict uint8

// The verdicts. Pass means at least one signature verified.
const (
	VerdictPending Verdict = iota
	VerdictNone
	VerdictPass
	VerdictFail
)

var verdictNames = [...]string{"pending", "none", "pass", "fail"}

func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// MarshalText implements encoding.TextMarshaler.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (v *Verdict) UnmarshalText(text []byte) error {
	for i, name := range verdictNames {
		if name == string(text) {
			*v = Verdict(i)
			return nil
		}
	}
	return fmt.Errorf("lab: DKIM verdict %q: want pending, none, pass or fail", text)
}

const maxSignatures = 8 // signatures verified per mail

// DKIMCheck is one line of dkim.jsonl.
type DKIMCheck struct {
	Provider string  `json:"provider"`
	ID       int     `json:"id"`
	Verdict  Verdict `json:"verdict"`
	Domain   string  `json:"domain,omitempty"` // d= of the signature that decided
	Error    string  `json:"error,omitempty"`
}

// verifier goes through stored mails behind the farm and verifies their
// signatures against the lab's own DNS data, faults aside. The stores are its
// queue: it holds a position in each, so nothing can pile up in memory and the
// farm never waits for it.
type verifier struct {
	zones     *zoneData
	providers []*provider
	wake      chan struct{}
	out       *os.File
	changed   func()

	pass, fail, none atomic.Int64

	mu     sync.Mutex
	failed error
}

func newVerifier(dir string, zones *zoneData, providers []*provider, changed func()) (*verifier, error) {
	out, err := createNew(filepath.Join(dir, "dkim.jsonl"))
	if err != nil {
		return nil, err
	}
	return &verifier{zones: zones, providers: providers, wake: make(chan struct{}, 1), out: out, changed: changed}, nil
}

// poke says that a mail was stored.
func (v *verifier) poke() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

func (v *verifier) run(ctx context.Context) {
	next := make([]int, len(v.providers))
	var buf []byte
	enc := json.NewEncoder(v.out)
	for {
		worked := false
		for i, p := range v.providers {
			for next[i] < p.store.count() && ctx.Err() == nil {
				check, content, err := v.check(p, next[i], buf)
				if err == nil {
					err = enc.Encode(check)
				}
				if err != nil {
					v.fault(err)
					return
				}
				buf = content
				next[i]++
				worked = true
			}
		}
		if worked {
			v.changed()
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-v.wake:
		}
	}
}

func (v *verifier) fault(err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failed == nil {
		v.failed = err
	}
}

func (v *verifier) check(p *provider, id int, buf []byte) (DKIMCheck, []byte, error) {
	m, err := p.store.mail(id)
	if err != nil {
		return DKIMCheck{}, buf, err
	}
	content, err := p.store.content(m, buf)
	if err != nil {
		return DKIMCheck{}, buf, err
	}
	c := v.verify(content)
	c.Provider, c.ID = m.Provider, id
	switch c.Verdict {
	case VerdictPass:
		v.pass.Add(1)
	case VerdictFail:
		v.fail.Add(1)
	default:
		v.none.Add(1)
	}
	p.store.setVerdict(id, c.Verdict, c.Domain)
	return c, content, nil
}

// verify judges one message.
func (v *verifier) verify(content []byte) DKIMCheck {
	results, err := dkim.VerifyWithOptions(bytes.NewReader(content), &dkim.VerifyOptions{
		LookupTXT:        v.lookupTXT,
		MaxVerifications: maxSignatures,
	})
	if err != nil && len(results) == 0 {
		return DKIMCheck{Verdict: VerdictFail, Error: err.Error()}
	}
	if len(results) == 0 {
		return DKIMCheck{Verdict: VerdictNone}
	}
	worst := DKIMCheck{Verdict: VerdictFail}
	for _, r := range results {
		if r.Err == nil {
			return DKIMCheck{Verdict: VerdictPass, Domain: r.Domain}
		}
		worst.Domain, worst.Error = r.Domain, r.Err.Error()
	}
	return worst
}

func (v *verifier) lookupTXT(name string) ([]string, error) {
	txt, exists := v.zones.txt(name)
	if !exists {
		return nil, fmt.Errorf("lab: %s does not exist", name)
	}
	return txt, nil
}

func (v *verifier) close() error {
	v.mu.Lock()
	failed := v.failed
	v.mu.Unlock()
	if err := v.out.Close(); err != nil {
		return err
	}
	return failed
}
