package policy

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strings"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// Feedback says which header fields Relais puts in front of the mail it signs,
// by which mailbox providers tell one campaign from another and know where
// complaints go.
type Feedback struct {
	Rule []FeedbackRule `toml:"rule"`
}

// FeedbackRule is for the mail of one sending domain and stream, or of all. The
// most specific one wins: domain and stream named, domain named, stream named,
// none named.
type FeedbackRule struct {
	Domain       string `toml:"domain"`        // sending domain or "*"
	Stream       string `toml:"stream"`        // stream's name or "*"
	FeedbackID   string `toml:"feedback_id"`   // template; empty: none is added
	CFBL         string `toml:"cfbl"`          // CFBLOff, CFBLReturnPath or an address; empty: CFBLOff
	ClientFields string `toml:"client_fields"` // ClientFieldsKeep or ClientFieldsReplace; empty: ClientFieldsKeep
}

// The values of FeedbackRule.CFBL that are no address.
const (
	CFBLOff        = "off"
	CFBLReturnPath = "return-path" // the signed return path of the message
)

// The values of FeedbackRule.ClientFields.
const (
	ClientFieldsKeep    = "keep"    // what the client wrote stands, and nothing is added beside it
	ClientFieldsReplace = "replace" // what the client wrote is taken away, unless it signed the message
)

// Bounds of feedback rules.
const (
	maxFeedbackRules       = 10_000
	maxFeedbackFields      = 4   // that Gmail reads, from the right
	maxFeedbackIDBytes     = 256 // of a template
	minFeedbackSenderBytes = 5   // what Gmail asks of the last field
	maxFeedbackSenderBytes = 15
)

// FeedbackTenantBytes is the length of a tenant's name in a Feedback-ID.
const FeedbackTenantBytes = 13

// feedbackMark is a place in a template that each message fills.
type feedbackMark uint8

const (
	markNone feedbackMark = iota // the text stands for itself
	markTag
	markStream
	markTenant
	markDomain
)

var feedbackMarks = map[string]feedbackMark{"tag": markTag, "stream": markStream, "tenant": markTenant, "domain": markDomain}

// feedbackPiece is literal text, or a mark.
type feedbackPiece struct {
	text string
	mark feedbackMark
}

// FeedbackPlan is a rule in its compiled form. It is immutable.
type FeedbackPlan struct {
	ReturnPath bool             // CFBL-Address is the signed return path
	Address    mailaddr.Address // of CFBL-Address, if it is the same for all; null: it is not
	Replace    bool             // the client's own fields are taken away

	pieces []feedbackPiece
}

// AddsFeedbackID reports whether mail gets a Feedback-ID.
func (f *FeedbackPlan) AddsFeedbackID() bool { return len(f.pieces) > 0 }

// AppendFeedbackID appends the value of Feedback-ID: at most four fields with a
// colon between them. What the client or the tenant named holds letters, digits,
// '.', '_' and '-' only; all else becomes '-'. tenant is what FeedbackTenant
// returned.
func (f *FeedbackPlan) AppendFeedbackID(dst []byte, tag, stream, tenant string, domain mailaddr.Domain) []byte {
	for _, p := range f.pieces {
		switch p.mark {
		case markTag:
			dst = appendFeedbackText(dst, tag)
		case markStream:
			dst = appendFeedbackText(dst, stream)
		case markTenant:
			dst = append(dst, tenant...)
		case markDomain:
			dst = appendFeedbackText(dst, string(domain))
		default:
			dst = append(dst, p.text...)
		}
	}
	return dst
}

func appendFeedbackText(dst []byte, text string) []byte {
	for i := 0; i < len(text); i++ {
		if isFeedbackByte(text[i]) {
			dst = append(dst, text[i])
		} else {
			dst = append(dst, '-')
		}
	}
	return dst
}

func isFeedbackByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

