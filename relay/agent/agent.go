package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

// Options configures an Agent. Dir, LocalAddresses, Load, Logger and
// Registerer are required.
type Options struct {
	Dir            string              // data directory that has joined
	Servers        []string            // link addresses, host:port; empty: as learned from control
	Local          netip.Addr          // address to connect from; zero: the kernel chooses
	Names          pki.Request         // names and addresses under which the relay serves TLS
	Version        string              // of the software
	LocalAddresses func() []netip.Addr // present on the host at the moment
	Load           func() Load         // what the reports tell of the queue
	Handover       func() string       // host:port, or :port, where it takes mail of other relays; empty: nowhere; nil: nowhere
	DialTimeout    time.Duration       // for one address; 0: link.DefaultDialTimeout
	Logger         *slog.Logger
	Registerer     prometheus.Registerer
}

// Load is how busy and how well the relay is.
type Load struct {
	WaitingRecipients  uint64
	InFlightRecipients uint64
	HeldRecipients     uint64
	Handover           *wire.HandoverReport // nil: nothing is handed over
	QueueBytes         uint64
	FreeBytes          uint64                // on the queue's file system
	Problems           []string              // one sentence each, as health shows them
	Left               []*wire.LeavingSource // of the view's leaving sources, those with nothing open
	Reflexes           []*wire.LaneReflex    // lanes that were slowed down long ago; at most wire.MaxLaneReflexes
}

// Health is the state of the tie to control, for health pages.
type Health struct {
	Connected   bool
	Server      string        // that we are or were connected to
	Transport   string        // of that connection: "quic", or "tcp" where UDP does not get through
	LastContact time.Time     // zero: none since the start
	Generation  uint64        // of the view in use
	Revision    uint64        // of the view in use; 0: none
	ViewAge     time.Duration // since it arrived
	LeafEnds    time.Time     // of the certificate
	Evicted     bool          // the cluster has put this relay out: it must not accept or deliver
	Copied      bool          // the cluster refuses this machine, because another one is linked with its key
	Problem     string        // what is wrong now, one sentence; empty: nothing
}

// Agent is a relay's tie to control. Its methods are safe for concurrent use.
type Agent struct {
	options     Options
	key         *pki.NodeKey
	holder      *pki.Holder
	store       *viewStore
	dialer      *link.Dialer
	lock        *os.File
	incarnation uint64
	bootNonce   [16]byte
	metrics     *metrics
	quota       quota

	renewed      chan struct{} // gets a token when there is a new certificate
	spread       time.Duration // over which relays renew when the issuing key changes
	lookPeriod   time.Duration // between two looks at whether the server lives
	trustChanged chan struct{} // closed and replaced when whom we believe, or our certificate, changes; under mu

	current atomic.Pointer[applied]

	mu          sync.Mutex
	member      Membership
	stopWork    context.CancelFunc // ends link and renewals; nil before Run
	subscribers []chan struct{}
	server      string
	transport   string
	connected   bool
	lastContact time.Time
	offset      time.Duration
	offsetKnown bool
	linkProblem string    // why there is no link
	copied      bool      // another machine is linked with our key
	viewProblem string    // why the newest view is not in use
	renewDue    string    // why the certificate could not be renewed
	renewBy     time.Time // when it is to be renewed before its time; zero: it need not be
	renewedFor  string    // key id of the CA that signed when it was renewed last
	renewedAt   time.Time // when it was renewed; zero: not since the start
}

// applied is the view in use.
type applied struct {
	directory  *policy.Directory
	generation uint64
	revision   uint64
	sum        [sha256.Size]byte // of the wire encoding
	since      time.Time         // stored on disk
	trust      *pki.Trust        // nil: the view says nothing of it
}

