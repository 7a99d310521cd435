package state

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

func keysWorld(t fataler) *world {
	w := newWorld(t)
	w.ok(&command.ClusterInit{Cluster: &command.Cluster{Id: id(100), Generation: 1, FsmVersion: 3, CaBundle: []byte("pem"), CredentialKeySealed: make([]byte, 32)}})
	w.node(6)
	w.tenant(1, "acme")
	w.ok(domainPut("example.com", id(1))) // signs with r1, as domains of before did
	return w
}

func dkimKey(selector, algorithm string) *command.DKIMKey {
	return &command.DKIMKey{Selector: selector, Algorithm: algorithm, Public: []byte("public " + selector), PrivateSealed: []byte("sealed " + selector)}
}

func addKeys(keys ...*command.DKIMKey) *command.DomainKeysAdd {
	return &command.DomainKeysAdd{Meta: &command.Meta{Actor: "ann"}, Domain: "example.com", Keys: keys}
}

func keyStep(selector string, step control.KeyStep) *command.DomainKeyStep {
	return &command.DomainKeyStep{Meta: &command.Meta{Actor: "system"}, Domain: "example.com", Selector: selector, Step: string(step)}
}

// states words the keys of the domain.
func (w *world) states() string {
	var out []string
	for _, k := range w.store.Read().Domain("example.com").DKIM {
		out = append(out, k.Selector+" "+k.State.String())
	}
	return strings.Join(out, ", ")
}

// signs returns the selectors in a relay's view.
func (w *world) signs() string {
	v, err := w.store.Read().View(ids.Node(id(6)), func(sealed, _ []byte) ([]byte, error) { return sealed, nil })
	if err != nil {
		w.t.Fatalf("%v", err)
	}
	var out []string
	for _, k := range v.Domains[0].DKIM {
		out = append(out, k.Selector)
	}
	return strings.Join(out, ",")
}

func (w *world) keys(states, signs string) {
	w.t.Helper()
	if got := w.states(); got != states {
		w.t.Errorf("keys are %s, want %s", got, states)
	}
	if got := w.signs(); got != signs {
		w.t.Errorf("relays sign with %s, want %s", got, signs)
	}
}

func goldenKeys(t *testing.T) *world {
	w := keysWorld(t)
	w.ok(addKeys(dkimKey("r2", policy.AlgorithmRSA), dkimKey("e2", policy.AlgorithmEd25519)))
	w.ok(keyStep("r2", control.StepSeen))
	w.ok(keyStep("e2", control.StepSeen))
	w.ok(keyStep("e2", control.StepUnseen))
	w.ok(keyStep("r2", control.StepSign))
	w.ok(&command.DomainKeysRollback{Domain: "example.com", Expect: w.store.Read().Domain("example.com").Revision}) // gives e2 up
	w.ok(&command.DomainKeysRollback{Domain: "example.com", Expect: w.store.Read().Domain("example.com").Revision}) // r1 signs again
	w.ok(keyStep("r2", control.StepRetire))
	w.now = w.now.Add(policy.SignatureLifetime + time.Hour)
	w.ok(keyStep("r2", control.StepOver))
	w.ok(keyStep("r2", control.StepForget))
	return w
}

func TestGoldenKeys(t *testing.T) { checkGolden(t, "keys3", goldenKeys) }

// TestKeyRotation walks a rotation of one key and the addition of another
// algorithm from end to end.
func TestKeyRotation(t *testing.T) {
	w := keysWorld(t)
	w.keys("r1 signing", "r1")
	add := addKeys(dkimKey("r2", policy.AlgorithmRSA), dkimKey("e2", policy.AlgorithmEd25519))
	w.ok(add)
	hash := w.store.Read().Hash()
	w.ok(add) // repeated after an unknown outcome
	if w.store.Read().Hash() != hash {
		t.Error("repeating the command changed the state")
	}
	w.keys("r1 signing, r2 new, e2 new", "r1")
	w.refused(addKeys(dkimKey("r3", policy.AlgorithmRSA)), fault.Conflict, "")     // r2 waits
	w.refused(addKeys(dkimKey("r1", policy.AlgorithmEd25519)), fault.Conflict, "") // in use
	w.refused(keyStep("r2", control.StepSign), fault.Conflict, "")                 // not seen
	w.ok(keyStep("r2", control.StepSeen))
	w.ok(keyStep("r2", control.StepUnseen))
	w.refused(keyStep("r2", control.StepSign), fault.Conflict, "") // not seen any more
	w.ok(keyStep("r2", control.StepSeen))
	w.ok(keyStep("r2", control.StepSign))
	w.keys("r1 retiring, r2 signing, e2 new", "r2")
	w.ok(keyStep("e2", control.StepSeen))
	w.ok(keyStep("e2", control.StepSign))
	w.keys("r1 retiring, r2 signing, e2 signing", "r2,e2")
	w.refused(keyStep("r1", control.StepOver), fault.Conflict, "") // a relay may sign with it still
	w.ok(keyStep("r1", control.StepRetire))
	w.now = w.now.Add(policy.SignatureLifetime - time.Hour)
	w.refused(keyStep("r1", control.StepOver), fault.Conflict, "") // its last signature is good
	w.refused(keyStep("r1", control.StepForget), fault.Conflict, "")
	w.now = w.now.Add(2 * time.Hour)
	w.ok(keyStep("r1", control.StepOver))
	w.keys("r1 over, r2 signing, e2 signing", "r2,e2")
	if k := w.store.Read().Domain("example.com").Key("r1"); len(k.PrivateSealed) != 0 {
		t.Error("the private part of a key that is over is kept")
	}
	w.ok(keyStep("r1", control.StepForget))
	w.keys("r2 signing, e2 signing", "r2,e2")
	w.refused(keyStep("r9", control.StepSeen), fault.Conflict, "")
	w.refused(&command.DomainKeyStep{Domain: "example.net", Selector: "r1", Step: "seen"}, fault.NotFound, "")
	audit := w.store.Read().Audit(1)[0]
	if audit.Object != "example.com" || !strings.Contains(audit.Before, "r1:over") || strings.Contains(audit.After, "r1") {
		t.Errorf("the last audit entry is %+v", audit)
	}
}

