// Package sim tries to break the limits that hold across relays: shared limits
// (shared/lease) and warm-up quotas (shared/warmup). It is tests only: a world of
// servers, relays and a network between them, in virtual time and on one
// goroutine, made from a seed. Machines stop for a minute and go on, crash and keep
// only what was synced, have clocks that run fast or slow; messages come late,
// twice, in another order or not at all, on one way or both; leaders change, with
// what they proposed committed or lost; limits, quotas and owners change.
//
// The promises of lease/DESIGN.md, warmup/DESIGN.md and ownership/DESIGN.md are
// checked whenever an event may have broken one:
//
//   - after every event, of the machine whose event it was, and of all whose word in the
//     table changed: I2 (what it may use is no more than the table says, which is
//     stricter; from I1 and that follows I5), I4, A1, A3, A4. Time alone only takes away;
//   - at every entry of the log: I1, W1, W2 (what relays take for reserved is reserved),
//     W4, W5, A2;
//   - at every grant I3; at every recipient W2; at every write that is synced, and at
//     every crash, W2 and W3, as if the machine crashed now;
//   - at the end of a world, in which it is calm for minutes: I6, I7, I8, and that the log
//     applied again gives the same state.
//
// A seed that fails says so:
//
//	make sim SEEDS=1 SEED=4711
//
// plays it again. What went wrong in which part of the worlds, and how often each
// promise was looked at while there was something to break, is counted and printed; a
// run of fifty worlds or more fails if a kind of trouble never came, or a promise
// was never looked at. Raft itself is a log here: an entry is committed or lost, and a
// leader may not know that it is none any more. A second layer, Test…Raft…, has the
// real Raft in memory, under testing/synctest.
package sim
