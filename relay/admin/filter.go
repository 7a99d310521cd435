package admin

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Filter selects mail, in the words of the command line's flags. Empty fields
// match all.
type Filter struct {
	Tenant      string   `json:"tenant,omitempty"` // id or name
	Stream      string   `json:"stream,omitempty"`
	Pool        string   `json:"pool,omitempty"`        // id or name
	FromDomain  string   `json:"from_domain,omitempty"` // of the From header
	Domain      string   `json:"domain,omitempty"`      // of the recipient
	Provider    string   `json:"provider,omitempty"`
	Source      string   `json:"source,omitempty"` // bind address
	Tag         string   `json:"tag,omitempty"`
	Priority    string   `json:"priority,omitempty"`     // a number such as 80, or a range such as 60-100
	State       string   `json:"state,omitempty"`        // waiting, held or in-doubt
	OlderThan   string   `json:"older_than,omitempty"`   // since acceptance, such as 2h or 3d
	YoungerThan string   `json:"younger_than,omitempty"` // likewise
	LastReply   string   `json:"last_reply,omitempty"`   // class, or a part of the reply
	IDs         []string `json:"ids,omitempty"`          // of messages or recipients
}

// Bounds of a filter.
const (
	maxFilterIDs       = 10_000
	maxFilterTextBytes = 256
)

// fields lists the filter's fields but the ids by their names.
func (f *Filter) fields() []struct {
	name  string
	value *string
} {
	return []struct {
		name  string
		value *string
	}{
		{"tenant", &f.Tenant}, {"stream", &f.Stream}, {"pool", &f.Pool}, {"from_domain", &f.FromDomain}, {"domain", &f.Domain},
		{"provider", &f.Provider}, {"source", &f.Source}, {"tag", &f.Tag}, {"state", &f.State}, {"older_than", &f.OlderThan},
		{"younger_than", &f.YoungerThan}, {"last_reply", &f.LastReply}, {"priority", &f.Priority},
	}
}

// Values is the filter as a query string.
func (f *Filter) Values() url.Values {
	v := url.Values{}
	for _, field := range f.fields() {
		if *field.value != "" {
			v.Set(field.name, *field.value)
		}
	}
	for _, id := range f.IDs {
		v.Add("id", id)
	}
	return v
}

func filterFrom(v url.Values) (f Filter) {
	for _, field := range f.fields() {
		*field.value = v.Get(field.name)
	}
	f.IDs = v["id"]
	return f
}

// Empty reports whether the filter selects everything.
func (f *Filter) Empty() bool {
	for _, field := range f.fields() {
		if *field.value != "" {
			return false
		}
	}
	return len(f.IDs) == 0
}

// parse gives the filter its meaning; dir, which may be nil, knows names.
func (f *Filter) parse(dir *policy.Directory, now time.Time) (out queue.Filter, err error) {
	const op = "admin.filter"
	for _, field := range f.fields() {
		if len(*field.value) > maxFilterTextBytes {
			return out, fault.Field(op, field.name, "%d bytes are too many, %d are the most", len(*field.value), maxFilterTextBytes)
		}
	}
	if out.Match, err = f.match(dir); err != nil {
		return out, err
	}
	if f.Provider != queue.UnknownProvider {
		if err = checkProvider(dir, f.Provider); err != nil {
			return out, err
		}
	}
	switch f.State {
	case "":
	case "waiting":
		out.State = relay.StateWaiting
	case "held":
		out.State = relay.StateHeld
	case "in-doubt":
		out.State, out.InDoubt = relay.StateWaiting, true
	default:
		return out, fault.Field(op, "state", "%q is not a state of queued mail: write waiting, held or in-doubt", f.State)
	}
	for _, age := range []struct {
		name, text string
		into       *time.Time
	}{{"older_than", f.OlderThan, &out.AcceptedBefore}, {"younger_than", f.YoungerThan, &out.AcceptedAfter}} {
		if age.text == "" {
			continue
		}
		d, err := policy.ParseDuration(age.text)
		if err != nil {
			return out, fault.Field(op, age.name, "%s", fault.Public(err))
		}
		*age.into = now.Add(-d.D())
	}
	if out.Priority, err = parsePriorities(f.Priority); err != nil {
		return out, err
	}
	out.LastReply = f.LastReply
	if out.Chosen, err = parseIDs(f.IDs); err != nil {
		return out, err
	}
	return out, nil
}

// parsePriorities reads one priority, or a range of them.
func parsePriorities(text string) (*queue.PriorityRange, error) {
	if text == "" {
		return nil, nil
	}
	low, high, ranged := strings.Cut(text, "-")
	if !ranged {
		high = low
	}
	least, ok := policy.ParsePriority(low)
	most, also := policy.ParsePriority(high)
	if !ok || !also || most < least {
		return nil, fault.Field("admin.filter", "priority", "%q is neither a number from 0 to 100 nor a range such as 60-100", text)
	}
	return &queue.PriorityRange{Least: least, Most: most}, nil
}

