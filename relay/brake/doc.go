// Package brake slows mail down: it keeps the reflex of every lane (package
// reflex) and the brakes that control has set (policy.Brake), and turns both into
// gates of the scheduler. It is asked and told by the engine as an Admitter.
//
// DESIGN.md says which brake becomes which gate.
package brake
