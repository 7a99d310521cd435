package queue

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// maxRepairOps is how many writes of repairs share a transaction; those of one
// message stay together.
const maxRepairOps = 2_000

// classQuarantined is the class of the last events of recipients whose message
// was moved aside.
const classQuarantined = "quarantined"

func (c *checker) set(key, value []byte) {
	c.batch.Set(key, value)
	c.ops++
	c.fixes++
}

func (c *checker) remove(key []byte) {
	c.batch.Delete(key)
	c.ops++
	c.fixes++
}

// settle commits the repairs that came together, when they are many.
func (c *checker) settle() error {
	if c.ops < maxRepairOps {
		return nil
	}
	return c.flush()
}

func (c *checker) flush() error {
	if c.ops == 0 {
		return nil
	}
	b := c.batch
	c.batch, c.ops = c.st.NewBatch(), 0
	return c.st.Commit(c.ctx, b)
}

// putQueue writes the record of a work queue again.
func (c *checker) putQueue(n Number, q *queueTally, floor int64) {
	q.floor, q.stored = floor, true
	c.set(store.AppendQueueKey(nil, uint32(n)), appendQueue(nil, &q.key, floor))
}

// Quarantined is a message or a record that was moved aside, as its file in the
// quarantine folder describes it.
type Quarantined struct {
	Message  string            `json:"message,omitempty"`
	Reason   Damage            `json:"reason"`
	Detail   string            `json:"detail"`
	At       time.Time         `json:"at"`
	Body     string            `json:"body,omitempty"` // file beside this one with the message's text
	Whole    bool              `json:"body_whole"`     // its checksum is right
	Envelope *QuarantinedMail  `json:"envelope,omitempty"`
	Records  map[string][]byte `json:"records"` // as they were, by key in hexadecimal
}

// QuarantinedMail is what is known of a message's envelope.
type QuarantinedMail struct {
	Tenant     string                 `json:"tenant"`
	Stream     string                 `json:"stream"`
	Sender     string                 `json:"sender"`
	AcceptedAt time.Time              `json:"accepted"`
	ExpiresAt  time.Time              `json:"expires"`
	Recipients []QuarantinedRecipient `json:"recipients"`
}

// QuarantinedRecipient is one recipient of a message that was moved aside.
type QuarantinedRecipient struct {
	Address   string `json:"address"`
	State     string `json:"state"`
	Attempts  uint32 `json:"attempts"`
	InDoubt   bool   `json:"in_doubt,omitempty"` // an attempt whose end nobody saw may have delivered it
	LastReply string `json:"last_reply,omitempty"`
}

// ListQuarantine reads the files of a quarantine folder, in the order of their
// names, and gives each to f. A folder that does not exist is empty.
func ListQuarantine(dir string, f func(Quarantined)) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return fault.Wrap(err, fault.Internal, "queue.ListQuarantine", "%s cannot be read", dir)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		var q Quarantined
		if err == nil {
			err = json.Unmarshal(text, &q)
		}
		if err != nil {
			return fault.Wrap(err, fault.Internal, "queue.ListQuarantine", "%s cannot be read", name)
		}
		f(q)
	}
	return nil
}

// writeAside puts a description into the quarantine folder, with the text of
// the message if there is one, and returns when both are on stable storage.
func (c *checker) writeAside(name string, q Quarantined, body io.Reader) error {
	const op = "queue.Fsck"
	q.At = c.cfg.Now().UTC()
	dir := c.cfg.Quarantine
	err := os.MkdirAll(dir, 0o700)
	if err == nil && body != nil {
		q.Body = name + ".eml"
		err = writeSynced(filepath.Join(dir, q.Body), body)
	}
	var text []byte
	if err == nil {
		text, err = json.MarshalIndent(q, "", "  ")
	}
	if err == nil {
		err = writeSynced(filepath.Join(dir, name+".json"), bytes.NewReader(append(text, '\n')))
	}
	if err == nil {
		err = store.OS().SyncDir(dir)
	}
	if err == nil {
		err = store.OS().SyncDir(filepath.Dir(dir))
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "%s cannot be written: nothing was moved aside; is there space left?", dir)
	}
	c.count.MovedAside++
	return nil
}

func writeSynced(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// quarantine moves the message at hand aside: its records and whatever can be
// read of its body, and then out of the queue, with an event for each recipient
// that was still open.
func (c *checker) quarantine(kind Damage, detail string) error {
	m := &c.rec
	q := Quarantined{Message: m.id.String(), Reason: kind, Detail: detail, Records: make(map[string][]byte)}
	q.Records[hex.EncodeToString(store.AppendMessageKey(nil, m.id))] = m.value
	for i := range m.states {
		q.Records[hex.EncodeToString(store.AppendStateKey(nil, m.id, m.states[i].index))] = m.states[i].value
	}
	for i := range m.journal {
		q.Records[hex.EncodeToString(store.AppendAttemptKey(nil, m.id, m.journal[i].index))] = m.journal[i].value
	}
	var body io.Reader
	if m.env != nil {
		q.Envelope = m.describe()
		if r, err := c.st.OpenBody(m.env.Body); err == nil {
			defer r.Close()
			q.Whole = r.Verify() == nil
			body = &tolerant{r: io.NewSectionReader(r, 0, min(r.Size(), maxQuarantinedBytes))}
		}
	}
	if !q.Whole {
		// What is damaged may be the reference: the header in front of a body says
		// whose it is.
		c.lose(m.id)
	}
	if err := c.writeAside(m.id.String(), q, body); err != nil {
		return err
	}
	c.moved[m.id] = struct{}{}
	c.remove(store.AppendMessageKey(nil, m.id))
	for i := range m.states {
		c.remove(store.AppendStateKey(nil, m.id, m.states[i].index))
	}
	for i := range m.journal {
		c.remove(store.AppendAttemptKey(nil, m.id, m.journal[i].index))
	}
	if m.env == nil {
		return c.settle()
	}
	c.remove(store.AppendDeadlineKey(nil, store.Milliseconds(m.env.ExpiresAt), m.id))
	for _, h := range m.helds {
		c.remove(store.AppendHeldKey(nil, h.rule, m.id, h.index))
	}
	for _, w := range m.waits {
		c.remove(store.AppendWaitingKey(nil, uint32(w.queue), w.due, m.id, w.index))
	}
	c.batch.DropBody(m.env.Body)
	c.tellQuarantined(kind, detail)
	return c.settle()
}

// maxQuarantinedBytes bounds the copy of a body whose length may be nonsense.
const maxQuarantinedBytes = 256 << 20

// tolerant ends where reading fails: a part of a message is better than none.
type tolerant struct{ r io.Reader }

// Read implements io.Reader.
func (t *tolerant) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil {
		return n, io.EOF
	}
	return n, nil
}

