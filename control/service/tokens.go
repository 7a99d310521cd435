package service

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// The lives of join tokens.
const (
	DefaultRelayTokenTTL   = time.Hour
	DefaultControlTokenTTL = 15 * time.Minute
	MaxTokenTTL            = 24 * time.Hour
	minTokenTTL            = time.Second
)

// TokenRequest asks for a join token. Zero values mean the defaults: one use,
// an hour for relays and 15 minutes for servers, from anywhere, any name.
type TokenRequest struct {
	Role     control.NodeRole
	TTL      time.Duration // at most 24 h
	Uses     int           // 1 to 1,000
	Labels   map[string]string
	CIDRs    []netip.Prefix
	NameGlob string
	Approve  bool // nodes wait, pending, until an operator accepts them
}

// CreateToken makes a join token. The second result is the text to paste,
// which holds the secret and is not kept.
func (s *Service) CreateToken(ctx context.Context, a Actor, req TokenRequest, c Change) (*control.JoinToken, string, error) {
	const op = "service.CreateToken"
	need := control.RoleOperator
	if req.Role == control.NodeControl {
		need = control.RoleAdmin
	}
	if err := s.enter(a, need, op); err != nil {
		return nil, "", err
	}
	if req.TTL == 0 {
		req.TTL = DefaultRelayTokenTTL
		if req.Role == control.NodeControl {
			req.TTL = DefaultControlTokenTTL
		}
	}
	if req.TTL < minTokenTTL || req.TTL > MaxTokenTTL {
		return nil, "", fault.Field(op, "ttl", "%s is out of range: a token lives %s to %s", req.TTL, minTokenTTL, MaxTokenTTL)
	}
	if req.Uses == 0 {
		req.Uses = 1
	}
	if req.Uses < 1 || req.Uses > command.MaxTokenUses {
		return nil, "", fault.Field(op, "uses", "%d is out of range: a token is good for 1 to %d uses", req.Uses, command.MaxTokenUses)
	}
	if req.Approve {
		if req.Role != control.NodeRelay {
			return nil, "", fault.Field(op, "approve", "only relays wait for approval: a control server is watched when it is promoted")
		}
		if err := s.approvalKnown(op); err != nil {
			return nil, "", err
		}
	}
	cluster, err := s.Cluster()
	if err != nil {
		return nil, "", err
	}
	pins, err := s.pins(cluster)
	if err != nil {
		return nil, "", err
	}
	at := now()
	row := control.JoinToken{Role: req.Role, UsesMax: uint32(req.Uses), UsesLeft: uint32(req.Uses), NotAfter: at.Add(req.TTL).Truncate(time.Millisecond), Labels: labelRows(req.Labels), NameGlob: req.NameGlob, Approve: req.Approve, CreatedAt: at}
	for _, p := range req.CIDRs {
		if err := checkNetwork(op, p); err != nil {
			return nil, "", err
		}
		row.CIDRs = append(row.CIDRs, p.Masked())
	}
	stamp(&row.ID, at)
	token := pki.NewJoinToken(pki.Role(req.Role), row.ID, pins...)
	row.SecretHash = token.SecretHash()
	out, err := propose[control.JoinToken](ctx, s, &command.TokenCreate{Meta: c.meta(a), Token: command.JoinTokenRecord(&row)})
	if err != nil {
		return nil, "", err
	}
	return out, token.String(), nil
}

func labelRows(m map[string]string) []control.Label {
	out := make([]control.Label, 0, len(m))
	for k, v := range m {
		out = append(out, control.Label{Key: k, Value: v})
	}
	slices.SortFunc(out, func(x, y control.Label) int { return strings.Compare(x.Key, y.Key) })
	return out
}

// Tokens returns the join tokens, oldest first.
func (s *Service) Tokens(a Actor) ([]*control.JoinToken, error) {
	if err := s.enter(a, control.RoleOperator, "service.Tokens"); err != nil {
		return nil, err
	}
	return s.state.Read().Tokens(), nil
}

// RevokeToken ends a token at once.
func (s *Service) RevokeToken(ctx context.Context, a Actor, id string, c Change) (*control.JoinToken, error) {
	if err := s.enter(a, control.RoleOperator, "service.RevokeToken"); err != nil {
		return nil, err
	}
	var token ids.Token
	if !parseID(&token, id) || s.state.Read().Token(token) == nil {
		return nil, notFound("token", "token", id)
	}
	return propose[control.JoinToken](ctx, s, &command.TokenRevoke{Meta: c.meta(a), Token: token[:]})
}

// TokenSecretHash returns the SHA-256 of a token's secret, with which enrolment
// checks a proof. An unknown token is Unauthenticated, as a wrong proof is. A
// server that follows first catches up with the leader: the token may have been
// made a moment ago. It does so for every token, so that the time an answer
// takes does not tell which ones exist.
func (s *Service) TokenSecretHash(ctx context.Context, id ids.Token) ([32]byte, error) {
	if !s.log.Ready() {
		if err := s.log.Fence(ctx); err != nil {
			return [32]byte{}, err
		}
	}
	t := s.state.Read().Token(id)
	if t == nil {
		return [32]byte{}, fault.New(fault.Unauthenticated, "service.TokenSecretHash", "the token is unknown, or its proof is wrong")
	}
	return t.SecretHash, nil
}

// RedeemRequest is a certificate request whose proof enrolment has checked.
type RedeemRequest struct {
	TokenID    ids.Token
	CSRHash    [32]byte
	Role       string // "relay" or "control"
	Name       string
	RemoteAddr netip.Addr
	Labels     map[string]string
	Version    string
	Addresses  []netip.Addr
}

// RedeemToken makes the node of a certificate request, or finds the one it was
// made before: the same request always gives the same node. Errors say whether
// the token expired, is used up or revoked, is for another role, or does not
// allow the address or name.
func (s *Service) RedeemToken(ctx context.Context, req RedeemRequest) (node ids.Node, nodeState string, err error) {
	if err := s.enter(System, control.RoleAdmin, "service.RedeemToken"); err != nil {
		return node, "", err
	}
	if !req.RemoteAddr.IsValid() {
		return node, "", fault.Field("service.RedeemToken", "remote", "is not an address")
	}
	stamp(&node, now())
	cmd := &command.TokenRedeem{Meta: &command.Meta{Actor: "join", Reason: "token " + req.TokenID.String()}, Token: req.TokenID[:], CsrHash: req.CSRHash[:], Role: req.Role, Node: node[:],
		Name: req.Name, Remote: req.RemoteAddr.Unmap().AsSlice(), Version: req.Version}
	for _, l := range labelRows(req.Labels) {
		cmd.Labels = append(cmd.Labels, &command.Label{Key: l.Key, Value: l.Value})
	}
	for _, a := range req.Addresses {
		cmd.Addresses = append(cmd.Addresses, a.Unmap().AsSlice())
	}
	row, err := propose[control.Node](ctx, s, cmd)
	if err != nil {
		return ids.Node{}, "", err
	}
	return row.ID, string(row.State), nil
}
