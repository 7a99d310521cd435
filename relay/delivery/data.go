package delivery

import (
	"bytes"
	"io"
	"sync"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
)

// Sizes of the data phase. A message of up to blockBytes goes out in one
// write together with its final dot.
const (
	blockBytes = 64 << 10
	readBytes  = 32 << 10
	smallBytes = 16 << 10 // of a block for a message that fits
)

// lateReplyWait is how long a host that broke off during the data may take to
// let its reason be read.
const lateReplyWait = 100 * time.Millisecond

type block struct {
	out []byte // stuffed data
	in  []byte // what was read from the store
}

// blocks are shared by all sessions, so that idle ones hold no buffer.
var blocks = sync.Pool{New: func() any {
	return &block{out: make([]byte, 0, blockBytes+readBytes+readBytes/2)}
}}

// smallBlocks are for most mail: thousands of sessions may wait for the record
// of their attempt at once, each with a block in hand.
var smallBlocks = sync.Pool{New: func() any { return &block{out: make([]byte, 0, smallBytes)} }}

// blocksFor returns the pool of blocks in which a message of that size fits,
// with some room for the dots that are put before its lines.
func blocksFor(size int64) *sync.Pool {
	if size <= smallBytes-smallBytes/16 {
		return &smallBlocks
	}
	return &blocks
}

// sendData sends the message and reads the reply to its end.
func (s *Session) sendData(t *transfer) {
	if t.accepted == 0 {
		s.sendNothing(t)
		return
	}
	pool := blocksFor(t.content.Size() + int64(t.tx.SignatureBytes))
	b := pool.Get().(*block)
	sent := s.writeContent(t, b) && s.writeEnd(t, b)
	b.out = b.out[:0]
	pool.Put(b) // the reply may take minutes
	if sent {
		s.traceMessage(t, true)
		s.readVerdict(t)
	}
}

// writeEnd waits for the journal and writes the last block.
func (s *Session) writeEnd(t *transfer, b *block) bool {
	if !s.journal(t) {
		return false
	}
	if s.in.buffered() > 0 {
		s.interrupted(t, nil)
		return false
	}
	if err := s.writeBlock(t, b); err != nil {
		// The end of the data was not handed over as a whole, so the host
		// cannot have seen it.
		s.interrupted(t, err)
		return false
	}
	return true
}

// journal waits for the record of the attempt before the end of the data goes out.
func (s *Session) journal(t *transfer) bool {
	if t.tx.Commit == nil {
		return true
	}
	if err := t.tx.Commit(); err != nil {
		s.abandon()
		t.settleLocal(fault.Wrap(err, fault.Unavailable, "delivery.Send", "the attempt could not be recorded and was broken off"), "4.3.0")
		return false
	}
	return true
}

// writeContent writes all of the message but its last block, which it leaves
// in b with the final dot.
func (s *Session) writeContent(t *transfer, b *block) bool {
	var st stuffer
	st.start()
	if t.tx.Sign != nil {
		fields, err := t.tx.Sign(t.convertedBytes)
		if err == nil {
			b.out, err = st.append(b.out, fields)
		}
		if err != nil {
			s.abandon()
			t.settleLocal(err, "5.6.0")
			return false
		}
	}
	size := t.content.Size()
	for at := int64(0); at < size; {
		part, err := t.content.part(b, at, min(size-at, readBytes))
		if err == nil {
			b.out, err = st.append(b.out, part)
		}
		if err != nil {
			s.abandon()
			t.settleLocal(err, "5.6.0")
			return false
		}
		at += int64(len(part))
		if len(b.out) >= blockBytes && at < size {
			if s.in.buffered() > 0 {
				s.interrupted(t, nil)
				return false
			}
			if err := s.writeBlock(t, b); err != nil {
				s.interrupted(t, err)
				return false
			}
		}
	}
	out, err := st.finish(b.out)
	b.out = out
	if err != nil {
		s.abandon()
		t.settleLocal(err, "5.6.0")
		return false
	}
	return true
}

// part returns n bytes of the message from offset at. They are valid until
// the next call.
func (c *Content) part(b *block, at, n int64) ([]byte, error) {
	if c.Bytes != nil {
		return c.Bytes[at : at+n], nil
	}
	if b.in == nil {
		b.in = make([]byte, readBytes)
	}
	got, err := c.Reader.ReadAt(b.in[:n], at)
	if int64(got) < n {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fault.Wrap(err, fault.Internal, "delivery.Send", "the stored message could not be read")
	}
	return b.in[:n], nil
}

func (s *Session) writeBlock(t *transfer, b *block) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(orFallback(t.timeouts.BlockTimeout))); err != nil {
		return err
	}
	_, err := s.conn.Write(b.out)
	b.out = b.out[:0]
	return err
}