func (c *checker) tellQuarantined(kind Damage, detail string) {
	m := &c.rec
	for i := range m.env.Recipients {
		s := m.state(i)
		if s.State.Final() {
			continue
		}
		env := m.env
		e := outbox.Event{
			Type: outbox.Unknown, At: c.cfg.Now(), Message: env.ID, Index: uint16(i), Tenant: env.Tenant, Project: env.Project, Stream: env.Stream,
			Tag: env.Tag, Pool: env.Pool, Address: env.Recipients[i].Address.String(), Size: env.Body.Length, AcceptedAt: env.AcceptedAt,
			Revision: env.Revision, Phase: relay.PhaseLocal, Class: classQuarantined, Attempts: s.Attempts,
			Reply: relay.Reply{Enhanced: "4.3.0", Text: "moved aside by fsck (" + string(kind) + "): " + detail},
		}
		c.val = c.ob.Add(c.batch, &e, c.val)
	}
}

func (m *messageRecords) describe() *QuarantinedMail {
	out := &QuarantinedMail{
		Tenant: m.env.Tenant.String(), Stream: m.env.Stream, Sender: m.env.Sender.String(), AcceptedAt: m.env.AcceptedAt, ExpiresAt: m.env.ExpiresAt,
	}
	for i := range m.env.Recipients {
		s := m.state(i)
		out.Recipients = append(out.Recipients, QuarantinedRecipient{
			Address: m.env.Recipients[i].Address.String(), State: s.State.String(), Attempts: s.Attempts, LastReply: s.LastReply.Text,
			InDoubt: !s.State.Final() && (s.InDoubt > 0 || slices.ContainsFunc(m.journal, func(a storedAttempt) bool { return a.mayName(uint16(i)) })),
		})
	}
	return out
}

// keepRecord puts one record that belongs to no message into the quarantine folder.
func (c *checker) keepRecord(kind Damage, key, value []byte, detail string) error {
	name := string(kind) + "-" + hex.EncodeToString(key[:min(len(key), 40)])
	q := Quarantined{Reason: kind, Detail: detail, Records: map[string][]byte{hex.EncodeToString(key): value}}
	return c.writeAside(name, q, nil)
}

// asideRecord moves one record aside that belongs to no message.
func (c *checker) asideRecord(kind Damage, key, value []byte, detail string) error {
	if err := c.keepRecord(kind, key, value, detail); err != nil {
		return err
	}
	c.remove(key)
	return c.settle()
}

// lose has a body looked for, for a repair. A check alone remembers nothing.
func (c *checker) lose(id ids.Message) {
	if c.cfg.Repair {
		c.lost[id] = struct{}{}
	}
}

// searchLost looks through all body files for the text of messages whose
// envelope is gone, and puts it into the quarantine folder.
func (c *checker) searchLost() error {
	if !c.cfg.Repair || len(c.lost) == 0 {
		return nil
	}
	for _, file := range c.st.BodyFiles() {
		err := c.st.FindBodies(file, func(rec store.Record, ref relay.BodyRef) error {
			if _, want := c.lost[rec.Message]; want {
				if err := c.saveLost(rec.Message, ref); err != nil {
					return err
				}
			}
			return c.step()
		})
		if err != nil {
			return err
		}
	}
	clear(c.lost)
	return nil
}

func (c *checker) saveLost(id ids.Message, ref relay.BodyRef) error {
	r, err := c.st.OpenBody(ref)
	if err != nil {
		return err
	}
	defer r.Close()
	whole := r.Verify() == nil
	q := Quarantined{Message: id.String(), Reason: EnvelopeDamaged, Detail: "its envelope is lost; the text was found in the body files"}
	// What was kept of the envelope stays in the description.
	if text, err := os.ReadFile(filepath.Join(c.cfg.Quarantine, id.String()+".json")); err == nil {
		if err := json.Unmarshal(text, &q); err != nil {
			return fault.Wrap(err, fault.Internal, "queue.Fsck", "the description of %s cannot be read", id)
		}
		if q.Body != "" && (q.Whole || !whole) {
			return nil // what is there already is no worse
		}
		c.count.MovedAside--
	}
	q.Whole = whole
	return c.writeAside(id.String(), q, &tolerant{r: io.NewSectionReader(r, 0, min(r.Size(), maxQuarantinedBytes))})
}
