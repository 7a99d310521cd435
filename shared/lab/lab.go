package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Mode says whether providers impose themselves.
type Mode string

// The modes.
const (
	Realistic Mode = "realistic" // limits, random deferrals and greylisting
	Open      Mode = "open"      // none of these; addresses still decide outcomes
)

const (
	defaultSmallReceivers = 8
	maxSmallReceivers     = 100
	defaultSlowDelay      = 3 * time.Second
	defaultIdleTimeout    = 5 * time.Minute
	maxFarmHosts          = 4096
	waitInterval          = 20 * time.Millisecond // between two looks of WaitFor
)

// Config says what a lab is made of. Seed, Dir and Logger are needed; the zero
// value of everything else has a default.
type Config struct {
	Seed uint64
	Mode Mode // default Realistic

	DNSAddr    netip.AddrPort         // default 127.0.0.1 and a free port
	FarmPrefix netip.Prefix           // MX hosts take addresses from it, from the second on; default 127.64.0.0/16
	FarmAddrs  func(i int) netip.Addr // overrides FarmPrefix: the address of the i-th MX host
	SMTPPort   uint16                 // of all MX hosts; 0 finds one that is free on all
	HTTPAddr   string                 // where the report is served; empty: nowhere
	Dir        string                 // mail files, ca.pem, dkim.jsonl; created, must hold no earlier run
	TTL        time.Duration          // of records that state none; default 60 s
	Zones      []Zone                 // further records, e.g. of sending domains
	Small      int                    // unlisted receivers, 1 to 100; default 8
	Tune       func(p *Profile)       // changes or inspects each profile before it starts
	SkipDKIM   bool                   // leave signatures unverified
	CheckPTR   bool                   // providers that want confirmed reverse DNS insist; see AddPTR
	SlowDelay  time.Duration          // how late slow- recipients are answered; default 3 s
	IdleTime   time.Duration          // how long MX hosts wait for a client; default 5 min
	Hostile    bool                   // beside the providers, hosts that play the corpus of transcripts
	Pace       time.Duration          // between the bytes of a transcript's drip; default 1 s
	Logger     *slog.Logger
}

// Lab is a running little internet.
type Lab struct {
	cfg        Config
	zones      *zoneData
	dns        *nameServer
	farm       *farm
	verifier   *verifier
	deliveries *deliveries
	http       *reportServer
	smtpPort   uint16
	start      time.Time

	cancel  context.CancelFunc
	working sync.WaitGroup
	once    sync.Once
	closed  error

	waiters atomic.Int64
	mu      sync.Mutex
	change  chan struct{} // closed and replaced when something changed and someone waits
}

func (c *Config) complete() error {
	if c.Logger == nil {
		return errors.New("lab: Logger is needed")
	}
	if c.Dir == "" {
		return errors.New("lab: Dir is needed, an empty folder or one to create")
	}
	if c.Mode == "" {
		c.Mode = Realistic
	}
	if c.Mode != Realistic && c.Mode != Open {
		return fmt.Errorf("lab: Mode %q: want %q or %q", c.Mode, Realistic, Open)
	}
	if c.Small == 0 {
		c.Small = defaultSmallReceivers
	}
	if c.Small < 1 || c.Small > maxSmallReceivers {
		return fmt.Errorf("lab: Small is %d: want 1 to %d", c.Small, maxSmallReceivers)
	}
	if !c.DNSAddr.IsValid() {
		c.DNSAddr = netip.MustParseAddrPort("127.0.0.1:0")
	}
	if c.FarmAddrs == nil {
		if !c.FarmPrefix.IsValid() {
			c.FarmPrefix = netip.MustParsePrefix("127.64.0.0/16")
		}
		c.FarmAddrs = addressesOf(c.FarmPrefix)
	}
	if c.TTL == 0 {
		c.TTL = defaultTTLSecs * time.Second
	}
	if c.TTL < time.Second {
		return fmt.Errorf("lab: TTL is %s: DNS counts in whole seconds, from 1", c.TTL)
	}
	if c.SlowDelay == 0 {
		c.SlowDelay = defaultSlowDelay
	}
	if c.Pace == 0 {
		c.Pace = defaultPace
	}
	if c.IdleTime == 0 {
		c.IdleTime = defaultIdleTimeout
	}
	return nil
}

