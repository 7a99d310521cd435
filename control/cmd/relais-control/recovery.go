package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

func printRecovery(w io.Writer, r api.Recovery) error {
	if !r.Active {
		_, err := fmt.Fprintln(w, "The cluster is not in recovery mode.")
		return err
	}
	return printPairs(w, "Recovery mode", "yes", "Cause", r.Cause, "Since", whenOr(r.Since, ""), "Generation", fmt.Sprint(r.Generation), "Heard", strings.Join(r.Heard, ", "), "Missing", strings.Join(r.Missing, ", "))
}

func (a *app) recoveryCommand() *cobra.Command {
	show1 := &cobra.Command{Use: "show", Short: "Show where recovery mode stands", Example: "  relais-control recovery show", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: "/recovery"}, printRecovery)
	}}
	end := &cobra.Command{
		Use:   "end",
		Short: "End recovery mode",
		Long: `End recovery mode. It ends by itself a minute after restore or recover, once
every active relay was heard. A relay that was not heard and never will be is
named with --waive: be sure that it is switched off, because its addresses may
then be given to another one.`,
		Example: "  relais-control recovery end\n  relais-control recovery end --waive edge-7 --reason 'machine burnt'",
		Args:    cobra.NoArgs,
	}
	reason, yes := reasonFlag(end), yesFlag(end)
	waive := end.Flags().StringSlice("waive", nil, "relay, id or name, that is given up though it was not heard; may be repeated")
	end.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(*waive) > 0 {
			if err := a.confirm(cmd, *yes, "The addresses of %s may go to other relays: be sure that it is switched off.", strings.Join(*waive, ", ")); err != nil {
				return err
			}
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/recovery/end", body: map[string][]string{"waive": *waive}, reason: *reason}, printRecovery)
	}
	return group("recovery", "Show and end recovery mode after restore or recover", show1, end)
}
