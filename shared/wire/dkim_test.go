package wire

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/policy"
)

// A relay of a release that knows RSA alone must not meet other keys where it
// looks: it refuses what it does not know, and its mail would stand still.
func TestOtherKeysAreApart(t *testing.T) {
	rsa := policy.DKIMKey{Selector: "r1", Algorithm: policy.AlgorithmRSA, Private: []byte{1}}
	ed := policy.DKIMKey{Selector: "e1", Algorithm: policy.AlgorithmEd25519, Private: []byte{2}}
	v := policy.View{Domains: []policy.Domain{{Name: "example.com", ReturnPath: "rp.example.com", DKIM: []policy.DKIMKey{rsa, ed}}}}
	encoded, err := EncodeView(&v)
	if err != nil {
		t.Fatal(err)
	}
	var message View
	if err := proto.Unmarshal(encoded, &message); err != nil {
		t.Fatal(err)
	}
	if keys := message.GetDomains()[0].GetDkim(); len(keys) != 1 || keys[0].GetSelector() != "r1" {
		t.Errorf("the field of old releases holds %v, want the RSA key alone", keys)
	}
	back, err := DecodeView(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if got := back.Domains[0].DKIM; len(got) != 2 || got[0].Selector != "r1" || got[1].Selector != "e1" || got[1].Algorithm != policy.AlgorithmEd25519 {
		t.Errorf("keys %+v come back", got)
	}
}
