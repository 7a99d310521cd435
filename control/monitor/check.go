package monitor

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"blitiri.com.ar/go/spf"
	"golang.org/x/net/publicsuffix"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/fault"
)

// maxDetailNames is how many found names a detail shows.
const maxDetailNames = 4

// Reverse implements service.DNS: the PTR record of the address must give the
// name, and the name the address. An error says that nothing is known.
func (r *Resolver) Reverse(ctx context.Context, addr netip.Addr, name string) (control.ReverseVerdict, string, error) {
	name = plainName(name)
	names, err := r.names(ctx, addr)
	if err != nil {
		return control.ReverseUnchecked, "", err
	}
	switch {
	case len(names) == 0:
		return control.ReverseFailed, fmt.Sprintf("%s has no PTR record: let it give %s", addr, name), nil
	case !slices.Contains(names, name):
		return control.ReverseFailed, fmt.Sprintf("the PTR record of %s gives %s, not %s", addr, few(names), name), nil
	}
	addrs, err := r.addrs(ctx, name, addr.Is6())
	if err != nil {
		return control.ReverseUnchecked, "", err
	}
	if !slices.Contains(addrs, addr.Unmap()) {
		texts := make([]string, len(addrs))
		for i, a := range addrs {
			texts[i] = a.String()
		}
		return control.ReverseFailed, fmt.Sprintf("%s gives %s, not %s: the name must lead back to the address", name, few(texts), addr), nil
	}
	return control.ReverseConfirmed, "", nil
}

func few(found []string) string {
	switch n := len(found); {
	case n == 0:
		return "no address"
	case n > maxDetailNames:
		return fmt.Sprintf("%s and %d more", strings.Join(found[:maxDetailNames], ", "), n-maxDetailNames)
	}
	return strings.Join(found, ", ")
}

// finding begins a result.
func finding(check, name string, required bool) service.Finding {
	return service.Finding{Check: check, Name: name, Required: required, Status: service.FindingOK}
}

// unknown says that DNS gave no answer.
func unknown(f service.Finding, err error) service.Finding {
	f.Status, f.Detail = service.FindingUnknown, wordsOf(err)
	return f
}

func bad(f service.Finding, format string, args ...any) service.Finding {
	f.Status, f.Detail = service.FindingWrong, fmt.Sprintf(format, args...)
	return f
}

// Ownership implements service.DNS.
func (r *Resolver) Ownership(ctx context.Context, d service.DomainFacts) service.Finding {
	f := finding("ownership", "_relais."+d.Name, true)
	want := "relais-verify=" + d.OwnershipToken
	texts, err := r.texts(ctx, f.Name)
	switch {
	case err != nil:
		return unknown(f, err)
	case !slices.Contains(texts, want):
		return bad(f, "the record with %q was not found", want)
	}
	return f
}

// Domain implements service.DNS.
func (r *Resolver) Domain(ctx context.Context, d service.DomainFacts) []service.Finding {
	out := []service.Finding{r.Ownership(ctx, d)}
	for _, k := range d.Keys {
		f, _ := r.Key(ctx, d.Name, k)
		out = append(out, f)
	}
	out = append(out, r.spf(ctx, d), r.returnPathMX(ctx, d), r.dmarc(ctx, d.Name))
	for _, s := range d.Sources {
		f := finding("reverse", s.Public.String(), true)
		switch verdict, detail, err := r.Reverse(ctx, s.Public, s.PTRName); {
		case err != nil:
			f = unknown(f, err)
		case verdict != control.ReverseConfirmed:
			f = bad(f, "%s", detail)
		}
		out = append(out, f)
	}
	return out
}

// Key implements service.DNS: every server that answers must show the record.
func (r *Resolver) Key(ctx context.Context, domain string, k service.KeyFacts) (f service.Finding, published bool) {
	f = finding("dkim", k.Selector+"._domainkey."+domain, k.Signs)
	answers, err := r.textsEverywhere(ctx, f.Name)
	if err != nil {
		return unknown(f, err), true
	}
	for _, texts := range answers {
		published = published || len(texts) > 0
		if f.Status == service.FindingOK {
			f = keyFinding(f, texts, domain, k)
		}
	}
	return f, published
}

