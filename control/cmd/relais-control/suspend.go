package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

// tenantSuspend stops or resumes a tenant's mail at the door.
func (a *app) tenantSuspend(suspend bool) *cobra.Command {
	cmd := &cobra.Command{
		Use: "suspend TENANT", Short: "Refuse a tenant's credentials until it is resumed, by id or name",
		Long:    "Refuse a tenant's credentials, also in sessions that are open, until it is resumed.\nWhat relays have accepted from it is delivered.",
		Example: "  relais-control tenant suspend acme --reason 'unpaid, ticket 4711'", Args: cobra.ExactArgs(1),
	}
	said := "suspended: its credentials are refused"
	if !suspend {
		cmd.Use, cmd.Short, cmd.Long = "resume TENANT", "Take a suspended tenant's mail again, by id or name", ""
		cmd.Example = "  relais-control tenant resume acme"
		said = "resumed: its credentials are good"
	}
	reason := reasonFlag(cmd)
	expect := cmd.Flags().Uint64("expect", 0, "revision of the tenant that the change is made from")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := call{method: http.MethodPut, path: "/tenants/" + url.PathEscape(args[0]) + "/suspended", body: map[string]bool{"suspended": suspend}, ifMatch: revisionText(cmd, *expect), reason: *reason}
		return show(a, cmd, req, func(w io.Writer, t api.Tenant) error {
			_, err := fmt.Fprintln(w, t.ID, t.Name, said)
			return err
		})
	}
	return cmd
}
