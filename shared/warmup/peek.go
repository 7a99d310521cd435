package warmup

// Peek returns what is spent and what is reserved. Unlike Settle it promises
// nothing to the ledger.
func (s *Spender) Peek() (used, amount uint32) { return s.used, s.amount }

// Room returns how much can be spent before a higher mark is on stable storage.
func (s *Spender) Room() uint32 {
	most := min(s.mark, s.amount)
	return most - min(s.used, most)
}
