package enroll

import (
	"crypto/sha256"
	"net/netip"
	"sync"
	"time"
	"unicode"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// readRequest checks the form of a request. Whether its token allows it is for
// the replicated state to say.
func readRequest(request *wire.JoinRequest, remote netip.Addr) (Redemption, error) {
	const op = "enroll.readRequest"
	r := Redemption{
		Role: pki.Role(request.GetRole()), CSRHash: sha256.Sum256(request.GetCsr()), Remote: remote,
		Name: request.GetName(), Labels: request.GetLabels(), Version: request.GetVersion(),
	}
	if !r.Role.Valid() {
		return r, fault.Field(op, "role", "%.20q is neither relay nor control", request.GetRole())
	}
	if err := wire.DecodeID(request.GetTokenId(), &r.Token); err != nil || r.Token.IsZero() {
		return r, fault.Field(op, "token", "the token has no id: paste the whole token")
	}
	if !isText(r.Name, maxNameBytes) {
		return r, fault.Field(op, "name", "a node name is printable and at most %d bytes long", maxNameBytes)
	}
	if !isText(r.Version, maxVersionBytes) {
		return r, fault.Field(op, "version", "a version is printable and at most %d bytes long", maxVersionBytes)
	}
	if len(r.Labels) > maxLabels {
		return r, fault.Field(op, "labels", "%d labels, at most %d", len(r.Labels), maxLabels)
	}
	for key, value := range r.Labels {
		if key == "" || !isText(key, maxLabelBytes) || !isText(value, maxLabelBytes) {
			return r, fault.Field(op, "labels", "keys and values are printable and at most %d bytes long", maxLabelBytes)
		}
	}
	addresses, err := wire.DecodeAddresses(request.GetAddresses(), maxAddresses)
	if err != nil {
		return r, err
	}
	r.Addresses = addresses
	return r, nil
}

func isText(s string, maxBytes int) bool {
	if len(s) > maxBytes {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

const (
	maxFailures       = 10 // of one client network within failureWindow
	failureWindow     = time.Minute
	maxFailureEntries = 4096
)

// failureLimit counts failed proofs by client network. A secret of 160 bits
// cannot be guessed; the limit keeps the log and the raft leader from those who
// try.
type failureLimit struct {
	mu      sync.Mutex
	entries map[netip.Prefix]failureEntry
}

type failureEntry struct {
	start time.Time
	count int
}

func newFailureLimit() *failureLimit {
	return &failureLimit{entries: make(map[netip.Prefix]failureEntry)}
}

// network returns what one party is likely to own: one IPv4 address, or a /64.
func network(address netip.Addr) netip.Prefix {
	bits := 64
	if address.Is4() {
		bits = 32
	}
	prefix, err := address.Prefix(bits)
	if err != nil { // the zero address alone
		return netip.Prefix{}
	}
	return prefix
}

// blocked returns how long a client has to wait, 0 if it may try.
func (l *failureLimit) blocked(address netip.Addr, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	entry := l.entries[network(address)]
	if entry.count < maxFailures {
		return 0
	}
	return max(0, entry.start.Add(failureWindow).Sub(now))
}

// failed counts one failure. When the table is full of fresh entries, new
// networks share one, so that a distributed attempt blocks itself first.
func (l *failureLimit) failed(address netip.Addr, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := network(address)
	if _, ok := l.entries[key]; !ok && len(l.entries) >= maxFailureEntries {
		for k, entry := range l.entries {
			if now.Sub(entry.start) >= failureWindow {
				delete(l.entries, k)
			}
		}
		if len(l.entries) >= maxFailureEntries {
			key = netip.Prefix{}
		}
	}
	entry := l.entries[key]
	if now.Sub(entry.start) >= failureWindow {
		entry = failureEntry{start: now}
	}
	entry.count++
	l.entries[key] = entry
}
