package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// ednsBytes is the UDP size we offer: answers of that size are not fragmented
// on any common path (RFC 6891 section 6.2.5).
const ednsBytes = 1232

// maxCNAMEs bounds a chain of aliases.
const maxCNAMEs = 8

// kind is what an answer said about the name and type that were asked.
type kind uint8

const (
	found    kind = iota
	noData        // the name exists, records of the type do not
	nxDomain      // the name does not exist
)

// answer is a definite answer of DNS.
type answer struct {
	kind    kind
	records []dns.RR // of the asked type, at the end of the alias chain
	ttl     time.Duration
	// authentic says that a server which is trusted to validate found the whole
	// answer, aliases included, proved by DNSSEC.
	authentic bool
}

// errTemporary is an answer that says nothing about the name.
type errTemporary struct{ text string }

func (e *errTemporary) Error() string { return e.text }

// lookup asks whichever name server answers best.
func (r *Resolver) lookup(ctx context.Context, name string, qtype uint16) (answer, error) {
	return lookupVia(ctx, r.exchange, name, qtype)
}

// exchanger gets an answer to one question from somewhere.
type exchanger func(ctx context.Context, name string, qtype uint16) (*dns.Msg, error)

// lookupVia asks for one name and type and follows aliases, also that of a mail
// host, which the domain's owner should not have named so (RFC 2181 section
// 10.3).
func lookupVia(ctx context.Context, exchange exchanger, name string, qtype uint16) (answer, error) {
	name = dns.Fqdn(name)
	ttl, authentic := maxAnswerTTL, true
	for range maxCNAMEs {
		msg, err := exchange(ctx, name, qtype)
		if err != nil {
			return answer{}, err
		}
		authentic = authentic && msg.AuthenticatedData
		target, chainTTL, ok := follow(msg, name)
		if !ok {
			break
		}
		ttl = min(ttl, chainTTL)
		switch msg.Rcode {
		case dns.RcodeNameError:
			// RFC 2308 section 2.1: with aliases it is the last name that does
			// not exist.
			return answer{kind: nxDomain, ttl: min(ttl, negativeTTL(msg)), authentic: authentic}, nil
		case dns.RcodeSuccess:
		default:
			return answer{}, &errTemporary{fmt.Sprintf("name server answered %s for %s", dns.RcodeToString[msg.Rcode], strings.TrimSuffix(name, "."))}
		}
		if a := collect(msg, target, qtype, ttl); a.kind == found {
			a.authentic = authentic
			return a, nil
		}
		if referral(msg) {
			return answer{}, &errTemporary{"the name server does not resolve " + strings.TrimSuffix(name, ".") + ", it names others to ask"}
		}
		if strings.EqualFold(target, name) {
			return answer{kind: noData, ttl: min(ttl, negativeTTL(msg)), authentic: authentic}, nil
		}
		// The server gave the alias but not what is behind it.
		name = target
	}
	return answer{}, &errTemporary{fmt.Sprintf("more than %d aliases (CNAME) in a row behind %s", maxCNAMEs, strings.TrimSuffix(name, "."))}
}

// follow walks the aliases of an answer from name and returns the last name
// and the smallest TTL on the way. It gives up on chains beyond the bound, and
// so on circles. Only what is said of the name that was asked and of its aliases
// is believed (RFC 2181 section 5.4.1): the rest of the message may be about
// anybody.
func follow(msg *dns.Msg, name string) (string, time.Duration, bool) {
	ttl := maxAnswerTTL
	for range maxCNAMEs {
		moved := false
		for _, rr := range msg.Answer {
			if c, ok := rr.(*dns.CNAME); ok && c.Target != "" && strings.EqualFold(c.Hdr.Name, name) {
				name, moved = c.Target, true
				ttl = min(ttl, time.Duration(c.Hdr.Ttl)*time.Second)
				break
			}
		}
		if !moved {
			return name, ttl, true
		}
	}
	return "", 0, false
}

// collect takes the records of one owner from an answer, and nothing that is
// said of other names (RFC 2181 section 5.4.1).
func collect(msg *dns.Msg, owner string, qtype uint16, ttl time.Duration) answer {
	a := answer{kind: noData, ttl: ttl}
	for _, rr := range msg.Answer {
		h := rr.Header()
		if h.Rrtype == qtype && h.Class == dns.ClassINET && strings.EqualFold(h.Name, owner) {
			a.kind = found
			a.records = append(a.records, rr)
			a.ttl = min(a.ttl, time.Duration(h.Ttl)*time.Second)
		}
	}
	return a
}

