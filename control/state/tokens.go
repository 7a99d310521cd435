package state

import (
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// tokenKeptAfterExpiry is how long a dead token stays to explain itself.
const tokenKeptAfterExpiry = 24 * time.Hour

var tokensTable = &table[control.JoinToken]{
	name: "join tokens", section: sectionTokens, maxRows: maxTokens,
	key:      func(t *control.JoinToken) []byte { return t.ID[:] },
	record:   func(t *control.JoinToken) proto.Message { return command.JoinTokenRecord(t) },
	row:      unmarshalRow[command.JoinToken, control.JoinToken],
	revision: func(t *control.JoinToken) *uint64 { return &t.Revision },
}

func (a *applier) tokenCreate(c *command.TokenCreate) (any, error) {
	row, err := c.GetToken().Row()
	if err != nil {
		return nil, err
	}
	a.dropDeadTokens()
	return putRow(a, tokensTable, row, change[control.JoinToken]{what: "the token", object: row.ID.String(), check: func(*control.JoinToken) error {
		if row.UsesLeft != row.UsesMax || len(row.Redemptions) > 0 || row.Revoked {
			return fault.Field(op, "token", "a new token is unused")
		}
		return nil
	}})
}

// dropDeadTokens makes room: tokens that ended a while ago are forgotten.
func (a *applier) dropDeadTokens() {
	for _, t := range all(a.txn, tokensTable) {
		if a.now.Sub(t.NotAfter) > tokenKeptAfterExpiry {
			remove(a, tokensTable, t)
		}
	}
}

// tokenRedeem turns a certificate request into a node, once: the same request
// gives the same node again, so a lost reply costs nothing.
func (a *applier) tokenRedeem(c *command.TokenRedeem) (any, error) {
	t := get(a.txn, tokensTable, "id", c.GetToken())
	if t == nil {
		return nil, fault.New(fault.Unauthenticated, op, "the token is unknown, or its proof is wrong")
	}
	if t.Revoked {
		return nil, fault.New(fault.Denied, op, "token %s was revoked: create a new one with `relais-control token create`", t.ID)
	}
	if string(t.Role) != c.GetRole() {
		return nil, fault.Field(op, "role", "token %s lets a %s join, not a %s: create one with --role %s", t.ID, t.Role, c.GetRole(), c.GetRole())
	}
	for _, r := range t.Redemptions {
		if string(r.CSRHash[:]) == string(c.GetCsrHash()) {
			if c.GetServer() != nil {
				return a.serverRedeemedBefore(r.Node)
			}
			return a.redeemedBefore(r.Node)
		}
	}
	if err := a.tokenAllows(t, c); err != nil {
		return nil, err
	}
	if c.GetServer() != nil {
		return a.serverRedeem(t, c)
	}
	node, err := a.nodeOf(t, c)
	if err != nil {
		return nil, err
	}
	if get(a.txn, nodesTable, "id", node.ID[:]) != nil {
		return nil, fault.New(fault.Exists, op, "node %s exists already", node.ID)
	}
	if err := a.spend(t, c, node.ID); err != nil {
		return nil, err
	}
	if err := put(a, nodesTable, node); err != nil {
		return nil, err
	}
	a.audit(node.ID.String(), "", node.Summary())
	return node, nil
}

// spend takes one use of the token for a node.
func (a *applier) spend(t *control.JoinToken, c *command.TokenRedeem, id ids.Node) error {
	used := *t
	used.UsesLeft--
	used.Redemptions = append(slices.Clone(t.Redemptions), control.Redemption{CSRHash: [32]byte(c.GetCsrHash()), Node: id})
	return put(a, tokensTable, &used)
}

func (a *applier) redeemedBefore(id ids.Node) (any, error) {
	node := get(a.txn, nodesTable, "id", id[:])
	if node == nil || node.State == control.NodeEvicted {
		return nil, fault.New(fault.Denied, op, "node %s was evicted: remove the machine's identity and join with a new token", id)
	}
	return node, nil
}

// tokenAllows checks everything a token limits.
func (a *applier) tokenAllows(t *control.JoinToken, c *command.TokenRedeem) error {
	if !a.now.Before(t.NotAfter) {
		return fault.New(fault.Denied, op, "token %s expired at %s, the cluster's clock says %s: create a new one with `relais-control token create`",
			t.ID, t.NotAfter.UTC().Format(time.RFC3339), a.now.UTC().Format(time.RFC3339))
	}
	if t.UsesLeft == 0 {
		return fault.New(fault.Denied, op, "token %s is used up (%d of %d): create a new one, with --uses for several machines", t.ID, t.UsesMax, t.UsesMax)
	}
	remote, ok := netip.AddrFromSlice(c.GetRemote())
	if !ok {
		return fault.Field(op, "remote", "is not an address")
	}
	remote = remote.Unmap()
	inside := len(t.CIDRs) == 0
	for _, p := range t.CIDRs {
		inside = inside || p.Contains(remote)
	}
	if !inside {
		return fault.Field(op, "cidr", "%s is outside the networks of token %s (%s): create one with --cidr %s", remote, t.ID, joinPrefixes(t.CIDRs), remote)
	}
	if t.NameGlob != "" {
		if match, err := path.Match(t.NameGlob, c.GetName()); err != nil || !match {
			return fault.Field(op, "name", "%q does not match %q, the names of token %s", c.GetName(), t.NameGlob, t.ID)
		}
	}
	return nil
}

func joinPrefixes(in []netip.Prefix) string {
	out := make([]string, len(in))
	for i, p := range in {
		out[i] = p.String()
	}
	return strings.Join(out, ", ")
}

// nodeOf makes the node of a redemption. The token's labels win over what the
// machine says of itself: they are the operator's.
func (a *applier) nodeOf(t *control.JoinToken, c *command.TokenRedeem) (*control.Node, error) {
	labels := slices.Clone(t.Labels)
	for _, l := range c.LabelRows() {
		if !slices.ContainsFunc(labels, func(o control.Label) bool { return o.Key == l.Key }) {
			labels = append(labels, l)
		}
	}
	slices.SortFunc(labels, func(x, y control.Label) int { return strings.Compare(x.Key, y.Key) })
	if len(labels) > command.MaxLabels {
		return nil, fault.Field(op, "label", "%d labels are too many, allowed are %d", len(labels), command.MaxLabels)
	}
	node := &control.Node{Name: c.GetName(), State: control.NodeActive, Labels: labels, Version: c.GetVersion(), Token: t.ID, JoinedAt: a.now}
	if t.Approve {
		node.State = control.NodePending
	}
	if err := readID(&node.ID, c.GetNode()); err != nil {
		return nil, err
	}
	for _, b := range c.GetAddresses() {
		if addr, ok := netip.AddrFromSlice(b); ok {
			node.Addresses = append(node.Addresses, addr.Unmap())
		}
	}
	return node, nil
}

func (a *applier) tokenRevoke(c *command.TokenRevoke) (any, error) {
	old := get(a.txn, tokensTable, "id", c.GetToken())
	if old == nil {
		return nil, fault.New(fault.NotFound, op, "there is no such token")
	}
	row := *old
	row.Revoked = true
	return putRow(a, tokensTable, &row, change[control.JoinToken]{what: "the token", object: row.ID.String(), expect: old.Revision})
}

// Token returns the token, or nil.
func (r *Reader) Token(id ids.Token) *control.JoinToken { return get(r.txn, tokensTable, "id", id[:]) }

// Tokens returns the tokens, oldest first.
func (r *Reader) Tokens() []*control.JoinToken { return all(r.txn, tokensTable) }