// parseFeedbackID reads a template: fields with ':' between them, each of plain
// text and of {tag}, {stream}, {tenant} and {domain}.
func parseFeedbackID(template string) ([]feedbackPiece, string) {
	if len(template) > maxFeedbackIDBytes {
		return nil, fmt.Sprintf("has %d octets, write at most %d", len(template), maxFeedbackIDBytes)
	}
	fields := strings.Split(template, ":")
	if len(fields) > maxFeedbackFields {
		return nil, fmt.Sprintf("has %d fields, write at most %d", len(fields), maxFeedbackFields)
	}
	var pieces []feedbackPiece
	seen := make(map[feedbackMark]bool)
	for n, field := range fields {
		if n > 0 {
			pieces = append(pieces, feedbackPiece{text: ":"})
		}
		if field == "" {
			return nil, fmt.Sprintf("field %d is empty: write what stands there, or leave the field out with its colon", n+1)
		}
		size := 0 // of the last field
		for field != "" {
			p, rest, problem := cutFeedbackPiece(field)
			if problem != "" {
				return nil, problem
			}
			switch last := n == len(fields)-1; {
			case p.mark == markNone:
				size += len(p.text)
			case seen[p.mark]:
				return nil, "names one thing twice, which would be counted twice: name each once"
			case last && p.mark != markTenant:
				return nil, "ends in what changes from mail to mail: the last field names the sender, write a word of yours or {tenant}"
			default:
				seen[p.mark] = true
				size += FeedbackTenantBytes
			}
			pieces = append(pieces, p)
			field = rest
		}
		if n == len(fields)-1 && (size < minFeedbackSenderBytes || size > maxFeedbackSenderBytes) {
			return nil, fmt.Sprintf("the last field, which names the sender, has %d characters: write %d to %d", size, minFeedbackSenderBytes, maxFeedbackSenderBytes)
		}
	}
	return pieces, ""
}

// cutFeedbackPiece cuts text or a mark off a field.
func cutFeedbackPiece(field string) (p feedbackPiece, rest, problem string) {
	if field[0] == '{' {
		name, rest, ok := strings.Cut(field[1:], "}")
		mark := feedbackMarks[name]
		if !ok || mark == markNone {
			return p, "", fmt.Sprintf("%q is not known, write {tag}, {stream}, {tenant} or {domain}", clip(field))
		}
		return feedbackPiece{mark: mark}, rest, ""
	}
	n := 0
	for n < len(field) && isFeedbackByte(field[n]) {
		n++
	}
	if n == 0 {
		return p, "", fmt.Sprintf("has %q, write letters, digits, '.', '_', '-' and ':' only", clip(field[:1]))
	}
	return feedbackPiece{text: field[:n]}, field[n:], ""
}

func (s *Feedback) validate(p *problems, streams *Streams) {
	if len(s.Rule) > maxFeedbackRules {
		p.add("feedback.rule", "has %d entries, write at most %d", len(s.Rule), maxFeedbackRules)
		return
	}
	names := make(map[string]bool, len(streams.Stream))
	for i := range streams.Stream {
		names[streams.Stream[i].Name] = true
	}
	type key struct{ domain, stream string }
	seen := make(map[key]int, len(s.Rule))
	for i := range s.Rule {
		r := &s.Rule[i]
		at := fmt.Sprintf("feedback.rule[%d].", i)
		if r.Domain != everyone {
			if n, err := mailaddr.ParseDomain(r.Domain); err != nil || n.IsLiteral() || string(n) != r.Domain {
				p.add(at+"domain", "%q is not a sending domain: write its name as `domain list` shows it, or \"*\"", clip(r.Domain))
			}
		}
		if r.Stream != everyone && !names[r.Stream] {
			p.add(at+"stream", "there is no stream %q: correct the name, add it to section streams, or write \"*\"", clip(r.Stream))
		}
		if r.FeedbackID != "" {
			if _, problem := parseFeedbackID(r.FeedbackID); problem != "" {
				p.add(at+"feedback_id", "%s", problem)
			}
		}
		if r.ClientFields != "" {
			p.oneOf(at+"client_fields", r.ClientFields, ClientFieldsKeep, ClientFieldsReplace)
		}
		r.validateCFBL(p, at+"cfbl")
		k := key{r.Domain, r.Stream}
		if first, dup := seen[k]; dup {
			p.add(at+"domain", "says the same domain and stream as rule[%d]: remove one of them", first)
		}
		seen[k] = i
	}
}

