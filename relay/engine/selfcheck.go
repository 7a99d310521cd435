package engine

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/sign"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// AlertDKIM is the alert of a domain whose signatures do not verify, and the
// owner of the rules that hold its mail.
const AlertDKIM = "T08"

// Bounds of the self-check.
const (
	maxSamplesWaiting  = 32
	maxSampleBytes     = 72 << 10 // of a message with its signature: one that is in memory as a whole
	maxChecksAtOnce    = 4
	maxTroubledDomains = 128 // known not to verify; a fault of all domains is one of ours
	maxFromsHeld       = 16  // From domains below one signing domain
	maxHoldWords       = 480 // bytes, of the cause of a rule
	checkTimeout       = 20 * time.Second
	sampleRetry        = 10 * time.Second // until the next try, when too many wait
)

// sample is a message to be checked.
type sample struct {
	signer  *sign.Signer
	want    sign.Algorithms
	from    mailaddr.Domain // of a live one
	message []byte          // as it went out
	fields  []byte          // without a message: the header section under which a stand-in is signed; nil: a plain one
	live    bool            // of mail that is sent, and not made to look again
	all     bool            // every name server is asked
}

// domainCheck is a domain whose signatures do not verify, or that has something
// else to tell.
type domainCheck struct {
	sign.CheckState
	note   string // of a domain that passes
	tenant ids.Tenant
	signer *sign.Signer    // nil after a restart
	want   sign.Algorithms // of the message that was found bad
	bad    []byte          // that message, if the key in DNS was right
	rules  map[mailaddr.Domain]ids.Hold
}

// selfCheck checks a sample of the signatures that this relay makes with the
// keys that DNS shows, and holds the mail of domains whose signatures do not
// verify (T08). One goroutine decides; checks run beside it, a few at a time.
type selfCheck struct {
	engine  *Engine
	every   atomic.Int64 // nanoseconds; 0: off
	samples chan sample
	results chan checkResult
	view    chan struct{} // the view changed, capacity 1
	counts  *prometheus.CounterVec

	mu      sync.Mutex
	domains map[mailaddr.Domain]*domainCheck
	loaded  bool                         // the rules of before a restart are in domains
	running map[mailaddr.Domain]struct{} // domains that are being checked; of the deciding goroutine
}

type checkResult struct {
	sample
	judgement sign.Judgement
}

func newSelfCheck(e *Engine) *selfCheck {
	return &selfCheck{
		engine: e, samples: make(chan sample, maxSamplesWaiting), results: make(chan checkResult, maxChecksAtOnce), view: make(chan struct{}, 1),
		counts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "relais_relay_dkim_checks_total", Help: "Signatures of ours that were checked with the key that DNS shows, by result.",
		}, []string{"result"}),
		domains: make(map[mailaddr.Domain]*domainCheck), running: make(map[mailaddr.Domain]struct{}),
	}
}

// offer gives the message in hand to be checked if its domain's turn has come.
// It is called for every message that is signed, and costs an atomic load for
// each key but once in a long while.
func (c *selfCheck) offer(w *worker, converted, header []byte, now time.Time) {
	every := time.Duration(c.every.Load())
	job := &w.signer
	if every == 0 || !job.signer.Due(job.want, now, every) {
		return
	}
	s := sample{signer: job.signer, want: job.want, from: job.env.From, live: true}
	content := w.tx.Content.Bytes
	if converted != nil {
		content = converted
	}
	if size := len(w.signature) + len(content); len(content) > 0 && size <= maxSampleBytes && !w.tx.Binary {
		s.message = append(append(make([]byte, 0, size), w.signature...), content...)
	} else if size := len(job.added) + len(header); size <= maxSampleBytes && bytes.HasSuffix(header, lineEnd) {
		// The body of a large message would have to be read once more, and kept
		// until then; a binary one has no lines, which a verifier of text wants.
		// So another body is signed under the same fields.
		s.fields = append(append(make([]byte, 0, size), job.added...), header...)
	}
	select {
	case c.samples <- s:
	default:
		job.signer.SetDue(now.Add(sampleRetry))
		c.counts.WithLabelValues("skipped").Inc()
	}
}

// changed tells that there is a new view.
func (c *selfCheck) changed(doc *policy.Document) {
	every := doc.Delivery.DKIMCheckEvery.D()
	if !doc.Delivery.SignDKIM {
		every = 0
	}
	c.every.Store(int64(every))
	select {
	case c.view <- struct{}{}:
	default:
	}
}

// run decides until ctx ends and the checks that it began are over.
func (c *selfCheck) run(ctx context.Context) {
	checks, cancel := context.WithCancel(ctx)
	defer cancel()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		now := c.engine.cfg.Now()
		timer.Reset(c.lookAgain(checks, now))
		samples := c.samples
		if len(c.running) >= maxChecksAtOnce {
			samples = nil
		}
		select {
		case <-ctx.Done():
			cancel()
			for len(c.running) > 0 {
				delete(c.running, (<-c.results).signer.Domain())
			}
			return
		case s := <-samples:
			c.begin(checks, s)
		case r := <-c.results:
			delete(c.running, r.signer.Domain())
			if ctx.Err() == nil {
				c.finish(&r)
			}
		case <-c.view:
			c.applyView()
		case <-timer.C:
		}
	}
}

// begin starts a check, unless the domain is being checked.
func (c *selfCheck) begin(ctx context.Context, s sample) bool {
	domain := s.signer.Domain()
	if _, busy := c.running[domain]; busy || len(c.running) >= maxChecksAtOnce {
		return false
	}
	c.running[domain] = struct{}{}
	go func() {
		ctx, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		judgement := c.judge(ctx, &s)
		c.results <- checkResult{s, judgement}
	}()
	return true
}

// lookAgain starts the checks that are due and returns how long to wait for the
// next one.
func (c *selfCheck) lookAgain(ctx context.Context, now time.Time) time.Duration {
	wait := time.Hour
	c.mu.Lock()
	due := make([]mailaddr.Domain, 0, len(c.domains))
	for domain, d := range c.domains {
		if _, busy := c.running[domain]; busy || d.Next.IsZero() {
			continue
		}
		if left := d.Next.Sub(now); left > 0 {
			wait = min(wait, left)
		} else {
			due = append(due, domain)
		}
	}
	c.mu.Unlock()
	slices.SortFunc(due, func(a, b mailaddr.Domain) int { return strings.Compare(string(a), string(b)) })
	for _, domain := range due {
		c.checkLetGo(domain, now)
		s, ok := c.secondLook(domain)
		if !ok {
			c.step(domain, sign.CheckEvent{Kind: sign.NotToBe}, now)
			continue
		}
		if !c.begin(ctx, s) {
			break // a result makes room
		}
	}
	return wait
}

// secondLook is what to check of a domain that is due: the message that was found
// bad though the key in DNS is right, else a stand-in, signed with the keys of
// now. False: the domain does not sign any more.
func (c *selfCheck) secondLook(domain mailaddr.Domain) (sample, bool) {
	signer := c.engine.signerOf(domain)
	if signer == nil || c.every.Load() == 0 {
		return sample{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.domains[domain]
	s := sample{signer: signer, want: d.want, all: true}
	if d.Fault == sign.FaultSigned && d.signer == signer {
		s.message = d.bad
	}
	return s, true
}
