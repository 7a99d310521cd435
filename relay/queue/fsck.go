package queue

import (
	"context"
	"hash/maphash"
	"log/slog"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// Damage names a kind of inconsistency between the records of a queue.
type Damage string

// The kinds of damage, and what a repair does about each.
const (
	WaitingWithoutMessage Damage = "waiting-without-message" // waiting key of a message that does not exist: removed, its body looked for
	WaitingExtra          Damage = "waiting-extra"           // waiting key that its recipient's state does not ask for: removed
	WaitingMissing        Damage = "waiting-missing"         // recipient that waits and is in no work queue: put there
	MessageDone           Damage = "message-done"            // message whose recipients are all final: removed
	DeadlineMissing       Damage = "deadline-missing"        // message that would never expire: its deadline is written
	DeadlineExtra         Damage = "deadline-extra"          // deadline of no message, or a second one: removed
	StateWithoutMessage   Damage = "state-without-message"   // recipient's state of a message that does not exist: removed
	StateExtra            Damage = "state-extra"             // state of a recipient that the message does not have: removed
	StateDamaged          Damage = "state-damaged"           // unreadable state: waits if it has a waiting key, else held
	EnvelopeDamaged       Damage = "envelope-damaged"        // unreadable envelope: moved aside
	QueueMissing          Damage = "queue-missing"           // work queue without a record: written again from its mail
	QueueDamaged          Damage = "queue-damaged"           // unreadable record of a work queue: written again
	RuleDamaged           Damage = "rule-damaged"            // unreadable rule that holds mail: moved aside
	HeldMissing           Damage = "held-missing"            // held recipient that its rule's index lacks: put there
	HeldExtra             Damage = "held-extra"              // index entry of a recipient that the rule does not hold: removed
	HeldWithoutRule       Damage = "held-without-rule"       // recipient held by a rule that is gone: held by hand from now on
	FloorHigh             Damage = "floor-high"              // floor above mail that waits, which a start would not see: lowered
	FloorDamaged          Damage = "floor-damaged"           // unreadable floor of the deadlines: removed, which is always right
	JournalWithoutMessage Damage = "journal-without-message" // journalled attempt of a message that does not exist: removed
	JournalDamaged        Damage = "journal-damaged"         // unreadable or impossible journal entry: whoever was due is in doubt
	BodyMissing           Damage = "body-missing"            // the body's file is gone: the message is moved aside
	BodyRange             Damage = "body-range"              // the body's place is not within its file: moved aside
	BodyDamaged           Damage = "body-damaged"            // the body's checksum is wrong: moved aside
	BodyHeader            Damage = "body-header"             // the header in front of the body is damaged: written again
	FileUnreferenced      Damage = "file-unreferenced"       // body file that no record refers to: removed
	InboundDamaged        Damage = "inbound-damaged"         // unreadable inbound mail: moved aside
	GivenDamaged          Damage = "given-damaged"           // unreadable record of a message on its way to another relay: that relay is asked
	TakenDamaged          Damage = "taken-damaged"           // unreadable memory of a message that another relay handed over: written again
	EventsDamaged         Damage = "events-damaged"          // unreadable events: moved aside, a gap takes their place
	IndexDamaged          Damage = "index-damaged"           // file of the index, of which what can be read was kept when the store was opened
	UnknownKey            Damage = "unknown-key"             // record that no part of this release writes: moved aside
)

// Finding is one inconsistency.
type Finding struct {
	Kind      Damage         `json:"kind"`
	Note      bool           `json:"note,omitempty"` // what a crash may leave and the relay clears up by itself
	Message   *ids.Message   `json:"message,omitempty"`
	Recipient *ids.Recipient `json:"recipient,omitempty"`
	Queue     Number         `json:"queue,omitempty"`
	Rule      *ids.Hold      `json:"rule,omitempty"`
	Key       string         `json:"key,omitempty"` // of the record, in hexadecimal
	File      string         `json:"file,omitempty"`
	Detail    string         `json:"detail"`
	Repaired  bool           `json:"repaired,omitempty"`
}

// FsckCount is what a check saw.
type FsckCount struct {
	Records    int64          `json:"records"` // looked at, all passes and rounds together
	Messages   int64          `json:"messages"`
	Recipients int64          `json:"recipients"` // that are not final
	Waiting    int64          `json:"waiting"`
	Held       int64          `json:"held"`
	InDoubt    int64          `json:"journalled"` // attempts without an end: in doubt at the next start
	Inbound    int64          `json:"inbound"`
	Queues     int64          `json:"work_queues"`
	BodyFiles  int64          `json:"body_files"`
	BodyBytes  int64          `json:"body_bytes"`
	Found      map[Damage]int `json:"found"`
	Notes      map[Damage]int `json:"notes"`
	Repaired   int            `json:"repaired"`
	MovedAside int            `json:"moved_aside"` // messages and records in the quarantine folder, of this run
	Clean      bool           `json:"clean"`       // nothing is wrong (any more)
}

// Total is the number of findings that are not mere notes.
func (c *FsckCount) Total() (n int) {
	for _, k := range c.Found {
		n += k
	}
	return n
}

// FsckConfig says how to check.
type FsckConfig struct {
	Bodies     bool   // read every body and compare its checksum
	Events     bool   // look at the outbox as well
	Live       bool   // the queue is open meanwhile; excludes Repair
	Repair     bool   // needs a store that nobody else uses, opened with Inspect
	Quarantine string // folder for what cannot be repaired; needed for Repair
	Now        func() time.Time
	Logger     *slog.Logger
	Report     func(Finding)         // each finding as it is made; nil: nobody cares
	Progress   func(FsckCount)       // now and then; nil: nobody cares
	Rest       func(since time.Time) // called every fsckStep records with the time the step began, to leave the machine to others; nil: no rest

	stop <-chan struct{} // the check ends when it is closed; nil: it is not
}

const (
	fsckStep      = 4096 // records between two looks at the clock
	maxFsckRounds = 5    // a repair may uncover what damage had hidden
)

// Fsck checks every record of the queue against the others, from one snapshot,
// and repairs what it finds if cfg says so. No mail is lost by a repair: what
// cannot be delivered any more is moved to the quarantine folder first. Memory
// grows with the number of work queues and body files, which the relay keeps in
// memory anyway, never with the number of messages: recipients and waiting keys
// are compared by counts and sums for each work queue, and one by one only where
// those differ. It returns what it saw; Clean says whether all is well now.
func Fsck(ctx context.Context, st *store.Store, cfg FsckConfig) (FsckCount, error) {
	if cfg.Now == nil || cfg.Logger == nil || cfg.Repair && (cfg.Live || cfg.Quarantine == "") {
		return FsckCount{}, fault.New(fault.Internal, "queue.Fsck", "Now and Logger are required, and Repair needs a folder and a queue at rest")
	}
	c := &checker{ctx: ctx, st: st, cfg: cfg, moved: make(map[ids.Message]struct{}), lost: make(map[ids.Message]struct{}), stepAt: time.Now()}
	c.count.Found, c.count.Notes = make(map[Damage]int), make(map[Damage]int)
	for _, d := range st.Salvaged() {
		c.report(Finding{Kind: IndexDamaged, File: d.File, Detail: d.Detail})
	}
	if cfg.Events {
		if err := c.events(); err != nil {
			return c.count, err
		}
	}
	if cfg.Repair {
		ob, err := outbox.Open(st, outbox.Config{Logger: cfg.Logger})
		if err != nil {
			return c.count, err
		}
		defer ob.Close()
		c.ob = ob
	}
	for round := 1; ; round++ {
		if err := c.round(round); err != nil {
			return c.count, err
		}
		if !cfg.Repair {
			c.count.Clean = c.count.Total() == 0
			return c.count, nil
		}
		if c.reported == 0 && c.fixes == 0 {
			c.count.Clean = true
			return c.count, nil
		}
		if round == maxFsckRounds {
			return c.count, nil
		}
	}
}

// tally sums up keys, so that two sets of them can be compared without holding
// either.
type tally struct {
	n   int64
	sum uint64
}

func (t *tally) add(seed maphash.Seed, key []byte) {
	t.n++
	t.sum += maphash.Bytes(seed, key)
}

// queueTally is what is known of one work queue during a check.
type queueTally struct {
	key     Key
	floor   int64
	stored  bool // it has a readable record
	found   tally
	want    tally
	first   int64 // due time of its first waiting key
	suspect bool  // found and wanted keys differ
}

// checker is one check under way.
type checker struct {
	ctx    context.Context
	st     *store.Store
	ob     *outbox.Outbox
	cfg    FsckConfig
	count  FsckCount
	moved  map[ids.Message]struct{} // messages in quarantine
	lost   map[ids.Message]struct{} // messages without an envelope, whose bodies are looked for
	stepAt time.Time

	// of one round
	snap      *store.Snapshot
	first     bool // the first round
	quiet     bool // findings were made already
	seed      maphash.Seed
	queues    map[Number]*queueTally
	byKey     map[Key]Number
	highest   Number
	deadFound tally
	deadWant  tally
	heldFound tally
	heldWant  tally
	rules     map[ids.Hold]struct{}
	files     map[uint64]int64 // living bodies by file
	fixes     int              // writes of repairs
	reported  int              // findings
	batch     *store.Batch
	ops       int
	rec       messageRecords
	key, val  []byte
}

// round is one pass over everything.
func (c *checker) round(n int) (err error) {
	c.snap = c.st.Snapshot()
	defer func() { c.snap.Close() }()
	c.first, c.quiet, c.fixes, c.reported, c.seed = n == 1, false, 0, 0, maphash.MakeSeed()
	c.queues, c.byKey, c.highest = make(map[Number]*queueTally), make(map[Key]Number), 0
	c.deadFound, c.deadWant, c.heldFound, c.heldWant = tally{}, tally{}, tally{}, tally{}
	c.rules, c.files = make(map[ids.Hold]struct{}), make(map[uint64]int64)
	found, notes, repaired, aside, records := c.count.Found, c.count.Notes, c.count.Repaired, c.count.MovedAside, c.count.Records
	c.count = FsckCount{Found: found, Notes: notes, Repaired: repaired, MovedAside: aside, Records: records}
	c.batch = c.st.NewBatch()
	defer func() {
		if c.batch != nil {
			c.batch.Abandon()
		}
	}()
	for _, pass := range []func() error{
		c.strays, c.workQueues, c.holdRules, c.waitingKeys, c.deadlineKeys, c.heldKeys, c.everyMessage, c.transfers, c.inboundMail,
		c.suspects, c.searchLost, c.bodyFiles, c.flush,
	} {
		if err := pass(); err != nil {
			return err
		}
	}
	return nil
}

// step counts a record, and now and then says how far it is.
func (c *checker) step() error {
	if c.count.Records++; c.count.Records%fsckStep != 0 {
		return nil
	}
	if err := c.interrupted(); err != nil {
		return err
	}
	if c.cfg.Rest != nil {
		c.cfg.Rest(c.stepAt)
	}
	c.stepAt = time.Now()
	if c.cfg.Progress != nil {
		c.cfg.Progress(c.count)
	}
	return nil
}

func (c *checker) interrupted() error {
	select {
	case <-c.cfg.stop:
		return errClosing
	default:
	}
	return fault.Wrap(c.ctx.Err(), fault.Unavailable, "queue.Fsck", "the check was interrupted")
}

// report counts a finding, and says whether its repair is wanted. What follows
// from moving a message aside is no finding of its own.
func (c *checker) report(f Finding) (repair bool) {
	if c.quiet {
		return false
	}
	if f.Message != nil {
		if _, ok := c.moved[*f.Message]; ok {
			return c.cfg.Repair
		}
	}
	f.Repaired = c.cfg.Repair
	c.reported++
	if f.Note {
		c.count.Notes[f.Kind]++
	} else {
		c.count.Found[f.Kind]++
	}
	if c.cfg.Repair {
		c.count.Repaired++
	}
	if c.cfg.Report != nil {
		c.cfg.Report(f)
	}
	return c.cfg.Repair
}

// about is a finding about a message.
func about(kind Damage, id ids.Message, detail string) Finding {
	return Finding{Kind: kind, Message: &id, Detail: detail}
}

// aboutRecipient is a finding about a recipient.
func aboutRecipient(kind Damage, id ids.Message, index uint16, detail string) Finding {
	return Finding{Kind: kind, Message: &id, Recipient: &ids.Recipient{Message: id, Index: index}, Detail: detail}
}
