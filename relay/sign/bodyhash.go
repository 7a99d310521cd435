package sign

import (
	"bytes"
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
	n := len(p)
	for len(p) > 0 {
		// Most lines are canonical as they stand and are copied whole.
		cr := bytes.IndexByte(p, '\r')
		end := cr + 2
		if cr < 0 || end > len(p) || p[cr+1] != '\n' {
			end = len(p)
			if cr >= 0 {
				end = min(cr+2, end)
			}
			h.writeAny(p[:end])
		} else if line := p[:cr]; h.space || h.cr || !isCanonical(line) {
			h.writeAny(p[:end])
		} else {
			if cr > 0 {
				h.writePending()
				h.flushRun(line)
			}
			h.breaks++
		}
		p = p[end:]
	}
	return n, nil
}

var twoSpaces = []byte("  ")

// isCanonical reports whether the relaxed form of a line is the line itself.
func isCanonical(line []byte) bool {
	return len(line) == 0 || line[len(line)-1] != ' ' && bytes.IndexByte(line, '\t') < 0 && !bytes.Contains(line, twoSpaces)
}

// writeAny hashes octets of any kind.
func (h *BodyHasher) writeAny(p []byte) {
	for i := 0; i < len(p); {
		switch c := p[i]; c {
		case ' ', '\t':
			h.settleCR()
			h.space = true
			i++
		case '\r':
			h.settleCR()
			h.cr = true
			i++
		case '\n':
			if h.cr {
				// RFC 6376 section 3.4.4: white space at the end of a line is ignored.
				h.cr, h.space = false, false
				h.breaks++
			} else {
				h.literal(c)
			}
			i++
		default:
			h.settleCR()
			h.writePending()
			run := canonicalRun(p[i:])
			h.flushRun(p[i : i+run])
			i += run
		}
	}
}

// canonicalRun returns how many octets of p, which begins with one that is not
// white space, are their own relaxed form: words with one space between them.
func canonicalRun(p []byte) int {
	for i := 1; i < len(p); i++ {
		if p[i] > ' ' {
			continue
		}
		if p[i] == ' ' && i+1 < len(p) && p[i+1] > ' ' {
			i++
			continue
		}
		return i
	}
	return len(p)
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
