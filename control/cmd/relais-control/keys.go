package main

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control/api"
)

// keysPeriod is how often the leader looks whether a signing key goes on.
const keysPeriod = 2 * time.Second

// watchKeys takes signing keys through their lives while this server leads.
func (s *server) watchKeys(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error {
		tick := time.NewTicker(keysPeriod)
		defer tick.Stop()
		watch := s.service.NewKeys()
		for {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				if !s.cluster.Ready() {
					watch = s.service.NewKeys()
					continue
				}
				if err := watch.Step(ctx, now); err != nil && ctx.Err() == nil {
					s.logger.Warn("signing keys did not go on", "error", err)
				}
			}
		}
	})
}

func (a *app) domainDKIM() *cobra.Command {
	rotate := &cobra.Command{
		Use: "rotate DOMAIN", Short: "Make new DKIM keys and print the records to publish",
		Long: `Make new DKIM keys for a domain, RSA and Ed25519. Mail is signed with the former
ones until DNS has shown the new records for dkim_publish_hold of the policy's
section delivery. The former records must stay until domain show says that they
may go: 14 days after the last relay stopped signing with them.`,
		Example: "  relais-control domain dkim rotate example.com --reason 'yearly'", Args: cobra.ExactArgs(1),
	}
	why := reasonFlag(rotate)
	rotate.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/domains/" + url.PathEscape(args[0]) + "/dkim/rotate", reason: *why}, printDomain(false))
	}
	rollback := &cobra.Command{
		Use: "rollback DOMAIN", Short: "Give up new DKIM keys, or sign with the former ones again",
		Long: `While new keys wait to sign, give them up. Afterwards let the newest former key
of each algorithm sign again, if DNS shows its record.`,
		Example: "  relais-control domain dkim rollback example.com --reason 'a receiver refuses the new key'", Args: cobra.ExactArgs(1),
	}
	whyBack := reasonFlag(rollback)
	force := rollback.Flags().Bool("force", false, "even if DNS does not show the records of the former keys")
	rollback.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/domains/" + url.PathEscape(args[0]) + "/dkim/rollback", body: map[string]bool{"force": *force}, reason: *whyBack}, printDomain(false))
	}
	return group("dkim", "Rotate the DKIM keys of a domain", rotate, rollback)
}

func printKeys(w io.Writer, keys []api.DomainKey) error {
	rows := make([][]string, 0, len(keys))
	for _, k := range keys {
		waits := k.Waits
		if waits == "" {
			waits = "-"
		}
		rows = append(rows, []string{k.Selector, k.Algorithm, k.State, whenOr(k.Since, "-"), waits})
	}
	return printTable(w, "SELECTOR ALGORITHM STATE SINCE WAITS-FOR", rows)
}
