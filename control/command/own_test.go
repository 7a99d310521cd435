package command

import (
	"strings"
	"testing"
)

// ownSamples are the samples of the commands about hand-over and addresses.
func ownSamples(meta *Meta) []Command {
	return []Command{
		&NodeHandover{Meta: meta, Expect: 31, Node: id(5), Address: "edge-1.example:7445"},
		&IPRetire{Meta: meta, Expect: 32, Source: id(14)},
		&IPLeft{Meta: meta, Source: id(14), Node: id(5), Epoch: 33},
		&IPQuarantine{Meta: meta, Expect: 34, Source: id(14)},
		&IPReclaim{Meta: meta, Source: id(14), Epoch: 35},
		&IPHeard{Meta: meta, Processes: []*LeaseProcess{{Node: id(5), Incarnation: 36}}},
	}
}

func TestHandoverAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"edge-1.example:7445": "", "[2001:db8::1]:7445": "", "192.0.2.1:1": "", HandoverNone: "",
		"": "is not an address", "edge-1": "is not an address", ":7445": "is not an address", "a b:1": "is not an address", "ä:1": "is not an address",
		"edge-1:0": "has no port", "edge-1:65536": "has no port", "edge-1:x": "has no port", strings.Repeat("a", 300) + ":1": "is not an address",
	} {
		err := (&NodeHandover{Node: id(5), Address: address}).Validate()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", address, err, want)
		}
	}
}
