package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/buildinfo"
)

func printUpgrade(w io.Writer, u api.Upgrade) error {
	var stands string
	switch {
	case len(u.Waiting) > 0:
		stands = "servers of two releases run, the older release can be put back"
	case u.KnownByAll > u.Commands:
		stands = "every server is upgraded, the older release can be put back until the version is raised: ten minutes after the last server's start, or by `upgrade finish`"
	default:
		stands = "none, or finished: a release that does not know this version cannot be put back"
	}
	return printPairs(w, "Commands", fmt.Sprint("version ", u.Commands), "Known by all", fmt.Sprint("version ", u.KnownByAll), "Older servers", strings.Join(u.Waiting, ", "), "Upgrade", stands)
}

func (a *app) upgradeCommand() *cobra.Command {
	status := &cobra.Command{Use: "status", Short: "Show where the cluster stands between two releases", Example: "  relais-control upgrade status", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: "/upgrade"}, printUpgrade)
	}}
	finish := &cobra.Command{
		Use:   "finish",
		Short: "Give up the way back to the release before",
		Long: `Let the cluster use what the new release brings, at once instead of ten
minutes after the last server was upgraded. From then on the release before
cannot be put back: its programs refuse to start. It is refused while a server
runs the older release.`,
		Example: "  relais-control upgrade finish --reason 'mail was watched for an hour'",
		Args:    cobra.NoArgs,
	}
	reason, yes := reasonFlag(finish), yesFlag(finish)
	finish.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.confirm(cmd, *yes, "The release before cannot be put back from now on."); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/upgrade/finish", reason: *reason}, printUpgrade)
	}
	return group("upgrade", "Show and finish the upgrade of the control servers", status, finish)
}

// versionInfo says what this program is and what it can read.
type versionInfo struct {
	buildinfo.Info
	Commands uint16 `json:"commands"` // newest version of the commands that it knows
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Show the version of this program", Example: "  relais-control version --json", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		v := versionInfo{buildinfo.Get(), command.FSMVersion}
		if a.json {
			return printJSON(cmd.OutOrStdout(), v)
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(), "relais-control %s, commands up to version %d\n", v.Info, v.Commands)
		return err
	}}
}
