package link

import "crypto/tls"

// Over starts a session on a connection whose handshake is done, as it is on TCP;
// one end of it is the client. It is for worlds that have a network and a time of
// their own, in which there is nothing to dial.
func Over(conn *tls.Conn, client bool) Session { return newMuxSession(conn, client) }
