// Package resolve turns a mail domain into the hosts that take its mail, by
// the rules of RFC 5321 section 5.1 and RFC 7505. It is its own stub resolver,
// because the operating system's hides the difference that matters most: a
// domain that does not exist (final, NXDOMAIN) and a name server that did not
// answer (try again, SERVFAIL, timeout). The two are never confused here.
//
// Answers are cached by their TTL within bounds of the policy, questions for
// the same name are asked once however many wait for them, and when DNS fails
// the last known route of a domain goes on being used for a few hours.
package resolve
