// Package handover moves messages from relay to relay: mail whose pool has no
// source here, and the queue of a relay that drains, goes to relays that own
// sources of its pools. A message is always with exactly one relay, whatever
// crashes when: relay/queue has the steps, this package the conversation.
//
// The giver dials and asks, the taker answers in order (shared/wire, TCP with
// mutual TLS, ALPN relais-handover/1). Whom a relay gives to, and takes from, is
// in its view: a relay that was put out of the cluster is refused at once.
package handover
