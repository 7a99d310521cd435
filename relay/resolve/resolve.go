package resolve

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/singleflight"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of the resolver.
const (
	maxServers           = 8
	maxRoutes            = 100_000  // cached domains
	maxRouteBytes        = 96 << 20 // of cached routes
	maxHostEntries       = 200_000  // cached host and family pairs
	maxHostBytes         = 64 << 20 // of cached hosts
	maxHosts             = 20       // mail hosts used of one domain, best preference first
	maxAddrsPerHost      = 16
	maxQuestionsInFlight = 512
	resolveTimeout       = 30 * time.Second // of one domain with all its hosts
	defaultQueryTimeout  = 3 * time.Second
	minAttempts          = 3 // questions before a name counts as unanswered

	maxAnswerTTL       = 7 * 24 * time.Hour // before the policy's bounds
	defaultNegativeTTL = 5 * time.Minute    // of a "no" without a SOA record
	maxNegativeTTL     = time.Hour
	temporaryTTL       = 5 * time.Second // a failing name is not asked again before (RFC 2308 section 7.1)
	staleRetry         = time.Minute     // a stale route is asked again after
	maxStale           = 12 * time.Hour  // how long after its expiry a route is used while DNS fails
)

// Config says whom to ask and what to refuse.
type Config struct {
	Servers []netip.AddrPort // recursive resolvers, best first; see SystemServers
	// Validating names those of Servers that validate DNSSEC and to which the
	// way is safe. What others say about it is not believed. Nil: those on
	// loopback addresses.
	Validating   []netip.AddrPort
	QueryTimeout time.Duration // of one question to one server; 0: 3 s
	// Policy returns the delivery section in force: MinDNSTTL and MaxDNSTTL.
	Policy func() *policy.Delivery
	// AllowPrivate permits mail hosts at loopback, private and own addresses.
	// It is for laboratories only.
	AllowPrivate bool
	// Own reports whether an address is one of this installation's own, so
	// that mail sent there would come back. It may be nil.
	Own        func(netip.Addr) bool
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

type routeKey struct {
	domain   mailaddr.Domain
	families Families
}

type hostKey struct {
	name  string
	qtype uint16
}

// hostAnswer is what is known of one host in one family.
type hostAnswer struct {
	kind      kind
	addrs     []netip.Addr
	authentic bool  // proved by DNSSEC
	err       error // temporary; kind means nothing then
}

// Resolver answers where mail goes. It is safe for concurrent use.
type Resolver struct {
	servers      []netip.AddrPort
	validating   map[netip.AddrPort]bool
	attempts     int
	queryTimeout time.Duration
	policy       func() *policy.Delivery
	allowPrivate bool
	own          func(netip.Addr) bool
	log          *slog.Logger

	udp, tcp  dns.Client
	preferred atomic.Uint32 // index of the server that answered last
	slots     chan struct{}

	routes     *cache[routeKey, *Route]
	hosts      *cache[hostKey, hostAnswer]
	routeCalls singleflight.Group
	hostCalls  singleflight.Group

	queries *prometheus.CounterVec
	lookups *prometheus.CounterVec
	proved  prometheus.Counter
}

// New returns a resolver with empty caches.
func New(cfg Config) (*Resolver, error) {
	const op = "resolve.New"
	if len(cfg.Servers) == 0 || len(cfg.Servers) > maxServers {
		return nil, fault.Field(op, "resolvers", "name 1 to %d resolvers as address:port, there are %d", maxServers, len(cfg.Servers))
	}
	if cfg.Policy == nil || cfg.Log == nil || cfg.Registerer == nil {
		return nil, fault.New(fault.Internal, op, "policy, logger and metrics registry are needed")
	}
	validating, err := validatingOf(cfg.Servers, cfg.Validating)
	if err != nil {
		return nil, err
	}
	r := &Resolver{
		servers: cfg.Servers, validating: validating, attempts: max(minAttempts, len(cfg.Servers)), queryTimeout: cfg.QueryTimeout,
		policy: cfg.Policy, allowPrivate: cfg.AllowPrivate, own: cfg.Own, log: cfg.Log,
		slots:  make(chan struct{}, maxQuestionsInFlight),
		routes: newCache[routeKey](maxRoutes, maxRouteBytes, routeBytes),
		hosts:  newCache[hostKey](maxHostEntries, maxHostBytes, hostBytes),
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_dns_queries_total", Help: "Questions sent to name servers, by result.",
		}, []string{"result"}),
		lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_routes_total", Help: "Mail domains resolved, by result; cached answers are not counted.",
		}, []string{"result"}),
		proved: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "relais_relay_routes_authentic_total", Help: "Mail domains whose MX records and a host's address DNSSEC proved; cached answers are not counted.",
		}),
	}
	if r.queryTimeout <= 0 {
		r.queryTimeout = defaultQueryTimeout
	}
	r.udp = dns.Client{Net: "udp", UDPSize: ednsBytes, Timeout: r.queryTimeout}
	r.tcp = dns.Client{Net: "tcp", Timeout: r.queryTimeout}
	size := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "relais_relay_routes_cached", Help: "Mail domains in the route cache.",
	}, func() float64 { return float64(r.routes.len()) })
	for _, c := range []prometheus.Collector{r.queries, r.lookups, r.proved, size} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, fault.Internal, op, "metrics could not be registered")
		}
	}
	return r, nil
}

