// Package reflex slows a lane down by itself when a provider asks for less, and
// brings it back when the provider takes mail again. It acts within seconds on
// what the relay itself sees and never waits for control: additive increase,
// multiplicative decrease of the rate of messages and of the connections of one
// lane, below what policy allows.
//
// It is pure: results and the time go in, an Allowance comes out. DESIGN.md has
// the rules and what the simulation holds them to.
package reflex
