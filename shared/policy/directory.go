package policy

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// The values of Stream.ReturnPath and ResolvedStream.ReturnPath.
const (
	ReturnPathMessage   = "message"   // one signed return path a message
	ReturnPathRecipient = "recipient" // one a recipient, so one recipient a transaction
)

// Directory is a View made ready for look-ups: a relay asks it several times
// for every message, so no look-up allocates or takes a lock. It is immutable
// and safe for use by many goroutines.
type Directory struct {
	view        *View
	providers   *ProviderTable
	tenants     map[ids.Tenant]*Tenant
	projects    map[ids.Project]*Project
	domains     map[mailaddr.Domain]*Domain
	returnPaths map[mailaddr.Domain]*Domain
	credentials map[ids.Credential]*Credential
	pools       map[ids.Pool]*Pool
	poolNames   map[string]*Pool
	local       map[ids.Pool][]WeightedSource
	streams     map[streamKey]*ResolvedStream
	shares      map[shareKey]Share
	weights     map[ids.Tenant]int
	peers       map[ids.Node]*Peer
	owners      map[ids.Pool][]*Peer // other relays with a source of the pool

	certificates bool

	feedback        map[feedbackKey]*FeedbackPlan
	warm            warmTable
	feedbackTenants map[ids.Tenant]string
}

// WeightedSource is a source with its share of new work.
type WeightedSource struct {
	*Source
	Weight int // 1 to 1000, relative within the pool
}

// ResolvedStream is what the policy says about mail of a stream.
type ResolvedStream struct {
	Name           string
	Kind           StreamKind
	Pool           ids.Pool
	PoolName       string
	ReturnPath     string   // ReturnPathMessage or ReturnPathRecipient
	Expire         Duration // after acceptance
	MinPriority    int      // that a message may ask for
	MaxPriority    int
	HasLocalSource bool // this relay owns a source of the pool with a weight
	Elsewhere      bool // mail of the pool can be handed over to a relay that does

	owner ids.Tenant // of a dedicated pool
}

// streamKey finds an entry of the streams section: a zero tenant or project
// stands for "*".
type streamKey struct {
	tenant  ids.Tenant
	project ids.Project
	name    string
}

// Compile checks a view and makes its look-ups. The view must not change
// afterwards. Errors are fault.Invalid and name the object and field; they mean
// that the view must not be used.
func Compile(v *View) (*Directory, error) {
	const op = "policy.Compile"
	if v == nil {
		return nil, fault.New(fault.Invalid, op, "there is no view to compile")
	}
	if err := v.Document.Validate(); err != nil {
		return nil, err
	}
	d := &Directory{
		view:        v,
		tenants:     make(map[ids.Tenant]*Tenant, len(v.Tenants)),
		projects:    make(map[ids.Project]*Project, len(v.Projects)),
		domains:     make(map[mailaddr.Domain]*Domain, len(v.Domains)),
		returnPaths: make(map[mailaddr.Domain]*Domain, len(v.Domains)),
		credentials: make(map[ids.Credential]*Credential, len(v.Credentials)),
		pools:       make(map[ids.Pool]*Pool, len(v.Pools)),
		poolNames:   make(map[string]*Pool, len(v.Pools)),
		local:       make(map[ids.Pool][]WeightedSource),
		streams:     make(map[streamKey]*ResolvedStream, len(v.Document.Streams.Stream)),
		shares:      make(map[shareKey]Share, len(v.Document.Streams.Stream)),
		weights:     make(map[ids.Tenant]int, len(v.Document.Streams.Tenant)),
	}
	var p problems
	d.providers = newProviderTable(&v.Document.Providers, &p)
	d.compileTenants(&p)
	d.compileDomains(&p)
	d.compilePools(&p)
	d.compileSources(&p)
	d.compilePeers(&p)
	d.compileShared(&p)
	d.compileWarm(&p)
	keys := make(map[uint8]bool, len(v.ReturnPathKeys))
	for i, k := range v.ReturnPathKeys {
		if keys[k.ID] {
			p.add(fmt.Sprintf("view.return_path_keys[%d]", i), "the key id %d is there twice: give each key its own", k.ID)
		}
		keys[k.ID] = true
	}
	if err := p.err(op); err != nil {
		return nil, err
	}
	d.compileStreams()
	d.compileFeedback()
	return d, nil
}

