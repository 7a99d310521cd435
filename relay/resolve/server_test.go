package resolve

import (
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/shared/policy"
)

// zone is a name server for tests: records in zone-file form, and faults by
// name.
type zone struct {
	mu      sync.Mutex
	records map[string][]dns.RR // by lower-case owner
	faults  map[string]func(q *dns.Msg, overUDP bool) *dns.Msg
	asked   map[string]int // "name type"
	noEDNS  bool
	addr    netip.AddrPort
}

const testSOA = "example. 300 IN SOA ns.example. root.example. 1 1 1 1 60"

func newZone(t testing.TB, records ...string) *zone {
	t.Helper()
	z := &zone{records: map[string][]dns.RR{}, faults: map[string]func(*dns.Msg, bool) *dns.Msg{}, asked: map[string]int{}}
	z.add(t, records...)
	pc, l := bothPorts(t)
	z.addr = netip.MustParseAddrPort(pc.LocalAddr().String())
	for _, s := range []*dns.Server{
		{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { z.serve(w, q, true) })},
		{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { z.serve(w, q, false) })},
	} {
		started, done := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(done)
			_ = s.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
	return z
}

// bothPorts takes a port that is free for UDP and for TCP.
func bothPorts(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	var err error
	for range 50 {
		var pc net.PacketConn
		if pc, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		var l net.Listener
		if l, err = net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			return pc, l
		}
		pc.Close()
	}
	t.Fatal(err)
	return nil, nil
}

func (z *zone) add(t testing.TB, records ...string) {
	t.Helper()
	z.mu.Lock()
	defer z.mu.Unlock()
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		owner := strings.ToLower(rr.Header().Name)
		z.records[owner] = append(z.records[owner], rr)
	}
}

// fault makes a name behave badly; nil heals it.
func (z *zone) fault(name string, f func(q *dns.Msg, overUDP bool) *dns.Msg) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if f == nil {
		delete(z.faults, dns.Fqdn(name))
		return
	}
	z.faults[dns.Fqdn(name)] = f
}

func rcode(code int) func(*dns.Msg, bool) *dns.Msg {
	return func(q *dns.Msg, _ bool) *dns.Msg { return new(dns.Msg).SetRcode(q, code) }
}

func silence(*dns.Msg, bool) *dns.Msg { return nil }

func (z *zone) count(question string) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.asked[question]
}

// await waits until a question has come so many times, and no more: one that was
// given up may be read here after that.
func (z *zone) await(t *testing.T, question string, times int) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); z.count(question) < times; {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%d questions %s, want %d", z.count(question), question, times)
		}
	}
	if n := z.count(question); n != times {
		t.Errorf("%d questions %s, want %d", n, question, times)
	}
}

func (z *zone) serve(w dns.ResponseWriter, q *dns.Msg, overUDP bool) {
	z.mu.Lock()
	name := strings.ToLower(q.Question[0].Name)
	z.asked[strings.TrimSuffix(name, ".")+" "+dns.TypeToString[q.Question[0].Qtype]]++
	fault := z.faults[name]
	answer := z.answer(q, name)
	noEDNS := z.noEDNS
	z.mu.Unlock()
	if noEDNS && q.IsEdns0() != nil {
		answer = new(dns.Msg).SetRcode(q, dns.RcodeFormatError)
	} else if fault != nil {
		answer = fault(q, overUDP)
	}
	if answer != nil {
		_ = w.WriteMsg(answer)
	}
}

// answer follows aliases within the zone, as a recursive resolver does. The
// caller holds z.mu.
func (z *zone) answer(q *dns.Msg, name string) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	soa, _ := dns.NewRR(testSOA)
	for range 20 {
		rrs, exists := z.records[name]
		if !exists {
			m.Rcode = dns.RcodeNameError
			m.Ns = append(m.Ns, soa)
			return m
		}
		next := ""
		for _, rr := range rrs {
			if rr.Header().Rrtype == q.Question[0].Qtype {
				m.Answer = append(m.Answer, rr)
			} else if c, ok := rr.(*dns.CNAME); ok {
				m.Answer = append(m.Answer, rr)
				next = strings.ToLower(c.Target)
			}
		}
		if next == "" {
			break
		}
		name = next
	}
	if len(m.Answer) == 0 {
		m.Ns = append(m.Ns, soa)
	}
	return m
}

func newResolver(t testing.TB, edit func(*Config), zones ...*zone) *Resolver {
	t.Helper()
	p := &policy.Delivery{MinDNSTTL: policy.Duration(time.Second), MaxDNSTTL: policy.Duration(time.Hour)}
	cfg := Config{QueryTimeout: 2 * time.Second, Policy: func() *policy.Delivery { return p }, AllowPrivate: true,
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()}
	for _, z := range zones {
		cfg.Servers = append(cfg.Servers, z.addr)
	}
	if edit != nil {
		edit(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
