package main

import (
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// Where the mail hosts of the domains are.
const (
	openDomains  = 100 // take mail at once, hosts of their own
	hostedSites  = 40  // hosting companies, each one host for many domains
	hostsOfMood  = 32  // addresses that share a mood
	firstHost    = 16  // place in the block of the first
	recordsTTL   = 3600
	recordsBatch = 1000
)

// world is 10,000 domains whose hosts do not take mail yet, in the proportions
// that an outbound queue of that depth has, and some that do.
type world struct {
	domains int
	block   *fleet.Block
	sinks   *sinks
	moods   [3]atomic.Int32 // by the mood at start
}

func newWorld(domains int, port uint16, s *seen) (*world, error) {
	block, err := fleet.LockBlock()
	if err != nil {
		return nil, err
	}
	w := &world{domains: domains, block: block, sinks: newSinks(s)}
	for m := range w.moods {
		w.moods[m].Store(int32(m))
		for i := range hostsOfMood {
			if err := w.sinks.listen(netip.AddrPortFrom(w.host(mood(m), i), port), &w.moods[m]); err != nil {
				w.close()
				return nil, err
			}
		}
	}
	return w, nil
}

func (w *world) close() {
	w.sinks.close()
	w.block.Release()
}

func (w *world) host(m mood, i int) netip.Addr {
	return w.block.Addr(firstHost + int(m)*hostsOfMood + i%hostsOfMood)
}

// moodOf says how the hosts of a domain of the backlog begin: two of five
// refuse connections, so that most of their mail stays due and untried; the
// others put every message off.
func (w *world) moodOf(d int) mood {
	if d%5 < 2 {
		return busy
	}
	return later
}

// putOff counts the mail of the backlog that its hosts put off.
func (w *world) putOff(n int, domain func(int) string) (count int) {
	moods := make(map[string]mood, w.domains)
	for d := range w.domains {
		moods[domainName(d)] = w.moodOf(d)
	}
	for i := range n {
		if moods[domain(i)] == later {
			count++
		}
	}
	return count
}

// record returns the MX and the address records of a domain of the backlog:
// half have hosts of their own, three of ten share those of a hosting company,
// and two of ten have a name of their own each at one big provider.
func (w *world) records(d int) []string {
	domain, addr := domainName(d), w.host(w.moodOf(d), d)
	host := "mx." + domain
	switch {
	case d%10 < 5:
	case d%10 < 8:
		m := w.moodOf(d)
		host = fmt.Sprintf("mx.hosting%d-%d.test", m, d/10%hostedSites)
		addr = w.host(m, d/10%hostedSites)
	default:
		host = fmt.Sprintf("d%05d.mail.bigprovider.test", d)
	}
	return []string{
		fmt.Sprintf("%s. %d IN MX 10 %s.", domain, recordsTTL, host),
		fmt.Sprintf("%s. %d IN A %s", host, recordsTTL, addr),
	}
}

func domainName(d int) string { return fmt.Sprintf("d%05d.test", d) }

func openName(d int) string { return fmt.Sprintf("open%02d.test", d%openDomains) }

// publish puts all domains into the lab's DNS.
func (w *world) publish(l *lab.Lab) error {
	var rr []string
	for d := range w.domains {
		if rr = append(rr, w.records(d)...); len(rr) >= recordsBatch {
			if err := l.AddRecords(rr...); err != nil {
				return err
			}
			rr = rr[:0]
		}
	}
	for d := range openDomains {
		rr = append(rr, fmt.Sprintf("%s. %d IN MX 10 mx.%[1]s.", openName(d), recordsTTL), fmt.Sprintf("mx.%s. %d IN A %s", openName(d), recordsTTL, w.host(takes, d)))
	}
	return l.AddRecords(rr...)
}

// openAll lets every host take mail.
func (w *world) openAll() {
	for m := range w.moods {
		w.moods[m].Store(int32(takes))
	}
}