func (f *Filter) match(dir *policy.Directory) (m queue.Match, err error) {
	const op = "admin.filter"
	if m.Tenant, err = tenantOf(dir, f.Tenant); err != nil {
		return m, err
	}
	if m.Pool, err = poolOf(dir, f.Pool); err != nil {
		return m, err
	}
	m.Stream, m.Provider, m.Tag = f.Stream, f.Provider, f.Tag
	for _, d := range []struct {
		name, text string
		into       *mailaddr.Domain
	}{{"from_domain", f.FromDomain, &m.From}, {"domain", f.Domain, &m.Domain}} {
		if d.text == "" {
			continue
		}
		if *d.into, err = mailaddr.ParseDomain(d.text); err != nil {
			return m, fault.Field(op, d.name, "%s", fault.Public(err))
		}
	}
	if f.Source != "" {
		if m.Source, err = netip.ParseAddr(f.Source); err != nil {
			return m, fault.Field(op, "source", "%q is not an address: name the bind address of a source", f.Source)
		}
	}
	return m, nil
}

// rule gives the filter of a rule its meaning.
func (f *Filter) rule(dir *policy.Directory) (m queue.Match, err error) {
	if f.State != "" || f.OlderThan != "" || f.YoungerThan != "" || f.LastReply != "" || f.Priority != "" || len(f.IDs) > 0 {
		return m, fault.Field("admin.filter", "filter", "a rule goes by tenant, stream, pool, domains, provider, source and tag, not by state, age, reply, priority or id: hold such mail without a rule")
	}
	if err := checkProvider(dir, f.Provider); err != nil {
		return m, err
	}
	if err := checkStream(dir, f.Stream); err != nil {
		return m, err
	}
	return f.match(dir)
}

// checkProvider refuses a provider that the policy does not know: a misspelt one
// would match nothing, and a rule for it never hold anything.
func checkProvider(dir *policy.Directory, name string) error {
	if name == "" || dir == nil || dir.Document().KnowsProvider(name) {
		return nil
	}
	var known []string
	for i := range dir.Document().Providers.Provider {
		known = append(known, dir.Document().Providers.Provider[i].Name)
	}
	return fault.Field("admin.filter", "provider", "%q is not a provider that the policy knows: write %q and a registrable domain, or one of %s", name, policy.UnlistedPrefix, strings.Join(known, ", "))
}

// checkStream refuses a stream that the policy has for nobody: a rule for a misspelt
// one would never hold anything. Mail of a stream that is gone is held without a rule.
func checkStream(dir *policy.Directory, name string) error {
	if name == "" || dir == nil {
		return nil
	}
	var known []string
	for i := range dir.Document().Streams.Stream {
		if known = append(known, dir.Document().Streams.Stream[i].Name); known[i] == name {
			return nil
		}
	}
	slices.Sort(known)
	return fault.Field("admin.filter", "stream", "%q is not a stream that the policy knows: write one of %s", name, strings.Join(slices.Compact(known), ", "))
}

func tenantOf(dir *policy.Directory, text string) (id ids.Tenant, err error) {
	if text == "" {
		return id, nil
	}
	if id.UnmarshalText([]byte(text)) == nil {
		return id, nil
	}
	if dir != nil {
		for i := range dir.View().Tenants {
			if t := &dir.View().Tenants[i]; t.Name == text {
				return t.ID, nil
			}
		}
	}
	return id, fault.Field("admin.filter", "tenant", "%q is neither the id nor the name of a tenant that this relay knows", text)
}

func poolOf(dir *policy.Directory, text string) (id ids.Pool, err error) {
	if text == "" {
		return id, nil
	}
	if id.UnmarshalText([]byte(text)) == nil {
		return id, nil
	}
	if dir != nil {
		if p, ok := dir.PoolByName(text); ok {
			return p.ID, nil
		}
	}
	return id, fault.Field("admin.filter", "pool", "%q is neither the id nor the name of a pool that this relay knows", text)
}

// parseIDs reads ids of messages and recipients.
func parseIDs(texts []string) ([]queue.Chosen, error) {
	const op = "admin.filter"
	if len(texts) == 0 {
		return nil, nil
	}
	if len(texts) > maxFilterIDs {
		return nil, fault.Field(op, "ids", "%d ids are too many at once, %d are the most", len(texts), maxFilterIDs)
	}
	out := make([]queue.Chosen, 0, len(texts))
	for _, text := range texts {
		if strings.HasPrefix(text, "rcp_") {
			r, err := ids.ParseRecipient(text)
			if err != nil {
				return nil, fault.Field(op, "ids", "%s", fault.Public(err))
			}
			out = append(out, queue.Chosen{Message: r.Message, Index: int(r.Index)})
			continue
		}
		id, err := ids.ParseMessage(text)
		if err != nil {
			return nil, fault.Field(op, "ids", "%s", fault.Public(err))
		}
		out = append(out, queue.Chosen{Message: id, Index: queue.AllRecipients})
	}
	queue.SortChosen(out)
	return out, nil
}
