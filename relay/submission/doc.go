// Package submission takes mail from the tenants' own systems on ports 465 and
// 587. It exists to decide who may send what: it authenticates credentials,
// holds every message to the rules for From, trace and X-Relais fields, and
// answers 250 only when the queue has the message on stable storage.
//
// The bytes and the dialogue are smtpconn's and go-smtp's; here are the rules.
// A message is read once: the header section in memory, the body in pieces
// through the DKIM body hash into the store.
package submission
