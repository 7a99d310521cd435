package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/relais-mta/relais/control"
)

// DNSRecord is a record to publish.
type DNSRecord struct {
	Name     string   // without the final dot
	Type     string   // TXT, MX, A, AAAA or PTR
	Values   []string // of a TXT record its character-strings; else one value
	Purpose  string
	Required bool // mail works badly or not at all without it
}

// maxCharacterStringBytes is the length of one character-string of a TXT
// record (RFC 1035 section 3.3).
const maxCharacterStringBytes = 255

// recordTTLSeconds is what the zone-file form says.
const recordTTLSeconds = 3600

// Zone returns the record as a line of a zone file (RFC 1035 section 5.1).
func (d DNSRecord) Zone() string {
	value := strings.Join(d.Values, " ")
	if d.Type == "TXT" {
		quoted := make([]string, len(d.Values))
		for i, s := range d.Values {
			quoted[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
		}
		value = strings.Join(quoted, " ")
	}
	return fmt.Sprintf("%s. %d IN %s %s", d.Name, recordTTLSeconds, d.Type, value)
}

// domainRecords lists what to publish for a domain.
func domainRecords(d *control.Domain, t *control.Tenant, sources []*control.Source, inbound []string) (out []DNSRecord, notes []string) {
	add := func(required bool, purpose, name, typ string, values ...string) {
		out = append(out, DNSRecord{Name: name, Type: typ, Values: values, Purpose: purpose, Required: required})
	}
	add(true, "shows that the domain belongs to tenant "+t.Name, "_relais."+string(d.Name), "TXT", "relais-verify="+t.OwnershipToken)
	for i := range d.DKIM {
		k := &d.DKIM[i]
		name, purpose := k.Selector+"._domainkey."+string(d.Name), "lets receivers check the DKIM signature"
		switch k.State {
		case control.KeyOver:
			notes = append(notes, "the TXT record "+name+" is of no use any more and may be removed from DNS")
			continue
		case control.KeyNew:
			purpose = "lets receivers check DKIM signatures of a new key, which signs once DNS has shown this record long enough"
		case control.KeyRetiring, control.KeyRetired:
			purpose = "lets receivers check DKIM signatures of a former key: leave it until `relais-control domain show " + string(d.Name) + "` says that it may go"
		}
		add(k.State == control.KeySigning, purpose, name, "TXT", characterStrings(k.RecordText())...) // RFC 6376 section 3.6.1, RFC 8463 section 4
	}
	hosts := inbound
	if len(hosts) == 0 {
		for _, src := range sources {
			hosts = append(hosts, src.EHLO)
		}
	}
	slices.Sort(hosts)
	for _, h := range slices.Compact(slices.Clone(hosts)) {
		add(true, "brings bounces and complaints back", string(d.ReturnPath), "MX", "10 "+strings.TrimSuffix(h, ".")+".")
	}
	add(true, "allows our addresses to send for the return path", string(d.ReturnPath), "TXT", characterStrings(spf(sources))...)
	add(false, "tells receivers what to do with mail that fails; tighten to quarantine or reject later", "_dmarc."+string(d.Name), "TXT", "v=DMARC1; p=none")
	for _, src := range sources {
		name := src.PTR
		if name == "" {
			name = src.EHLO
		}
		typ := "A"
		if src.Public.Is6() {
			typ = "AAAA"
		}
		add(false, "names the address to receivers; the owner of the address block sets it", reverseName(src.Public), "PTR", name+".")
		add(false, "must lead back to the address", name, typ, src.Public.String())
	}
	if len(sources) == 0 {
		notes = append(notes, "no address that may carry this tenant's mail is in a pool yet, so the SPF and MX records are not complete: add addresses, then show the domain again")
	}
	notes = append(notes, "compare what is published with `relais-control domain check "+string(d.Name)+"`; an address is used once its reverse DNS is confirmed")
	return out, notes
}

// spf lists the addresses one by one: ip4 and ip6 terms cost receivers no
// look-up, so the limit of ten does not apply (RFC 7208 section 4.6.4).
func spf(sources []*control.Source) string {
	var text strings.Builder
	text.WriteString("v=spf1")
	addrs := make([]netip.Addr, 0, len(sources))
	for _, src := range sources {
		addrs = append(addrs, src.Public)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	for _, a := range slices.Compact(addrs) {
		if a.Is4() {
			text.WriteString(" ip4:" + a.String())
		} else {
			text.WriteString(" ip6:" + a.String())
		}
	}
	text.WriteString(" -all")
	return text.String()
}

// characterStrings cuts a text into the strings of one TXT record; readers put
// them together without a space.
func characterStrings(text string) (out []string) {
	for len(text) > maxCharacterStringBytes {
		out = append(out, text[:maxCharacterStringBytes])
		text = text[maxCharacterStringBytes:]
	}
	return append(out, text)
}

// reverseName returns the name of an address's PTR record (RFC 1035 section
// 3.5, RFC 3596 section 2.5).
func reverseName(a netip.Addr) string {
	if a.Is4() {
		b := a.As4()
		return fmt.Sprintf("%d.%d.%d.%d.in-addr.arpa", b[3], b[2], b[1], b[0])
	}
	const hexDigits = "0123456789abcdef"
	b := a.As16()
	var name strings.Builder
	for i := len(b) - 1; i >= 0; i-- {
		name.WriteByte(hexDigits[b[i]&15])
		name.WriteByte('.')
		name.WriteByte(hexDigits[b[i]>>4])
		name.WriteByte('.')
	}
	return name.String() + "ip6.arpa"
}
