package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

func (a *app) limitCommand() *cobra.Command {
	list1 := &cobra.Command{
		Use: "list", Short: "List the limits that all relays share",
		Long:    "List the limits of section limits of the policy: what each counts, how much of it relays hold now, and which connected relays do not keep it because their release knows no such limits.",
		Example: "  relais-control limit list\n  relais-control limit list --json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/limits", nil, "NAME LIMIT OF HELD FREE RELAYS NOT_KEPT_BY", func(l api.SharedLimit) []string {
				return []string{l.Name, limitText(l), selectorText(l), amount(l.Held), amount(l.Free), strconv.Itoa(len(l.Holders)), strings.Join(l.NotKept, ",")}
			})
		},
	}
	show1 := &cobra.Command{
		Use: "show NAME", Short: "Show a shared limit and who holds how much of it",
		Long: `Show a limit that all relays share: who holds how much of it (CEILING, and FLOOR
for when it is cut off), what each could use (DEMAND), what it used and how often
the limit said no between its last two reports, and when it was last heard.`,
		Example: "  relais-control limit show orange", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/limits/" + url.PathEscape(args[0])}, func(w io.Writer, body items[api.SharedLimit]) error {
				for i, l := range body.Items {
					if i > 0 {
						fmt.Fprintln(w)
					}
					if err := printLimit(w, l); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	return group("limit", "Show the limits that all relays share", list1, show1)
}

// limitText is a limit as the policy writes it.
func limitText(l api.SharedLimit) string {
	if l.Per != "" {
		return fmt.Sprintf("messages=%s/%s burst=%d", amount(l.Max), l.Per, l.Burst)
	}
	return "connections=" + amount(l.Max)
}

func selectorText(l api.SharedLimit) string {
	var parts []string
	for _, s := range [][2]string{{"provider", l.Provider}, {"tenant", l.Tenant}, {"domain", l.Domain}, {"pool", l.Pool}} {
		if s[1] != "" {
			parts = append(parts, s[0]+"="+s[1])
		}
	}
	if len(parts) == 0 {
		return "all mail"
	}
	return strings.Join(parts, " ")
}

func amount(n float64) string { return strconv.FormatFloat(n, 'f', -1, 64) }

func printLimit(w io.Writer, l api.SharedLimit) error {
	if err := printPairs(w, "Limit", l.Name+": "+limitText(l), "Counts", selectorText(l), "Held", amount(l.Held)+" of "+amount(l.Max)+", "+amount(l.Free)+" free",
		"Set aside", fmt.Sprintf("%d %% as floors, %d %% for newcomers", l.FloorPercent, l.ReservePercent), "Not kept by", strings.Join(l.NotKept, ", "), "Unknown", l.Problem); err != nil {
		return err
	}
	if len(l.Holders) == 0 {
		_, err := fmt.Fprintln(w, "No relay holds any of it.")
		return err
	}
	rows := make([][]string, 0, len(l.Holders))
	for _, h := range l.Holders {
		row := []string{h.Node, amount(h.Ceiling), amount(h.Floor), "", "", "", "", strconv.FormatUint(h.Incarnation, 10), h.State}
		if h.Demand != nil {
			row[3], row[4], row[5], row[6] = amount(*h.Demand), strconv.FormatInt(*h.Used, 10), strconv.FormatInt(*h.Denied, 10), whenOr(h.LastHeard, "")
			if !*h.Heard {
				row[8] += ", silent"
			}
			if h.WaitsInTurn {
				row[8] += ", waits its turn"
			}
		}
		rows = append(rows, row)
	}
	return printTable(w, "RELAY CEILING FLOOR DEMAND USED DENIED LAST_HEARD INCARNATION STATE", rows)
}

func (a *app) policyWhy() *cobra.Command {
	cmd := &cobra.Command{
		Use: "why [LANE]", Short: "Show every limit, brake and warm-up that holds for a lane or for some mail",
		Long: `Show every limit that holds for a lane (a source address and a provider, written
ADDRESS/PROVIDER as relais-relay lanes shows them) or for mail that flags select:
those of each address and relay by itself, and those that all relays share, with
who holds how much; and the brakes and warm-ups. What is left open may match, but
the warm-up of an address is shown only if the address is named. Which of them holds mail back on
one relay, and until when, is told there by relais-relay queue why.`,
		Example: "  relais-control policy why 198.51.100.7/orange\n  relais-control policy why --tenant acme --domain example.com --provider mx:example.com", Args: cobra.MaximumNArgs(1),
	}
	flags := map[string]*string{}
	for name, usage := range map[string]string{"source": "address that the mail leaves from", "provider": "mailbox provider", "tenant": "tenant's name", "domain": "domain of the recipient", "pool": "pool's name"} {
		flags[name] = cmd.Flags().String(name, "", usage)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		query := url.Values{}
		if len(args) == 1 {
			source, provider, ok := strings.Cut(args[0], "/")
			if !ok || source == "" || provider == "" {
				return usagef("%q is not a lane: write ADDRESS/PROVIDER, such as 198.51.100.7/orange", args[0])
			}
			query.Set("source", source)
			query.Set("provider", provider)
		}
		for name, value := range flags {
			if *value == "" {
				continue
			}
			if query.Has(name) {
				return usagef("--%s and the lane both say it: leave one out", name)
			}
			query.Set(name, *value)
		}
		if len(query) == 0 {
			return usagef("name a lane, or select mail by flags")
		}
		return show(a, cmd, call{method: http.MethodGet, path: "/policy/why", query: query}, printWhy)
	}
	return cmd
}

// printEach prints what a provider's profile says.
func printEach(w io.Writer, p *api.PolicyWhy) error {
	profile := "its own profile"
	if !p.Profile {
		profile = "the default profile"
	}
	if len(p.Each) == 0 {
		_, err := fmt.Fprintf(w, "\nNothing limits an address or a relay by itself, by %s.\n", profile)
		return err
	}
	fmt.Fprintf(w, "\nEach address and relay by itself, by %s:\n", profile)
	rows := make([][]string, 0, len(p.Each))
	for _, l := range p.Each {
		limit := strconv.Itoa(l.Max)
		if l.Per != "" {
			limit += "/" + l.Per + " burst=" + strconv.Itoa(l.Burst)
		}
		rows = append(rows, []string{l.Kind, l.Scope, limit})
	}
	return printTable(w, "KIND SCOPE LIMIT", rows)
}

func printWhy(w io.Writer, p api.PolicyWhy) error {
	if err := printPairs(w, "Source", p.Source, "Pool", p.Pool, "Tenant", p.Tenant, "Provider", p.Provider, "Domain", p.Domain); err != nil {
		return err
	}
	if p.Provider != "" {
		if err := printEach(w, &p); err != nil {
			return err
		}
	}
	if len(p.Shared) == 0 {
		fmt.Fprintln(w, "\nNo limit that all relays share counts this mail.")
	} else {
		fmt.Fprintln(w, "\nAll relays together:")
	}
	for _, l := range p.Shared {
		fmt.Fprintln(w)
		if err := printLimit(w, l); err != nil {
			return err
		}
	}
	if len(p.Brakes) > 0 {
		rows := make([][]string, 0, len(p.Brakes))
		for i := range p.Brakes {
			rows = append(rows, brakeRow(&p.Brakes[i]))
		}
		fmt.Fprintln(w, "\nBrakes:")
		if err := printTable(w, brakeHeader, rows); err != nil {
			return err
		}
	}
	if len(p.WarmUps) == 0 {
		return nil
	}
	fmt.Fprintln(w, "\nWarm-up, today:")
	var rows [][]string
	for i := range p.WarmUps {
		v := &p.WarmUps[i]
		for _, c := range v.Classes {
			rows = append(rows, []string{v.Kind, v.Name, v.Plan, c.Class, strconv.Itoa(c.Stage), fmt.Sprint(c.Quota), fmt.Sprint(c.Reserved), fmt.Sprint(c.Used)})
		}
	}
	return printTable(w, "KIND NAME PLAN CLASS STAGE QUOTA RESERVED USED", rows)
}
