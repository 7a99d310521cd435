// Package delivery is the sending half of SMTP (RFC 5321): it opens a session
// to the best reachable mail host of a domain and carries transactions over
// it, telling for each recipient what happened and in which phase.
//
// It is our own and not a library's, for three reasons. MAIL, RCPT and DATA of
// a transaction go out in one write (RFC 2920), which halves the cost of small
// mail. The end of the data waits for the attempt's journal record, so that a
// crash can leave a recipient in doubt but never unknowingly so. And a refusal
// belongs to what it was said about: a reply at MAIL to the message, at RCPT
// to that recipient, at the final dot to the recipients that were accepted,
// and a 421 to the connection only.
//
// A session is used by one goroutine at a time and runs none of its own.
package delivery
