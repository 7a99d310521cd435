package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/policy"
)

// brakesPeriod is how often the leader looks whether the time of a brake is over,
// reportsTicks after how many of these reports of relays are looked at.
const (
	brakesPeriod = time.Second
	reportsTicks = 5
)

// watchBrakes ends brakes whose time is over while this server leads, and notes
// what the relays that are linked to this server tell of their reflexes.
func (s *server) watchBrakes(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error {
		tick := time.NewTicker(brakesPeriod)
		defer tick.Stop()
		for ticks := 0; ; {
			select {
			case <-ctx.Done():
				return nil
			case now := <-tick.C:
				if s.cluster.Ready() {
					if err := s.service.SweepBrakes(ctx, now); err != nil && ctx.Err() == nil {
						s.logger.Warn("brakes whose time is over were not ended", "error", err)
					}
				}
				if ticks++; ticks%reportsTicks != 0 {
					continue
				}
				if err := s.service.NoteReports(ctx); err != nil && ctx.Err() == nil {
					s.logger.Warn("what relays told of their reflexes was not noted", "error", err)
				}
			}
		}
	})
}

func (a *app) brakeCommand() *cobra.Command {
	var all bool
	ls := &cobra.Command{
		Use: "list", Short: "List the restrictions of mail that are in force",
		Long: `List the restrictions of mail that are in force: those that people and rules set,
and the lanes that a relay slowed down by itself long ago (owner reflex).`,
		Example: "  relais-control brake list\n  relais-control brake list --all --json", Args: cobra.NoArgs,
	}
	ls.Flags().BoolVar(&all, "all", false, "those that ended in the last seven days as well")
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		query := url.Values{}
		if all {
			query.Set("ended", "true")
		}
		return list(a, cmd, "/brakes", query, brakeHeader, func(b api.Brake) []string { return brakeRow(&b) })
	}
	return group("brake", "Hold or slow down mail, and show and end what does", ls, a.brakeSet(), a.brakePin(), a.brakeCancel(),
		&cobra.Command{Use: "show BRAKE", Short: "Show a restriction of mail, by id", Example: "  relais-control brake show brk_…", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/brakes/" + url.PathEscape(args[0])}, printBrake)
		}})
}

func (a *app) brakeSet() *cobra.Command {
	var body api.BrakeSet
	var hold bool
	var ttl time.Duration
	cmd := &cobra.Command{
		Use: "set [--provider P] [--pool POOL] [--source ADDRESS] [--tenant TENANT] [--domain DOMAIN] --hold|--slow N --cause TEXT", Short: "Hold or slow down the mail that matches all that is given",
		Long: `Hold or slow down the mail that matches all that is given, on every relay. Slow N
leaves N percent of the message rate and of the connections that the provider's
profile allows each source. Relays obey within seconds and keep to it when they
are cut off or restarted: without contact a brake ends an hour after its time at
the earliest. Mail that is held stays in the queue, and its deadline counts.`,
		Example: "  relais-control brake set --provider google --slow 25 --ttl 2h --cause 'complaints, ticket 4711'\n  relais-control brake set --tenant acme --hold --cause 'list of unknown origin'",
		Args:    cobra.NoArgs,
	}
	f := cmd.Flags()
	f.StringVar(&body.Provider, "provider", "", `name of a provider, or "mx:" and a registrable domain`)
	f.StringVar(&body.Pool, "pool", "", "pool, id or name")
	f.StringVar(&body.Source, "source", "", "source address, or its id")
	f.StringVar(&body.Tenant, "tenant", "", "tenant, id or name")
	f.StringVar(&body.Domain, "domain", "", "domain of recipients")
	f.BoolVar(&hold, "hold", false, "send nothing")
	f.IntVar(&body.Percent, "slow", 0, "percent of what policy allows, 1 to 99")
	f.Var((*policy.DurationFlag)(&ttl), "ttl", "how long, such as 2h or 7d (default: until it is cancelled)")
	f.StringVar(&body.Cause, "cause", "", "why; it is shown to who wonders why mail waits")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case hold == cmd.Flags().Changed("slow"):
			return usagef("name one of --hold and --slow N")
		case body.Provider+body.Pool+body.Source+body.Tenant+body.Domain == "":
			return usagef("name a provider, pool, source, tenant or domain")
		case body.Cause == "":
			return usagef("--cause is missing: say why the mail is restricted")
		case ttl < 0 || ttl > 0 && ttl < time.Second:
			return usagef("--ttl is %v, write a second or more", ttl)
		case !hold && (body.Percent < 1 || body.Percent > 99):
			return usagef("--slow is %d, write 1 to 99 percent", body.Percent)
		}
		body.Level, body.TTLSeconds = "slow", int64(ttl/time.Second)
		if hold {
			body.Level = "hold"
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/brakes", body: body, reason: body.Cause}, printBrake)
	}
	return cmd
}

