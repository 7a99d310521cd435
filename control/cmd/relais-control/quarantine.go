package main

import (
	"net/http"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

func (a *app) ipRelease() *cobra.Command {
	cmd := &cobra.Command{
		Use: "release ADDRESS --reason TEXT", Short: "Have the relay of an address stop using it",
		Long: `Have the relay of an address stop using it: it opens nothing from it any more, ends
idle sessions at once and busy ones after their message, and says when it has.
Until then the address is releasing, then free: any relay may get it. It stays in
its pool. A relay that does not answer keeps its address; when its machine is
off, use ip reassign.

An address in quarantine is free at once, as by ip unquarantine.`,
		Example: "  relais-control ip release 198.51.100.7 --reason 'moves to edge-8'", Args: cobra.ExactArgs(1),
	}
	return a.ipEnd(cmd, "release", "say why the address may be used elsewhere")
}

func (a *app) ipUnquarantine() *cobra.Command {
	cmd := &cobra.Command{
		Use: "unquarantine ADDRESS --reason TEXT", Short: "End the quarantine of an address",
		Long: `End the quarantine of an address: it is free, stays in its pool, and sends again
when a relay gets it. While the relay that had it has not said that it stopped, as
one that was evicted never does, only the network can keep its machine from using
the address: say that it is switched off.`,
		Example: "  relais-control ip unquarantine 198.51.100.7 --old-owner-is-off --reason 'machine wiped, ticket 4711'", Args: cobra.ExactArgs(1),
	}
	return a.ipEnd(cmd, "unquarantine", "say why the address may be used again")
}

// ipEnd completes a command that makes an address free.
func (a *app) ipEnd(cmd *cobra.Command, verb, hint string) *cobra.Command {
	reason := reasonFlag(cmd)
	off := cmd.Flags().Bool("old-owner-is-off", false, "your word that the machine that held the address is switched off")
	expect := cmd.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *reason == "" {
			return usagef("--reason is missing: %s", hint)
		}
		return show(a, cmd, call{method: http.MethodPost, path: ipPath(args[0], verb), body: map[string]bool{"old_owner_is_off": *off}, ifMatch: revisionText(cmd, *expect), reason: *reason}, printIP)
	}
	return cmd
}

func (a *app) ipQuarantine() *cobra.Command {
	cmd := &cobra.Command{
		Use: "quarantine ADDRESS --reason TEXT", Short: "Have nobody send from an address",
		Long: `Have nobody send from an address until ip unquarantine. Its relay, if it has one,
stops as for ip release and stays named until it says that it has. Then the
address may also go to the pool of another tenant.`,
		Example: "  relais-control ip quarantine 198.51.100.7 --reason 'listed at example.org'", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	expect := cmd.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *reason == "" {
			return usagef("--reason is missing: say why nobody may use the address")
		}
		return show(a, cmd, call{method: http.MethodPost, path: ipPath(args[0], "quarantine"), ifMatch: revisionText(cmd, *expect), reason: *reason}, printIP)
	}
	return cmd
}

func (a *app) ipReassign() *cobra.Command {
	cmd := &cobra.Command{
		Use: "reassign ADDRESS --node NODE --force --machine-is-off --reason TEXT", Short: "Give an address of a machine that is off to another relay",
		Long: `Give an address to another relay without the word of the one that has it. If that
machine runs, two relays send from one address: make sure that it is switched off
and stays so, or that the network keeps it from using the address. For a relay that
answers use ip release, then ip assign.`,
		Example: "  relais-control ip reassign 198.51.100.7 --node edge-8 --force --machine-is-off --reason 'power supply burnt'", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	node := cmd.Flags().String("node", "", "relay that gets it, id or name")
	force := cmd.Flags().Bool("force", false, "do not wait for the relay that has it")
	off := cmd.Flags().Bool("machine-is-off", false, "your word that the machine that has the address is switched off")
	expect := cmd.Flags().Uint64("expect", 0, "revision of the address that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case *node == "":
			return usagef("--node is missing: the relay that gets the address")
		case !*force || !*off:
			return usagef("say --force and --machine-is-off, or use `ip release` and then `ip assign` for a relay that answers")
		case *reason == "":
			return usagef("--reason is missing: say why its relay cannot release the address")
		}
		return show(a, cmd, call{method: http.MethodPost, path: ipPath(args[0], "assign"), body: api.IPAssign{Node: *node, OldOwnerIsOff: true}, ifMatch: revisionText(cmd, *expect), reason: *reason}, printIP)
	}
	return cmd
}

func ipPath(address, verb string) string { return "/ips/" + url.PathEscape(address) + "/" + verb }
