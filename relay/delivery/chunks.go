package delivery

import (
	"strconv"

	"github.com/relais-mta/relais/relay"
)

// maxChunkBytes bounds one BDAT chunk, so that a host that counts a chunk
// before it looks at it can take it, and a refusal comes before all was sent.
const maxChunkBytes = 1 << 20

// sendChunks sends a binary message with BDAT (RFC 3030 section 2). Chunks are
// counted, so nothing is stuffed, and the host knows the end before the last
// chunk is complete: the journal comes before that chunk's command.
func (s *Session) sendChunks(t *transfer) {
	var fields []byte
	if t.tx.Sign != nil {
		var err error
		if fields, err = t.tx.Sign(nil); err != nil {
			// Nothing was begun that the host would have to forget.
			s.needReset = true
			t.settleLocal(err, "5.6.0")
			return
		}
	}
	b := blocks.Get().(*block)
	defer func() {
		b.out = b.out[:0]
		blocks.Put(b)
	}()
	left := t.content.Size()
	for at, first := int64(0), true; ; first = false {
		n := min(left, maxChunkBytes)
		left -= n
		if left == 0 && !s.journal(t) {
			return
		}
		size := n
		if first {
			size += int64(len(fields))
		}
		b.out = append(b.out[:0], "BDAT "...)
		b.out = strconv.AppendInt(b.out, size, 10)
		if left == 0 {
			b.out = append(b.out, " LAST"...)
		}
		b.out = append(b.out, '\r', '\n')
		if first {
			b.out = append(b.out, fields...)
		}
		if !s.writeChunk(t, b, at, n) {
			return
		}
		at += n
		if left == 0 {
			break
		}
		if !s.chunkTaken(t) {
			return
		}
	}
	s.readVerdict(t)
}

// writeChunk writes what b holds and n bytes of the content from at.
func (s *Session) writeChunk(t *transfer, b *block, at, n int64) bool {
	for end := at + n; ; {
		part := int64(0)
		if at < end {
			bytes, err := t.content.part(b, at, min(end-at, readBytes))
			if err != nil {
				s.abandon()
				t.settleLocal(err, "5.6.0")
				return false
			}
			part = int64(len(bytes))
			b.out = append(b.out, bytes...)
		}
		at += part
		if s.in.buffered() > 0 {
			s.interrupted(t, nil)
			return false
		}
		if err := s.writeBlock(t, b); err != nil {
			s.interrupted(t, err)
			return false
		}
		if at == end {
			return true
		}
	}
}

// chunkTaken reads the reply to a chunk that is not the last. A refusal is
// about the message (RFC 3030 section 2); the rest is not sent.
func (s *Session) chunkTaken(t *transfer) bool {
	r, err := s.in.read(orFallback(t.timeouts.BlockTimeout))
	switch {
	case err != nil:
		s.dead = true
		t.settle(relay.Deferred, relay.PhaseDATA, brokenReply(err))
	case r.positive():
		return true
	case r.code == 421:
		s.closing(t, relay.PhaseDATA, &r)
	case r.refusal():
		s.needReset = true
		t.settle(statusOf(&r), relay.PhaseDATA, r.keep())
	default:
		s.nonsense(t, relay.PhaseDATA)
	}
	return false
}