func (r *FeedbackRule) validateCFBL(p *problems, field string) {
	switch r.CFBL {
	case "", CFBLOff, CFBLReturnPath:
		return
	}
	address, err := mailaddr.Parse(r.CFBL)
	switch {
	case err != nil || address.IsNull() || address.Domain.IsLiteral() || strings.HasPrefix(address.Local, `"`):
		p.add(field, "is %q, write \"off\", \"return-path\" or an address such as \"fbl@example.com\"", clip(r.CFBL))
	case r.Domain == everyone:
		// RFC 9477 section 3.1.2: the signature is that of the From domain.
		p.add(field, "is one address for all domains, which only those above it could sign: name the domain, or write \"return-path\"")
	case !address.Domain.IsSubdomainOf(mailaddr.Domain(r.Domain)):
		p.add(field, "is not at %s or below, so its signature does not cover the address: write an address there, or \"return-path\"", clip(r.Domain))
	}
}

// feedbackKey finds a rule: an empty domain or stream stands for "*".
type feedbackKey struct {
	domain mailaddr.Domain
	stream string
}

// compileFeedback makes the plans of valid rules, and the tenants' names if one
// of them writes those.
func (d *Directory) compileFeedback() {
	rules := d.view.Document.Feedback.Rule
	if len(rules) == 0 {
		return
	}
	d.feedback = make(map[feedbackKey]*FeedbackPlan, len(rules))
	d.feedbackTenants = make(map[ids.Tenant]string, len(d.tenants))
	for id := range d.tenants {
		d.feedbackTenants[id] = FeedbackTenant(d.view.CredentialKey, id)
	}
	for i := range rules {
		r := &rules[i]
		plan := &FeedbackPlan{ReturnPath: r.CFBL == CFBLReturnPath, Replace: r.ClientFields == ClientFieldsReplace}
		if r.FeedbackID != "" {
			plan.pieces, _ = parseFeedbackID(r.FeedbackID)
		}
		if r.CFBL != CFBLOff && r.CFBL != CFBLReturnPath && r.CFBL != "" {
			plan.Address, _ = mailaddr.Parse(r.CFBL) // checked by validate
		}
		if !plan.AddsFeedbackID() && !plan.ReturnPath && plan.Address.IsNull() {
			plan = nil // said to be off, which is more specific than what says on
		}
		key := feedbackKey{domain: mailaddr.Domain(r.Domain), stream: r.Stream}
		if r.Domain == everyone {
			key.domain = ""
		}
		if r.Stream == everyone {
			key.stream = ""
		}
		d.feedback[key] = plan
	}
}

// Feedback returns what is put in front of mail of a sending domain in the named
// stream; nil is nothing. It allocates nothing.
func (d *Directory) Feedback(domain mailaddr.Domain, stream string) *FeedbackPlan {
	if len(d.feedback) == 0 {
		return nil
	}
	for _, key := range [...]feedbackKey{{domain, stream}, {domain: domain}, {stream: stream}, {}} {
		if plan, ok := d.feedback[key]; ok {
			return plan
		}
	}
	return nil
}

// FeedbackTenantName returns the name of a tenant of the view in a Feedback-ID,
// empty for one that is not in it, or if no rule is there.
func (d *Directory) FeedbackTenantName(id ids.Tenant) string { return d.feedbackTenants[id] }

var feedbackEncoding = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// FeedbackTenant returns the name of a tenant in a Feedback-ID: always the same
// in a cluster, telling nothing of the tenant to those who read it. key is the
// view's CredentialKey.
func FeedbackTenant(key [32]byte, id ids.Tenant) string {
	// A credential's hash is made of its secret alone, which never begins so.
	m := hmac.New(sha256.New, key[:])
	_, _ = m.Write([]byte("feedback-id tenant\x00")) // hash.Hash never returns an error
	_, _ = m.Write(id[:])
	var sum [sha256.Size]byte
	m.Sum(sum[:0])
	return feedbackEncoding.EncodeToString(sum[:8])[:FeedbackTenantBytes]
}
