package main

import (
	"net/http"
	"net/url"

	"github.com/spf13/cobra"
)

func (a *app) ipRelease() *cobra.Command {
	cmd := &cobra.Command{
		Use: "release ADDRESS --old-owner-is-off --reason TEXT", Short: "End the quarantine of an address",
		Long: `End the quarantine of an address whose relay was evicted: it is free, stays in its
pool, and sends again when a relay gets it. Only the network can keep an evicted
machine from using an address, so say that it is switched off. To give the
address to another relay at once, use ip assign --old-owner-is-off.`,
		Example: "  relais-control ip release 198.51.100.7 --old-owner-is-off --reason 'machine wiped, ticket 4711'", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	off := cmd.Flags().Bool("old-owner-is-off", false, "your word that the machine that held the address is switched off")
	expect := cmd.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *reason == "" {
			return usagef("--reason is missing: say why the address may be used again")
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/ips/" + url.PathEscape(args[0]) + "/release", body: map[string]bool{"old_owner_is_off": *off}, ifMatch: revisionText(cmd, *expect), reason: *reason}, printIP)
	}
	return cmd
}