func (d *Directory) compileTenants(p *problems) {
	names := make(map[string]bool, len(d.view.Tenants))
	for i := range d.view.Tenants {
		t := &d.view.Tenants[i]
		at := fmt.Sprintf("view.tenants[%d]", i)
		if t.ID.IsZero() || d.tenants[t.ID] != nil || names[t.Name] {
			p.add(at, "tenant %v %q has no id, or its id or name is there twice", t.ID, clip(t.Name))
		}
		d.tenants[t.ID], names[t.Name] = t, true
	}
	for i := range d.view.Projects {
		pr := &d.view.Projects[i]
		at := fmt.Sprintf("view.projects[%d]", i)
		if pr.ID.IsZero() || d.projects[pr.ID] != nil {
			p.add(at, "project %v %q has no id, or its id is there twice", pr.ID, clip(pr.Name))
		}
		if d.tenants[pr.Tenant] == nil {
			p.add(at+".tenant", "project %q belongs to tenant %v, which the view lacks", clip(pr.Name), pr.Tenant)
		}
		d.projects[pr.ID] = pr
	}
	for i := range d.view.Credentials {
		c := &d.view.Credentials[i]
		at := fmt.Sprintf("view.credentials[%d]", i)
		if c.ID.IsZero() || d.credentials[c.ID] != nil {
			p.add(at, "credential %v has no id, or its id is there twice", c.ID)
		}
		if pr := d.projects[c.Project]; pr == nil || pr.Tenant != c.Tenant {
			p.add(at+".project", "credential %v is for project %v, which is not a project of its tenant %v", c.ID, c.Project, c.Tenant)
		}
		if err := c.Scope.Check(); err != nil {
			p.add(at+".scope", "the scope of credential %v cannot be: %s", c.ID, fault.Public(err))
		}
		d.certificates = d.certificates || len(c.Scope.Certificates) > 0
		d.credentials[c.ID] = c
	}
}

func (d *Directory) compileDomains(p *problems) {
	for i := range d.view.Domains {
		dom := &d.view.Domains[i]
		at := fmt.Sprintf("view.domains[%d]", i)
		if n, err := mailaddr.ParseDomain(string(dom.Name)); err != nil || n != dom.Name || n.IsLiteral() {
			p.add(at+".name", "%q is not a domain name in normal form", clip(string(dom.Name)))
			continue
		}
		if d.domains[dom.Name] != nil {
			p.add(at+".name", "domain %s is there twice", dom.Name)
		}
		if d.tenants[dom.Tenant] == nil {
			p.add(at+".tenant", "domain %s belongs to tenant %v, which the view lacks", dom.Name, dom.Tenant)
		}
		d.domains[dom.Name] = dom
		if dom.ReturnPath == "" {
			continue
		}
		if n, err := mailaddr.ParseDomain(string(dom.ReturnPath)); err != nil || n != dom.ReturnPath || n.IsLiteral() {
			p.add(at+".return_path", "%q is not a domain name in normal form", clip(string(dom.ReturnPath)))
			continue
		}
		switch other := d.returnPaths[dom.ReturnPath]; {
		case other == nil:
			d.returnPaths[dom.ReturnPath] = dom
		case other.Tenant != dom.Tenant:
			p.add(at+".return_path", "%s is the return path of %s, a domain of another tenant", dom.ReturnPath, other.Name)
		}
	}
}

func (d *Directory) compilePools(p *problems) {
	for i := range d.view.Pools {
		pool := &d.view.Pools[i]
		at := fmt.Sprintf("view.pools[%d]", i)
		if pool.ID.IsZero() || pool.Name == "" || d.pools[pool.ID] != nil || d.poolNames[pool.Name] != nil {
			p.add(at, "pool %v %q has no id or name, or one of them is there twice", pool.ID, clip(pool.Name))
		}
		switch pool.Kind {
		case PoolShared:
			if !pool.Tenant.IsZero() {
				p.add(at+".tenant", "pool %q is shared, yet names an owner", clip(pool.Name))
			}
		case PoolDedicated:
			if d.tenants[pool.Tenant] == nil {
				p.add(at+".tenant", "pool %q is dedicated to tenant %v, which the view lacks", clip(pool.Name), pool.Tenant)
			}
		default:
			p.add(at+".kind", "pool %q is %q, which is neither shared nor dedicated", clip(pool.Name), clip(string(pool.Kind)))
		}
		d.pools[pool.ID], d.poolNames[pool.Name] = pool, pool
	}
}