func (a *app) brakeCancel() *cobra.Command {
	cmd := &cobra.Command{
		Use: "cancel BRAKE", Short: "End a restriction of mail",
		Long: `End a restriction of mail. A rule does not set it again by what was known until
now. Of a relay's own reflex it says that the lane goes back to policy's limits.`,
		Example: "  relais-control brake cancel brk_… --reason 'the list was cleaned'", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	expect := cmd.Flags().Uint64("expect", 0, "revision of the brake that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/brakes/" + url.PathEscape(args[0]) + "/cancel", ifMatch: revisionText(cmd, *expect), reason: *reason}, printBrake)
	}
	return cmd
}

func (a *app) brakePin() *cobra.Command {
	var off bool
	cmd := &cobra.Command{
		Use: "pin BRAKE [--off]", Short: "Keep a restriction from ending by its time or a rule",
		Example: "  relais-control brake pin brk_… --reason 'until the audit is done'", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	cmd.Flags().BoolVar(&off, "off", false, "let it end again")
	expect := cmd.Flags().Uint64("expect", 0, "revision of the brake that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPut, path: "/brakes/" + url.PathEscape(args[0]) + "/pinned", body: map[string]bool{"pinned": !off}, ifMatch: revisionText(cmd, *expect), reason: *reason}, printBrake)
	}
	return cmd
}

// brakeHeader is above rows that brakeRow makes.
const brakeHeader = "ID SCOPE LEVEL OWNER SINCE UNTIL CAUSE"

func brakeRow(b *api.Brake) []string {
	return []string{b.ID, brakeScope(b), brakeLevel(b), brakeOwner(b), when(b.CreatedAt), brakeEnd(b), b.Cause}
}

func brakeScope(b *api.Brake) string {
	var parts []string
	for _, p := range []struct{ name, value string }{
		{"provider", b.Provider}, {"pool", b.PoolName}, {"source", b.SourceAddr}, {"tenant", b.TenantName}, {"domain", b.Domain},
	} {
		if p.value != "" {
			parts = append(parts, p.name+"="+p.value)
		}
	}
	return strings.Join(parts, ",")
}

func brakeLevel(b *api.Brake) string {
	switch {
	case b.Level == "hold":
		return "hold"
	case b.NodeName != "":
		return "slow"
	}
	return fmt.Sprintf("slow:%d%%", b.Percent)
}

func brakeOwner(b *api.Brake) string {
	if b.NodeName != "" {
		return b.Owner + "@" + b.NodeName
	}
	return b.Owner
}

func brakeEnd(b *api.Brake) string {
	switch {
	case !b.InForce && b.EndedBy != "":
		return "ended by " + b.EndedBy
	case !b.InForce:
		return "ended"
	case b.Pinned:
		return "pinned"
	}
	return whenOr(b.Until, "it is cancelled")
}

func printBrake(w io.Writer, b api.Brake) error {
	ended := ""
	if !b.InForce {
		ended = whenOr(b.EndedAt, "") + " by " + b.EndedBy
		if b.EndedBy == "" {
			ended = whenOr(b.EndedAt, "") + ", its time was over"
		}
		if b.EndReason != "" {
			ended += ": " + b.EndReason
		}
	}
	return printPairs(w, "Id", b.ID, "Scope", brakeScope(&b), "Level", brakeLevel(&b), "Cause", b.Cause, "Evidence", b.Evidence, "Evidence of", whenOr(b.EvidenceAt, ""),
		"Owner", brakeOwner(&b), "Since", when(b.CreatedAt), "Until", whenOr(b.Until, "it is cancelled"), "Pinned", yes(b.Pinned), "Ended", ended, "Revision", fmt.Sprint(b.Revision))
}
