package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/cluster"
	"github.com/relais-mta/relais/control/quota"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/ids"
)

// newWarm returns the leader's part of warm-up.
func (s *server) newWarm(q *quota.Quota) (*quota.Warm, error) {
	w := quota.NewWarm(quota.WarmOptions{State: s.state, Propose: s.cluster.Propose, Send: q.Send, Document: s.service.Document, Clocks: s.service.WarmClocks, Now: time.Now, Logger: s.logger})
	return w, s.registry.Register(w)
}

// warmRequests adds what other servers ask about the time.
func warmRequests(all map[string]cluster.PeerHandler) map[string]cluster.PeerHandler {
	all["clock"] = func(context.Context, ids.Node, []byte) (any, error) { return service.Clock(), nil }
	return all
}

const warmWhat = `What warms up is named by --ip ADDRESS, --pool NAME or --domain NAME.`

// warmFlags name what warms up.
type warmFlags struct{ ip, pool, domain *string }

func addWarmFlags(cmd *cobra.Command) warmFlags {
	f := warmFlags{
		ip:     cmd.Flags().String("ip", "", "a source address, as ip list shows it"),
		pool:   cmd.Flags().String("pool", "", "a pool: all its addresses share the quota"),
		domain: cmd.Flags().String("domain", "", "a sending domain: what all addresses send for it"),
	}
	cmd.MarkFlagsMutuallyExclusive("ip", "pool", "domain")
	cmd.MarkFlagsOneRequired("ip", "pool", "domain")
	return f
}

func (f warmFlags) path() string {
	for kind, name := range map[string]string{"source": *f.ip, "pool": *f.pool, "domain": *f.domain} {
		if name != "" {
			return "/warmups/" + kind + "/" + url.PathEscape(name)
		}
	}
	return ""
}

func (a *app) warmupList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List what warms up, with today's quotas", Args: cobra.NoArgs,
		Long:    "List what warms up: by plan, from stage to stage over its classes of providers, with today's quota and what is spent of it, all classes together.",
		Example: "  relais-control warmup list\n  relais-control warmup list --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/warmups", nil, "KIND NAME PLAN SINCE STAGES QUOTA RESERVED USED HELD", func(v api.WarmUp) []string {
				low, high := 0, 0
				quota, reserved, used := uint64(0), uint64(0), uint64(0)
				for _, c := range v.Classes {
					if low == 0 || c.Stage < low {
						low = c.Stage
					}
					high = max(high, c.Stage)
					quota, reserved, used = quota+c.Quota, reserved+c.Reserved, used+c.Used
				}
				return []string{v.Kind, v.Name, v.Plan, v.StartDay, fmt.Sprintf("%d-%d", low, high), fmt.Sprint(quota), fmt.Sprint(reserved), fmt.Sprint(used), v.Hold}
			})
		},
	}
}

func printWarmUp(w io.Writer, v api.WarmUp) error {
	proven := make([]string, 0, len(v.Proven))
	for _, p := range v.Proven {
		proven = append(proven, fmt.Sprintf("%s %d/day (%s)", p.Class, p.Volume, p.Evidence))
	}
	if err := printPairs(w, "Warms up", v.Kind+" "+v.Name, "Plan", v.Plan, "Since", v.StartDay, "Today", v.Today+" UTC", "Held", v.Hold, "Proven", strings.Join(proven, ", "), "Revision", fmt.Sprint(v.Revision)); err != nil {
		return err
	}
	rows := make([][]string, 0, len(v.Classes))
	for _, c := range v.Classes {
		stage := strconv.Itoa(c.Stage)
		if c.LastStage > 0 {
			stage += "/" + strconv.Itoa(c.LastStage)
		}
		why := c.Why
		if c.PausedUntil != "" {
			why = strings.TrimSuffix("paused until "+c.PausedUntil+": "+why, ": ")
		}
		rows = append(rows, []string{c.Class, stage, fmt.Sprint(c.Quota), fmt.Sprint(c.Reserved), fmt.Sprint(c.Used), fmt.Sprint(c.Answers.Accepted), fmt.Sprint(c.Answers.Deferred), fmt.Sprint(c.Answers.Blocked), fmt.Sprint(c.Answers.Hard), fmt.Sprint(c.Yesterday), why})
	}
	return printTable(w, "CLASS STAGE QUOTA RESERVED USED ACCEPTED DEFERRED BLOCKED HARD YESTERDAY WHY", rows)
}

func (a *app) warmupShow() *cobra.Command {
	cmd := &cobra.Command{
		Use: "show", Short: "Show where a warm-up stands with each class of providers", Args: cobra.NoArgs,
		Long:    warmWhat + " Counts are of recipients. What relays have spent, and what providers answered, is known every 10 s; blocked is refused for good because of who sends or of the content, hard because there is no such recipient. A day leads to the next stage if most of its quota was used and the answers pass the plan's gate.",
		Example: "  relais-control warmup show --ip 198.51.100.7\n  relais-control warmup show --pool news --json",
	}
	what := addWarmFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: what.path()}, printWarmUp)
	}
	return cmd
}