// Open reads the identity and the last view of a data directory. Without a
// usable view Directory is nil until control has sent one; why is in Health.
func Open(options Options) (_ *Agent, err error) {
	const op = "agent.Open"
	member, err := LoadMembership(options.Dir)
	if err != nil {
		return nil, err
	}
	a := &Agent{options: options, member: member, renewed: make(chan struct{}, 1), trustChanged: make(chan struct{}), spread: renewSpread, lookPeriod: lookPeriod}
	if len(a.servers()) == 0 {
		return nil, fault.Field(op, "control.addresses", "no control server is known: name one as host:port")
	}
	if a.lock, err = lockDir(options.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = a.lock.Close() // the first error is the one worth telling
		}
	}()
	if a.key, err = pki.LoadNodeKey(filepath.Join(options.Dir, identityDir, keyFile)); err != nil {
		return nil, err
	}
	chain, err := pki.LoadCertificates(filepath.Join(options.Dir, identityDir, leafFile))
	if err != nil {
		return nil, err
	}
	bundle, err := pki.LoadCertificates(filepath.Join(options.Dir, identityDir, caFile))
	if err != nil {
		return nil, err
	}
	cert, err := pki.TLSCertificate(a.key, chain)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "key and certificate in %s do not belong together: run relais-relay join again", filepath.Join(options.Dir, identityDir))
	}
	a.holder = pki.NewHolder(cert, bundle)
	a.dialer = link.NewDialer(link.DialerConfig{Local: options.Local, ResetKey: a.key.Derive(resetPurpose), Timeout: options.DialTimeout})
	if a.incarnation, err = nextIncarnation(options.Dir); err != nil {
		return nil, err
	}
	_, _ = rand.Read(a.bootNonce[:]) // documented never to return an error
	if a.store, err = newViewStore(options.Dir, a.key, member); err != nil {
		return nil, err
	}
	if a.metrics, err = newMetrics(options.Registerer, a); err != nil {
		return nil, err
	}
	a.loadView()
	return a, nil
}

// lockDir makes sure that one process alone acts as this relay.
func lockDir(dir string) (*os.File, error) {
	const op = "agent.lockDir"
	path := filepath.Join(dir, identityDir, lockFile)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, op, "cannot open %s", path)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = file.Close() // the lock's error is the one worth telling
		return nil, fault.Wrap(err, fault.Conflict, op, "another process runs the relay in %s: stop it first", dir)
	}
	return file, nil
}

// Close lets another process open the directory. Run must have returned.
func (a *Agent) Close() error {
	a.dialer.Close()
	a.metrics.unregister(a.options.Registerer)
	return fault.Wrap(a.lock.Close(), fault.Internal, "agent.Close", "cannot release the lock")
}

const noLinkYet = "no link to control since the start"

// loadView puts the stored view in use, if it is good.
func (a *Agent) loadView() {
	a.linkProblem = noLinkYet
	encoded, stored, err := a.store.load()
	if err == nil {
		var next *applied
		if next, err = a.compile(encoded); err == nil {
			next.since = stored
			a.current.Store(next)
			a.useTrust(next.trust)
			a.options.Logger.Info("working from the stored policy", "generation", next.generation, "revision", next.revision)
			return
		}
	}
	if fault.Is(err, fault.NotFound) {
		a.viewProblem = "no policy has arrived from control yet"
		return
	}
	a.viewProblem = fault.Public(err)
	a.options.Logger.Error("the stored policy is not usable", "error", err)
}

// compile reads an encoded view and checks that it is for this relay.
func (a *Agent) compile(encoded []byte) (*applied, error) {
	const op = "agent.compile"
	view, err := wire.DecodeView(encoded)
	if err != nil {
		return nil, err
	}
	member := a.Membership()
	if view.Cluster != member.Cluster {
		return nil, fault.New(fault.Denied, op, "the view is of cluster %s, this relay belongs to %s", view.Cluster, member.Cluster)
	}
	if view.Node != member.Node {
		return nil, fault.New(fault.Denied, op, "the view is for node %s, this is %s", view.Node, member.Node)
	}
	if view.Document, err = policy.Parse(view.Sections); err != nil {
		return nil, err
	}
	directory, err := policy.Compile(view)
	if err != nil {
		return nil, err
	}
	trust, err := a.readTrust(&view.Trust)
	if err != nil {
		return nil, err
	}
	return &applied{trust: trust, directory: directory, generation: view.Generation, revision: view.Revision, sum: sha256.Sum256(encoded), since: time.Now()}, nil
}

// apply checks a received view, stores it and puts it in use, in that order: a
// view in use survives a restart. An error leaves the last good view in use.
func (a *Agent) apply(encoded []byte, announced *wire.Revision) error {
	const op = "agent.apply"
	if held := a.current.Load(); held != nil {
		generation, index := announced.GetGeneration(), announced.GetIndex()
		if generation < held.generation || generation == held.generation && index < held.revision {
			return fault.New(fault.Conflict, op, "revision %d of generation %d is older than revision %d of generation %d in use", index, generation, held.revision, held.generation)
		}
		if generation == held.generation && index == held.revision && sha256.Sum256(encoded) == held.sum {
			return nil
		}
	}
	next, err := a.compile(encoded)
	if err != nil {
		return err
	}
	if next.generation != announced.GetGeneration() || next.revision != announced.GetIndex() {
		return fault.New(fault.Invalid, op, "the view is revision %d of generation %d, announced as %d of %d", next.revision, next.generation, announced.GetIndex(), announced.GetGeneration())
	}
	if err := a.saveTrust(next.trust); err != nil { // first: what it believes too much does no harm
		return err
	}
	if err := a.store.save(encoded, next.generation, next.revision); err != nil {
		return err
	}
	a.noteGeneration(next.generation)
	a.current.Store(next)
	a.useTrust(next.trust)
	a.notify()
	return nil
}

