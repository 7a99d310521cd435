package control

import (
	"fmt"
	"time"
)

// RecoveryCause says how a cluster came into recovery mode.
type RecoveryCause string

// The causes.
const (
	CauseRestore RecoveryCause = "restore" // from a backup
	CauseRecover RecoveryCause = "recover" // from the disk of a server that survived
)

// MinRecovery is how long recovery mode lasts at least, and with long leases twice
// their life: whatever a relay may hold from before has ended.
const MinRecovery = time.Minute

// Recovery is the one row that says that the cluster is in recovery mode: its
// state may be older than what relays do, so nothing that a relay may hold is
// given to another one until every active relay was heard or waived.
type Recovery struct {
	Generation uint64
	Since      time.Time
	Cause      RecoveryCause
	Revision   uint64
}

// Summary renders the row for the audit tail.
func (r *Recovery) Summary() string {
	return fmt.Sprintf("generation=%d cause=%s since=%s", r.Generation, r.Cause, r.Since.UTC().Format(time.RFC3339))
}
