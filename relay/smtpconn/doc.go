// Package smtpconn is the ground that both our SMTP listeners stand on: it owns
// the socket, TLS and the bytes, and lets go-smtp keep the dialogue.
//
// go-smtp's server takes commands that end in a bare LF, swallows octets in
// "CRLF . CR X" and "CRLF . LF", and takes the socket over at STARTTLS. A
// message that two servers cut at different places is how mail is smuggled, so
// a Conn stands below go-smtp and above TLS. It reads the decrypted bytes
// itself, hands go-smtp one checked command line at a time, and gives the
// message to the session in pieces that are already free of dot-stuffing. What
// go-smtp is never shown it cannot misread: EHLO's answer, STARTTLS, the order
// of commands, limits and time-outs are decided here, on the way through.
//
// Nothing is ever resynchronised: a line that does not end in CRLF, a bare CR
// or a NUL gets one plain refusal, and then the connection ends.
package smtpconn
