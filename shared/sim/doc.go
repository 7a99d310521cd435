// Package sim tries to break the limits that hold across relays: shared limits
// (shared/lease) and warm-up quotas (shared/warmup). It is tests only: a world of
// servers, relays and a network between them, in virtual time and on one
// goroutine, made from a seed. Machines stop for a minute and go on, crash and keep
// only what was synced, have clocks that run fast or slow; messages come late,
// twice, in another order or not at all, on one way or both; leaders change, with
// what they proposed committed or lost; limits, quotas and owners change.
//
// After every event every promise of lease/DESIGN.md and warmup/DESIGN.md is
// checked. A seed that fails says so:
//
//	make sim SEEDS=1 SEED=4711
//
// plays it again. Raft itself is a log here: an entry is committed or lost, and a
// leader may not know that it is none any more. A second layer, Test…Raft…, has the
// real Raft in memory, under testing/synctest.
package sim
