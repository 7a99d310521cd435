// Package archtest holds the rules of the architecture as tests over the whole
// tree: who may import whom, which packages are pure, how large files and
// functions may grow. A rule that only people watch is soon broken; here each
// one names the file, the line and the way out.
//
// The rules look at syntax only, so the tree need not compile and the test
// takes about a second. Sizes and sleeps that are allowed for now are in
// testdata/allow.txt, which may only shrink: an entry that is too generous, or
// no longer needed, fails as well.
//
// It also holds shared/docs/rfc-index, which says what is supported of which
// RFC, against the code, and looks for dead links in shared/docs.
package archtest
