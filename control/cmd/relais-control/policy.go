package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// How a command waits for relays to take a policy.
const (
	applyWait  = 15 * time.Second
	applyPause = 100 * time.Millisecond
)

// policyResult is what a change of the policy prints as JSON.
type policyResult struct {
	api.Policy
	Preview api.PolicyPreview `json:"preview"`
	Applied *api.PolicyStatus `json:"applied,omitempty"`
}

func (a *app) policyDiff() *cobra.Command {
	cmd := &cobra.Command{
		Use: "diff FILE… | DIR | --rev N", Short: "Show what a change of the policy would change and touch",
		Long: `Show by key what a change would change, and what it touches: pools, lanes
(pairs of a source address and a provider), streams. Files are read as by
policy put; --rev compares with a former revision, 0 with the shipped policy.
Nothing is changed.`,
		Example: "  relais-control policy diff providers.toml\n  relais-control policy diff --rev 41 --json",
	}
	revision := cmd.Flags().Uint64("rev", 0, "former revision to compare with, see policy history")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req, err := previewRequest(args, cmd.Flags().Changed("rev"), *revision)
		if err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/policy/preview", body: req}, printPreview)
	}
	return cmd
}

func previewRequest(args []string, byRevision bool, revision uint64) (api.PolicyPreviewRequest, error) {
	switch {
	case byRevision && len(args) > 0:
		return api.PolicyPreviewRequest{}, usagef("--rev and files exclude each other")
	case byRevision:
		return api.PolicyPreviewRequest{Revision: &revision}, nil
	case len(args) == 0:
		return api.PolicyPreviewRequest{}, usagef("name files, a directory, or --rev")
	}
	sections, err := readSections(args)
	return api.PolicyPreviewRequest{Sections: sections}, err
}

// printPreview prints changes by key, old above new, and the impact.
func printPreview(w io.Writer, p api.PolicyPreview) error {
	for _, c := range p.Changes {
		if c.Old != "" {
			fmt.Fprintf(w, "- %s.%s = %s\n", c.Section, c.Key, c.Old)
		}
		if c.New != "" {
			fmt.Fprintf(w, "+ %s.%s = %s\n", c.Section, c.Key, c.New)
		}
	}
	_, err := fmt.Fprintf(w, "impact: %s\n", p.Impact.Summary)
	return err
}

// waitFlags say how long a change waits for relays.
type waitFlags struct {
	no   *bool
	most *time.Duration
}

func addWaitFlags(cmd *cobra.Command) waitFlags {
	most := time.Duration(applyWait)
	cmd.Flags().Var((*policy.DurationFlag)(&most), "wait", "wait at most this long for connected relays to apply it")
	return waitFlags{no: cmd.Flags().Bool("no-wait", false, "do not wait for relays to apply it"), most: &most}
}

// changePolicy previews a change, makes it, and waits for relays to apply it.
func (a *app) changePolicy(cmd *cobra.Command, preview api.PolicyPreviewRequest, change call, wait waitFlags) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var result policyResult
	if err := c.do(cmd.Context(), call{method: http.MethodPost, path: "/policy/preview", body: preview}, &result.Preview); err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	if !a.json {
		fmt.Fprintf(cmd.ErrOrStderr(), "impact: %s\n", result.Preview.Impact.Summary)
	}
	if err := c.do(cmd.Context(), change, &result.Policy); err != nil {
		return err
	}
	if !a.json {
		fmt.Fprintf(out, "policy revision %d\n", result.Policy.Revision)
	}
	if !*wait.no {
		status, err := c.waitApplied(cmd.Context(), result.Policy.Revision, *wait.most)
		if err != nil {
			return err
		}
		result.Applied = &status
	}
	if a.json {
		if err := printJSON(out, result); err != nil {
			return err
		}
	}
	if result.Applied == nil {
		return nil
	}
	if !a.json {
		if err := printApplied(out, *result.Applied); err != nil {
			return err
		}
	}
	return refusalOf(*result.Applied)
}

// refusalOf is the error for relays that refused the policy.
func refusalOf(s api.PolicyStatus) error {
	for _, r := range s.Relays {
		if r.Refused {
			return fault.New(fault.Conflict, "relais-control", "relay %s refuses policy revision %d and keeps its last good one: %s; correct the policy, or go back with `relais-control policy rollback`", r.Name, s.Revision, r.RefusedWhy)
		}
	}
	return nil
}

