package delivery

import "github.com/relais-mta/relais/relay/trace"

// maxTracedHeaderBytes bounds what is read of a message for a watcher.
const maxTracedHeaderBytes = 16 << 10

// traceMessage shows that the message went out: its size and, to who asked for
// it, the header section as it was stored, which our signatures stand in front of.
func (s *Session) traceMessage(t *transfer, dot bool) {
	if !s.trace.On() {
		return
	}
	if n := min(t.content.Size(), maxTracedHeaderBytes); s.trace.Headers() && n > 0 {
		header := make([]byte, n)
		if t.content.Bytes != nil {
			copy(header, t.content.Bytes)
		} else if got, err := t.content.Reader.ReadAt(header, 0); int64(got) < n {
			s.trace.Note("the header section cannot be read: %v", err)
			header = nil
		}
		s.trace.Header(trace.Sent, header)
	}
	s.trace.Note("a message of %d octets, without our signatures", t.content.Size())
	if dot {
		s.trace.Sent([]byte("."))
	}
}

// traceBreak shows why a connection is over.
func (s *Session) traceBreak(err error) {
	if s.trace.On() {
		s.trace.Note("%s", describe(err))
	}
}
