package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	storeBufferBytes = 256 << 10
	maxDeliveryKeys  = 1 << 24 // Message-ID and recipient pairs counted
	maxMessageIDSize = 998     // RFC 5322 section 2.1.1: longest line
)

// Mail is one accepted message: everything but its content.
type Mail struct {
	Provider   string     `json:"provider"`
	ID         int        `json:"id"` // from 0, in order of acceptance at this provider
	Offset     int64      `json:"offset"`
	Length     int64      `json:"length"`
	From       string     `json:"from"` // envelope sender, "" for the null sender
	To         []string   `json:"to"`
	Source     netip.Addr `json:"source"`
	MX         netip.Addr `json:"mx"` // address it came in on
	Hello      string     `json:"hello"`
	TLS        string     `json:"tls,omitempty"`
	Begun      time.Time  `json:"begun"` // MAIL
	Received   time.Time  `json:"received"`
	MessageID  string     `json:"message_id,omitempty"`
	EightBit   bool       `json:"eight_bit,omitempty"`   // content has bytes above 127
	LostReply  bool       `json:"lost_reply,omitempty"`  // the 250 was withheld
	DKIM       Verdict    `json:"dkim,omitempty"`        // filled in by Lab.Mails and Lab.Mail
	DKIMDomain string     `json:"dkim_domain,omitempty"` // of the signature that decided
}

// mailStore keeps what one provider accepted: message after message in one
// data file, one JSON line each in an index file. Two growing files cost far
// less than a file for each mail.
type mailStore struct {
	mu      sync.Mutex
	data    *os.File
	index   *os.File
	dataBuf *bufio.Writer
	idxBuf  *bufio.Writer
	size    int64
	idxSize int64
	refs    []mailRef
	failed  error // first write error; nothing is accepted after it
}

// mailRef says where a mail's index line is.
type mailRef struct {
	index   int64
	length  int32
	verdict Verdict
	signer  string // domain of the signature that decided the verdict
}

func openStore(dir, provider string) (*mailStore, error) {
	base := filepath.Join(dir, strings.NewReplacer(":", "_", "/", "_").Replace(provider))
	data, err := createNew(base + ".mail")
	if err != nil {
		return nil, err
	}
	index, err := createNew(base + ".jsonl")
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	return &mailStore{
		data: data, index: index,
		dataBuf: bufio.NewWriterSize(data, storeBufferBytes),
		idxBuf:  bufio.NewWriterSize(index, storeBufferBytes),
	}, nil
}

func createNew(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("lab: Dir holds mail of an earlier run, give an empty one: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("lab: Dir: %w", err)
	}
	return f, nil
}

// append stores a message and fills in where it is.
func (s *mailStore) append(m *Mail, content []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.failed
	}
	m.ID, m.Offset, m.Length = len(s.refs), s.size, int64(len(content))
	line, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("lab: index: %w", err)
	}
	line = append(line, '\n')
	if _, err := s.dataBuf.Write(content); err != nil {
		s.failed = fmt.Errorf("lab: mail file: %w", err)
		return s.failed
	}
	if _, err := s.idxBuf.Write(line); err != nil {
		s.failed = fmt.Errorf("lab: index: %w", err)
		return s.failed
	}
	s.refs = append(s.refs, mailRef{index: s.idxSize, length: int32(len(line))})
	s.size += int64(len(content))
	s.idxSize += int64(len(line))
	return nil
}

func (s *mailStore) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.refs)
}

func (s *mailStore) flush() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.dataBuf.Flush(), s.idxBuf.Flush())
}

// mail reads the index line of a mail back.
func (s *mailStore) mail(id int) (Mail, error) {
	s.mu.Lock()
	if id < 0 || id >= len(s.refs) {
		s.mu.Unlock()
		return Mail{}, fmt.Errorf("lab: mail %d does not exist", id)
	}
	ref := s.refs[id]
	var err error
	if buffered := s.idxSize - int64(s.idxBuf.Buffered()); ref.index+int64(ref.length) > buffered {
		err = s.idxBuf.Flush()
	}
	s.mu.Unlock()
	if err != nil {
		return Mail{}, fmt.Errorf("lab: index: %w", err)
	}
	line := make([]byte, ref.length)
	if _, err := s.index.ReadAt(line, ref.index); err != nil {
		return Mail{}, fmt.Errorf("lab: index: %w", err)
	}
	var m Mail
	if err := json.Unmarshal(line, &m); err != nil {
		return Mail{}, fmt.Errorf("lab: index: %w", err)
	}
	m.DKIM, m.DKIMDomain = ref.verdict, ref.signer
	return m, nil
}

// content reads a message back, using buf when it is large enough.
func (s *mailStore) content(m Mail, buf []byte) ([]byte, error) {
	s.mu.Lock()
	var err error
	if m.Offset+m.Length > s.size-int64(s.dataBuf.Buffered()) {
		err = s.dataBuf.Flush()
	}
	s.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("lab: mail file: %w", err)
	}
	if int64(cap(buf)) < m.Length {
		buf = make([]byte, m.Length)
	}
	buf = buf[:m.Length]
	if _, err := s.data.ReadAt(buf, m.Offset); err != nil && !(errors.Is(err, io.EOF) && m.Length == 0) {
		return nil, fmt.Errorf("lab: mail file: %w", err)
	}
	return buf, nil
}

