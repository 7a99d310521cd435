package lab

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxTriesTracked   = 1 << 19 // recipients whose tries are counted, per provider and generation
	maxProtocolFaults = 100     // kinds of protocol faults described per provider
)

// farm is all simulated providers and the connections they serve.
type farm struct {
	providers map[string]*provider
	order     []*provider
	listeners []net.Listener
	open      bool // Mode Open
	idle      time.Duration
	slow      time.Duration
	pace      time.Duration
	checkPTR  bool
	start     time.Time
	zones     *zoneData
	certs     *certificates
	log       *slog.Logger

	ctx     context.Context
	cancel  context.CancelFunc
	serving sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool

	stored func(*Mail) // called for every accepted mail before its 250
	moved  func()      // called when a counter changed
}

// provider is one simulated provider at work.
type provider struct {
	profile   Profile
	dice      dice
	limits    atomic.Pointer[Limits]
	behaviour atomic.Pointer[Behaviour]
	hosts     map[netip.Addr]string // MX name by address
	tls       *tls.Config
	wrongTLS  *tls.Config
	store     *mailStore
	played    atomic.Int64 // connections that got the transcript

	mu         sync.Mutex
	domains    map[string]struct{}
	lanes      map[netip.Addr]*lane
	tries      *generations[int]
	greylist   *generations[time.Time]
	breaches   []Breach
	breached   int64
	faults     map[string]*ProtocolFault
	storeFault error
}

func newProvider(p Profile, seed uint64, store *mailStore) *provider {
	v := &provider{
		profile: p, dice: newDice(seed, p.Name), store: store,
		hosts:    make(map[netip.Addr]string),
		domains:  make(map[string]struct{}),
		lanes:    make(map[netip.Addr]*lane),
		tries:    newGenerations[int](maxTriesTracked),
		greylist: newGenerations[time.Time](maxTriesTracked),
		faults:   make(map[string]*ProtocolFault),
	}
	limits := p.Limits
	v.limits.Store(&limits)
	v.behaviour.Store(&Behaviour{})
	for _, d := range p.Domains {
		v.domains[strings.ToLower(d)] = struct{}{}
	}
	return v
}

func (p *provider) serves(domain string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.domains[domain]
	return ok
}

// lane returns the counters of a source, nil when too many sources are known.
func (p *provider) lane(source netip.Addr, start time.Time) *lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lanes[source]
	if l == nil && len(p.lanes) < maxSourcesPerFarm {
		l = &lane{source: source, start: start}
		p.lanes[source] = l
	}
	return l
}

// try counts a RCPT for an address whose fate depends on it.
func (p *provider) try(rcpt string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, _ := p.tries.get(rcpt)
	n++
	p.tries.put(rcpt, n)
	return n
}

// greylisted tells whether a recipient is to wait, and remembers first
// contact by source, sender domain and recipient.
func (p *provider) greylisted(source netip.Addr, from, rcpt string, now time.Time) bool {
	key := source.String() + "\x00" + domainOf(from) + "\x00" + rcpt
	p.mu.Lock()
	defer p.mu.Unlock()
	first, known := p.greylist.get(key)
	if !known {
		p.greylist.put(key, now)
		return true
	}
	return now.Sub(first) < p.profile.GreylistDelay
}

func (p *provider) breach(l *lane, limit LimitName, allowed, seen int, window time.Duration, now time.Time) {
	l.countBreach()
	b := Breach{At: now, Provider: p.profile.Name, Source: l.source, Limit: limit, Allowed: allowed, Seen: seen}
	if limit == LimitRate {
		b.Window = window.String()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.breached++
	if len(p.breaches) < maxBreachesKept {
		p.breaches = append(p.breaches, b)
	}
}

// fault notes something a client did that SMTP does not allow.
func (p *provider) fault(kind string, source netip.Addr, detail string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.faults[kind]
	if f == nil {
		if len(p.faults) >= maxProtocolFaults {
			return
		}
		f = &ProtocolFault{Provider: p.profile.Name, Kind: kind}
		p.faults[kind] = f
	}
	f.Count++
	f.Source, f.Detail = source, detail
}

func domainOf(address string) string {
	return strings.ToLower(address[strings.LastIndexByte(address, '@')+1:])
}

// listen starts serving on one address of a provider.
func (f *farm) listen(p *provider, addr netip.AddrPort, host string) (netip.AddrPort, error) {
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("lab: MX %s: %w", host, err)
	}
	f.listeners = append(f.listeners, ln)
	p.hosts[addr.Addr()] = host
	return ln.Addr().(*net.TCPAddr).AddrPort(), nil
}

// serve accepts connections on all listeners until close.
func (f *farm) serve(owner map[net.Listener]*provider) {
	for _, ln := range f.listeners {
		p := owner[ln]
		f.serving.Go(func() {
			for {
				conn, err := ln.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					f.log.Warn("lab accept", "provider", p.profile.Name, "err", err)
					select {
					case <-f.ctx.Done():
						return
					case <-time.After(10 * time.Millisecond): // out of descriptors: wait for some
					}
					continue
				}
				f.take(p, conn)
			}
		})
	}
}

func (f *farm) take(p *provider, conn net.Conn) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		_ = conn.Close() // we are going down and owe the client nothing
		return
	}
	f.conns[conn] = struct{}{}
	f.mu.Unlock()
	f.serving.Go(func() {
		if t := p.profile.Transcript; t != nil {
			t.Play(f.ctx, conn, int(p.played.Add(1)-1), f.pace)
		} else {
			newSession(f, p, conn).run()
		}
		f.mu.Lock()
		delete(f.conns, conn)
		f.mu.Unlock()
		_ = conn.Close() // usually closed already
	})
}

func (f *farm) close() error {
	f.cancel()
	var errs []error
	for _, ln := range f.listeners {
		errs = append(errs, ln.Close())
	}
	f.mu.Lock()
	f.closed = true
	for c := range f.conns {
		_ = c.Close() // ends the session's read
	}
	f.mu.Unlock()
	f.serving.Wait()
	for _, p := range f.order {
		errs = append(errs, p.store.close(), p.storeFault)
	}
	return errors.Join(errs...)
}

// pause waits for a delay, false when the lab is closing.
func (f *farm) pause(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-f.ctx.Done():
		return false
	}
}

// keywords returns what a provider announces after EHLO.
func (p *provider) keywords(overTLS bool) []string {
	b := p.behaviour.Load()
	all := []string{"PIPELINING", fmt.Sprintf("SIZE %d", p.profile.MaxMessageSize), "8BITMIME", "SMTPUTF8"}
	if p.profile.Name != GMX { // it answers without enhanced codes
		all = append(all, "ENHANCEDSTATUSCODES")
	}
	if !overTLS && b.TLS != TLSAbsent {
		all = append(all, "STARTTLS")
	}
	return slices.DeleteFunc(all, func(k string) bool {
		word, _, _ := strings.Cut(k, " ")
		return slices.Contains(b.Without, word)
	})
}