func (d *Directory) compileSources(p *problems) {
	type address struct {
		owner ids.Node
		bind  netip.Addr
	}
	seen := make(map[ids.Source]bool, len(d.view.Sources))
	binds := make(map[address]bool, len(d.view.Sources))
	weights := weightsByPool(&d.view.Document.Pools)
	for i := range d.view.Sources {
		s := &d.view.Sources[i]
		at := fmt.Sprintf("view.sources[%d]", i)
		if s.ID.IsZero() || seen[s.ID] {
			p.add(at, "source %v has no id, or its id is there twice", s.ID)
		}
		if !s.Bind.IsValid() || !s.Public.IsValid() || s.Bind.Is4() != s.Public.Is4() {
			p.add(at+".bind", "source %v binds %v and is seen as %v: two addresses of one family are needed", s.ID, s.Bind, s.Public)
		}
		if a := (address{s.Owner, s.Bind}); binds[a] {
			p.add(at+".bind", "address %v is a source of its relay twice", s.Bind)
		} else {
			binds[a] = true
		}
		pool := d.pools[s.Pool]
		if pool == nil && !s.Pool.IsZero() {
			p.add(at+".pool", "source %v is in pool %v, which the view lacks", s.Bind, s.Pool)
		}
		seen[s.ID] = true
		if pool == nil || s.Owner.IsZero() || s.Owner != d.view.Node {
			continue
		}
		weight := 1
		if w, ok := weights[poolAddress{pool.Name, s.Bind.Unmap()}]; ok {
			weight = w
		}
		if weight > 0 {
			d.local[s.Pool] = append(d.local[s.Pool], WeightedSource{Source: s, Weight: weight})
		}
	}
}

type poolAddress struct {
	pool string
	ip   netip.Addr
}

func weightsByPool(s *Pools) map[poolAddress]int {
	weights := make(map[poolAddress]int)
	for i := range s.Pool {
		for text, w := range s.Pool[i].Weights {
			if ip, err := netip.ParseAddr(text); err == nil {
				weights[poolAddress{s.Pool[i].Name, ip.Unmap()}] = w
			}
		}
	}
	return weights
}

// compileStreams turns names into ids. An entry whose tenant, project or pool
// does not exist stays without effect: objects may go away after the policy
// was put.
func (d *Directory) compileStreams() {
	tenants := make(map[string]ids.Tenant, len(d.tenants))
	for id, t := range d.tenants {
		tenants[t.Name] = id
	}
	type projectName struct {
		tenant ids.Tenant
		name   string
	}
	projects := make(map[projectName]ids.Project, len(d.projects))
	for id, pr := range d.projects {
		projects[projectName{pr.Tenant, pr.Name}] = id
	}
	doc := &d.view.Document
	for i := range doc.Streams.Stream {
		s := &doc.Streams.Stream[i]
		key := streamKey{name: s.Name}
		known := true
		if s.Tenant != everyone {
			key.tenant, known = tenants[s.Tenant]
		}
		if known && s.Project != everyone {
			key.project, known = projects[projectName{key.tenant, s.Project}]
		}
		if known {
			d.streams[key] = d.resolve(s, doc)
			d.compileShare(key.tenant, s)
		}
	}
	for _, t := range doc.Streams.Tenant {
		if id, known := tenants[t.Name]; known {
			d.weights[id] = t.Weight
		}
	}
}

func (d *Directory) resolve(s *Stream, doc *Document) *ResolvedStream {
	r := &ResolvedStream{Name: s.Name, Kind: s.Kind, PoolName: s.Pool, ReturnPath: s.ReturnPath, Expire: s.Expire, MinPriority: MinPriority, MaxPriority: MaxPriority}
	if s.MessagePriorityMin != nil {
		r.MinPriority = *s.MessagePriorityMin
	}
	if s.MessagePriorityMax != nil {
		r.MaxPriority = *s.MessagePriorityMax
	}
	if pool := d.poolNames[s.Pool]; pool != nil {
		r.Pool, r.owner = pool.ID, pool.Tenant
		r.HasLocalSource = len(d.local[pool.ID]) > 0
		r.Elsewhere = d.Elsewhere(pool.ID)
	}
	if r.ReturnPath == "" {
		r.ReturnPath = ReturnPathMessage
		if s.Kind == Bulk {
			r.ReturnPath = ReturnPathRecipient
		}
	}
	if r.Expire == 0 {
		r.Expire = doc.Queue.ExpireTransactional
		if s.Kind == Bulk {
			r.Expire = doc.Queue.ExpireBulk
		}
	}
	return r
}

