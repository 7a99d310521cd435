package resolve

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Bounds of an answer about text.
const (
	maxTexts     = 16
	maxTextBytes = 8 << 10 // of one record; an RSA key of 4096 bits needs less than one
)

// Text is what a name server said about the text records of a name.
type Text struct {
	Server  netip.AddrPort // zero: the one that answers best
	Records []string       // the strings of each record joined (RFC 6376 section 3.6.2.2)
	Missing string         // without records, what DNS says: "NXDOMAIN", or that there is no TXT record
	TTL     time.Duration  // how long the answer may be kept, as it was given, at most a week
	Err     error          // the answer says nothing about the name: no server answered, or one could not
}

// Text asks for the text records of a name. Nothing is cached here, so that a
// change is seen as soon as the name servers that are asked let go of what they
// know.
func (r *Resolver) Text(ctx context.Context, name string) Text {
	return textOf(lookupVia(ctx, r.exchange, name, dns.TypeTXT))
}

// TextEverywhere asks every name server by itself and at once, in the order of
// Config.Servers, so that what one of them has in its cache, or made up, does not
// stand for DNS.
func (r *Resolver) TextEverywhere(ctx context.Context, name string) []Text {
	out := make([]Text, len(r.servers))
	var wg sync.WaitGroup
	for i, server := range r.servers {
		wg.Go(func() {
			exchange := func(ctx context.Context, name string, qtype uint16) (*dns.Msg, error) {
				return r.exchangeWith(ctx, server, name, qtype)
			}
			out[i] = textOf(lookupVia(ctx, exchange, name, dns.TypeTXT))
			out[i].Server = server
		})
	}
	wg.Wait()
	return out
}

// exchangeWith asks one server, twice if need be.
func (r *Resolver) exchangeWith(ctx context.Context, server netip.AddrPort, name string, qtype uint16) (*dns.Msg, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, &errTemporary{"no name server was asked: too many questions are open"}
	}
	const tries = 2
	var last error
	for range tries {
		msg, err := r.ask(ctx, server, name, qtype)
		switch {
		case err == nil && usable(msg.Rcode):
			return msg, nil
		case err == nil:
			r.queries.WithLabelValues("servfail").Inc()
			last = &errTemporary{fmt.Sprintf("name server %s answered %s for %s", server.Addr(), dns.RcodeToString[msg.Rcode], strings.TrimSuffix(name, "."))}
		default:
			r.queries.WithLabelValues("error").Inc()
			last = &errTemporary{fmt.Sprintf("no answer from name server %s for %s", server.Addr(), strings.TrimSuffix(name, "."))}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, last
}

var errTooMuchText = errors.New("the answer holds more text than any use needs")

func textOf(a answer, err error) Text {
	switch {
	case err != nil:
		return Text{Err: err}
	case a.kind == nxDomain:
		return Text{Missing: "NXDOMAIN", TTL: a.ttl}
	case a.kind == noData:
		return Text{Missing: "no TXT record", TTL: a.ttl}
	case len(a.records) > maxTexts:
		return Text{Err: errTooMuchText}
	}
	t := Text{TTL: a.ttl, Records: make([]string, 0, len(a.records))}
	for _, rr := range a.records {
		txt, ok := rr.(*dns.TXT)
		if !ok {
			continue
		}
		text := strings.Join(txt.Txt, "")
		if len(text) > maxTextBytes {
			return Text{Err: errTooMuchText}
		}
		t.Records = append(t.Records, text)
	}
	return t
}