// validatingOf returns the servers whose word about DNSSEC is taken.
func validatingOf(servers, named []netip.AddrPort) (map[netip.AddrPort]bool, error) {
	out := make(map[netip.AddrPort]bool)
	for _, s := range named {
		if !slices.Contains(servers, s) {
			return nil, fault.Field("resolve.New", "dns.validating", "%s is none of the resolvers: name it in dns.resolvers too", s)
		}
		out[s] = true
	}
	for _, s := range servers {
		if named == nil && s.Addr().IsLoopback() {
			out[s] = true
		}
	}
	return out, nil
}

// SystemServers reads the resolvers of a resolv.conf file; "" means
// /etc/resolv.conf.
func SystemServers(path string) ([]netip.AddrPort, error) {
	const op = "resolve.SystemServers"
	if path == "" {
		path = "/etc/resolv.conf"
	}
	conf, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil, fault.Wrap(err, fault.NotFound, op, "%s cannot be read; set resolvers in the configuration file", path)
	}
	var out []netip.AddrPort
	for _, s := range conf.Servers {
		addr, err := netip.ParseAddr(s)
		if err == nil && len(out) < maxServers {
			out = append(out, netip.AddrPortFrom(addr, 53))
		}
	}
	if len(out) == 0 {
		return nil, fault.Field(op, "resolvers", "%s names no name server; set resolvers in the configuration file", path)
	}
	return out, nil
}

// Cached returns the route of a domain if it is known and fresh at now. It
// takes one read lock and allocates nothing.
func (r *Resolver) Cached(domain mailaddr.Domain, families Families, now time.Time) (*Route, bool) {
	e, ok := r.routes.get(routeKey{domain, families})
	if !ok || !now.Before(e.expires) {
		return nil, false
	}
	return e.value, true
}

// Route returns the route of a domain, from the cache or from DNS. It never
// returns nil: what went wrong is in Route.Failure. When ctx ends first, the
// failure is temporary and is not remembered, and the question goes on for
// others.
func (r *Resolver) Route(ctx context.Context, domain mailaddr.Domain, families Families) *Route {
	if families == 0 {
		families = IPv4
	}
	if route, ok := r.Cached(domain, families, time.Now()); ok {
		return route
	}
	key := routeKey{domain, families}
	flight := string(domain) + "/" + string('0'+rune(families))
	result := r.routeCalls.DoChan(flight, func() (any, error) {
		// Detached: the answer is for everyone who waits, not only for the
		// first who asked.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resolveTimeout)
		defer cancel()
		return r.refresh(ctx, key), nil
	})
	select {
	case res := <-result:
		return res.Val.(*Route)
	case <-ctx.Done():
		return &Route{Domain: domain, Families: families, Failure: deferred("4.4.3", "DNS look-up of "+string(domain)+" was given up")}
	}
}

// refresh finds the route and caches it. When DNS fails, the last good route
// is kept within maxStale (RFC 8767 section 5).
func (r *Resolver) refresh(ctx context.Context, key routeKey) *Route {
	route := r.find(ctx, key.domain, key.families)
	now := time.Now()
	keep := maxStale
	switch {
	case route.Failure == nil:
		r.lookups.WithLabelValues("found").Inc()
		if route.authentic() {
			r.proved.Inc()
		}
	case route.Failure.Status == failedStatus:
		r.lookups.WithLabelValues("failed").Inc()
		keep = 0
	default:
		keep = 0
		if last, ok := r.lastGood(key, now); ok {
			r.lookups.WithLabelValues("stale").Inc()
			stale := *last
			stale.Stale = true
			stale.Expires = now.Add(staleRetry)
			keep = max(0, last.Resolved.Add(maxStale).Sub(stale.Expires))
			route = &stale
			break
		}
		r.lookups.WithLabelValues("deferred").Inc()
	}
	r.routes.put(key, entry[*Route]{value: route, expires: route.Expires, drop: route.Expires.Add(keep)}, now)
	return route
}

func (r *Resolver) lastGood(key routeKey, now time.Time) (*Route, bool) {
	e, ok := r.routes.get(key)
	if !ok || e.value.Failure != nil || !now.Before(e.drop) {
		return nil, false
	}
	return e.value, true
}

// bounded applies the policy's TTL bounds to the TTL of an answer.
func (r *Resolver) bounded(ttl time.Duration) time.Duration {
	p := r.policy()
	if most := p.MaxDNSTTL.D(); most > 0 {
		ttl = min(ttl, most)
	}
	return max(ttl, p.MinDNSTTL.D(), time.Second)
}

// hostName is the form of names inside routes and caches.
func hostName(fqdn string) string { return strings.ToLower(strings.TrimSuffix(fqdn, ".")) }