// waitApplied waits until every connected relay applied or refused a revision. That
// no server tells for a while, as when the cluster chooses a leader, undoes no change.
func (c *client) waitApplied(ctx context.Context, revision uint64, most time.Duration) (api.PolicyStatus, error) {
	deadline := time.Now().Add(most)
	for {
		s, err := c.policyStatus(ctx)
		waiting := err != nil || s.Revision < revision // this server is behind the one that made the change
		for _, r := range s.Relays {
			waiting = waiting || r.Connected && !r.Refused && r.AckedRevision < revision
		}
		switch late := time.Now().After(deadline); {
		case !waiting, late && err == nil:
			return s, nil
		case late:
			return s, fault.Wrap(err, fault.Unavailable, "relais-control", "the policy is changed, its revision is %d; which relays apply it is not known, ask with `relais-control policy status`", revision)
		}
		select {
		case <-time.After(applyPause):
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}

// policyStatus asks every server, since each knows of the relays linked to it,
// and puts the answers together.
func (c *client) policyStatus(ctx context.Context) (api.PolicyStatus, error) {
	req := call{method: http.MethodGet, path: "/policy/status"}
	if len(c.file.Endpoints) == 1 {
		var s api.PolicyStatus
		return s, c.do(ctx, req, &s)
	}
	var answers []api.PolicyStatus
	var failed []error
	var said error // by a server that was reached
	for _, endpoint := range c.file.Endpoints {
		var s api.PolicyStatus
		if _, err := c.once(ctx, endpoint, req, &s); err != nil {
			if failed = append(failed, err); answered(err) {
				said = err
			}
			continue
		}
		answers = append(answers, s)
	}
	switch {
	case len(answers) == 0 && said != nil:
		return api.PolicyStatus{}, said
	case len(answers) == 0:
		return api.PolicyStatus{}, fault.Wrap(errors.Join(failed...), fault.Unavailable, "relais-control", "no control server of this cluster can be reached: is one running?")
	}
	return mergeStatus(answers), nil
}

// mergeStatus takes of every relay what the server knows that heard most.
func mergeStatus(answers []api.PolicyStatus) api.PolicyStatus {
	out := api.PolicyStatus{}
	at := map[string]int{}
	for _, s := range answers {
		out.Revision = max(out.Revision, s.Revision)
		for _, r := range s.Relays {
			i, known := at[r.ID]
			if !known {
				at[r.ID] = len(out.Relays)
				out.Relays = append(out.Relays, r)
				continue
			}
			old := &out.Relays[i]
			if r.Connected && !old.Connected || r.Connected == old.Connected && r.AckedRevision > old.AckedRevision {
				*old = r
			}
		}
	}
	for i := range out.Relays {
		r := &out.Relays[i]
		// Refused by the word of a server that knows an older policy only. A server
		// of a release before does not tell the revision.
		if r.Refused && r.RefusedRevision != 0 && r.RefusedRevision < out.Revision {
			r.Refused, r.RefusedRevision, r.RefusedWhy = false, 0, ""
		}
		out.Total++
		if r.AckedRevision > 0 && r.AckedRevision >= out.Revision {
			out.Applied++
		}
	}
	return out
}

// printApplied says who applied the policy, and what is with the others.
func printApplied(w io.Writer, s api.PolicyStatus) error {
	if s.Total == 0 {
		_, err := fmt.Fprintln(w, "no relay has joined yet")
		return err
	}
	fmt.Fprintf(w, "applied by %d of %d relays\n", s.Applied, s.Total)
	for _, r := range s.Relays {
		switch {
		case r.Refused:
			fmt.Fprintf(w, "  %s refuses it and keeps its last good one: %s\n", r.Name, r.RefusedWhy)
		case r.AckedRevision >= s.Revision && r.AckedRevision > 0:
		case !r.Connected:
			fmt.Fprintf(w, "  %s is not connected; it worked with revision %d\n", r.Name, r.AckedRevision)
		default:
			fmt.Fprintf(w, "  %s works with revision %d\n", r.Name, r.AckedRevision)
		}
	}
	return nil
}

func (a *app) policyStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show which relays work with the policy in force",
		Long:    "Show which relays work with the policy in force, and why others do not. It fails if a relay refused it.",
		Example: "  relais-control policy status\n  relais-control policy status --json", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.policyStatus(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				if err := printJSON(cmd.OutOrStdout(), s); err != nil {
					return err
				}
				return refusalOf(s)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "policy revision %d\n", s.Revision)
			if err := printApplied(cmd.OutOrStdout(), s); err != nil {
				return err
			}
			return refusalOf(s)
		},
	}
}

func (a *app) policyHistory() *cobra.Command {
	return &cobra.Command{
		Use: "history", Short: "List the policies that were put, newest first",
		Long:    "List the policies that were put last, newest first. policy diff and policy rollback take their revisions.",
		Example: "  relais-control policy history", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/policy/versions", nil, "REVISION TIME ACTOR SECTIONS REASON", func(v api.PolicyVersion) []string {
				return []string{strconv.FormatUint(v.Revision, 10), whenOr(v.Time, ""), v.Actor, strings.Join(v.Sections, ","), v.Reason}
			})
		},
	}
}

func (a *app) policyRollback() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rollback REV", Short: "Put a former policy again",
		Long: `Put the policy of a former revision again, as a new revision; 0 is the shipped
policy. Only the policy goes back: revoked credentials, evicted nodes, addresses
and keys are no part of it.`,
		Example: "  relais-control policy rollback 41 --reason 'orange defers'\n  relais-control policy rollback 41 --dry-run",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	expect := cmd.Flags().Uint64("expect", 0, "revision of the policy that the change is made from")
	dry := cmd.Flags().Bool("dry-run", false, "say what it would do and change nothing")
	wait := addWaitFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		revision, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return usagef("%q is not a revision: take one from policy history", args[0])
		}
		preview := api.PolicyPreviewRequest{Revision: &revision}
		if *dry {
			return show(a, cmd, call{method: http.MethodPost, path: "/policy/preview", body: preview}, printPreview)
		}
		return a.changePolicy(cmd, preview, call{method: http.MethodPost, path: "/policy/rollback", body: map[string]uint64{"revision": revision}, ifMatch: revisionText(cmd, *expect), reason: *reason}, wait)
	}
	return cmd
}