func TestKeyRollback(t *testing.T) {
	w := keysWorld(t)
	back := func() *command.DomainKeysRollback {
		return &command.DomainKeysRollback{Domain: "example.com", Expect: w.store.Read().Domain("example.com").Revision}
	}
	w.refused(back(), fault.Conflict, "") // there is nothing to go back to
	w.ok(addKeys(dkimKey("r2", policy.AlgorithmRSA), dkimKey("e2", policy.AlgorithmEd25519)))
	w.ok(back())
	w.keys("r1 signing", "r1") // nothing was ever signed with the new ones
	w.ok(addKeys(dkimKey("r2", policy.AlgorithmRSA)))
	w.ok(keyStep("r2", control.StepSeen))
	w.ok(keyStep("r2", control.StepSign))
	stale := back()
	w.ok(back())
	w.keys("r1 signing, r2 retiring", "r1")
	w.refused(stale, fault.Conflict, "") // repeated, it would go forward again
	w.ok(keyStep("r2", control.StepRetire))
	w.ok(back())
	w.keys("r1 retiring, r2 signing", "r2")
}

// TestKeysMakeRoom: a domain never has more keys than its limit, and a key whose
// record must stay is never dropped for another.
func TestKeysMakeRoom(t *testing.T) {
	w := keysWorld(t)
	last := "r1"
	for n := 2; n <= control.MaxDomainKeys; n++ {
		next := "r" + string(rune('0'+n))
		w.ok(addKeys(dkimKey(next, policy.AlgorithmRSA)))
		w.ok(keyStep(next, control.StepSeen))
		w.ok(keyStep(next, control.StepSign))
		w.ok(keyStep(last, control.StepRetire))
		last = next
	}
	w.refused(addKeys(dkimKey("more", policy.AlgorithmRSA)), fault.Conflict, "")
	w.now = w.now.Add(policy.SignatureLifetime + time.Hour)
	w.ok(keyStep("r3", control.StepOver))
	w.ok(addKeys(dkimKey("more", policy.AlgorithmRSA)))
	if got := w.states(); strings.Contains(got, "r3") || !strings.Contains(got, "r1 retired") {
		t.Errorf("keys are %s", got)
	}
}

// TestKeysAtRandom: whatever steps come in whatever order, mail is always signed
// with RSA, by one key of each algorithm, and a key that may have signed in the
// life of a signature is there.
func TestKeysAtRandom(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := keysWorld(t)
		lastSigned := map[string]time.Time{"r1": w.now}
		for n := range rapid.IntRange(1, 60).Draw(t, "steps") {
			d := w.store.Read().Domain("example.com")
			var c command.Command
			switch rapid.IntRange(0, 9).Draw(t, "kind") {
			case 0:
				c = addKeys(dkimKey("k"+string(rune('a'+n%26))+string(rune('a'+n/26)), rapid.SampledFrom([]string{policy.AlgorithmRSA, policy.AlgorithmEd25519}).Draw(t, "algorithm")))
			case 1:
				c = &command.DomainKeysRollback{Domain: "example.com", Expect: d.Revision}
			case 2:
				w.now = w.now.Add(time.Duration(rapid.Int64Range(0, int64(10*24*time.Hour)).Draw(t, "pause")))
				continue
			default:
				c = keyStep(rapid.SampledFrom(d.DKIM).Draw(t, "key").Selector, control.KeyStep(rapid.SampledFrom(control.KeySteps).Draw(t, "step")))
			}
			w.apply(c) // many are refused
			d = w.store.Read().Domain("example.com")
			signing := map[string]int{}
			for _, k := range d.DKIM {
				if k.State == control.KeySigning {
					signing[k.Algorithm]++
				}
				if k.State == control.KeySigning || k.State == control.KeyRetiring {
					lastSigned[k.Selector] = w.now
				}
				if (len(k.PrivateSealed) == 0) != (k.State == control.KeyOver) {
					t.Fatalf("%s is %s and has a private part of %d bytes", k.Selector, k.State, len(k.PrivateSealed))
				}
			}
			if signing[policy.AlgorithmRSA] != 1 || signing[policy.AlgorithmEd25519] > 1 || len(d.DKIM) > control.MaxDomainKeys {
				t.Fatalf("after %v: %s", c, w.states())
			}
			for selector, at := range lastSigned {
				gone := !slices.ContainsFunc(d.DKIM, func(k control.DKIMKey) bool {
					return k.Selector == selector && k.State != control.KeyOver
				})
				if gone && w.now.Before(at.Add(policy.SignatureLifetime)) {
					t.Fatalf("after %v: %s may have signed %v ago and is given up: %s", c, selector, w.now.Sub(at), w.states())
				}
			}
		}
	})
}
