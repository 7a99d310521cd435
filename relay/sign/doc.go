// Package sign makes the two things that bind a message to Relais and its
// tenant: the DKIM signature (RFC 6376) and the signed return path.
//
// Signing is the last step before a message goes on the wire, and the most
// expensive one, so the work is split: the body is hashed once while it is
// accepted (BodyHasher), and a Signer later needs only the header section. That
// is why go-msgauth, which reads the body again in a goroutine for each
// signature, is the yardstick in the tests and not the implementation.
//
// A return path is the envelope sender of a message on the wire. It carries the
// message's id under a keyed hash, so that a bounce can be trusted to answer
// something we sent, and all other mail to port 25 can be refused.
package sign
