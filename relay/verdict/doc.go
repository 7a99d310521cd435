// Package verdict says what a remote server's reply means: one of the
// canonical classes, who is at fault, and what to do with the recipient.
//
// It exists because the first digit does not tell. Providers answer 5xx for
// states that pass and 4xx for refusals that do not, put their own codes into
// the text, and quote numbers that look like codes. A wrong reading here
// suppresses good recipients or hammers a provider that asked for silence, so
// the rules are data, in a fixed order, each with a sample reply that is
// tested.
//
// The package is pure: same reply, same verdict, everywhere.
package verdict
