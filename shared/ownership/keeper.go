package ownership

import (
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

// Config holds the lengths of time that both halves must agree on. They are about
// floating addresses only.
type Config struct {
	TTL      time.Duration // an address is usable this long after the report that earned it was sent
	Guard    time.Duration // a relay opens no session this long before the end
	Takeover time.Duration // beyond the end, until another relay may have the address
}

// DefaultConfig returns the values for a cluster on one network.
func DefaultConfig() Config {
	return Config{TTL: 2 * time.Minute, Guard: 5 * time.Second, Takeover: 10 * time.Second}
}

// Validate refuses lengths that do not fit together.
func (c Config) Validate() error {
	switch {
	case c.TTL < 10*time.Second || c.TTL > 10*time.Minute:
		return fault.Field(op, "ttl", "is %v, write 10s to 10m", c.TTL)
	case c.Guard < 0 || c.Guard > c.TTL/4:
		return fault.Field(op, "guard", "is %v, write 0s to %v", c.Guard, c.TTL/4)
	case c.Takeover < time.Second || c.Takeover > time.Minute:
		return fault.Field(op, "takeover", "is %v, write 1s to 1m", c.Takeover)
	}
	return nil
}

// Keeper is the leader's half for floating addresses: since when each relay may
// have been silent. It begins with the barrier of a term and lives as long as the
// term. What a relay's report earns is told to it only when a command that was
// proposed after the report came is committed, as with every lease.
type Keeper struct {
	cfg     Config
	barrier lease.Instant
	heard   map[ids.Node]lease.Instant
}

// NewKeeper returns the half of a leader whose own barrier was applied at an
// instant. Former leaders prolonged nothing after it.
func NewKeeper(cfg Config, barrier lease.Instant) *Keeper {
	return &Keeper{cfg: cfg, barrier: barrier, heard: make(map[ids.Node]lease.Instant)}
}

// Heard takes it that a relay's report was received at an instant.
func (k *Keeper) Heard(now lease.Instant, n ids.Node) {
	k.heard[n] = max(k.heard[n], now)
}

// Over reports whether a silent relay's leases of floating addresses are over by
// its own clock, whatever that is, and have been for the time of a takeover: then
// the leader may propose Reclaim.
func (k *Keeper) Over(now lease.Instant, n ids.Node) bool {
	basis := max(k.barrier, k.heard[n])
	return now > basis.Add(lease.Outlast(k.cfg.TTL)+k.cfg.Takeover)
}
