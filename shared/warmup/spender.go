package warmup

// Mark is what a relay keeps on stable storage of one reservation.
type Mark struct {
	Used   uint32 // at most this much may have been spent
	Amount uint32 // reserved when the mark was written
	number uint64 // of a mark that this process made: it need not be kept
}

// Spender spends one relay's reservation of one subject, class and day. It spends
// only below a mark that is on stable storage already; after a crash everything
// below the mark counts as spent. One goroutine owns it. The zero Spender has
// nothing.
type Spender struct {
	amount  uint32
	used    uint32
	mark    uint32 // on stable storage
	settled uint32 // told to the ledger
	asked   uint64 // number of the request that waits for its reply, 0 for none
	marks   uint64 // made so far
	cutting uint64 // number of the mark of a cut that is not on stable storage yet, 0 for none
}

// Step returns by how much to raise the mark at once: what one second sends, and
// 8 at least. A crash wastes a step at most: W3.
func Step(perSecond int) uint32 { return uint32(min(max(perSecond, 8), 1_000_000)) }

// Resume returns a spender as a crash or a stop left it.
func Resume(m Mark) Spender {
	return Spender{amount: max(m.Amount, m.Used), used: m.Used, mark: m.Used}
}

// Take spends n, all or nothing, before they are offered to a host.
func (s *Spender) Take(n uint32) bool {
	if uint64(s.used)+uint64(n) > uint64(min(s.mark, s.amount)) {
		return false
	}
	s.used += n
	return true
}

// Refund takes back what was taken and then provably not offered, such as when
// the connection failed before the first RCPT. What the ledger was told of is not
// taken back.
func (s *Spender) Refund(n uint32) { s.used = max(s.used-min(n, s.used), s.settled) }

// Reserved returns what may be spent in all, as far as the relay knows.
func (s *Spender) Reserved() uint32 { return s.amount }

// Left returns what is reserved and not spent.
func (s *Spender) Left() uint32 { return s.amount - min(s.used, s.amount) }

// Raise returns the mark to put on stable storage next, so that a step can be
// spent, and whether there is one. Saved must follow when it is there.
func (s *Spender) Raise(step uint32) (Mark, bool) {
	next := min(s.amount, s.used+step)
	if next <= s.mark || s.Cutting() || s.mark-min(s.mark, s.used) > step/2 {
		return Mark{}, false
	}
	return s.make(next), true
}

// Saved says that a mark is on stable storage. Marks are saved in the order in
// which they were returned.
func (s *Spender) Saved(m Mark) {
	// A mark that was made before a cut allows nothing more: that of the cut, which
	// is lower, takes its place. It may be equal to it in all but its number.
	if m.number >= s.cutting {
		s.mark, s.cutting = m.Used, 0
	}
}

func (s *Spender) make(used uint32) Mark {
	s.marks++
	return Mark{Used: used, Amount: s.amount, number: s.marks}
}

// Ask notes the number of a request whose reply is now awaited; any former reply
// is void.
func (s *Spender) Ask(seq uint64) { s.asked = seq }

// Granted takes the reply to the request that is awaited and reports whether it
// was that.
func (s *Spender) Granted(r Reply) bool {
	if s.asked == 0 || r.Seq != s.asked {
		return false
	}
	s.asked = 0
	if !s.Cutting() {
		s.amount = max(r.Amount, s.used)
		s.settled = max(s.settled, min(r.Used, s.used))
	}
	return true
}

// CutTo stops spending beyond an amount, at once, and returns the mark to save.
// Only when that is saved may the ledger be told: after a crash the relay would
// take a higher mark for what it has spent, or spend up to a higher amount. Any
// reply that is awaited is void.
func (s *Spender) CutTo(amount uint32) Mark {
	s.asked = 0
	s.amount = max(min(s.amount, amount), s.used)
	m := s.make(min(s.mark, s.amount))
	s.cutting = m.number
	return m
}

// Cutting reports whether a cut waits to be saved.
func (s *Spender) Cutting() bool { return s.cutting != 0 }

// Settle returns what to tell the ledger.
func (s *Spender) Settle() (used, amount uint32) {
	s.settled = s.used
	return s.used, s.amount
}

// The least that a relay reserves at once of a subject that others share.
const minChunk = 10

// Chunk returns by how much a relay should raise a reservation of own, of a quota
// of which committed is taken by all. Who has the subject alone takes all but a
// tenth, and that when it is needed. Of a shared subject a relay takes half of its
// part of what is left, or what it sends in a quarter of an hour, if that is less.
func Chunk(quota, committed, own uint32, relays int, quarterHour uint32) uint32 {
	left := quota - min(committed, quota)
	if relays <= 1 {
		if most := quota - quota/10; own < most {
			return min(most-own, left)
		}
		return min(max(quota/100, minChunk), left)
	}
	return min(max(min(left/uint32(2*relays), quarterHour), minChunk), left)
}