// Credential returns a credential by its id.
func (d *Directory) Credential(id ids.Credential) (*Credential, bool) {
	c, ok := d.credentials[id]
	return c, ok
}

// WantsCertificates reports whether a credential needs clients to show a
// certificate.
func (d *Directory) WantsCertificates() bool { return d.certificates }

// Tenant returns a tenant by its id.
func (d *Directory) Tenant(id ids.Tenant) (*Tenant, bool) {
	t, ok := d.tenants[id]
	return t, ok
}

// Project returns a project by its id.
func (d *Directory) Project(id ids.Project) (*Project, bool) {
	p, ok := d.projects[id]
	return p, ok
}

// DomainFor returns the sending domain that covers name: name itself or the
// nearest domain above it.
func (d *Directory) DomainFor(name mailaddr.Domain) (*Domain, bool) {
	if name.IsLiteral() {
		return nil, false
	}
	for {
		if dom, ok := d.domains[name]; ok {
			return dom, true
		}
		dot := strings.IndexByte(string(name), '.')
		if dot < 0 {
			return nil, false
		}
		name = name[dot+1:]
	}
}

// ReturnPathDomain returns the sending domain whose signed return paths are at
// the given domain.
func (d *Directory) ReturnPathDomain(name mailaddr.Domain) (*Domain, bool) {
	dom, ok := d.returnPaths[name]
	return dom, ok
}

// Stream returns what the policy says about mail of the named stream of a
// project. Errors: fault.NotFound when no entry has the name or the entry's
// pool does not exist, fault.Denied when the pool is dedicated to another
// tenant.
func (d *Directory) Stream(tenant ids.Tenant, project ids.Project, name string) (*ResolvedStream, error) {
	const op = "policy.Stream"
	r := d.streams[streamKey{tenant, project, name}]
	if r == nil {
		r = d.streams[streamKey{tenant: tenant, name: name}]
	}
	if r == nil {
		r = d.streams[streamKey{name: name}]
	}
	switch {
	case r == nil || tenant.IsZero():
		return nil, &fault.Error{Kind: fault.NotFound, Op: op, Field: "stream",
			Public: fmt.Sprintf("there is no stream %q for this project; add it to section streams of the policy or name another", clip(name))}
	case r.Pool.IsZero():
		return nil, &fault.Error{Kind: fault.NotFound, Op: op, Field: "stream",
			Public: fmt.Sprintf("stream %q uses pool %q, which does not exist; make the pool or change the stream", clip(name), clip(r.PoolName))}
	case !r.owner.IsZero() && r.owner != tenant:
		// Invariant A3: a dedicated address never carries
		// another tenant's mail.
		return nil, &fault.Error{Kind: fault.Denied, Op: op, Field: "stream",
			Public: fmt.Sprintf("stream %q uses pool %q, which is dedicated to another tenant; change the stream's pool", clip(name), clip(r.PoolName))}
	}
	return r, nil
}

// Pool returns a pool by its id.
func (d *Directory) Pool(id ids.Pool) (*Pool, bool) {
	p, ok := d.pools[id]
	return p, ok
}

// PoolByName returns a pool by its name.
func (d *Directory) PoolByName(name string) (*Pool, bool) {
	p, ok := d.poolNames[name]
	return p, ok
}

// MayUse reports whether mail of the tenant may leave through the pool now: a
// dedicated pool carries only its owner's mail (invariant A3), whatever it was when the mail was accepted.
func (d *Directory) MayUse(tenant ids.Tenant, pool ids.Pool) bool {
	p, ok := d.pools[pool]
	return ok && (p.Tenant.IsZero() || p.Tenant == tenant)
}

// LocalSources returns the sources of a pool that are assigned to this relay
// and have a weight, in the order of the view. The caller must not change the
// result.
func (d *Directory) LocalSources(pool ids.Pool) []WeightedSource { return d.local[pool] }

// Sources returns the sources of all relays. The caller must not change the
// result.
func (d *Directory) Sources() []Source { return d.view.Sources }

// ReturnPathKeys returns the keys of signed return paths: the first one signs,
// all verify. The caller must not change the result.
func (d *Directory) ReturnPathKeys() []ReturnPathKey { return d.view.ReturnPathKeys }

// Providers returns the table of mailbox providers.
func (d *Directory) Providers() *ProviderTable { return d.providers }

// Document returns the policy document, which must not be changed.
func (d *Directory) Document() *Document { return &d.view.Document }

// View returns the view the directory was made of, which must not be changed.
func (d *Directory) View() *View { return d.view }
