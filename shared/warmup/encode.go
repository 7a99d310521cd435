package warmup

import (
	"encoding/binary"

	"github.com/relais-mta/relais/shared/fault"
)

// The first byte of an encoded row. A reader refuses any other. Rows without
// tallies keep the format of those who know none.
const (
	rowFormat      = 1
	rowWithTallies = 2
)

// AppendRow appends what the ledger holds of one subject's day, which SetRow
// reads; nothing if it holds nothing. Equal rows have equal bytes.
func (l *Ledger) AppendRow(dst []byte, s Subject, d Day) []byte {
	p := l.page(d)
	if p == nil || p.rows[s] == nil {
		return dst
	}
	w := p.rows[s]
	format := byte(rowFormat)
	if len(w.tallies) > 0 {
		format = rowWithTallies
	}
	dst = append(dst, format)
	dst = binary.AppendUvarint(dst, uint64(len(w.holders)))
	for _, h := range w.holders {
		dst = binary.BigEndian.AppendUint64(dst, uint64(h.node))
		dst = binary.AppendUvarint(dst, h.epoch)
		dst = binary.AppendUvarint(dst, h.seq)
	}
	for _, cells := range [2][]cell{w.cells, w.more} {
		dst = binary.AppendUvarint(dst, uint64(len(cells)))
		for i := range cells {
			c := &cells[i]
			dst = append(dst, byte(c.class))
			for _, v := range [4]uint32{uint32(c.holder), c.quota, c.amount, c.used} {
				dst = binary.AppendUvarint(dst, uint64(v))
			}
		}
	}
	if format == rowWithTallies {
		dst = appendTallies(dst, w.tallies)
	}
	return dst
}

// SetRow makes one subject's day what AppendRow wrote. The error is
// fault.Invalid, and then nothing has changed.
func (l *Ledger) SetRow(s Subject, d Day, b []byte) error {
	const op = "warmup.SetRow"
	p := l.page(d)
	if p == nil {
		return fault.Field(op, "day", "is %s, which is not open: today is %s", d, l.today)
	}
	if len(b) == 0 {
		delete(p.rows, s)
		return nil
	}
	r := rowReader{b: b}
	format := r.byte()
	if format != rowFormat && format != rowWithTallies {
		return fault.Field(op, "row", "of subject %d has format %d, known are up to %d", s, format, rowWithTallies)
	}
	w := &row{}
	if n := r.count(maxHolders); n > 0 {
		w.holders = make([]holder, n)
	}
	for i := range w.holders {
		w.holders[i] = holder{node: Node(r.fixed()), epoch: r.uvarint(), seq: r.uvarint()}
	}
	w.cells = r.cells(MaxClasses, len(w.holders))
	w.more = r.cells(MaxClasses*maxHolders, len(w.holders))
	if format == rowWithTallies {
		w.tallies = r.tallies(len(w.holders))
	}
	if r.bad || len(r.b) > 0 || !w.ordered() {
		return fault.Field(op, "row", "of subject %d on %s is damaged", s, d)
	}
	p.rows[s] = w
	return nil
}

// ordered reports whether a row is one that the ledger could have made.
func (w *row) ordered() bool {
	for i := range w.cells {
		if i > 0 && w.cells[i].class <= w.cells[i-1].class {
			return false
		}
	}
	for i := range w.more {
		c := &w.more[i]
		first := w.find(c.class)
		if c.holder == 0 || c.quota != 0 || first == nil || first.holder == 0 || first.holder == c.holder {
			return false
		}
		if i > 0 {
			if last := &w.more[i-1]; c.class < last.class || c.class == last.class && c.holder <= last.holder {
				return false
			}
		}
	}
	return true
}

// rowReader reads an encoded row; after the first mistake it reads zeros.
type rowReader struct {
	b   []byte
	bad bool
}

func (r *rowReader) byte() byte {
	if r.bad || len(r.b) == 0 {
		r.bad = true
		return 0
	}
	out := r.b[0]
	r.b = r.b[1:]
	return out
}

func (r *rowReader) fixed() uint64 {
	if r.bad || len(r.b) < 8 {
		r.bad = true
		return 0
	}
	out := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return out
}

func (r *rowReader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.bad || n <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// count reads a number of elements, of which each has three bytes at least.
func (r *rowReader) count(most int) int {
	n := r.uvarint()
	if n > uint64(most) || n > uint64(len(r.b)) {
		r.bad = true
		return 0
	}
	return int(n)
}

func (r *rowReader) cells(most, holders int) []cell {
	n := r.count(most)
	if n == 0 {
		return nil
	}
	out := make([]cell, n)
	for i := range out {
		c := &out[i]
		c.class = Class(r.byte())
		holder, quota, amount, used := r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint()
		if c.class >= MaxClasses || holder > uint64(holders) || quota > MaxQuota || amount > MaxQuota || used > amount || holder == 0 && amount > 0 {
			r.bad = true
			return nil
		}
		c.holder, c.quota, c.amount, c.used = uint16(holder), uint32(quota), uint32(amount), uint32(used)
	}
	return out
}
