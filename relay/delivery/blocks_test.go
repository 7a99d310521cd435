package delivery

import "testing"

// Thousands of sessions hold a block while they wait for the record of their
// attempt: most mail must not cost each of them a large one.
func TestSmallMailTakesSmallBlocks(t *testing.T) {
	for _, tc := range []struct {
		size int64
		most int
	}{
		{0, smallBytes}, {2 << 10, smallBytes}, {12 << 10, smallBytes}, {16 << 10, 2 * blockBytes}, {1 << 30, 2 * blockBytes},
	} {
		b := blocksFor(tc.size).Get().(*block)
		if cap(b.out) > tc.most || int64(cap(b.out)) < min(tc.size, blockBytes) {
			t.Errorf("a message of %d bytes gets a block of %d", tc.size, cap(b.out))
		}
	}
}