// referral reports whether an empty answer names other servers instead of
// saying that there is nothing (RFC 2308 section 2.2): a server that does not
// resolve for us knows nothing about the name.
func referral(msg *dns.Msg) bool {
	named := false
	for _, rr := range msg.Ns {
		switch rr.(type) {
		case *dns.SOA:
			return false
		case *dns.NS:
			named = true
		}
	}
	return named && !msg.Authoritative
}

// negativeTTL is how long "no" holds: RFC 2308 section 5, the smaller of the
// SOA record's TTL and its MINIMUM field.
func negativeTTL(msg *dns.Msg) time.Duration {
	for _, rr := range msg.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return time.Duration(min(soa.Hdr.Ttl, soa.Minttl)) * time.Second
		}
	}
	return defaultNegativeTTL
}

// exchange asks the configured servers in turn until one gives a usable answer
// (RFC 1035 section 4.2.1: ask another server, or the same one again). The server that answered last is asked first.
func (r *Resolver) exchange(ctx context.Context, name string, qtype uint16) (*dns.Msg, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, &errTemporary{"no name server was asked: too many questions are open"}
	}
	first := r.preferred.Load()
	var last error
	for i := range uint32(r.attempts) {
		n := (first + i) % uint32(len(r.servers))
		msg, err := r.ask(ctx, r.servers[n], name, qtype)
		if err == nil && usable(msg.Rcode) {
			r.preferred.Store(n)
			return msg, nil
		}
		if err != nil {
			r.queries.WithLabelValues("error").Inc()
			last = err
		} else {
			r.queries.WithLabelValues("servfail").Inc()
			last = &errTemporary{fmt.Sprintf("name server answered %s for %s", dns.RcodeToString[msg.Rcode], strings.TrimSuffix(name, "."))}
		}
		if ctx.Err() != nil {
			break
		}
	}
	var temporary *errTemporary
	if errors.As(last, &temporary) {
		return nil, temporary
	}
	r.log.Debug("dns question failed", "name", name, "type", dns.TypeToString[qtype], "error", last)
	return nil, &errTemporary{"no answer from the name servers for " + strings.TrimSuffix(name, ".")}
}

func usable(rcode int) bool { return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError }

// ask sends one question to one server: over UDP with EDNS, without EDNS to a
// server that does not know it (RFC 6891 section 7), over TCP (RFC 1035 section
// 4.2.2) if the answer was cut (RFC 7766 section 5, RFC 2181 section 9).
func (r *Resolver) ask(ctx context.Context, server netip.AddrPort, name string, qtype uint16) (*dns.Msg, error) {
	question := new(dns.Msg)
	// RFC 5452 section 9.2: a random id, and a socket of its own, for which the
	// kernel picks a random port.
	question.SetQuestion(name, qtype)
	question.SetEdns0(ednsBytes, false)
	// RFC 6840 section 5.7: we want to know whether the answer was validated.
	question.AuthenticatedData = r.validating[server]
	answer, err := r.send(ctx, &r.udp, server, question)
	if err == nil && (answer.Rcode == dns.RcodeFormatError || answer.Rcode == dns.RcodeNotImplemented || answer.Rcode == dns.RcodeBadVers) {
		question.Extra = nil
		question.Id = dns.Id()
		answer, err = r.send(ctx, &r.udp, server, question)
	}
	if err == nil && answer.Truncated {
		question.Id = dns.Id()
		if answer, err = r.send(ctx, &r.tcp, server, question); err == nil && answer.Truncated {
			return nil, errCut
		}
	}
	return answer, err
}

var (
	errOtherQuestion = errors.New("the answer is to another question")
	errCut           = errors.New("the answer is cut, even over TCP")
)

// send makes one exchange and checks that the answer belongs to the question.
func (r *Resolver) send(ctx context.Context, client *dns.Client, server netip.AddrPort, question *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, r.queryTimeout)
	defer cancel()
	answer, _, err := client.ExchangeContext(ctx, question, server.String())
	if err != nil {
		return nil, err
	}
	// RFC 5452 section 9.1: the question must come back as it was asked.
	q := question.Question[0]
	if !answer.Response || answer.Id != question.Id || len(answer.Question) != 1 ||
		answer.Question[0].Qtype != q.Qtype || answer.Question[0].Qclass != q.Qclass || !strings.EqualFold(answer.Question[0].Name, q.Name) {
		return nil, errOtherQuestion
	}
	// RFC 4035 section 4.9.3: the bit is worth what the server and the way to it
	// are worth.
	answer.AuthenticatedData = answer.AuthenticatedData && r.validating[server]
	r.queries.WithLabelValues("answered").Inc()
	return answer, nil
}
