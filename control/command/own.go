package command

import (
	"strconv"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// The commands about where relays take mail of others, and about addresses on
// their way from one relay to another.
const (
	TypeNodeHandover Type = 100
	TypeIPRetire     Type = 101
	TypeIPLeft       Type = 102
	TypeIPQuarantine Type = 103
	TypeIPReclaim    Type = 121
	TypeIPHeard      Type = 122
)

func ownType(c Command) Type {
	switch c.(type) {
	case *NodeHandover:
		return TypeNodeHandover
	case *IPRetire:
		return TypeIPRetire
	case *IPLeft:
		return TypeIPLeft
	case *IPQuarantine:
		return TypeIPQuarantine
	case *IPReclaim:
		return TypeIPReclaim
	case *IPHeard:
		return TypeIPHeard
	}
	return 0
}

// HandoverNone is the address of a relay that took mail of others and does not
// any more: it stays known to those who have offered it some.
const HandoverNone = "-"

// maxHandoverBytes bounds an address as host:port: a host name has at most 253.
const maxHandoverBytes = 260

// Validate implements Command.
func (c *NodeHandover) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("node", c.GetNode(), 16, 16), checkHandover(c.GetAddress()))
}

// Validate implements Command.
func (c *IPRetire) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16))
}

// Validate implements Command.
func (c *IPLeft) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16), checkBytes("node", c.GetNode(), 16, 16))
}

// Validate implements Command.
func (c *IPQuarantine) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16))
}

// Validate implements Command.
func (c *IPReclaim) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16))
}

// MaxLeaseProcesses is how many processes one command notes.
const MaxLeaseProcesses = 5000

// Validate implements Command.
func (c *IPHeard) Validate() error {
	if n := len(c.GetProcesses()); n > MaxLeaseProcesses {
		return fault.Field(opValidate, "processes", "%d are more than the limit of %d", n, MaxLeaseProcesses)
	}
	for _, p := range c.GetProcesses() {
		if err := checkBytes("node", p.GetNode(), 16, 16); err != nil {
			return err
		}
	}
	return checkMeta(c.GetMeta())
}

// checkHandover refuses what is neither HandoverNone nor host:port.
func checkHandover(address string) error {
	if address == HandoverNone {
		return nil
	}
	at := strings.LastIndexByte(address, ':')
	strange := strings.ContainsFunc(address, func(r rune) bool { return r <= ' ' || r > '~' })
	if at < 1 || len(address) > maxHandoverBytes || strange {
		return fault.Field(opValidate, "handover_address", "is not an address such as edge-1.example:7445 or [2001:db8::1]:7445")
	}
	if port, err := strconv.ParseUint(address[at+1:], 10, 16); err != nil || port == 0 {
		return fault.Field(opValidate, "handover_address", "has no port of 1 to 65535")
	}
	return nil
}
