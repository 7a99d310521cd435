package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	maxUDPAnswerBytes   = 1232 // the size every path carries, also when a client offers more
	minUDPAnswerBytes   = 512  // RFC 1035 section 4.2.1
	dnsReadTimeout      = 5 * time.Second
	dnsShutdownTimeout  = 2 * time.Second
	maxListenAttempts   = 20 // tries to find one free port on all addresses
	maxCountedQuestions = 1 << 16
)

// DNSFault is a way the name server misbehaves for a name and all names below
// it.
type DNSFault int

// The faults a name can be given.
const (
	FaultNone     DNSFault = iota // answer as usual
	FaultServfail                 // SERVFAIL
	FaultNXDOMAIN                 // NXDOMAIN although the name exists
	FaultRefused                  // REFUSED
	FaultDrop                     // no answer at all: the client times out
	FaultTruncate                 // over UDP an empty answer with TC set; TCP answers in full
)

// nameServer answers for the lab's zones over UDP and TCP and for nothing
// else.
type nameServer struct {
	zones   *zoneData
	udp     *dns.Server
	tcp     *dns.Server
	addr    netip.AddrPort
	serving sync.WaitGroup

	mu        sync.Mutex
	faults    map[string]DNSFault // by canonical name
	questions map[question]int
	total     atomic.Int64
}

type question struct {
	name  string
	qtype uint16
}

func startNameServer(at netip.AddrPort, zones *zoneData) (*nameServer, error) {
	pc, ln, err := listenBoth(at)
	if err != nil {
		return nil, err
	}
	n := &nameServer{
		zones:     zones,
		addr:      ln.Addr().(*net.TCPAddr).AddrPort(),
		faults:    make(map[string]DNSFault),
		questions: make(map[question]int),
	}
	started := make(chan struct{}, 2)
	notify := func() { started <- struct{}{} }
	n.udp = &dns.Server{PacketConn: pc, Handler: n, UDPSize: dns.DefaultMsgSize, ReadTimeout: dnsReadTimeout, NotifyStartedFunc: notify}
	n.tcp = &dns.Server{Listener: ln, Handler: n, ReadTimeout: dnsReadTimeout, NotifyStartedFunc: notify}
	failed := make(chan error, 2)
	for _, s := range []*dns.Server{n.udp, n.tcp} {
		n.serving.Go(func() {
			if err := s.ActivateAndServe(); err != nil {
				failed <- err
			}
		})
	}
	for range 2 {
		select {
		case <-started:
		case err := <-failed:
			return nil, errors.Join(fmt.Errorf("lab: dns on %s: %w", at, err), pc.Close(), ln.Close())
		}
	}
	return n, nil
}

// listenBoth opens UDP and TCP on the same port, choosing a free one when the
// port is 0.
func listenBoth(at netip.AddrPort) (net.PacketConn, net.Listener, error) {
	var last error
	for range maxListenAttempts {
		ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return nil, nil, fmt.Errorf("lab: DNSAddr %s: %w", at, err)
		}
		pc, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(ln.Addr().(*net.TCPAddr).AddrPort()))
		if err == nil {
			return pc, ln, nil
		}
		last = err
		if cerr := ln.Close(); cerr != nil || at.Port() != 0 {
			break
		}
	}
	return nil, nil, fmt.Errorf("lab: DNSAddr %s over UDP: %w", at, last)
}

func (n *nameServer) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), dnsShutdownTimeout)
	defer cancel()
	err := errors.Join(n.udp.ShutdownContext(ctx), n.tcp.ShutdownContext(ctx))
	n.serving.Wait()
	return err
}

func (n *nameServer) setFault(name string, f DNSFault) {
	n.mu.Lock()
	defer n.mu.Unlock()
	name = dns.CanonicalName(name)
	if f == FaultNone {
		delete(n.faults, name)
		return
	}
	n.faults[name] = f
}

// observe counts a question and returns the fault that covers its name.
func (n *nameServer) observe(name string, qtype uint16) DNSFault {
	n.total.Add(1)
	n.mu.Lock()
	defer n.mu.Unlock()
	k := question{name, qtype}
	if _, known := n.questions[k]; known || len(n.questions) < maxCountedQuestions {
		n.questions[k]++
	}
	if len(n.faults) == 0 {
		return FaultNone
	}
	for at := name; ; {
		if f, ok := n.faults[at]; ok {
			return f
		}
		i, end := dns.NextLabel(at, 0)
		if end {
			return FaultNone
		}
		at = at[i:]
	}
}

// ServeDNS implements dns.Handler.
func (n *nameServer) ServeDNS(w dns.ResponseWriter, req *dns.Msg) {
	resp := new(dns.Msg)
	resp.SetReply(req)
	overUDP := w.RemoteAddr().Network() == "udp"
	limit := dns.MaxMsgSize
	if overUDP {
		limit = minUDPAnswerBytes
	}
	if opt := req.IsEdns0(); opt != nil {
		if overUDP {
			limit = min(max(int(opt.UDPSize()), minUDPAnswerBytes), maxUDPAnswerBytes)
		}
		resp.SetEdns0(maxUDPAnswerBytes, opt.Do())
		if opt.Version() != 0 { // RFC 6891 section 6.1.3
			resp.Rcode = dns.RcodeBadVers
			n.send(w, resp)
			return
		}
	}
	if req.Opcode != dns.OpcodeQuery || len(req.Question) != 1 {
		resp.Rcode = dns.RcodeNotImplemented
		n.send(w, resp)
		return
	}
	q := req.Question[0]
	name := dns.CanonicalName(q.Name)
	switch n.observe(name, q.Qtype) {
	case FaultDrop:
		return
	case FaultServfail:
		resp.Rcode = dns.RcodeServerFailure
	case FaultRefused:
		resp.Rcode = dns.RcodeRefused
	case FaultNXDOMAIN:
		resp.Rcode = dns.RcodeNameError
		resp.Ns = []dns.RR{n.zones.soa(name)}
	case FaultTruncate:
		if overUDP {
			resp.Truncated = true
			break
		}
		n.zones.answer(resp, name, q)
	default:
		n.zones.answer(resp, name, q)
	}
	resp.Truncate(limit) // sets TC when it had to cut (RFC 2181 section 9)
	n.send(w, resp)
}

// send writes an answer; the client that went away is the one who notices.
func (n *nameServer) send(w dns.ResponseWriter, m *dns.Msg) {
	if err := w.WriteMsg(m); err != nil {
		_ = w.Close() // a TCP connection that cannot be written is of no more use
	}
}
