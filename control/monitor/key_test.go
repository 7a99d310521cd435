package monitor

import (
	"bytes"
	"encoding/base64"
	"net/netip"
	"strings"
	"testing"

	"github.com/relais-mta/relais/control/service"
)

// A key counts as published only when every server that answers shows it.
func TestKeyIsSeenEverywhere(t *testing.T) {
	first, a := newZone(t)
	second, b := newZone(t)
	r := NewResolver([]netip.AddrPort{netip.MustParseAddrPort(a.servers[0]), netip.MustParseAddrPort(b.servers[0])})
	bare := bytes.Repeat([]byte{7}, 32)
	facts := service.KeyFacts{Selector: "e1", Kind: "ed25519", Public: bare, Signs: true}
	name := "e1._domainkey.example.com"
	good := name + `. 60 IN TXT "v=DKIM1; k=ed25519; p=` + base64.StdEncoding.EncodeToString(bare) + `"`
	rsa := name + `. 60 IN TXT "v=DKIM1; p=` + base64.StdEncoding.EncodeToString(bare) + `"`
	for _, tc := range []struct {
		name          string
		first, second string // empty: no record; broken: no answer
		status        service.FindingStatus
		published     bool
		detail        string
	}{
		{"nowhere", "", "", service.FindingWrong, false, "no record"},
		{"at one", good, "", service.FindingWrong, true, "no record"},
		{"at the other", "", good, service.FindingWrong, true, "no record"},
		{"at both", good, good, service.FindingOK, true, ""},
		{"one is silent", "broken", good, service.FindingOK, true, ""},
		{"both are silent", "broken", "broken", service.FindingUnknown, true, "no answer"},
		{"another kind", good, rsa, service.FindingWrong, true, "is for a rsa key, ours is ed25519"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for z, record := range map[*zone]string{first: tc.first, second: tc.second} {
				broken := ""
				switch record {
				case "broken":
					broken = name + "."
					z.set(t)
				case "":
					z.set(t)
				default:
					z.set(t, record)
				}
				z.breakName(broken)
			}
			f, published := r.Key(t.Context(), "example.com", facts)
			if f.Status != tc.status || published != tc.published || !strings.Contains(f.Detail, tc.detail) || !f.Required || f.Name != name {
				t.Errorf("got %+v, published %v", f, published)
			}
		})
	}
}
