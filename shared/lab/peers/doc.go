// Package peers starts mail servers that others wrote, as Debian ships them:
// Postfix, Exim and OpenSMTPD. It exists because a farm that we wrote shares
// our misreadings of the standards; these do not.
//
// Debian lets only one mail server be installed on a machine, so each has a
// Debian of its own, which scripts/more-peers.sh makes. A server runs chrooted
// there in its own mount and process namespaces: nothing that it does reaches
// the machine or outlives it, but its addresses are the machine's loopback.
// Starting one needs root.
package peers
