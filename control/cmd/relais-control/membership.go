package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
)

// nodeEvict puts a relay out for good.
func (a *app) nodeEvict() *cobra.Command {
	cmd := &cobra.Command{
		Use: "evict NODE", Short: "Put a relay out of the cluster for good",
		Long: "Put a relay out of the cluster for good: its session is closed within a second, its certificate is not renewed, and\n" +
			"the relay, once told, accepts and delivers nothing. Its queue stays on its disk. Its addresses go to\n" +
			"quarantine until `ip assign --old-owner-is-off` or `ip unquarantine` says that it is off. The machine comes back by joining\n" +
			"as a new node.",
		Example: "  relais-control node evict edge-7 --reason 'disk stolen'", Args: cobra.ExactArgs(1),
	}
	reason, yes := reasonFlag(cmd), yesFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.confirm(cmd, *yes, "Relay %s is put out of the cluster for good.", args[0]); err != nil {
			return err
		}
		return a.setNodeState(cmd, args[0], "evicted", *reason, "evicted: it works no more once it is told, its queue stays on its disk")
	}
	return cmd
}

// nodeApprove accepts a relay that joined with a token of --approve.
func (a *app) nodeApprove() *cobra.Command {
	cmd := &cobra.Command{
		Use: "approve NODE", Short: "Accept a relay that waits for it",
		Long:    "Accept a relay that joined with a token made with --approve. It links within seconds.",
		Example: "  relais-control node approve edge-7", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/nodes/" + url.PathEscape(args[0]) + "/approve", reason: *reason}, func(w io.Writer, n api.Node) error {
			_, err := fmt.Fprintln(w, n.ID, n.Name, "accepted: it links within seconds")
			return err
		})
	}
	return cmd
}

// cloneText says which machines claim to be one relay.
func cloneText(c *api.NodeClone) string {
	if c == nil {
		return ""
	}
	return fmt.Sprintf("%s works, %s was refused %d times, last at %s", c.Holder, c.Refused, c.Times, when(c.At))
}

// setNodeState moves a relay to a state and says so.
func (a *app) setNodeState(cmd *cobra.Command, node, state, reason, said string) error {
	body := map[string]string{"state": state}
	return show(a, cmd, call{method: http.MethodPut, path: "/nodes/" + url.PathEscape(node) + "/state", body: body, reason: reason}, func(w io.Writer, n api.Node) error {
		_, err := fmt.Fprintln(w, n.ID, n.Name, said)
		return err
	})
}
