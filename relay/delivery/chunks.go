package delivery

import (
	"bytes"
	"strconv"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of BDAT.
const (
	// maxChunkBytes bounds one chunk, so that a host that counts a chunk before it
	// looks at it can take it, and a refusal comes before all was sent.
	maxChunkBytes = 1 << 20
	// maxChunksAhead bounds the chunks whose replies were not read (RFC 3030
	// section 4.2): that much more goes out behind a refusal at most.
	maxChunksAhead = 8
)

// chunking returns what policy says about BDAT to this host: of its provider or,
// where that says nothing, of all.
func (t *transfer) chunking() string {
	if t.tx.Chunking != "" {
		return t.tx.Chunking
	}
	return t.timeouts.Chunking
}

// chunks reports whether text goes out by BDAT: large mail to a host that takes
// it, which saves a round trip and the search for dots. What does not end in a
// line end would arrive without one, so it goes by DATA, which adds it.
func (s *Session) chunks(t *transfer) (bool, error) {
	size := t.content.Size()
	if !s.ext.Chunking || t.chunking() != policy.ChunkAuto || size < max(2, t.timeouts.ChunkFromBytes) {
		return false, nil
	}
	b := blocks.Get().(*block)
	defer blocks.Put(b)
	end, err := t.content.part(b, size-2, 2)
	return err == nil && string(end) == "\r\n", err
}

// sendChunks sends a message with BDAT (RFC 3030 section 2). Chunks are counted,
// so nothing is stuffed. All but the last one may be under way at once; that
// begins only when the host has taken the others and the attempt is journalled,
// so that doubt about the message can only begin there.
func (s *Session) sendChunks(t *transfer) {
	var fields []byte
	if t.tx.Sign != nil {
		var err error
		if fields, err = t.tx.Sign(t.convertedBytes); err != nil {
			// Nothing was begun that the host would have to forget.
			s.needReset = true
			t.settleLocal(err, "5.6.0")
			return
		}
	}
	b := blocks.Get().(*block)
	c := chunker{session: s, t: t, b: b, window: 1}
	if s.ext.Pipelining {
		c.window = maxChunksAhead
	}
	sent := c.run(fields)
	b.out = b.out[:0]
	blocks.Put(b) // the reply may take minutes
	if sent {
		s.traceMessage(t, false)
		s.readVerdict(t)
	}
}

// chunker is a message on its way in chunks.
type chunker struct {
	session *Session
	t       *transfer
	b       *block
	window  int // chunks that may be ahead of their replies
	ahead   int // chunks whose replies were not read
	text    textCheck
}

// run sends all chunks. It returns false when the transaction is settled.
func (c *chunker) run(fields []byte) bool {
	s, t := c.session, c.t
	left := t.content.Size()
	for at := int64(0); ; fields = nil {
		n := min(left, maxChunkBytes)
		if left -= n; left == 0 && (!c.taken(0) || !s.journal(t)) {
			return false
		}
		c.b.out = append(c.b.out[:0], "BDAT "...)
		c.b.out = strconv.AppendInt(c.b.out, n+int64(len(fields)), 10)
		if left == 0 {
			c.b.out = append(c.b.out, " LAST"...)
		}
		c.b.out = append(c.b.out, '\r', '\n')
		if s.trace.On() {
			s.trace.Sent(c.b.out)
		}
		c.b.out = append(c.b.out, fields...)
		if !c.check(fields) || !c.write(at, n) {
			return false
		}
		if left == 0 {
			return true
		}
		at += n
		c.ahead++
		if !c.taken(c.window - 1) {
			return false
		}
	}
}

// write writes what the block holds and n bytes of the content from at.
func (c *chunker) write(at, n int64) bool {
	s, t := c.session, c.t
	for end := at + n; ; {
		for at < end && len(c.b.out) < blockBytes {
			part, err := t.content.part(c.b, at, min(end-at, readBytes))
			if err != nil {
				s.abandon()
				t.settleLocal(err, "5.6.0")
				return false
			}
			if !c.check(part) {
				return false
			}
			at += int64(len(part))
			c.b.out = append(c.b.out, part...)
		}
		if c.ahead == 0 && s.in.buffered() > 0 {
			s.interrupted(t, nil)
			return false
		}
		if err := s.writeBlock(t, c.b); err != nil {
			// The chunk was not handed over as a whole, so the host cannot have taken
			// it. It may have said why, to a chunk before.
			c.broken(err)
			return false
		}
		if at == end {
			return true
		}
	}
}

// check looks at text that goes out; binary content may be anything.
func (c *chunker) check(p []byte) bool {
	if c.t.tx.Binary || c.text.add(p) {
		return true
	}
	c.session.abandon()
	c.t.settleLocal(errBareEnd, "5.6.0")
	return false
}

// broken ends a transaction whose connection broke within a chunk.
func (c *chunker) broken(cause error) {
	s := c.session
	for ; c.ahead > 0 && s.readable(); c.ahead-- {
		r, err := s.in.read(lateReplyWait)
		if err == nil && r.positive() {
			continue
		}
		if err == nil && r.refusal() {
			s.abandon()
			c.t.settle(statusOf(&r), relay.PhaseDATA, r.keep())
			return
		}
		break
	}
	s.interrupted(c.t, cause)
}

// taken reads replies to chunks until at most so many are outstanding. A refusal
// is about the message (RFC 3030 section 2); the rest is not sent, and what was
// sent already is answered by the host and forgotten.
func (c *chunker) taken(outstanding int) bool {
	s, t := c.session, c.t
	timeout := orFallback(t.timeouts.BlockTimeout)
	for ; c.ahead > outstanding; c.ahead-- {
		r, err := s.in.read(timeout)
		switch {
		case err != nil:
			s.traceBreak(err)
			s.dead = true
			t.settle(relay.Deferred, relay.PhaseDATA, brokenReply(err))
		case r.positive():
			continue
		case r.code == 421:
			s.closing(t, relay.PhaseDATA, &r)
		case r.refusal():
			s.needReset = true
			t.settle(statusOf(&r), relay.PhaseDATA, r.keep())
			for c.ahead--; c.ahead > 0 && !s.dead; c.ahead-- {
				r, err := s.in.read(timeout)
				s.dead = err != nil || r.code == 421 || r.proceed()
			}
		default:
			s.nonsense(t, relay.PhaseDATA)
		}
		return false
	}
	return true
}

// textCheck finds line ends that are not CRLF in text that comes in pieces.
// Chunks would carry them, but not the DATA of the hosts behind (RFC 5321
// section 2.3.8).
type textCheck struct {
	afterCR bool // the last piece ended in CR
}

// add returns false at a CR or LF that stands alone.
func (c *textCheck) add(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	returns, pairs := bytes.Count(p, []byte{'\r'}), bytes.Count(p, crlf)
	if c.afterCR {
		if p[0] != '\n' {
			return false
		}
		returns++
		pairs++
	}
	if c.afterCR = p[len(p)-1] == '\r'; c.afterCR {
		returns--
	}
	return returns == pairs && bytes.Count(p, crlf[1:]) == pairs
}

var crlf = []byte("\r\n")
