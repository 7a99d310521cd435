package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// drainPause is how often the queue of a draining relay is looked at; it
// reports every few seconds.
const drainPause = time.Second

func (a *app) nodeDrain() *cobra.Command {
	cmd := &cobra.Command{
		Use: "drain NODE", Short: "Let a relay take no new mail and finish its queue",
		Long: `Let a relay take no new mail: it refuses recipients with 451 4.3.5, hands over its
queue to the relays that have addresses of the same pools, and delivers what no
other relay can take, until its queue is empty. Then its addresses are released,
and it is drained. It stays so across restarts until it is undrained. --wait waits
for the queue to be empty, showing what is left.`,
		Example: "  relais-control node drain edge-7 --reason 'new disk'\n  relais-control node drain edge-7 --wait 2h",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	var wait time.Duration
	cmd.Flags().Var((*policy.DurationFlag)(&wait), "wait", "wait at most this long for the queue to be empty")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		var n api.Node
		path := "/nodes/" + url.PathEscape(args[0])
		if err := c.do(cmd.Context(), call{method: http.MethodPut, path: path + "/state", body: map[string]string{"state": "draining"}, reason: *reason}, &n); err != nil {
			return err
		}
		if wait > 0 {
			if n, err = c.waitDrained(cmd.Context(), cmd.ErrOrStderr(), n.ID, wait); err != nil {
				return err
			}
		} else if seen, err := c.nodeAnywhere(cmd.Context(), n.ID); err == nil {
			n = seen
		}
		if a.json {
			return printJSON(cmd.OutOrStdout(), n)
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), n.ID, n.Name, drainText(n))
		return err
	}
	return cmd
}

func (a *app) nodeUndrain() *cobra.Command {
	cmd := &cobra.Command{
		Use: "undrain NODE", Short: "Let a drained relay take mail again",
		Long:    "Let a drained relay take mail again. Addresses that it released come back with ip assign.",
		Example: "  relais-control node undrain edge-7", Args: cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.setNodeState(cmd, args[0], "active", *reason, "takes mail again")
	}
	return cmd
}

// left returns how many recipients a relay still has, if it said so since it
// heard that it drains.
func left(n api.Node) (recipients uint64, known bool) {
	if !n.Connected || n.Report == nil || n.AckedRevision < n.Revision {
		return 0, false
	}
	return n.Report.WaitingRecipients + n.Report.InFlightRecipients + n.Report.HeldRecipients, true
}

// drainText says how far a draining relay is.
func drainText(n api.Node) string {
	switch recipients, known := left(n); {
	case n.State != "draining":
		return n.State
	case !n.Connected:
		return "drains; it is not connected, so what it has left is not known"
	case !known:
		return "drains; it has not said yet what it has left"
	case recipients == 0:
		return "drains; its queue is empty"
	default:
		return fmt.Sprintf("drains; left are %d recipients waiting, %d in flight, %d held", n.Report.WaitingRecipients, n.Report.InFlightRecipients, n.Report.HeldRecipients) + handedText(n.Report)
	}
}

// handedText says how far a relay is with giving its mail to others; empty: it
// gives none.
func handedText(r *api.NodeReport) string {
	if r.HandedOver == 0 && r.HandoverPools == 0 {
		return ""
	}
	return fmt.Sprintf("; handed over to other relays are %d, %d a second of late", r.HandedOver, r.HandoverPerSecond)
}

// nodeAnywhere asks the server that the relay is linked to, or else any.
func (c *client) nodeAnywhere(ctx context.Context, id string) (api.Node, error) {
	var n api.Node
	req := call{method: http.MethodGet, path: "/nodes/" + url.PathEscape(id)}
	for _, endpoint := range c.file.Endpoints {
		if _, err := c.once(ctx, endpoint, req, &n); err == nil && n.Connected {
			return n, nil
		}
		n = api.Node{}
	}
	return n, c.do(ctx, req, &n)
}

// waitDrained waits until the relay's queue is empty.
func (c *client) waitDrained(ctx context.Context, progress io.Writer, id string, most time.Duration) (api.Node, error) {
	deadline := time.Now().Add(most)
	said := ""
	for {
		n, err := c.nodeAnywhere(ctx, id)
		if err != nil {
			return n, err
		}
		recipients, known := left(n)
		if known && recipients == 0 || n.State != "draining" {
			return n, nil
		}
		if text := drainText(n); text != said {
			said = text
			fmt.Fprintln(progress, n.Name, text)
		}
		if time.Now().After(deadline) {
			return n, fault.New(fault.Timeout, "relais-control", "%s %s, after %s", n.Name, drainText(n), most)
		}
		select {
		case <-time.After(drainPause):
		case <-ctx.Done():
			return n, ctx.Err()
		}
	}
}
