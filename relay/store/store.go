package store

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// Format is the version of everything under the data directory. A binary
// opens its own and older ones.
const Format = 1

// Config says where the store lives and what bounds it.
type Config struct {
	Dir           string                // data directory; created with mode 0700 if absent
	Storage       policy.Storage        // limits; SetLimits changes them later
	Logger        *slog.Logger          // required
	Registerer    prometheus.Registerer // nil: metrics are not exported
	MemTableBytes int64                 // size of one of Badger's tables in memory; 0: 32 MiB; at least 8 MiB
	FS            FileSystem            // of bodies and reserve; nil: the operating system's
	Inspect       bool                  // nothing found at start is counted, swept or cut: somebody looks for damage first
	Salvage       string                // folder for copies of damaged files of the index, of which what can be read is used; empty: the store does not open with them
}

// minMemTableBytes keeps the largest transaction above one message of 1,000
// recipients with room to spare.
const minMemTableBytes = 8 << 20

type counter = atomic.Uint64

// Store is an open data directory. Its methods may be called concurrently.
type Store struct {
	dir, indexDir, bodyDir string
	log                    *slog.Logger
	fs                     FileSystem
	db                     *badger.DB
	lock                   *os.File
	generation             [16]byte
	memTableBytes          int64
	walBytes               int64 // blocks reserved for one memory table's log
	maxGroupBytes          int64
	maxGroupEntries        int
	metrics                *storeMetrics
	ledger                 *ledger
	handles                *handles
	nextFile               atomic.Uint64 // number of the last body file or segment
	largeBodies            atomic.Int64  // bytes of large buffers of bodies, at most maxLargeBodiesBytes

	currentLock sync.Mutex
	current     *view        // what readers see
	settling    sync.RWMutex // held by commitLoop from the moment a transaction is seen until its callbacks were called

	submitLock  sync.Mutex
	queued      []*Batch
	queuedBytes int64
	closing     bool
	room        chan struct{} // closed when batches left the queue
	sequencer   Sequencer
	wake        chan struct{}

	groups, freeGroups chan *group
	ahead              []*group // of commitLoop: came while another waited for the disk
	groupsDone         bool     // of commitLoop
	committerDone      chan struct{}

	segment *segment // of writeLoop

	slab                []badger.Entry // of commitLoop
	runs                [][]byte       // of commitLoop
	nextMem             uint64         // of commitLoop: the memory table's log that is made ahead
	logReady            bool           // of commitLoop
	prepareMemtableSoon atomic.Bool

	salvaged []IndexDamage // of Open

	limitsNow    atomic.Pointer[policy.Storage]
	measuring    sync.Mutex
	measuredAt   atomic.Int64 // Unix nanoseconds
	freeBytes    atomic.Int64
	freeInodes   atomic.Int64
	admitted     atomic.Int64 // bytes admitted since measuredAt
	growthBytes  atomic.Int64
	ballastBytes atomic.Int64
	ballast      File
	ballastLock  sync.Mutex // guards the size of ballast and the samples
	sampledAt    time.Time
	sampledFree  int64
	calmSamples  int
	readOnly     atomic.Bool

	failed      atomic.Pointer[fault.Error]
	failedNow   chan struct{}
	commitSince atomic.Int64 // when the commit under way began, Unix nanoseconds; 0: none is
	bodySince   atomic.Int64 // and the writing of bodies
	diskError   atomic.Pointer[diskTrouble]

	stop         chan struct{}
	reclaimWake  chan struct{}
	reclaimDone  chan struct{}
	residentDone chan struct{}
	scanned      chan struct{}
	closeOnce    sync.Once
	closeErr     error
}

// Open opens or creates the data directory. Errors are faults: Invalid for a
// directory of a newer format and for one whose index is damaged, Conflict when another process has it open,
// NoSpace when there is too little room to open it safely.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if err := ctx.Err(); err != nil {
		return nil, fault.Wrap(err, fault.Timeout, "store.Open", "opening was cancelled")
	}
	s := newStore(cfg)
	if err := s.open(cfg); err != nil {
		s.closeFiles()
		return nil, err
	}
	snap := s.Snapshot()
	for range 2 {
		s.freeGroups <- &group{}
	}
	go s.writeLoop()
	go s.commitLoop()
	if cfg.Inspect {
		snap.Close()
		snap = nil
	}
	go s.reclaimLoop(snap)
	go s.residentLoop()
	return s, nil
}