func (s *mailStore) setVerdict(id int, v Verdict, signer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs[id].verdict, s.refs[id].signer = v, signer
}

func (s *mailStore) close() error {
	return errors.Join(s.flush(), s.data.Close(), s.index.Close())
}

// Mails goes through the mails a provider accepted so far, in order. A mail
// that cannot be read back ends it with the error.
func (l *Lab) Mails(provider string) iter.Seq2[Mail, error] {
	return func(yield func(Mail, error) bool) {
		p := l.farm.providers[provider]
		if p == nil {
			yield(Mail{}, fmt.Errorf("lab: provider %q does not exist", provider))
			return
		}
		for id := range p.store.count() {
			m, err := p.store.mail(id)
			if !yield(m, err) || err != nil {
				return
			}
		}
	}
}

// Mail returns an accepted mail and its exact content (RFC 5321 section 4.5.2
// transparency undone).
func (l *Lab) Mail(provider string, id int) (Mail, []byte, error) {
	p := l.farm.providers[provider]
	if p == nil {
		return Mail{}, nil, fmt.Errorf("lab: provider %q does not exist", provider)
	}
	m, err := p.store.mail(id)
	if err != nil {
		return Mail{}, nil, err
	}
	content, err := p.store.content(m, nil)
	return m, content, err
}

// deliveries counts how often each message arrived for each recipient, keyed
// by a 64-bit hash of both: two different pairs share a key with a chance of
// 2^-64, and a million pairs take some 30 MB.
type deliveries struct {
	seed maphash.Seed

	mu         sync.Mutex
	count      map[uint64]delivered
	extra      int64 // arrivals beyond the first of their pair
	excused    int64 // of those, after a copy whose 250 was lost
	withoutID  int64 // recipients of mails without a Message-ID
	untracked  int64 // recipients beyond maxDeliveryKeys
	nullSender int64
}

type delivered struct {
	times uint16
	lost  bool // one of them was never acknowledged
}

func newDeliveries() *deliveries {
	return &deliveries{seed: maphash.MakeSeed(), count: make(map[uint64]delivered)}
}

func (d *deliveries) key(messageID, rcpt string) uint64 {
	var h maphash.Hash
	h.SetSeed(d.seed)
	_, _ = h.WriteString(messageID) // a hash never fails
	_ = h.WriteByte(0)
	_, _ = h.WriteString(rcpt)
	return h.Sum64()
}

func (d *deliveries) add(m *Mail) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.From == "" {
		d.nullSender++
	}
	if m.MessageID == "" {
		d.withoutID += int64(len(m.To))
		return
	}
	for _, rcpt := range m.To {
		k := d.key(m.MessageID, rcpt)
		was, known := d.count[k]
		if !known && len(d.count) >= maxDeliveryKeys {
			d.untracked++
			continue
		}
		if was.times > 0 {
			d.extra++
			if was.lost {
				d.excused++
			}
		}
		if was.times < 1<<16-1 {
			was.times++
		}
		was.lost = was.lost || m.LostReply
		d.count[k] = was
	}
}

// Deliveries returns how often a message was accepted for a recipient,
// whatever the provider. The Message-ID is written with its angle brackets,
// the recipient as in RCPT, its domain in lower case.
func (l *Lab) Deliveries(messageID, rcpt string) int {
	d := l.deliveries
	d.mu.Lock()
	defer d.mu.Unlock()
	return int(d.count[d.key(messageID, rcpt)].times)
}

var messageIDField = []byte("\nmessage-id:")

// messageIDOf finds the Message-ID field of a message, "" when there is none.
func messageIDOf(content []byte) string {
	header := content
	if end := bytes.Index(content, []byte("\r\n\r\n")); end >= 0 {
		header = content[:end+2]
	}
	for rest := header; len(rest) > 0; {
		at := 0
		if !fieldIs(rest, messageIDField[1:]) {
			at = bytes.IndexByte(rest, '\n') + 1
			if at == 0 {
				return ""
			}
			rest = rest[at:]
			continue
		}
		value := rest[len(messageIDField)-1:]
		for { // unfold: a line that starts with blank space goes on
			end := bytes.IndexByte(value[at:], '\n')
			if end < 0 {
				at = len(value)
				break
			}
			at += end + 1
			if at >= len(value) || value[at] != ' ' && value[at] != '\t' {
				break
			}
		}
		id := string(bytes.TrimSpace(value[:at]))
		return id[:min(len(id), maxMessageIDSize)]
	}
	return ""
}

// fieldIs reports whether line starts with a lower-case field name, whatever
// the case of the line.
func fieldIs(line, name []byte) bool {
	return len(line) >= len(name) && bytes.EqualFold(line[:len(name)], name)
}