// addressesOf hands out the addresses of a prefix from its second one on.
func addressesOf(prefix netip.Prefix) func(i int) netip.Addr {
	next := prefix.Masked().Addr()
	var made []netip.Addr
	return func(i int) netip.Addr {
		for len(made) <= i {
			next = next.Next()
			if !prefix.Contains(next) {
				return netip.Addr{}
			}
			made = append(made, next)
		}
		return made[i]
	}
}

// Start brings a lab up. When it returns, names resolve and MX hosts answer.
// ctx ends the lab like Close.
func Start(ctx context.Context, cfg Config) (*Lab, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: Dir: %w", err)
	}
	certs, err := newCertificates()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	l := &Lab{
		cfg: cfg, zones: newZoneData(uint32(cfg.TTL / time.Second)), deliveries: newDeliveries(),
		start: time.Now(), cancel: cancel, change: make(chan struct{}),
	}
	l.farm = &farm{
		providers: make(map[string]*provider), open: cfg.Mode == Open,
		idle: cfg.IdleTime, slow: cfg.SlowDelay, pace: cfg.Pace, checkPTR: cfg.CheckPTR, start: l.start,
		zones: l.zones, certs: certs, log: cfg.Logger, conns: make(map[net.Conn]struct{}),
		stored: l.stored, moved: l.moved,
	}
	l.farm.ctx, l.farm.cancel = context.WithCancel(ctx)
	if err := l.up(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	context.AfterFunc(ctx, func() { _ = l.Close() }) // Close keeps its error for its next caller
	return l, nil
}

func (l *Lab) up(ctx context.Context) error {
	if err := os.WriteFile(filepath.Join(l.cfg.Dir, "ca.pem"), l.CAPEM(), 0o644); err != nil {
		return fmt.Errorf("lab: Dir: %w", err)
	}
	profiles := DefaultProfiles(l.cfg.Small)
	if l.cfg.Hostile {
		hostile, err := hostileProfiles()
		if err != nil {
			return err
		}
		profiles = append(profiles, hostile...)
	}
	owner, err := l.build(profiles)
	if err != nil {
		return err
	}
	for _, z := range l.cfg.Zones {
		if err := l.zones.add(z.Origin, z.Records); err != nil {
			return err
		}
	}
	if l.dns, err = startNameServer(l.cfg.DNSAddr, l.zones); err != nil {
		return err
	}
	l.dns.setFault(DomainServfail, FaultServfail)
	l.dns.setFault(DomainTimeout, FaultDrop)
	if !l.cfg.SkipDKIM {
		if l.verifier, err = newVerifier(l.cfg.Dir, l.zones, l.farm.order, l.moved); err != nil {
			return err
		}
		l.working.Go(func() { l.verifier.run(ctx) })
	}
	if l.cfg.HTTPAddr != "" {
		if l.http, err = startReportServer(l, l.cfg.HTTPAddr); err != nil {
			return err
		}
	}
	l.farm.serve(owner)
	return nil
}

// Close ends the lab and returns the first thing that went wrong while it ran
// or while it closed, if any. Mail files are complete after it.
func (l *Lab) Close() error {
	l.once.Do(func() {
		l.cancel()
		var errs []error
		if l.http != nil {
			errs = append(errs, l.http.close())
		}
		l.working.Wait()
		errs = append(errs, l.farm.close())
		if l.dns != nil {
			errs = append(errs, l.dns.close())
		}
		if l.verifier != nil {
			errs = append(errs, l.verifier.close())
		}
		l.closed = errors.Join(errs...)
	})
	return l.closed
}

// DNSAddr returns where the name server listens, over UDP and TCP.
func (l *Lab) DNSAddr() netip.AddrPort { return l.dns.addr }

// SMTPPort returns the port of all MX hosts.
func (l *Lab) SMTPPort() uint16 { return l.smtpPort }

// AddRecords adds records in zone-file syntax, all or none: "name TTL IN type
// data", the name absolute whether or not it ends in a dot. The lab becomes
// authoritative for the registrable domain of a name it did not know.
func (l *Lab) AddRecords(rr ...string) error { return l.zones.add("", rr) }

