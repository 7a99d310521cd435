package command

import (
	"strconv"
	"strings"

	"github.com/relais-mta/relais/shared/fault"
)

// The commands about where relays take mail of others.
const (
	TypeNodeHandover Type = 100
)

func ownType(c Command) Type {
	switch c.(type) {
	case *NodeHandover:
		return TypeNodeHandover
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
