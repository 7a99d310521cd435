package main

// mutant is one broken rule.
type mutant struct {
	name     string
	file     string
	old, new string // exact text, which the file holds once
	scenario string // that must fail, as a regular expression
}

const (
	lease     = "shared/lease/"
	warmup    = "shared/warmup/"
	ownership = "shared/ownership/"
)

var mutants = []mutant{
	{
		"a lease counts from when it arrives", lease + "holder.go",
		"sent, known = slot.at, true", "sent, known = now, true",
		"Test03LateGrantOfASilentRelay",
	},
	{
		"a new leader does not wait (R4)", lease + "grantor.go",
		"n.basis = barrier", "n.basis = 0",
		"Test04LeadershipTransfers",
	},
	{
		"grants are taken in any order (I3)", lease + "holder.go",
		"if stamp.Compare(r.stamp) < 0 || stamp.Compare(r.given) <= 0 {", "if false {",
		"Test03LateGrant",
	},
	{
		"a stale report lowers a ceiling (R2)", lease + "grantor.go",
		"if line.Stamp == (Stamp{g.generation, g.term, e.seq}) && e.seq != 0 {", "if e.seq != 0 {",
		"Test03StaleReport",
	},
	{
		"no margin for the speed of clocks (R3)", lease + "lease.go",
		"return d + d/100 + 50*time.Millisecond", "return d",
		"Test03FloorsAndSlotsEndInTime",
	},
	{
		"a renewal without a commit (R1)", lease + "grantor.go",
		"		n.queued, n.batched = false, n.nonce\n	}\n	return t, out",
		"		n.queued, n.batched = false, n.nonce\n	}\n	_, early := g.answers(nil)\n	return t, append(out, early...)",
		"Test01OldLeaderResumes",
	},
	{
		"a push prolongs a lease", lease + "grant.go",
		"Nonce: n.answered}", "Nonce: n.nonce}",
		"Test01PushOfAFormerLeader",
	},
	{
		"a raised bucket begins full", lease + "bucket.go",
		"b.next = at + Instant(burst*interval-saved)", "b.next = at + Instant(0*saved)",
		"Test03MovedBurst",
	},
	{
		"a smaller floor is confirmed before it is saved", lease + "holder.go",
		"	if !r.pending {\n		r.acked = stamp", "	if true {\n		r.acked = stamp",
		"TestFloorsAreSavedFirst",
	},
	{
		"open slots do not count as held", lease + "rights.go",
		"held = max(held, r.open-r.floor.Amount)", "held = max(held, 0)",
		"Test09TwoConnectionsForTenRelays",
	},
	{
		"a stale release counts", lease + "grantor.go",
		"if e == nil || e.seq == 0 || r.Stamp != (Stamp{g.generation, g.term, e.seq}) {", "if e == nil {",
		"TestReleasesRace",
	},
	{
		"a release does not void former grants", lease + "holder.go",
		"r.given, r.share, r.leased = r.stamp, Share{}, false", "r.share, r.leased = Share{}, false",
		"TestReleasesRace",
	},
	{
		"a relay goes on past its lease (I4)", lease + "rights.go",
		"	if r.leased && now >= r.stop {\n		r.leased = false", "	if false {\n		r.leased = false",
		"Test06AllRelaysCutOff",
	},
	{
		"slots are reclaimed without a linger (R3)", lease + "grantor.go",
		"linger = g.cfg.Linger", "linger = 0",
		"Test03FloorsAndSlotsEndInTime",
	},
	{
		"a grant for the former process counts", lease + "holder.go",
		"if g.Node != h.node || g.Incarnation != h.incarnation {", "if g.Node != h.node {",
		"Test10CrashLoop",
	},
	{
		"more is given out than is free (I1)", lease + "allocate.go",
		"free, need := l.whole(), Share{}", "free, need := l.whole().add(l.whole()), Share{}",
		"Test08BusyRelayFlips",
	},

	{
		"a cut that comes late counts (W5)", warmup + "ledger.go",
		"if h == 0 || seq <= w.holders[h-1].seq {", "if h == 0 {",
		"TestRepeatedRequests",
	},
	{
		"settlements add up (W5)", warmup + "ledger.go",
		"e.used = max(e.used, min(s.Used, MaxQuota))", "e.used += min(s.Used, MaxQuota)",
		"Test12LeaderDiesAfterReserve",
	},
	{
		"a restart forgets what was spent (W2)", warmup + "spender.go",
		"return Spender{amount: max(m.Amount, m.Used), used: m.Used, mark: m.Used}", "return Spender{amount: max(m.Amount, m.Used), used: 0, mark: m.Used}",
		"Test11CrashAtEverySync",
	},
	{
		"spending before the mark is saved (W2)", warmup + "spender.go",
		"uint64(min(s.mark, s.amount))", "uint64(s.amount)",
		"Test11CrashAtEverySync",
	},
	{
		"any reply is taken (W2)", warmup + "spender.go",
		"if s.asked == 0 || r.Seq != s.asked {", "if r.Seq == 0 {",
		"TestRepeatedRequests",
	},
	{
		"a cut leaves the mark on disk (W1)", warmup + "spender.go",
		"m := s.make(min(s.mark, s.amount))", "m := s.make(s.mark)",
		"TestRecall",
	},
	{
		"a cut ends with any mark that is saved (W2)", warmup + "spender.go",
		"if m.number >= s.cutting {", "if m.Amount == s.amount {",
		"TestCutBehindAMark",
	},
	{
		"a mark from before a cut counts (W2)", warmup + "spender.go",
		"	if m.number >= s.cutting {", "	s.mark = m.Used\n	if m.number >= s.cutting {",
		"TestMarkOnItsWayAtACut",
	},
	{
		"reservations of others do not count (W1)", warmup + "ledger.go",
		"e.amount += min(r.UpTo-e.amount, limit-committed)", "e.amount += min(r.UpTo-e.amount, limit-min(limit, e.amount))",
		"Test12LeaderDiesAfterReserve",
	},
	{
		"a former owner may reserve (W4)", warmup + "ledger.go",
		"if owner := l.owners[r.Subject]; r.Epoch != owner {", "if owner := l.owners[r.Subject]; r.Epoch > owner {",
		"Test14AddressMovesInTheDay",
	},

	{
		"an address changes hands while it is used (A1)", ownership + "ownership.go",
		"!a.Owner.IsZero() && !ownerIsOff && (a.Owner != to || a.State == Quarantined):\n		return a, conflict(\"node\", \"its owner may still send from it: release", "a.State == Assigned && !ownerIsOff:\n		return a, conflict(\"node\", \"its owner may still send from it: release",
		"TestReleaseWaitsForTheOwner",
	},
	{
		"a former owner's word counts (A1)", ownership + "ownership.go",
		"if by.IsZero() || by != a.Owner || epoch != a.Epoch {", "if by.IsZero() {",
		"TestReleaseWaitsForTheOwner",
	},
	{
		"a release is confirmed before the disk knows (A1)", ownership + "use.go",
		"u.open == 0 && u.saved >= u.news.Revision", "u.open == 0",
		"TestReleaseIsSavedFirst",
	},
	{
		"a release is confirmed with connections open (A1)", ownership + "use.go",
		"u.open == 0 && u.saved >= u.news.Revision", "u.saved >= u.news.Revision",
		"TestReleaseWaitsForTheOwner",
	},
	{
		"former news of an address count (A1)", ownership + "use.go",
		"	if n.Revision <= u.news.Revision {\n		return false", "	if n.Revision == u.news.Revision {\n		return false",
		"TestReleaseWaitsForTheOwner",
	},
	{
		"a floating address is used past its lease (A1)", ownership + "use.go",
		"case !u.news.Pinned && now >= u.until:", "case !u.news.Pinned && u.until == 0:",
		"Test15TakeoverOfAFloatingAddress",
	},
	{
		"a new leader takes addresses at once (R4)", ownership + "keeper.go",
		"basis := max(k.barrier, k.heard[n])", "basis := k.heard[n]",
		"Test15TakeoverOfAFloatingAddress",
	},
	{
		"a take-over does not wait for slow clocks (A1)", ownership + "keeper.go",
		"lease.Outlast(k.cfg.TTL)+k.cfg.Takeover", "k.cfg.TTL",
		"Test15ClocksDiffer",
	},
	{
		"a tenant's address carries what it did (A3)", ownership + "ownership.go",
		"(a.State != Quarantined || !a.Owner.IsZero())", "a.State != Quarantined",
		"Test18AddressIsDedicatedMeanwhile",
	},
}
