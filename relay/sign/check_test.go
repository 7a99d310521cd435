package sign

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/policy"
)

// ours are the records of the keys that twoKeys signs with.
func ours(t *testing.T) (s *Signer, records map[string]KeyRecord) {
	t.Helper()
	s, texts := twoKeys(t)
	records = make(map[string]KeyRecord)
	for name, text := range texts {
		records[name] = KeyRecord{Records: []string{text}, TTL: time.Minute}
	}
	return s, records
}

const (
	rsaName = "r1._domainkey.example.com"
	edName  = "e1._domainkey.example.com"
)

// TestCheck: each thing that can be wrong with a key in DNS is found, and named.
func TestCheck(t *testing.T) {
	s, right := ours(t)
	if len(right) != 2 || len(right[rsaName].Records) != 1 || len(right[edName].Records) != 1 {
		t.Fatalf("records %v", right)
	}
	signed := signMessage(t, s, []byte(plainMessage))
	other, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&other.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.ParsePKCS8PrivateKey(testKey(t).Private)
	if err != nil {
		t.Fatal(err)
	}
	bare := x509.MarshalPKCS1PublicKey(&private.(*rsa.PrivateKey).PublicKey)
	text := func(records ...string) KeyRecord { return KeyRecord{Records: records, TTL: time.Minute} }
	p := func(der []byte) string { return "v=DKIM1; k=rsa; p=" + base64.StdEncoding.EncodeToString(der) }
	for _, tc := range []struct {
		name    string
		record  KeyRecord // of the RSA key
		message []byte
		want    CheckVerdict
		fault   CheckFault
		words   string
		testing bool
	}{
		{name: "right", record: right[rsaName], want: CheckGood},
		{name: "in the other form", record: text(p(bare)), want: CheckGood},
		{name: "with spaces", record: text(strings.Replace(right[rsaName].Records[0], "p=MIIB", " t = y:s ; p = MI IB", 1)), want: CheckGood, testing: true},
		{name: "no such name", record: KeyRecord{Missing: "NXDOMAIN"}, want: CheckBad, fault: FaultKey, words: "there is no key at " + rsaName + " (NXDOMAIN)"},
		{name: "no text", record: KeyRecord{Missing: "no TXT record"}, want: CheckBad, fault: FaultKey, words: "(no TXT record)"},
		{name: "several", record: text(right[rsaName].Records[0], "v=spf1 -all"), want: CheckBad, fault: FaultKey, words: "2 text records"},
		{name: "revoked", record: text("v=DKIM1; k=rsa; p="), want: CheckBad, fault: FaultKey, words: "revoked"},
		{name: "another key", record: text(p(spki)), want: CheckBad, fault: FaultKey, words: "another one than mail is signed with"},
		{name: "a key of another kind", record: right[edName], want: CheckBad, fault: FaultKey, words: "another one than mail is signed with"},
		{name: "cut", record: text(right[rsaName].Records[0][:100]), want: CheckBad, fault: FaultKey},
		{name: "no key", record: text("v=DKIM1; k=rsa"), want: CheckBad, fault: FaultKey, words: "missing public key data"},
		{name: "another version", record: text(strings.Replace(right[rsaName].Records[0], "DKIM1", "DKIM2", 1)), want: CheckBad, fault: FaultKey, words: "incompatible public key version"},
		{name: "not for mail", record: text(right[rsaName].Records[0] + "; s=other"), want: CheckBad, fault: FaultKey, words: "inappropriate service"},
		{name: "nonsense", record: text("hello"), want: CheckBad, fault: FaultKey},
		{name: "no answer", record: KeyRecord{Err: errors.New("no answer from the name servers")}, want: CheckUnknown, words: "no answer"},
		{name: "another body", record: right[rsaName], message: append(slices.Clone(signed), "x\r\n"...), want: CheckBad, fault: FaultSigned, words: "is right, but: body hash did not verify"},
		{name: "another subject", record: right[rsaName], message: []byte(strings.Replace(string(signed), "Subject:   two", "Subject: one", 1)), want: CheckBad, fault: FaultSigned, words: "signature did not verify"},
		{name: "nothing", record: right[rsaName], message: []byte("\r\n"), want: CheckBad, fault: FaultSigned},
	} {
		message := tc.message
		if message == nil {
			message = signed
		}
		asked := map[string]int{}
		found := s.Check(message, 0, func(name string) KeyRecord {
			asked[name]++
			if name == rsaName {
				return tc.record
			}
			return right[name]
		})
		if len(found) != 2 || found[0].Selector != "r1" || found[1].Selector != "e1" || asked[rsaName] != 1 || asked[edName] != 1 {
			t.Fatalf("%s: findings %+v, asked for %v", tc.name, found, asked)
		}
		if f := found[0]; f.Verdict != tc.want || f.Fault != tc.fault || !strings.Contains(f.Words, tc.words) || f.Testing != tc.testing {
			t.Errorf("%s: %+v", tc.name, f)
		}
		if tc.message == nil && found[1].Verdict != CheckGood {
			t.Errorf("%s: the other signature is %+v", tc.name, found[1])
		}
	}
}

