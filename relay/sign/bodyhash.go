package sign

import (
	"crypto/sha256"
	"hash"
)

// canonicalBufferBytes is how much canonical text is gathered before it is
// given to SHA-256, whose cost per call matters for short pieces.
const canonicalBufferBytes = 1024

// BodyHasher computes the SHA-256 of a body in relaxed canonical form (RFC 6376
// section 3.4.4) while the body streams by. It wants the body as it goes on the
// wire, with lines that end in CRLF and before dot-stuffing; the header section
// and its empty line are not part of it. It holds a fixed amount of memory,
// whatever the body looks like. It is for one goroutine.
type BodyHasher struct {
	sum     hash.Hash
	out     [canonicalBufferBytes]byte
	n       int   // used bytes of out
	breaks  int64 // line ends seen and not yet written, as they may be the trailing ones
	space   bool  // white space seen and not yet written, as it may end the line
	cr      bool  // the last byte was CR
	written bool  // the canonical body is not empty
}

// NewBodyHasher returns a hasher for one body. Reset makes it ready for another.
func NewBodyHasher() *BodyHasher { return &BodyHasher{sum: sha256.New()} }

// Reset forgets everything written.
func (h *BodyHasher) Reset() {
	h.sum.Reset()
	h.n, h.breaks, h.space, h.cr, h.written = 0, 0, false, false, false
}

// Write hashes the next piece of the body; pieces may be cut anywhere. It never
// returns an error.
func (h *BodyHasher) Write(p []byte) (int, error) {
	start := 0 // of a run that needs no change
	for i := 0; i < len(p); i++ {
		c := p[i]
		if c > ' ' && !h.space && !h.cr && h.breaks == 0 {
			continue
		}
		switch c {
		case ' ', '\t':
			// A single space between two words is its own canonical form: keep
			// the run going. This is what most white space looks like.
			if c == ' ' && !h.space && !h.cr && h.breaks == 0 && i+1 < len(p) && p[i+1] > ' ' {
				continue
			}
			h.flushRun(p[start:i])
			h.settleCR()
			h.space = true
			start = i + 1
		case '\r':
			h.flushRun(p[start:i])
			h.settleCR()
			h.cr = true
			start = i + 1
		case '\n':
			h.flushRun(p[start:i])
			if h.cr {
				// RFC 6376 section 3.4.4: white space at the end of a line is ignored.
				h.cr, h.space = false, false
				h.breaks++
			} else {
				h.literal(c)
			}
			start = i + 1
		default:
			h.flushRun(p[start:i])
			h.settleCR()
			h.writePending()
			start = i
		}
	}
	h.flushRun(p[start:])
	return len(p), nil
}

// flushRun copies bytes that are canonical already.
func (h *BodyHasher) flushRun(run []byte) {
	if len(run) == 0 {
		return
	}
	h.written = true
	for len(run) > 0 {
		if h.n == len(h.out) {
			h.drain()
		}
		k := copy(h.out[h.n:], run)
		h.n += k
		run = run[k:]
	}
}

// settleCR deals with a CR that no LF followed. Accepted mail holds none; it is
// hashed as it stands, because changing it would sign something else.
func (h *BodyHasher) settleCR() {
	if h.cr {
		h.cr = false
		h.literal('\r')
	}
}

func (h *BodyHasher) literal(c byte) {
	h.writePending()
	h.put(c)
}

// writePending writes the line ends and the white space that turned out to be
// inside the body.
func (h *BodyHasher) writePending() {
	for ; h.breaks > 0; h.breaks-- {
		h.put('\r')
		h.put('\n')
	}
	if h.space {
		h.space = false
		h.put(' ')
	}
}

func (h *BodyHasher) put(c byte) {
	if h.n == len(h.out) {
		h.drain()
	}
	h.out[h.n] = c
	h.n++
	h.written = true
}

func (h *BodyHasher) drain() {
	_, _ = h.sum.Write(h.out[:h.n]) // hash.Hash never returns an error
	h.n = 0
}

// Sum ends the body and returns its hash. Nothing may be written after it
// without a Reset.
func (h *BodyHasher) Sum() (sum [sha256.Size]byte) {
	h.settleCR()
	// RFC 6376 section 3.4.4: empty lines at the end are ignored, a body that is
	// not empty ends in one CRLF, an empty one stays empty. White space on a last
	// line without CRLF is ignored like any other at the end of a line.
	h.space = false
	if h.written {
		h.breaks = 1
		h.writePending()
	}
	h.drain()
	h.sum.Sum(sum[:0])
	return sum
}
