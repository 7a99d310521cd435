package lease

import "time"

// Hello begins the session of a relay's process. A higher incarnation says that
// the former process has ended: what it held is free, but for the floors, which
// are kept on the relay's disk.
type Hello struct {
	Node        Node
	Incarnation uint64 // higher at every start of the process, from stable storage
}

// Floor is a relay's reserved part of a limit, as it is kept on its disk.
type Floor struct {
	Limit LimitID
	Kind  Kind
	Per   time.Duration
	Share Share
	Until Instant // by the relay's clock
	Soft  bool
}

// Welcome answers a Hello once the incarnation is replicated.
type Welcome struct {
	Node        Node
	Incarnation uint64
	Generation  uint64
	Term        uint64
}

// Report tells what a relay wants and holds, of all limits at once. It asks for
// everything that it lists to be renewed.
type Report struct {
	Node        Node
	Incarnation uint64
	Nonce       uint64 // rises with every report of the incarnation
	Weight      int64  // of the relay in sharing: 1 to 1000
	Lines       []Line // in the order of their limits
}

// Line is one limit of a report.
type Line struct {
	Limit  LimitID
	Demand int64 // what the relay could use now, in the unit of amounts
	Held   int64 // the largest amount it may still be using, floor not counted
	Stamp  Stamp // of the last grant that it acts on
	Used   int64 // events started, or slots opened, since the last report
	Denied int64 // times that the limit said no since then
}

// Grant answers a report (then Nonce is the report's), or changes what a relay
// holds without having been asked (then Nonce is that of the last report that was
// answered, or 0).
type Grant struct {
	Node        Node
	Incarnation uint64
	Generation  uint64
	Term        uint64
	Nonce       uint64
	Reply       bool // answers its nonce: what is not listed is not held
	Lines       []GrantLine
}

// GrantLine is one limit of a grant.
type GrantLine struct {
	Limit LimitID
	Kind  Kind
	Per   time.Duration
	Seq   uint64
	Share Share // beyond the floor
	Floor Share
	Soft  bool
}

// Release gives up one limit: the relay has stopped using it and will not act on
// any grant up to the stamp again.
type Release struct {
	Node        Node
	Incarnation uint64
	Limit       LimitID
	Stamp       Stamp
}
