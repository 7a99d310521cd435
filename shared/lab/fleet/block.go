// Package fleet starts real Relais processes around the lab: one control
// server and some relays, each on its own loopback addresses, joined by the
// documented commands. `make run` and the end-to-end tests are built on it, so
// that both go through exactly what an operator would type.
package fleet

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"github.com/relais-mta/relais/shared/fault"
)

// The addresses of one instance are a /20 of 127.16.0.0/12.
const (
	blockCount     = 256
	blockAddresses = 4096
)

// Block is a locked range of loopback addresses: several instances can run
// side by side on one machine without sharing any address.
type Block struct {
	number int
	lock   *os.File
}

// LockBlock takes the first free block. The lock is advisory, held by an open
// file in the system's temporary directory, and ends with the process.
func LockBlock() (*Block, error) {
	for n := range blockCount {
		path := filepath.Join(os.TempDir(), fmt.Sprintf("relais-block-%03d.lock", n))
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o666)
		if err != nil {
			continue // another user's file
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			return &Block{number: n, lock: f}, nil
		}
		_ = f.Close()
	}
	return nil, fault.New(fault.Exhausted, "fleet.LockBlock", "all %d blocks of 127.16.0.0/12 are in use; stop another instance", blockCount)
}

// Release gives the block back.
func (b *Block) Release() { _ = b.lock.Close() }

// Addr returns the i-th address of the block, 1 to blockAddresses-2.
func (b *Block) Addr(i int) netip.Addr {
	if i < 1 || i > blockAddresses-2 {
		panic(fmt.Sprintf("fleet: address %d is outside the block", i))
	}
	n := uint32(127)<<24 | 16<<16 | uint32(b.number*blockAddresses+i)
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// Places of things within a block.
const (
	placeControl = 1   // control server
	placeDNS     = 2   // the lab's name server
	placeHTTP    = 3   // the lab's report
	placeRelay   = 10  // listeners of relay i at placeRelay+i
	placeServer  = 100 // further control server i at placeServer+i
	placeSource  = 256 // sources of relay i at placeSource+64*i
	placeFarm    = 1024
)

// Ports, the same in every block, above 1023 so that no privilege is needed.
const (
	portDNS         = 10053
	portSMTP        = 10025 // of the lab's MX hosts
	portHTTP        = 10080
	portSubmissions = 10465
	portSubmission  = 10587
	portInbound     = 11025
	portMetrics     = 10090
	portAPI         = 10443
	portLink        = 10743
	portRaft        = 10744
	portHandover    = 10745
)
