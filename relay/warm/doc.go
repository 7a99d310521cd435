// Package warm keeps a relay within the warm-up quotas of its cluster: nothing is
// offered that was not reserved first, spent behind a mark on the disk, and what
// is reserved is told to the leader, spent or given back.
//
// The arithmetic is that of shared/warmup. This package gives it a disk, the link
// to the leader, a clock, and the engine's question before each transaction. A
// relay that restarts takes its marks for what was spent; one that lost them
// counts all that it ever reserved of a day as spent. One that is cut off spends
// what it has reserved, and then waits.
package warm