func newStore(cfg Config) *Store {
	s := &Store{
		dir: cfg.Dir, indexDir: filepath.Join(cfg.Dir, "index"), bodyDir: filepath.Join(cfg.Dir, "bodies"),
		log: cfg.Logger, fs: cfg.FS, metrics: newMetrics(), ledger: newLedger(), handles: newHandles(),
		memTableBytes: cfg.MemTableBytes,
		room:          make(chan struct{}), wake: make(chan struct{}, 1),
		groups: make(chan *group), freeGroups: make(chan *group, 2), committerDone: make(chan struct{}),
		failedNow: make(chan struct{}),
		stop:      make(chan struct{}), reclaimWake: make(chan struct{}, 1), reclaimDone: make(chan struct{}), scanned: make(chan struct{}), residentDone: make(chan struct{}),
	}
	if s.fs == nil {
		s.fs = osFS{}
	}
	if s.memTableBytes == 0 {
		s.memTableBytes = defaultMemTableBytes
	}
	s.memTableBytes = max(s.memTableBytes, minMemTableBytes)
	// A log is full at memTableBytes, and one more transaction of at most 15 %
	// of that may follow.
	s.walBytes = s.memTableBytes + s.memTableBytes/4
	limits := cfg.Storage
	s.limitsNow.Store(&limits)
	return s
}

func (s *Store) open(cfg Config) error {
	const op = "store.Open"
	for _, dir := range []string{s.dir, s.indexDir, s.bodyDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return diskFault(err, op)
		}
	}
	if err := s.fs.SyncDir(s.dir); err != nil {
		return diskFault(err, op)
	}
	if err := s.takeLock(); err != nil {
		return err
	}
	if err := s.openBallast(); err != nil {
		return err
	}
	if err := s.openIndex(cfg.Salvage); err != nil {
		return err
	}
	s.publish()
	if err := s.checkFormat(); err != nil {
		return err
	}
	s.publish()
	if err := s.findFiles(); err != nil {
		return diskFault(err, op)
	}
	s.keepBallast()
	return s.register(cfg.Registerer)
}

func (s *Store) lockPath() string { return filepath.Join(s.dir, "lock") }

// takeLock makes sure that one process has the directory open. The lock goes
// with the process, however it ends.
func (s *Store) takeLock() error {
	f, err := os.OpenFile(s.lockPath(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return diskFault(err, "store.Open")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		return fault.Wrap(err, fault.Conflict, "store.Open", "%s is in use by another process: stop it first", s.dir)
	}
	s.lock = f
	return nil
}

// The format record: version u32, store generation 16, created ms u64.
const formatBytes = 4 + 16 + 8

func (s *Store) checkFormat() error {
	const op = "store.Open"
	value, err := s.Get(keyFormat, nil)
	if fault.Is(err, fault.NotFound) {
		return s.writeFormat()
	}
	if err != nil {
		return err
	}
	if len(value) < 4 {
		return fault.New(fault.Invalid, op, "the format record of %s is damaged", s.dir)
	}
	if v := binary.BigEndian.Uint32(value); v > Format {
		return fault.New(fault.Invalid, op, "data directory was written by a newer Relais (format %d, this binary reads up to %d)", v, Format)
	}
	if len(value) != formatBytes {
		return fault.New(fault.Invalid, op, "the format record of %s is damaged", s.dir)
	}
	copy(s.generation[:], value[4:])
	return nil
}

func (s *Store) writeFormat() error {
	_, _ = rand.Read(s.generation[:]) // documented never to return an error
	value := binary.BigEndian.AppendUint32(nil, Format)
	value = append(value, s.generation[:]...)
	value = binary.BigEndian.AppendUint64(value, uint64(time.Now().UnixMilli()))
	err := s.db.Update(func(txn *badger.Txn) error { return txn.Set(keyFormat, value) })
	if err == nil {
		err = s.fs.SyncDir(s.indexDir)
	}
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "store.Open", "the format record cannot be written")
	}
	return nil
}

// Generation is random per data directory: it names the stream of events, so
// that a wiped disk does not use sequence numbers again.
func (s *Store) Generation() [16]byte { return s.generation }

// Counted is closed when the bodies that were stored at start are counted.
func (s *Store) Counted() <-chan struct{} { return s.scanned }

// Close refuses new batches, finishes those submitted and closes the files.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.submitLock.Lock()
		s.closing = true
		s.submitLock.Unlock()
		select {
		case s.wake <- struct{}{}:
		default:
		}
		<-s.committerDone
		close(s.stop)
		<-s.reclaimDone
		<-s.residentDone
		s.sealSegment()
		s.handles.close()
		s.closeErr = s.closeFiles()
	})
	return s.closeErr
}

func (s *Store) closeFiles() error {
	var err error
	if s.db != nil {
		err = s.db.Close()
	}
	if s.ballast != nil {
		_ = s.ballast.Close() // holds nothing
	}
	if s.lock != nil {
		_ = s.lock.Close() // gives up the lock
	}
	return err
}
