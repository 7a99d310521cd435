// Package store is the relay's only door to its disk: it owns Badger, where
// envelopes and recipients' states live, and the files that hold message
// bodies. It exists so that one place decides what "on stable storage" means.
//
// Everything is written through batches. A committer gathers the batches that
// wait, appends and syncs their bodies, and puts all their keys into one
// synced Badger transaction; a batch is answered when that is done, so one
// disk flush serves every message that arrived while the previous one ran.
// DESIGN.md tells why each step is in its place.
//
// The keys (keys.go is the only file that spells them):
//
//	\x00format                               format version, store generation, time of creation
//	\x00outbox                               where the outbox stands
//	\x00deadlines                            where reading deadlines begins
//	a <message 16> <index 2>                 journalled attempt, named by its first recipient
//	i <message 16>                           inbound mail
//	m <message 16>                           envelope
//	o <sequence 8>                           events of one commit under the number of the first
//	q <queue 4>                              work queue: what its number means
//	r <message 16> <index 2>                 recipient's state; absent while it is as at acceptance
//	w <queue 4> <due ms 8> <message 16> <index 2>  waiting recipient
//	x <deadline ms 8> <message 16>           deadline of a message
//
// Numbers are big-endian, so keys sort by them. Values under m and i begin
// with a codec version and a body reference (AppendRef), which is how the
// store finds out which bodies are alive.
package store