func (a *app) warmupStart() *cobra.Command {
	cmd := &cobra.Command{
		Use: "start --plan NAME", Short: "Put an address, pool or sending domain under a plan", Args: cobra.NoArgs,
		Long: warmWhat + `

An address, pool or domain that is warm already enters at the stages that allow
what it has proved: --proven CLASS=N/day for each class, and --evidence saying
what shows it.`,
		Example: "  relais-control warmup start --ip 198.51.100.7 --plan standard\n  relais-control warmup start --pool news --plan standard --proven google=40000/day --evidence 'logs of the former platform, October'",
	}
	what := addWarmFlags(cmd)
	plan := cmd.Flags().String("plan", "standard", "plan of the policy's section warmup")
	proven := cmd.Flags().StringArray("proven", nil, "CLASS=N/day that it has sent and that was welcome")
	evidence := cmd.Flags().String("evidence", "", "what shows the proven volume")
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		body := map[string]any{"plan": *plan}
		var proofs []api.WarmProof
		for _, text := range *proven {
			class, amount, ok := strings.Cut(text, "=")
			n, err := perDay(amount)
			if !ok || err != nil {
				return usagef("--proven %s: write CLASS=N/day, such as google=40000/day", text)
			}
			proofs = append(proofs, api.WarmProof{Class: class, Volume: uint32(n), Evidence: *evidence})
		}
		switch {
		case len(proofs) > 0 && *evidence == "":
			return usagef("--evidence is missing: say what shows the proven volume")
		case len(proofs) == 0 && *evidence != "":
			return usagef("--evidence belongs to --proven: say what it shows, such as --proven google=40000/day; without that the warm-up begins at stage 1")
		case len(proofs) > 0:
			body["proven"] = proofs
		}
		return show(a, cmd, call{method: http.MethodPost, path: what.path(), body: body, reason: *reason}, printWarmUp)
	}
	return cmd
}

func (a *app) warmupHold(resume bool) *cobra.Command {
	cmd := &cobra.Command{
		Use: "hold --reason TEXT", Short: "Keep a warm-up at its stages, whatever its days show", Args: cobra.NoArgs,
		Long: warmWhat + " Its quotas stay as they are.", Example: "  relais-control warmup hold --pool news --reason 'waiting for the ticket at Orange'",
	}
	path := "/hold"
	if resume {
		path = "/resume"
		cmd.Use, cmd.Short, cmd.Example = "resume", "Let a warm-up go on that was held", "  relais-control warmup resume --pool news"
	}
	what := addWarmFlags(cmd)
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: what.path() + path, reason: *reason}, printWarmUp)
	}
	return cmd
}

func (a *app) warmupStepBack() *cobra.Command {
	cmd := &cobra.Command{
		Use: "step-back", Short: "Put a warm-up back by some stages, from now on", Args: cobra.NoArgs,
		Long:    warmWhat + " What relays have reserved beyond the smaller quota is recalled.",
		Example: "  relais-control warmup step-back --ip 198.51.100.7 --stages 2 --class google --reason 'listed'",
	}
	what := addWarmFlags(cmd)
	stages := cmd.Flags().Int("stages", 1, "how many")
	class := cmd.Flags().String("class", "", "of this class of providers alone")
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		body := map[string]any{"stages": *stages}
		if *class != "" {
			body["class"] = *class
		}
		return show(a, cmd, call{method: http.MethodPost, path: what.path() + "/step-back", body: body, reason: *reason}, printWarmUp)
	}
	return cmd
}

func (a *app) warmupStop() *cobra.Command {
	cmd := &cobra.Command{
		Use: "stop --reason TEXT", Short: "End a warm-up: nothing limits it any more", Args: cobra.NoArgs,
		Long: warmWhat + " It may send without quota from then on.", Example: "  relais-control warmup stop --ip 198.51.100.7 --reason 'at its target for a month'",
	}
	what := addWarmFlags(cmd)
	reason, yes := reasonFlag(cmd), yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.confirm(cmd, *yes, "It may send without quota from now on."); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: what.path() + "/stop", reason: *reason}, func(w io.Writer, _ struct{}) error {
			_, err := fmt.Fprintln(w, "stopped")
			return err
		})
	}
	return cmd
}

func (a *app) warmupRoll() *cobra.Command {
	cmd := &cobra.Command{
		Use: "roll", Short: "Begin today, although more than a day has passed since the last day began", Args: cobra.NoArgs,
		Long: `Days begin by themselves, one after the other, while the leader's clock agrees
with those of most servers. After a longer stop, or if a clock was wrong, the
leader waits for this order: a day that began is never taken back.`,
		Example: "  relais-control warmup roll --yes --reason 'the cluster was off since Friday'",
	}
	reason, yes := reasonFlag(cmd), yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.confirm(cmd, *yes, "Days are passed over, and a day that began is never taken back."); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/warmup-day", reason: *reason}, func(w io.Writer, d api.WarmDay) error {
			_, err := fmt.Fprintf(w, "today is %s\n", d.Today)
			return err
		})
	}
	return cmd
}
