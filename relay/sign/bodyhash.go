package sign

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math/bits"
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
		// Most lines are canonical as they stand and are hashed many at a time.
		if !h.space && !h.cr {
			end, regular := canonicalLines(p)
			if !regular {
				h.writeAny(p)
				break
			}
			if end > 0 {
				h.writeLines(p[:end])
				p = p[end:]
				continue
			}
		}
		end := bytes.IndexByte(p, '\n') + 1
		if end == 0 {
			end = len(p)
		}
		h.writeAny(p[:end])
		p = p[end:]
	}
	return n, nil
}

// writeLines hashes whole lines that are their own relaxed form. The empty ones
// at their end may turn out to be the body's last.
func (h *BodyHasher) writeLines(p []byte) {
	end := len(p)
	for end >= 2 && p[end-1] == '\n' && (end == 2 || p[end-3] == '\n') {
		end -= 2 // an empty line
	}
	empty := int64(len(p)-end) / 2
	if end > 0 {
		end, empty = end-2, empty+1 // the last line end is pending too
		h.writePending()
		if end < len(h.out) {
			h.flushRun(p[:end])
		} else {
			h.drain()
			_, _ = h.sum.Write(p[:end]) // hash.Hash never returns an error
			h.written = true
		}
	}
	h.breaks += empty
}

// Eight octets at a time.
const (
	each = 0x0101010101010101
	low7 = 0x7f * each
	high = 0x80 * each
)

// zeros has the high bit set of each octet of x that is 0.
func zeros(x uint64) uint64 { return ^((x&low7 + low7) | x | low7) }

// controls has the high bit set of each octet of x up to and including the space.
func controls(x uint64) uint64 { return ^((x&low7 + (0x7f-' ')*each) | x) & high }

// canonicalLines returns how many octets at the beginning of p are whole lines
// that are their own relaxed form: no tab, no two spaces together, none before
// the line end. It may be fewer than there are. What it looks for shows in two
// octets up to the space that stand together, which are rare. regular is false
// if there are line ends other than CRLF.
func canonicalLines(p []byte) (end int, regular bool) {
	end = len(p)
	lineEnds := 0
	before := uint64(0) // whether the octet before is a control, in the lowest octet
	at := 0
scan:
	for ; at+8 <= len(p); at += 8 {
		w := binary.LittleEndian.Uint64(p[at:])
		c := controls(w)
		if c == 0 {
			before = 0
			continue
		}
		hits := c&(c<<8|before) | zeros(w^'\t'*each)
		before = c >> 56
		for ; hits != 0; hits &= hits - 1 {
			i := at + bits.TrailingZeros64(hits)/8
			switch {
			case i > 0 && p[i] == '\n' && p[i-1] == '\r':
				lineEnds++
			case i > 0 && p[i-1] == '\n' && (p[i] == '\r' || p[i] == ' '):
			default:
				end = i
				break scan
			}
		}
	}
	if end == len(p) {
		end = at // the last octets come with the next piece, or one by one
	}
	end = bytes.LastIndexByte(p[:end], '\n') + 1
	// A CR or LF of its own has no neighbour that would show it.
	return end, bytes.Count(p[:end], returnOctet) == lineEnds && bytes.Count(p[:end], newlineOctet) == lineEnds
}

var returnOctet, newlineOctet = []byte{'\r'}, []byte{'\n'}

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
