package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"github.com/relais-mta/relais/control/service"
)

// DomainCheck is a domain compared with DNS.
type DomainCheck struct {
	Name     string    `json:"name"`
	OK       bool      `json:"ok" doc:"Every required record is as it should be"`
	Findings []Finding `json:"findings"`
}

// Finding is the outcome for one record.
type Finding struct {
	Check    string `json:"check" enum:"ownership,dkim,spf,return-path,dmarc,reverse"`
	Name     string `json:"name" doc:"What was looked up"`
	Required bool   `json:"required"`
	Status   string `json:"status" enum:"ok,wrong,unknown" doc:"unknown: DNS gave no answer"`
	Detail   string `json:"detail,omitempty" doc:"What is wrong, and the fix"`
}

func checkOf(c service.DomainCheck) DomainCheck {
	out := DomainCheck{Name: c.Name, OK: c.OK, Findings: make([]Finding, 0, len(c.Findings))}
	for _, f := range c.Findings {
		out.Findings = append(out.Findings, Finding{Check: f.Check, Name: f.Name, Required: f.Required, Status: string(f.Status), Detail: f.Detail})
	}
	return out
}

func (s *server) registerDNS(a huma.API) {
	handle(s, a, route{method: http.MethodPost, path: "/domains/{domain}/check", id: "check-domain", summary: "Compare the records of a domain with DNS now"},
		func(ctx context.Context, in *struct {
			Domain string `path:"domain"`
		}) (*Out[DomainCheck], error) {
			c, err := s.svc.CheckDomain(ctx, actorOf(ctx), in.Domain)
			if err != nil {
				return nil, err
			}
			return out(checkOf(c), s.svc.Info().Index), nil
		})
	handle(s, a, route{method: http.MethodPost, path: "/ips/{ip}/check", id: "check-ip", summary: "Check the reverse DNS of an address now"},
		func(ctx context.Context, in *struct {
			Precondition
			IP string `path:"ip" doc:"The address or its id"`
		}) (*Out[IP], error) {
			v, err := s.svc.CheckIP(ctx, actorOf(ctx), in.IP, service.Change{Reason: in.Reason})
			if err != nil {
				return nil, err
			}
			return out(ipOf(v), v.Revision), nil
		})
	handle(s, a, route{method: http.MethodPut, path: "/ips/{ip}/override", id: "override-ip", summary: "Use an address without confirmed reverse DNS, or end that"},
		func(ctx context.Context, in *struct {
			Precondition
			IP   string `path:"ip" doc:"The address or its id"`
			Body struct {
				Use bool `json:"use" doc:"true needs a reason"`
			}
		}) (*Out[IP], error) {
			c, err := in.change()
			if err != nil {
				return nil, err
			}
			v, err := s.svc.OverrideIP(ctx, actorOf(ctx), in.IP, in.Body.Use, c)
			if err != nil {
				return nil, err
			}
			return out(ipOf(v), v.Revision), nil
		})
}
