package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
)

func (a *app) caCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ca",
		Short:   "Print the cluster's CA certificate, show and change its issuing key",
		Long:    "Print the root certificate of the cluster, in PEM, from the data directory. Install it where browsers and mail clients look.\nThe subcommands show and change the issuing key below it, which goes over the management API.",
		Example: "  relais-control ca --data /var/lib/relais/control > relais-ca.pem\n  relais-control ca status",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := os.ReadFile(paths{a.dataDir}.ca())
			if err != nil {
				return fault.Wrap(err, fault.NotFound, "relais-control.ca", "%s holds no CA certificate: name the data directory of a server with --data", a.dataDir)
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), map[string]string{"ca": string(text)})
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
	cmd.AddCommand(a.caStatus(), a.caRotate(), a.caRollback())
	return cmd
}

func (a *app) caStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the issuing CA, and what a change of its key waits for",
		Example: "  relais-control ca status", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/ca"}, printCA)
		},
	}
}

func (a *app) caRotate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Change the issuing key",
		Long: `Begin a change of the key that signs certificates. It goes on by itself, each
phase when every relay and server has acknowledged the one before:

  distribute   everybody learns of the new CA, the old one signs
  sign         the new one signs, everybody renews its certificate
  done         the old one is dropped: what it signed opens nothing any more

ca status shows whom a phase waits for, ca rollback goes back before the end.
A relay that is off comes back by itself later, for up to 30 days after its
certificate ended, whatever happened meanwhile: --skip goes on without one,
--force-next without all that have not acknowledged.

The cluster begins a change by itself 30 days before the issuing CA ends.`,
		Example: "  relais-control ca rotate --reason yearly\n  relais-control ca rotate --skip edge-7 --reason 'in repair until May'\n  relais-control ca rotate --force-next --yes --reason 'the site is gone'",
		Args:    cobra.NoArgs,
	}
	reason := reasonFlag(cmd)
	skip := cmd.Flags().String("skip", "", "relay or server, id or name, that the change that runs does not wait for")
	force := cmd.Flags().Bool("force-next", false, "let the change that runs go on to its next phase without those that have not acknowledged")
	yes := cmd.Flags().Bool("yes", false, "with --force-next: do it")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		req := call{method: http.MethodPost, path: "/ca/rotate", reason: *reason}
		switch {
		case *skip != "" && *force:
			return usagef("--skip and --force-next exclude each other: --force-next skips all that have not acknowledged")
		case (*skip != "" || *force) && strings.TrimSpace(*reason) == "":
			return usagef("--reason is missing: say why the change goes on without them")
		case *force && !*yes:
			return usagef("--force-next goes on without everybody that has not acknowledged: look at `relais-control ca status`, then add --yes")
		case *yes && !*force:
			return usagef("--yes belongs to --force-next")
		case *skip != "":
			req.path, req.body = "/ca/skip", map[string]string{"node": *skip}
		case *force:
			req.path = "/ca/force"
		}
		return show(a, cmd, req, printCA)
	}
	return cmd
}

func (a *app) caRollback() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rollback", Short: "Go back to the old issuing key",
		Long: `Go back to the old issuing key while a change runs. Before the new key signs this
is done at once; after that everybody renews under the old key first. The new
CA is given up for good.`,
		Example: "  relais-control ca rollback --reason 'edge-7 refuses the new CA'", Args: cobra.NoArgs,
	}
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/ca/rollback", reason: *reason}, printCA)
	}
	return cmd
}

// phaseText says what a phase means.
var phaseText = map[string]string{
	"distribute":  "everybody learns of the new CA, the old one signs",
	"sign":        "the new one signs, everybody renews",
	"return":      "the old one signs again, everybody renews",
	"done":        "the old one is dropped",
	"rolled-back": "the new one is given up",
}

func printCA(w io.Writer, c api.CA) error {
	pairs := []string{"Root pin", c.RootPin, "Root ends", when(c.RootEnds), "Signs", c.Signs, "Ends", when(c.Ends), "Believed", strings.Join(c.Believed, ", ")}
	if c.Supported {
		pairs = append(pairs, "Changes by itself", when(c.ChangesAt))
	} else {
		pairs = append(pairs, "Changes by itself", "no: a server runs a release that cannot follow, upgrade it")
	}
	if ch := c.Change; ch != nil {
		pairs = append(pairs, "Last change", ch.From+" to "+ch.To, "Phase", ch.Phase+": "+phaseText[ch.Phase], "Since", when(ch.Since))
		if ch.Running {
			pairs = append(pairs, "Acknowledged", fmt.Sprintf("%d of %d", ch.Acked, ch.Total))
		}
	}
	pairs = append(pairs, "Given up", strings.Join(c.Refused, ", "))
	for _, r := range c.Revoked {
		pairs = append(pairs, "Revoked server", fmt.Sprintf("%s until %s", r.Server, when(r.Until)))
	}
	if err := printPairs(w, pairs...); err != nil {
		return err
	}
	if c.Change == nil || !c.Change.Running {
		return nil
	}
	var rows [][]string
	for _, m := range c.Change.Waiting {
		rows = append(rows, []string{m.ID, m.Name, m.Role, m.Why})
	}
	for _, m := range c.Change.Skipped {
		rows = append(rows, []string{m.ID, m.Name, m.Role, "skipped by " + m.Why})
	}
	if len(rows) == 0 {
		return nil
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	return printTable(w, "ID NAME ROLE WAITS-FOR", rows)
}