// sendNothing ends a transaction whose DATA was accepted although no recipient
// was: a lone dot, so that nothing of the message goes anywhere (RFC 2920
// section 3.1).
func (s *Session) sendNothing(t *transfer) {
	s.needReset = true
	s.out = append(s.out[:0], ".\r\n"...)
	if s.flush(orFallback(t.timeouts.BlockTimeout)) != nil {
		s.dead = true
		return
	}
	r, err := s.in.read(orFallback(t.timeouts.FinalDotTimeout))
	if err != nil || r.code == 421 || r.proceed() {
		s.dead = true
	}
}

// abandon breaks the connection off in the middle of the data, which is the
// only way to make the host forget them.
func (s *Session) abandon() {
	s.dead = true
	s.Abort()
}

// interrupted ends a transaction that the host broke off before the end of the
// data was sent. If it said why, that is the answer.
func (s *Session) interrupted(t *transfer, cause error) {
	if cause != nil {
		s.traceBreak(cause)
	}
	out := brokenReply(cause)
	status := relay.Deferred
	if cause == nil || s.readable() {
		r, err := s.in.read(lateReplyWait)
		switch {
		case err == nil && r.refusal():
			out, status = r.keep(), statusOf(&r)
		case cause == nil:
			out = brokenReply(errOutOfTurn)
		}
	}
	s.abandon()
	t.settle(status, relay.PhaseDATA, out)
}

// readVerdict reads the reply to the end of the data. Without one, or with one
// that makes no sense, nobody knows whether the host took the message.
func (s *Session) readVerdict(t *transfer) {
	r, err := s.in.read(orFallback(t.timeouts.FinalDotTimeout))
	switch {
	case err != nil:
		s.traceBreak(err)
		s.dead = true
		t.settle(relay.InDoubt, relay.PhaseFinalDot, brokenReply(err))
	case r.positive():
		s.done++
		s.needReset = false
		t.settle(relay.Delivered, relay.PhaseFinalDot, r.keep())
	case r.refusal():
		s.needReset = true
		s.dead = r.code == 421
		t.settle(statusOf(&r), relay.PhaseFinalDot, r.keep())
	default:
		s.dead = true
		t.settle(relay.InDoubt, relay.PhaseFinalDot, brokenReply(errUnexpected))
	}
}

// errBareEnd is content with a line end that is not CRLF. It is refused at
// acceptance; should any get this far it must not reach a host, because hosts
// disagree about what it means (RFC 5321 section 2.3.8).
var errBareEnd = fault.New(fault.Invalid, "delivery.Send", "the message holds a CR or LF that is not part of a CRLF line end")

// stuffer makes message bytes fit for the data phase: a dot at the beginning
// of a line is doubled (RFC 5321 section 4.5.2), and the end is marked.
type stuffer struct {
	lineStart bool // the next byte begins a line
	afterCR   bool // the last byte was a CR
}

func (st *stuffer) start() { st.lineStart = true }

// append appends src to dst with its dots doubled. It looks at line ends only,
// which the search for one byte finds many bytes at a time.
func (st *stuffer) append(dst, src []byte) ([]byte, error) {
	if len(src) == 0 {
		return dst, nil
	}
	if st.afterCR && src[0] != '\n' {
		return dst, errBareEnd
	}
	if st.lineStart && src[0] == '.' {
		dst = append(dst, '.')
	}
	returns := 0 // CRs that an LF accounts for
	copied := 0  // bytes of src already in dst
	for at := 0; ; {
		i := bytes.IndexByte(src[at:], '\n')
		if i < 0 {
			break
		}
		at += i
		switch {
		case at > 0 && src[at-1] == '\r':
			returns++
		case at == 0 && st.afterCR:
		default:
			return dst, errBareEnd
		}
		at++
		if at < len(src) && src[at] == '.' {
			dst = append(append(dst, src[copied:at]...), '.')
			copied = at
		}
	}
	last := src[len(src)-1]
	st.lineStart, st.afterCR = last == '\n', last == '\r'
	if st.afterCR {
		returns++
	}
	if bytes.Count(src, []byte{'\r'}) != returns {
		return dst, errBareEnd
	}
	return append(dst, src[copied:]...), nil
}

// finish appends the end of the data, after a line end if the last line lacks
// one.
func (st *stuffer) finish(dst []byte) ([]byte, error) {
	if st.afterCR {
		return dst, errBareEnd
	}
	if !st.lineStart {
		dst = append(dst, '\r', '\n')
	}
	return append(dst, ".\r\n"...), nil
}
