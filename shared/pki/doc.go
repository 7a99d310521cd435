// Package pki holds the identities of nodes and the rules by which one node
// believes another: keys and certificate requests, SPIFFE ids, the pin of a
// cluster's CA, join tokens, TLS configurations, and the sealing of secrets at
// rest. Both sides use the very same checks, because a rule that only one end
// applies is no rule. Nothing here signs a certificate: control/ca does.
package pki