// keyFinding compares the published key with ours (RFC 6376 section 3.6.1, RFC
// 8463 section 4).
func keyFinding(f service.Finding, texts []string, domain string, k service.KeyFacts) service.Finding {
	if len(texts) == 0 {
		return bad(f, "there is no record: publish the key that `relais-control domain show %s` prints", domain)
	}
	if len(texts) > 1 {
		return bad(f, "there are %d records: keep one, receivers may take any", len(texts))
	}
	tags := tagList(texts[0])
	if v, ok := tags["v"]; ok && v != "DKIM1" {
		return bad(f, "the record begins with v=%s, not v=DKIM1", v)
	}
	kind, ok := tags["k"]
	if !ok {
		kind = "rsa"
	}
	if kind != k.Kind {
		return bad(f, "the record is for a %s key, ours is %s", kind, k.Kind)
	}
	p := strings.Join(strings.Fields(tags["p"]), "")
	switch key, err := base64.StdEncoding.DecodeString(p); {
	case p == "":
		return bad(f, "the key is revoked: its p= is empty")
	case err != nil:
		return bad(f, "p= is not base64")
	case string(key) != string(k.Public):
		return bad(f, "the published key is not ours: publish the one that `relais-control domain show %s` prints", domain)
	}
	return f
}

// tagList reads tag=value pairs between semicolons (RFC 6376 section 3.2).
func tagList(text string) map[string]string {
	tags := map[string]string{}
	for pair := range strings.SplitSeq(text, ";") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			tags[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	return tags
}

// spf asks whether every address may send for the return path, as a receiver
// would.
func (r *Resolver) spf(ctx context.Context, d service.DomainFacts) service.Finding {
	f := finding("spf", d.ReturnPath, true)
	if len(d.Sources) == 0 {
		f.Status, f.Detail = service.FindingUnknown, "no address that may carry this mail is in a pool yet"
		return f
	}
	for _, s := range d.Sources {
		result, err := spf.CheckHostWithSender(s.Public.AsSlice(), s.EHLO, "postmaster@"+d.ReturnPath, spf.WithContext(ctx), spf.WithResolver(spfResolver{r}))
		switch {
		case result == spf.Pass:
		case result == spf.TempError:
			return unknown(f, errors.Join(err))
		case err != nil:
			return bad(f, "SPF gives %s for %s: %v", result, s.Public, err)
		default:
			return bad(f, "SPF gives %s for %s", result, s.Public)
		}
	}
	return f
}

func (r *Resolver) returnPathMX(ctx context.Context, d service.DomainFacts) service.Finding {
	f := finding("return-path", d.ReturnPath, true)
	found, err := r.mx(ctx, d.ReturnPath)
	if err != nil {
		return unknown(f, err)
	}
	if len(found) == 0 {
		return bad(f, "there is no MX record: bounces and complaints do not come back")
	}
	for _, mx := range found {
		if !slices.Contains(d.Inbound, mx.Host) {
			return bad(f, "the MX %s is none of ours (%s)", mx.Host, few(d.Inbound))
		}
	}
	return f
}

// dmarc looks at the domain and then at the organisational domain above it
// (RFC 7489 section 6.6.3).
func (r *Resolver) dmarc(ctx context.Context, domain string) service.Finding {
	f := finding("dmarc", "_dmarc."+domain, false)
	places := []string{domain}
	if org, err := publicsuffix.EffectiveTLDPlusOne(domain); err == nil && org != domain {
		places = append(places, org)
	}
	for _, place := range places {
		texts, err := r.texts(ctx, "_dmarc."+place)
		if err != nil {
			return unknown(f, err)
		}
		texts = slices.DeleteFunc(texts, func(t string) bool { return tagList(t)["v"] != "DMARC1" })
		if len(texts) == 0 {
			continue
		}
		f.Name = "_dmarc." + place
		switch p := tagList(texts[0])["p"]; {
		case len(texts) > 1:
			return bad(f, "there are %d DMARC records: receivers ignore them all", len(texts))
		case p != "none" && p != "quarantine" && p != "reject":
			return bad(f, "p=%s is no policy: write none, quarantine or reject", p)
		}
		return f
	}
	return bad(f, "there is no DMARC record: large receivers ask for one, p=none at least")
}

// wordsOf returns what an error says to a person: our own text, which the SPF
// library may have wrapped, or else its whole text.
func wordsOf(err error) string {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return dns.Err
	case fault.KindOf(err) != fault.Internal:
		return fault.Public(err)
	}
	return err.Error()
}
