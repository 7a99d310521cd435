package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// byTenant asks for the rows of one tenant.
type byTenant struct {
	Tenant string `query:"tenant" doc:"Id or name; empty: all"`
}

func (s *server) registerOpen(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/version", id: "get-version", summary: "What answers", open: true},
		func(context.Context, *struct{}) (*Out[Version], error) {
			i := s.svc.Info()
			return out(Version{Version: i.Version, Cluster: i.Cluster.String(), Commands: i.Commands, Leader: i.Leader, Index: i.Index, Revision: i.Revision}, i.Index), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/health", id: "get-health", summary: "Whether this server serves", open: true},
		func(context.Context, *struct{}) (*healthOut, error) {
			if err := s.svc.Health(); err != nil {
				return &healthOut{Status: http.StatusServiceUnavailable, Body: Health{Status: "unsound", Detail: fault.Public(err)}}, nil
			}
			if !s.svc.Fresh() {
				return &healthOut{Status: http.StatusServiceUnavailable, Body: Health{Status: "no-leader", Detail: "this server is not in touch with the cluster's leader"}}, nil
			}
			return &healthOut{Status: http.StatusOK, Body: Health{Status: "ok"}}, nil
		})
}

type healthOut struct {
	Status int
	Body   Health
}

type tenantPath struct {
	Tenant string `path:"tenant" doc:"Id or name"`
}