// TestCheckLeavesOthersSignaturesAlone: a signature that the client made is not
// ours to judge.
func TestCheckLeavesOthersSignaturesAlone(t *testing.T) {
	s, right := ours(t)
	theirs := "DKIM-Signature: v=1; a=rsa-sha256; d=example.com; s=client; h=From; bh=eA==; b=eA==\r\n"
	signed := signMessage(t, s, []byte(strings.Repeat(theirs, 5)+plainMessage))
	found := s.Check(signed, UseRSA, func(name string) KeyRecord { return right[name] })
	if len(found) != 2 { // signMessage signs with both keys
		found = s.Check(signed, 0, func(name string) KeyRecord { return right[name] })
	}
	for _, f := range found {
		if f.Verdict != CheckGood {
			t.Errorf("%+v", f)
		}
	}
	header, body := split([]byte(plainMessage))
	one, err := s.Sign(nil, nil, header, hashInPieces(NewBodyHasher(), body, 99), UseEd25519, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	found = s.Check(slices.Concat(one, []byte(plainMessage)), UseEd25519, func(name string) KeyRecord {
		if name != edName {
			t.Errorf("asked for %s, with which the message is not signed", name)
		}
		return right[name]
	})
	if len(found) != 1 || found[0].Verdict != CheckGood {
		t.Errorf("findings %+v", found)
	}
}

// TestJudge: a good RSA signature is what receivers need.
func TestJudge(t *testing.T) {
	s, _ := ours(t)
	f := func(selector string, v CheckVerdict) Finding {
		return Finding{Selector: selector, Verdict: v, Words: "w"}
	}
	for _, tc := range []struct {
		name     string
		findings []Finding
		verdict  CheckVerdict
		decided  string
		note     bool
	}{
		{"both good", []Finding{f("r1", CheckGood), f("e1", CheckGood)}, CheckGood, "r1", false},
		{"RSA good", []Finding{f("r1", CheckGood), f("e1", CheckBad)}, CheckGood, "r1", true},
		{"RSA good, no answer for the other", []Finding{f("r1", CheckGood), f("e1", CheckUnknown)}, CheckGood, "r1", false},
		{"RSA bad", []Finding{f("r1", CheckBad), f("e1", CheckGood)}, CheckBad, "r1", false},
		{"no answer for RSA", []Finding{f("r1", CheckUnknown), f("e1", CheckBad)}, CheckUnknown, "r1", false},
		{"Ed25519 alone, bad", []Finding{f("e1", CheckBad)}, CheckBad, "e1", false},
		{"Ed25519 alone, good", []Finding{f("e1", CheckGood)}, CheckGood, "e1", false},
		{"testing", []Finding{{Selector: "r1", Verdict: CheckGood, Testing: true}}, CheckGood, "r1", true},
	} {
		if j := Judge(tc.findings, s.AlgorithmOf); j.Verdict != tc.verdict || j.Decided.Selector != tc.decided || j.Note != "" != tc.note {
			t.Errorf("%s: %+v", tc.name, j)
		}
	}
}

// TestDue: the first signature of each key is due, then one in every interval.
func TestDue(t *testing.T) {
	rsaKey := testKey(t)
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner("example.com", []policy.DKIMKey{rsaKey, {Selector: "e1", Algorithm: AlgorithmEd25519, Private: der}})
	if err != nil {
		t.Fatal(err)
	}
	now := checkStart
	for i, tc := range []struct {
		after time.Duration
		want  Algorithms
		due   bool
	}{
		{0, UseRSA, true}, {time.Second, UseRSA, false}, {2 * time.Second, 0, true}, {3 * time.Second, 0, false},
		{5 * time.Minute, UseRSA, true}, {5*time.Minute + time.Second, UseEd25519, false}, {5*time.Minute + 2*time.Second, UseEd25519, true},
	} {
		if got := s.Due(tc.want, now.Add(tc.after), 5*time.Minute); got != tc.due {
			t.Errorf("%d: due is %v", i, got)
		}
	}
	s.SetDue(now.Add(time.Hour))
	if s.Due(0, now.Add(59*time.Minute), time.Minute) || !s.Due(0, now.Add(time.Hour), time.Minute) {
		t.Error("SetDue is not heeded")
	}
	if n := testing.AllocsPerRun(100, func() { s.Due(0, now, time.Minute) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
