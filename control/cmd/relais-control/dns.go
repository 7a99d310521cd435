package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/monitor"
	"github.com/relais-mta/relais/shared/fault"
)

// watchDNS gives the service its view of DNS and looks, while this server
// leads, at the addresses and domains of the cluster.
func (s *server) watchDNS(ctx context.Context, group *errgroup.Group) {
	resolver := monitor.NewResolver(s.conf.DNS.Resolvers)
	s.service.SetDNS(resolver)
	watch := monitor.NewWatch(s.service, resolver, s.logger, time.Now)
	group.Go(func() error { watch.Run(ctx); return nil })
}

func (a *app) domainCheck() *cobra.Command {
	return &cobra.Command{
		Use: "check DOMAIN", Short: "Compare the DNS records of a domain with what they should be",
		Long: `Ask DNS for the records of a domain: ownership, DKIM keys, SPF of the return path
for every address, MX of the return path, DMARC, and the reverse DNS of every
address. It fails if a required record is missing or wrong, or not known.`,
		Example: "  relais-control domain check example.com\n  relais-control domain check example.com --json", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var check api.DomainCheck
			err := show(a, cmd, call{method: http.MethodPost, path: "/domains/" + url.PathEscape(args[0]) + "/check"}, func(w io.Writer, c api.DomainCheck) error {
				check = c
				return printCheck(w, c)
			})
			if err != nil || check.OK || a.json {
				return err
			}
			return fault.New(fault.Invalid, "relais-control", "%s is not ready: publish what is missing, `relais-control domain show %s` prints it", check.Name, check.Name)
		},
	}
}

func printCheck(w io.Writer, c api.DomainCheck) error {
	rows := make([][]string, 0, len(c.Findings))
	for _, f := range c.Findings {
		status := f.Status
		if status == "wrong" && !f.Required {
			status = "advice"
		}
		rows = append(rows, []string{status, f.Check, f.Name, f.Detail})
	}
	return printTable(w, "STATUS CHECK NAME DETAIL", rows)
}

// reverseText words the standing of an address.
func reverseText(i api.IP) string {
	text := i.Reverse
	if text == "" {
		text = "unchecked"
	}
	if i.Overridden {
		text += ", overridden"
	}
	return text
}

func printIP(w io.Writer, i api.IP) error {
	used := ""
	switch {
	case i.State == "quarantined":
		used = "no: it is in quarantine; see `relais-control ip unquarantine`"
	case i.State == "releasing":
		used = "no: " + i.Unused + "; it is free when that relay says so"
	case i.Unused != "" && i.Reverse != "confirmed" && !i.Overridden && i.Node != "":
		used = "no: " + i.Unused + "; see `relais-control ip check`, or `ip override` to use it anyhow"
	case i.Unused != "":
		used = "no: " + i.Unused
	}
	return printPairs(w, "Id", i.ID, "Bind", i.Bind, "Public", i.Public, "EHLO", i.EHLO, "Pool", i.PoolName, "Node", i.NodeName, "State", i.State, "Lease", leaseText(i), "Quarantine", i.Quarantine, "Reverse DNS", reverseText(i), "Found", i.ReverseDetail, "Used", used,
		"Epoch", fmt.Sprint(i.Epoch), "Revision", fmt.Sprint(i.Revision))
}

func (a *app) ipCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use: "check ADDRESS", Short: "Check the reverse DNS of an address now",
		Long: `Check that the PTR record of the address gives its name, and that the name leads
back to it, and record the verdict. An address is used only while that is so, or
while an operator overrides it. The leader checks by itself, too.`,
		Example: "  relais-control ip check 198.51.100.7", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/ips/" + url.PathEscape(args[0]) + "/check", reason: *reason}, printIP)
	}
	return cmd
}

func (a *app) ipOverride() *cobra.Command {
	cmd := &cobra.Command{
		Use: "override ADDRESS --reason TEXT", Short: "Use an address without confirmed reverse DNS, or end that",
		Example: "  relais-control ip override 198.51.100.7 --reason 'the provider sets the PTR tomorrow, ticket 4711'\n  relais-control ip override 198.51.100.7 --end",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	end := cmd.Flags().Bool("end", false, "go by the check again")
	expect := cmd.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !*end && *reason == "" {
			return usagef("--reason is missing: say why the address is used without confirmed reverse DNS")
		}
		return show(a, cmd, call{method: http.MethodPut, path: "/ips/" + url.PathEscape(args[0]) + "/override", body: map[string]bool{"use": !*end}, ifMatch: revisionText(cmd, *expect), reason: *reason}, printIP)
	}
	return cmd
}
