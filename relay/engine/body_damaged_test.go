package engine

import (
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
)

// TestNoPartOfADamagedBodyIsSent: a body whose checksum is wrong is found before any
// of it is on the wire, also one that is too long for memory.
func TestNoPartOfADamagedBodyIsSent(t *testing.T) {
	w := newWorld(t, nil) // no source: mail stays
	for _, size := range []int{100, maxWholeBodyBytes + 1, 2 << 20} {
		env := *w.acceptText("Subject: x\r\n\r\n"+strings.Repeat("x", size), nil, w.at(lab.Google, 0, lab.Accept))
		carrier := &worker{engine: w.engine}
		closer, err := carrier.content(&env)
		if err != nil {
			t.Fatalf("%d octets: %v", size, err)
		}
		if closer != nil {
			if err := closer.Close(); err != nil {
				t.Error(err)
			}
		}
		env.Body.CRC32C++
		carrier = &worker{engine: w.engine}
		if _, err := carrier.content(&env); !fault.Is(err, fault.Internal) || carrier.tx.Content.Bytes != nil || carrier.tx.Content.Reader != nil {
			t.Errorf("%d octets with a wrong checksum: %v", size, err)
		}
	}
}
