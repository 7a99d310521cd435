// Package lab is the little internet Relais is run, tested and measured
// against: an authoritative name server for invented domains, and a farm of
// mail exchangers that behave like the providers they are named after. It
// exists because every promise an outbound platform makes (limits kept per
// source address, nothing lost, nothing sent twice, signatures that verify)
// can only be checked from the receiving side, by code that shares nothing
// with the sender. Everything listens on loopback, inside one process.
//
// # What is simulated
//
// Each provider has its own MX hosts, under the suffix its namesake uses so
// that shipped provider profiles match, its own limits per source address
// (connections at once, messages per connection, messages in a sliding
// window, recipients per transaction), its own share of deferrals and
// greylisting, and its own wording. In Open mode limits, random deferrals and
// random greylisting are off; what an address asks for (below) still happens.
//
// # Local parts decide outcomes
//
// The text before the first hyphen of a local part, in lower case, chooses
// what happens to a recipient. Anything that is not in the table is accepted.
//
//	accept-…    nothing special: accepted as any other name
//	nobody-…    refused at RCPT as an unknown user (5.1.1 or the local style)
//	bounce-…    the same
//	disabled-…  refused at RCPT as a disabled mailbox
//	full-…      refused at RCPT as over quota, permanently
//	fulltemp-…  deferred at RCPT as over quota, every time
//	grey-…      greylisted: deferred until the same source, sender domain and
//	            recipient come back after the provider's greylisting delay
//	defer-…     deferred at RCPT once or twice (the seed decides), then accepted
//	throttle-…  told to slow down at RCPT the first time, then accepted; where
//	            the reply is a 421 the connection is closed with it
//	block-…     refused at RCPT with the provider's block of the source address
//	spam-…      refused after the final dot as unwanted content
//	slow-…      accepted, RCPT and the final dot answered after the slow delay
//	drop-…      first try: connection closed at RCPT without a reply; second
//	            try: closed in the middle of DATA; then accepted
//	late-…      first time: stored, then closed without the 250 that follows the
//	            final dot; then accepted (so the second copy is a duplicate)
//
// # Hostile hosts
//
// With Config.Hostile the farm also has a host for every file of transcripts/:
// peers that are slow, endless, malformed or gone, each at the domain of its
// file's name below hostile.test, with what shall come of mail for it.
//
// # Determinism
//
// A decision depends only on Config.Seed, the provider, the recipient and how
// many times that recipient was tried there, never on the order in which
// different recipients arrive.
package lab
