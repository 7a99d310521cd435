// Package e2e tests both real binaries from the outside: it starts them with
// the documented commands around the lab, talks SMTP and HTTP to them, kills
// them, cuts their power and fills their disks, and reads what arrived. It
// exists because the promises of the README are about processes and wires, not
// about packages. The tests need root and the Debian packages that
// scripts/debian-peers.sh installs.
package e2e