// noteGeneration remembers a rise of the cluster's generation, which happens
// when the cluster was restored from a backup.
func (a *Agent) noteGeneration(generation uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if generation <= a.member.Generation {
		return
	}
	a.options.Logger.Warn("the cluster has a new generation: it was restored or recovered", "old", a.member.Generation, "new", generation)
	a.member.Generation = generation
	a.saveMember()
}

// noteServers remembers the servers that control names.
func (a *Agent) noteServers(servers []string) {
	valid := make([]string, 0, len(servers))
	for _, address := range servers[:min(len(servers), maxServers)] {
		if link.CheckAddress(address) == nil {
			valid = append(valid, address)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(valid) == 0 || slices.Equal(valid, a.member.Servers) {
		return
	}
	a.member.Servers = valid
	a.saveMember()
}

// saveMember writes the membership; a failure costs knowledge that control
// gives again, so it is logged alone. The caller holds mu.
func (a *Agent) saveMember() {
	if err := a.member.save(a.options.Dir); err != nil {
		a.options.Logger.Error("cannot write the membership", "error", err)
	}
}

// Directory returns the view in use, compiled; nil before the first.
func (a *Agent) Directory() *policy.Directory {
	if held := a.current.Load(); held != nil {
		return held.directory
	}
	return nil
}

// maxSubscribers bounds the channels given out; a relay has a handful of parts.
const maxSubscribers = 64

// Subscribe returns a channel that gets a token whenever a new view is in use.
// A reader that is behind finds one token for several views.
func (a *Agent) Subscribe() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.subscribers) == maxSubscribers {
		panic("agent: more subscribers than a relay has parts")
	}
	channel := make(chan struct{}, 1)
	a.subscribers = append(a.subscribers, channel)
	return channel
}

func (a *Agent) notify() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, channel := range a.subscribers {
		select {
		case channel <- struct{}{}:
		default:
		}
	}
}

// Membership returns who this relay is.
func (a *Agent) Membership() Membership {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.member
}

// Holder returns the relay's certificate and the CAs it believes, for its own
// listeners. The certificate in it changes with each renewal.
func (a *Agent) Holder() *pki.Holder { return a.holder }

// Incarnation returns the number of this process among those of the relay: higher
// than that of any before, and on stable storage since Open.
func (a *Agent) Incarnation() uint64 { return a.incarnation }

// Connected reports whether there is a link to control.
func (a *Agent) Connected() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.connected
}

// LastContact returns when control was last heard, zero if not since the start.
func (a *Agent) LastContact() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lastContact
}

// ClockOffset returns control's clock minus ours, as measured on the last
// exchange, and whether there was one.
func (a *Agent) ClockOffset() (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.offset, a.offsetKnown
}

// Health returns the state of the tie to control.
func (a *Agent) Health() Health {
	h := Health{LeafEnds: a.holder.Leaf().NotAfter}
	if held := a.current.Load(); held != nil {
		h.Generation, h.Revision, h.ViewAge = held.generation, held.revision, time.Since(held.since)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	h.Connected, h.Server, h.Transport, h.LastContact, h.Copied = a.connected, a.server, a.transport, a.lastContact, a.copied
	eviction := ""
	if e := a.member.Evicted; e != nil {
		h.Evicted, eviction = true, e.text()
	}
	ended := ""
	if time.Now().After(h.LeafEnds) {
		ended = a.renewDue // the reason why there is no link
	}
	refused := a.linkProblem
	if refused == noLinkYet {
		refused = "" // nothing was tried: the state of the view says more
	}
	for _, problem := range []string{eviction, ended, refused, a.viewProblem, a.linkProblem, a.renewDue} {
		if problem != "" {
			h.Problem = problem
			break
		}
	}
	return h
}

// Run holds the link and renews the certificate until ctx ends. It returns nil.
// An evicted relay does neither: its membership is over, whoever answers.
func (a *Agent) Run(ctx context.Context) error {
	working, stop := context.WithCancel(ctx)
	defer stop()
	a.mu.Lock()
	a.stopWork = stop
	evicted := a.member.Evicted != nil
	a.mu.Unlock()
	if !evicted {
		var renewing sync.WaitGroup
		renewing.Go(func() { a.renewLoop(working) })
		a.linkLoop(working)
		renewing.Wait()
	}
	<-ctx.Done()
	return nil
}