// RemoveRecords forgets the records of a type (as dns.TypeTXT; dns.TypeANY for
// all) at a name.
func (l *Lab) RemoveRecords(name string, rrtype uint16) { l.zones.remove(absolute(name), rrtype) }

// AddPTR gives an address a reverse name that leads back to it: a PTR and an A
// record, as every source address and its EHLO name need.
func (l *Lab) AddPTR(addr netip.Addr, name string) error {
	arpa, err := reverseName(addr)
	if err != nil {
		return err
	}
	kind := "A"
	if addr.Is6() {
		kind = "AAAA"
	}
	return l.AddRecords(
		fmt.Sprintf("%s IN PTR %s", arpa, absolute(name)),
		fmt.Sprintf("%s IN %s %s", absolute(name), kind, addr))
}

// SetDNSFault makes the name server misbehave for a name and all below it;
// FaultNone ends that.
func (l *Lab) SetDNSFault(name string, f DNSFault) { l.dns.setFault(absolute(name), f) }

// DNSQueries returns how often a name and type were asked for; name "" counts
// all questions.
func (l *Lab) DNSQueries(name string, qtype uint16) int {
	if name == "" {
		return int(l.dns.total.Load())
	}
	l.dns.mu.Lock()
	defer l.dns.mu.Unlock()
	return l.dns.questions[question{absolute(name), qtype}]
}

// HostDomain makes a provider receive mail for one more domain and publishes
// its MX records, e.g. for the sending domain that gets bounces.
func (l *Lab) HostDomain(provider, domain string) error {
	p := l.farm.providers[provider]
	if p == nil {
		return fmt.Errorf("lab: provider %q does not exist", provider)
	}
	domain = strings.TrimSuffix(absolute(domain), ".")
	if err := l.AddRecords(mxRecords(domain, p.profile.mx(p.profile.Domains[0]))...); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.domains[domain] = struct{}{}
	return nil
}

// ProviderInfo describes a simulated provider.
type ProviderInfo struct {
	Name    string       `json:"name"`
	Domains []string     `json:"domains"`
	Hosts   []string     `json:"hosts"` // MX names
	Addrs   []netip.Addr `json:"addrs"` // of the MX hosts that listen
	Limits  Limits       `json:"limits"`
}

// Providers returns all simulated providers, named ones first.
func (l *Lab) Providers() []ProviderInfo {
	var out []ProviderInfo
	for _, p := range l.farm.order {
		info := ProviderInfo{Name: p.profile.Name, Domains: slices.Clone(p.profile.Domains), Limits: *p.limits.Load()}
		for a, h := range p.hosts {
			info.Addrs = append(info.Addrs, a)
			if !slices.Contains(info.Hosts, h) {
				info.Hosts = append(info.Hosts, h)
			}
		}
		slices.SortFunc(info.Addrs, netip.Addr.Compare)
		slices.Sort(info.Hosts)
		out = append(out, info)
	}
	return out
}

// stored counts an accepted mail.
func (l *Lab) stored(m *Mail) {
	l.deliveries.add(m)
	if l.verifier != nil {
		l.verifier.poke()
	}
}

// moved wakes whoever waits for a condition.
func (l *Lab) moved() {
	if l.waiters.Load() == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.change)
	l.change = make(chan struct{})
}

// WaitFor returns nil once cond holds for the current report, and the
// context's error when that ends first. cond is called again after changes, at
// most every 20 ms.
func (l *Lab) WaitFor(ctx context.Context, cond func(Report) bool) error {
	l.waiters.Add(1)
	defer l.waiters.Add(-1)
	pace := time.NewTicker(waitInterval)
	defer pace.Stop()
	for {
		l.mu.Lock()
		change := l.change
		l.mu.Unlock()
		if cond(l.Report()) {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return fmt.Errorf("lab: waiting: %w", ctx.Err())
		}
		select {
		case <-pace.C:
		case <-ctx.Done():
			return fmt.Errorf("lab: waiting: %w", ctx.Err())
		}
	}
}
