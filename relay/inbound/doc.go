// Package inbound takes the mail that comes back to us on port 25: bounces,
// complaints and replies to the signed return paths of messages that left this
// cluster. Everything else is refused at RCPT with 550 5.7.1, so that the port
// can never relay, and a forged bounce never reaches anybody.
package inbound