func (s *server) registerTenants(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/tenants", id: "list-tenants", summary: "List tenants"},
		func(ctx context.Context, _ *struct{}) (*List[Tenant], error) {
			rows, err := s.svc.Tenants(actorOf(ctx))
			return list(rows, s.tenantOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/tenants", id: "add-tenant", summary: "Add a tenant and its default project", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Name string `json:"name" doc:"Letters, digits, '.', '-' and '_'"`
			}
		}) (*Out[Tenant], error) {
			row, err := s.svc.AddTenant(ctx, actorOf(ctx), in.Body.Name, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(s.tenantOf(row), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/tenants/{tenant}", id: "get-tenant", summary: "Show a tenant"},
		func(ctx context.Context, in *tenantPath) (*Out[Tenant], error) {
			row, err := s.svc.Tenant(actorOf(ctx), in.Tenant)
			if err != nil {
				return nil, err
			}
			return out(s.tenantOf(row), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodPut, path: "/tenants/{tenant}/suspended", id: "suspend-tenant", summary: "Suspend or resume a tenant"},
		func(ctx context.Context, in *struct {
			Tenant string `path:"tenant" doc:"Id or name"`
			Precondition
			Body struct {
				Suspended bool `json:"suspended"`
			}
		}) (*Out[Tenant], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.SuspendTenant(ctx, actorOf(ctx), in.Tenant, in.Body.Suspended, c)
			if err != nil {
				return nil, err
			}
			return out(s.tenantOf(row), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/projects", id: "list-projects", summary: "List projects"},
		func(ctx context.Context, in *byTenant) (*List[Project], error) {
			rows, err := s.svc.Projects(actorOf(ctx), in.Tenant)
			return list(rows, projectOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/projects", id: "add-project", summary: "Add a project", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Tenant string `json:"tenant" doc:"Id or name"`
				Name   string `json:"name" doc:"Letters, digits, '.', '-' and '_'"`
			}
		}) (*Out[Project], error) {
			row, err := s.svc.AddProject(ctx, actorOf(ctx), in.Body.Tenant, in.Body.Name, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(projectOf(row), row.Revision), nil
		})
}

func (s *server) registerSending(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/domains", id: "list-domains", summary: "List sending domains"},
		func(ctx context.Context, in *byTenant) (*List[Domain], error) {
			rows, err := s.svc.Domains(actorOf(ctx), in.Tenant)
			return list(rows, domainOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/domains", id: "add-domain", summary: "Add a sending domain with a fresh signing key", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body struct {
				Tenant     string `json:"tenant" doc:"Id or name"`
				Name       string `json:"name"`
				ReturnPath string `json:"return_path,omitempty" doc:"Domain of return paths; empty: rp. and the name"`
				Selector   string `json:"selector,omitempty" doc:"DKIM selector; empty: r and the date"`
			}
		}) (*Out[Domain], error) {
			v, err := s.svc.AddDomain(ctx, actorOf(ctx), service.DomainRequest(in.Body), service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(domainOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/domains/{domain}", id: "get-domain", summary: "Show a domain and its DNS records"},
		func(ctx context.Context, in *struct {
			Domain string `path:"domain"`
		}) (*Out[Domain], error) {
			v, err := s.svc.Domain(actorOf(ctx), in.Domain)
			if err != nil {
				return nil, err
			}
			return out(domainOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/credentials", id: "list-credentials", summary: "List credentials"},
		func(ctx context.Context, in *byTenant) (*List[Credential], error) {
			rows, err := s.svc.Credentials(actorOf(ctx), in.Tenant)
			return list(rows, credentialOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/credentials", id: "create-credential", summary: "Create a credential; its secret is in this answer only", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body CredentialCreate
		}) (*Out[Credential], error) {
			req, err := in.Body.request()
			if err != nil {
				return nil, err
			}
			row, secret, err := s.svc.CreateCredential(ctx, actorOf(ctx), req, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			body := credentialOf(row)
			body.Secret = secret
			return out(body, row.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/credentials/{credential}/revoke", id: "revoke-credential", summary: "Revoke a credential for good"},
		func(ctx context.Context, in *struct {
			Precondition
			Credential string `path:"credential"`
		}) (*Out[Credential], error) {
			row, err := s.svc.RevokeCredential(ctx, actorOf(ctx), in.Credential, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(credentialOf(row), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/credentials/{credential}/rotate", id: "rotate-credential", summary: "Give a credential a new secret; it is in this answer only"},
		func(ctx context.Context, in *struct {
			Precondition
			Credential string `path:"credential"`
			Body       CredentialRotate
		}) (*Out[Credential], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			overlap := service.DefaultRotationOverlap
			if in.Body.OverlapSeconds != nil {
				overlap = time.Duration(*in.Body.OverlapSeconds) * time.Second
			}
			row, secret, err := s.svc.RotateCredential(ctx, actorOf(ctx), in.Credential, overlap, c)
			if err != nil {
				return nil, err
			}
			body := credentialOf(row)
			body.Secret = secret
			return out(body, row.Revision), nil
		})
	s.registerIPs(a)
	s.registerPools(a)
}

func (s *server) registerIPs(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/ips", id: "list-ips", summary: "List source addresses"},
		func(ctx context.Context, _ *struct{}) (*List[IP], error) {
			rows, err := s.svc.IPs(ctx, actorOf(ctx))
			return list(rows, ipOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/ips", id: "add-ip", summary: "Add a source address and, if named, assign it", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body IPAdd
		}) (*Out[IP], error) {
			req := service.IPRequest{EHLO: in.Body.EHLO, PTR: in.Body.PTR, Floating: in.Body.Floating, Node: in.Body.Node, Pool: in.Body.Pool}
			var err error
			if req.Bind, err = parseAddr("bind", in.Body.Bind); err != nil {
				return nil, err
			}
			if in.Body.Public != "" {
				if req.Public, err = parseAddr("public", in.Body.Public); err != nil {
					return nil, err
				}
			}
			row, err := s.svc.AddIP(ctx, actorOf(ctx), req, service.Change{Reason: in.Reason})
			return s.ipOut(ctx, row, err)
		})
	handle(s, a, route{method: http.MethodGet, path: "/ips/{ip}", id: "get-ip", summary: "Show a source address"},
		func(ctx context.Context, in *struct {
			IP string `path:"ip" doc:"The address or its id"`
		}) (*Out[IP], error) {
			v, err := s.svc.IPView(ctx, actorOf(ctx), in.IP)
			if err != nil {
				return nil, err
			}
			return out(ipOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/ips/{ip}/assign", id: "assign-ip", summary: "Assign an address to a relay, a pool, or both"},
		func(ctx context.Context, in *struct {
			Precondition
			IP   string `path:"ip" doc:"The address or its id"`
			Body IPAssign
		}) (*Out[IP], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.AssignIP(ctx, actorOf(ctx), in.IP, service.AssignRequest(in.Body), c)
			return s.ipOut(ctx, row, err)
		})
}

func (s *server) ipOut(ctx context.Context, row *control.Source, err error) (*Out[IP], error) {
	if err != nil {
		return nil, err
	}
	v, err := s.svc.IPView(ctx, actorOf(ctx), row.ID.String())
	if err != nil {
		return nil, err
	}
	return out(ipOf(v), v.Revision), nil
}

func parseAddr(field, text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return addr, fault.Field("api", field, "%q is not an IP address such as 192.0.2.1 or 2001:db8::1", text)
	}
	return addr, nil
}

func (s *server) registerPools(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/pools", id: "list-pools", summary: "List pools"},
		func(ctx context.Context, _ *struct{}) (*List[Pool], error) {
			rows, err := s.svc.Pools(actorOf(ctx))
			return list(rows, poolOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/pools", id: "add-pool", summary: "Add a pool", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body PoolAdd
		}) (*Out[Pool], error) {
			row, err := s.svc.AddPool(ctx, actorOf(ctx), in.Body.Name, policy.PoolKind(in.Body.Kind), in.Body.Tenant, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(poolOf(service.PoolView{Pool: *row}), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/pools/{pool}", id: "get-pool", summary: "Show a pool and its addresses"},
		func(ctx context.Context, in *struct {
			Pool string `path:"pool" doc:"Id or name"`
		}) (*Out[Pool], error) {
			v, err := s.svc.Pool(actorOf(ctx), in.Pool)
			if err != nil {
				return nil, err
			}
			return out(poolOf(v), v.Revision), nil
		})
}

type nodePath struct {
	Node string `path:"node" doc:"Id or name"`
}

func (s *server) registerNodes(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/tokens", id: "list-tokens", summary: "List join tokens"},
		func(ctx context.Context, _ *struct{}) (*List[Token], error) {
			rows, err := s.svc.Tokens(actorOf(ctx))
			return list(rows, tokenOf), err
		})
	handle(s, a, route{method: http.MethodPost, path: "/tokens", id: "create-token", summary: "Create a join token; its text is in this answer only", status: http.StatusCreated},
		func(ctx context.Context, in *struct {
			Precondition
			Body TokenCreate
		}) (*Out[Token], error) {
			req, err := in.Body.request()
			if err != nil {
				return nil, err
			}
			row, text, err := s.svc.CreateToken(ctx, actorOf(ctx), req, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			body := tokenOf(row)
			body.Secret = text
			return out(body, row.Revision), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/tokens/{token}/revoke", id: "revoke-token", summary: "Revoke a join token"},
		func(ctx context.Context, in *struct {
			Precondition
			Token string `path:"token"`
		}) (*Out[Token], error) {
			row, err := s.svc.RevokeToken(ctx, actorOf(ctx), in.Token, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(tokenOf(row), row.Revision), nil
		})
	handle(s, a, route{method: http.MethodGet, path: "/nodes", id: "list-nodes", summary: "List relays"},
		func(ctx context.Context, _ *struct{}) (*List[Node], error) {
			rows, err := s.svc.Nodes(actorOf(ctx))
			return list(rows, nodeOf), err
		})
	handle(s, a, route{method: http.MethodGet, path: "/nodes/{node}", id: "get-node", summary: "Show a relay"},
		func(ctx context.Context, in *nodePath) (*Out[Node], error) {
			v, err := s.svc.Node(actorOf(ctx), in.Node)
			if err != nil {
				return nil, err
			}
			return out(nodeOf(v), v.Revision), nil
		})
	s.registerApproval(a)
	handle(s, a, route{method: http.MethodPut, path: "/nodes/{node}/state", id: "set-node-state", summary: "Move a relay between its states; eviction is for good"},
		func(ctx context.Context, in *struct {
			Node string `path:"node" doc:"Id or name"`
			Precondition
			Body struct {
				State string `json:"state" enum:"active,draining,drained,evicted"`
			}
		}) (*Out[Node], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			row, err := s.svc.SetNodeState(ctx, actorOf(ctx), in.Node, control.NodeState(in.Body.State), c)
			if err != nil {
				return nil, err
			}
			v, err := s.svc.Node(actorOf(ctx), row.ID.String())
			return out(nodeOf(v), v.Revision), err
		})
}

func (b TokenCreate) request() (service.TokenRequest, error) {
	req := service.TokenRequest{Role: control.NodeRole(b.Role), TTL: time.Duration(b.TTLSeconds) * time.Second, Uses: b.Uses, Labels: b.Labels, NameGlob: b.NameGlob, Approve: b.Approve}
	for _, text := range b.CIDRs {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			addr, addrErr := netip.ParseAddr(text)
			if addrErr != nil {
				return req, fault.Field("api", "cidr", "%q is not a network such as 198.51.100.0/24 or an address", text)
			}
			if addr.Zone() != "" { // a prefix has none, and would silently be another network
				return req, fault.Field("api", "cidr", "%q is not a network such as 198.51.100.0/24 or an address", text)
			}
			addr = addr.Unmap()
			p = netip.PrefixFrom(addr, addr.BitLen())
		}
		req.CIDRs = append(req.CIDRs, p)
	}
	return req, nil
}

func (s *server) registerPolicy(a huma.API) {
	handle(s, a, route{method: http.MethodGet, path: "/policy", id: "get-policy", summary: "Show the policy"},
		func(ctx context.Context, _ *struct{}) (*Out[Policy], error) {
			v, err := s.svc.Policy(actorOf(ctx))
			if err != nil {
				return nil, err
			}
			return out(policyOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodPut, path: "/policy", id: "put-policy", summary: "Change sections of the policy"},
		func(ctx context.Context, in *struct {
			Precondition
			Body PolicyPut
		}) (*Out[Policy], error) {
			expect, err := in.revision()
			if err != nil {
				return nil, err
			}
			v, err := s.svc.PutPolicy(ctx, actorOf(ctx), in.Body.Sections, expect, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(policyOf(v), v.Revision), nil
		})
	s.registerVersions(a)
	handle(s, a, route{method: http.MethodGet, path: "/audit", id: "list-audit", summary: "List the newest changes"},
		func(ctx context.Context, in *struct {
			Limit  int       `query:"limit" minimum:"1" maximum:"1000" default:"100"`
			Actor  string    `query:"actor" doc:"Only changes by this operator or part of the server"`
			Object string    `query:"object" doc:"Only changes of objects with this text in their name or id"`
			Action string    `query:"action" doc:"Only changes of this kind, such as policy.put"`
			Since  time.Time `query:"since" doc:"Only changes at or after this time"`
		}) (*List[AuditEntry], error) {
			rows, err := s.svc.Audit(actorOf(ctx), service.AuditFilter{Limit: in.Limit, Actor: in.Actor, Object: in.Object, Action: in.Action, Since: in.Since})
			return list(rows, auditOf), err
		})
}
