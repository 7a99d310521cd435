package main

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/api"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/shared/policy"
)

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

// items is a list as the API sends it.
type items[T any] struct {
	Items []T `json:"items"`
}

// show sends a request and prints its answer as JSON or by the given function.
func show[T any](a *app, cmd *cobra.Command, req call, text func(io.Writer, T) error) error {
	return showAdapted(a, cmd, req, func(*T) error { return nil }, text)
}

// showAdapted is show of an answer that is worked on first.
func showAdapted[T any](a *app, cmd *cobra.Command, req call, adapt func(*T) error, text func(io.Writer, T) error) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var out T
	if err := c.do(cmd.Context(), req, &out); err != nil {
		return err
	}
	if err := adapt(&out); err != nil {
		return err
	}
	if a.json {
		return printJSON(cmd.OutOrStdout(), out)
	}
	return text(cmd.OutOrStdout(), out)
}

// list prints a list, as a JSON array or as a table with a row for each item.
func list[T any](a *app, cmd *cobra.Command, path string, query url.Values, header string, row func(T) []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var out items[T]
	if err := c.do(cmd.Context(), call{method: http.MethodGet, path: path, query: query}, &out); err != nil {
		return err
	}
	if a.json {
		if out.Items == nil {
			out.Items = []T{}
		}
		return printJSON(cmd.OutOrStdout(), out.Items)
	}
	rows := make([][]string, 0, len(out.Items))
	for _, i := range out.Items {
		rows = append(rows, row(i))
	}
	return printTable(cmd.OutOrStdout(), header, rows)
}

func group(name, short string, subcommands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short}
	cmd.AddCommand(subcommands...)
	return cmd
}

func reasonFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("reason", "", "why, for the audit tail")
}

func tenantQuery(tenant string) url.Values {
	if tenant == "" {
		return nil
	}
	return url.Values{"tenant": {tenant}}
}

func (a *app) tokenCommand() *cobra.Command {
	return group("token", "Create, list and revoke join tokens", a.tokenCreate(),
		&cobra.Command{Use: "list", Short: "List join tokens", Example: "  relais-control token list", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/tokens", nil, "ID ROLE USES ENDS REVOKED NETWORKS", func(t api.Token) []string {
				return []string{t.ID, t.Role, fmt.Sprintf("%d/%d", t.UsesMax-t.UsesLeft, t.UsesMax), when(t.NotAfter), yes(t.Revoked), strings.Join(t.CIDRs, ",")}
			})
		}}, a.tokenRevoke())
}

func (a *app) tokenCreate() *cobra.Command {
	var body api.TokenCreate
	var ttl time.Duration
	cmd := &cobra.Command{
		Use: "create --role relay", Short: "Create a join token and print it once",
		Long:    "Create a token with which machines join. It is printed once: standard output holds the token and nothing else, so that it can be piped.",
		Example: "  relais-control token create --role relay\n  relais-control token create --role relay --uses 20 --ttl 1h --label pool=eu --cidr 198.51.100.0/24",
		Args:    cobra.NoArgs,
	}
	reason := reasonFlag(cmd)
	cmd.Flags().StringVar(&body.Role, "role", "", "relay or control")
	cmd.Flags().Var((*policy.DurationFlag)(&ttl), "ttl", "life, at most 24h (default: 1h for relays, 15m for servers)")
	cmd.Flags().IntVar(&body.Uses, "uses", 1, "how many machines may join with it, at most 1000")
	cmd.Flags().StringToStringVar(&body.Labels, "label", nil, "label for every node that joins, key=value; may be repeated")
	cmd.Flags().StringSliceVar(&body.CIDRs, "cidr", nil, "network the machine must come from; may be repeated")
	cmd.Flags().BoolVar(&body.Approve, "approve", false, "the machine waits until `node approve` accepts it")
	cmd.Flags().StringVar(&body.NameGlob, "name", "", "pattern that its name must match, such as 'edge-*'")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if body.Role != "relay" && body.Role != "control" {
			return usagef("--role is %q: use relay or control", body.Role)
		}
		if cmd.Flags().Changed("ttl") && ttl < time.Second {
			return usagef("--ttl is %s: use at least 1s", ttl)
		}
		if body.Uses < 1 || body.Uses > command.MaxTokenUses {
			return usagef("--uses is %d: a token is good for 1 to %d uses", body.Uses, command.MaxTokenUses)
		}
		body.TTLSeconds = int64(ttl / time.Second)
		return show(a, cmd, call{method: http.MethodPost, path: "/tokens", body: body, reason: *reason}, func(w io.Writer, t api.Token) error {
			_, err := fmt.Fprintln(w, t.Secret)
			return err
		})
	}
	return cmd
}

func (a *app) tokenRevoke() *cobra.Command {
	cmd := &cobra.Command{Use: "revoke ID", Short: "Revoke a join token", Example: "  relais-control token revoke tok_01…", Args: cobra.ExactArgs(1)}
	reason := reasonFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/tokens/" + url.PathEscape(args[0]) + "/revoke", reason: *reason}, func(w io.Writer, t api.Token) error {
			_, err := fmt.Fprintln(w, t.ID, "revoked")
			return err
		})
	}
	return cmd
}

func (a *app) nodeCommand() *cobra.Command {
	return group("node", "List, show, accept, drain and evict relays", a.nodeApprove(), a.nodeEvict(), a.nodeDrain(), a.nodeUndrain(),
		&cobra.Command{Use: "list", Short: "List relays", Example: "  relais-control node list --json", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/nodes", nil, "ID NAME STATE CONNECTED REVISION VERSION ADDRESSES", func(n api.Node) []string {
				state := n.State
				if n.Clone != nil && time.Since(n.Clone.At) < copiedShown {
					state += ",copied"
				}
				return []string{n.ID, n.Name, state, yes(n.Connected), fmt.Sprint(n.AckedRevision), n.Version, strings.Join(n.Sources, ",")}
			})
		}},
		&cobra.Command{Use: "show NODE", Short: "Show a relay, by id or name", Example: "  relais-control node show edge-7", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/nodes/" + url.PathEscape(args[0])}, func(w io.Writer, n api.Node) error {
				refused := ""
				if n.Refused > 0 {
					refused = fmt.Sprintf("%d: %s", n.Refused, n.RefusedWhy)
				}
				queue := ""
				if r := n.Report; r != nil {
					queue = fmt.Sprintf("%d recipients waiting, %d in flight, %d held", r.WaitingRecipients, r.InFlightRecipients, r.HeldRecipients)
				}
				return printPairs(w, "Id", n.ID, "Name", n.Name, "State", n.State, "Queue", queue, "Version", n.Version, "Labels", labelText(n.Labels), "Joined", when(n.JoinedAt),
					"Connected", yes(n.Connected), "Last contact", whenOr(n.LastContact, "none since the servers started"), "Works with revision", fmt.Sprint(n.AckedRevision),
					"Refused revision", refused, "Copied machine", cloneText(n.Clone), "Certificate ends", whenOr(n.CertNotAfter, ""), "Assigned addresses", strings.Join(n.Sources, ", "), "Addresses on its host", strings.Join(n.LocalAddresses, ", "))
			})
		}})
}

func (a *app) tenantCommand() *cobra.Command {
	print := func(w io.Writer, t api.Tenant) error {
		return printPairs(w, "Id", t.ID, "Name", t.Name, "Suspended", yes(t.Suspended), "Ownership token", t.OwnershipToken, "Name in Feedback-ID", t.FeedbackName, "Created", when(t.CreatedAt), "Revision", fmt.Sprint(t.Revision))
	}
	add := &cobra.Command{Use: "add NAME", Short: "Add a tenant and its default project", Example: "  relais-control tenant add acme", Args: cobra.ExactArgs(1)}
	reason := reasonFlag(add)
	add.RunE = func(cmd *cobra.Command, args []string) error {
		return show(a, cmd, call{method: http.MethodPost, path: "/tenants", body: map[string]string{"name": args[0]}, reason: *reason}, print)
	}
	return group("tenant", "Add, list, show, suspend and resume tenants", add, a.tenantSuspend(true), a.tenantSuspend(false),
		&cobra.Command{Use: "list", Short: "List tenants", Example: "  relais-control tenant list", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
			return list(a, cmd, "/tenants", nil, "ID NAME SUSPENDED FEEDBACK-NAME CREATED", func(t api.Tenant) []string {
				return []string{t.ID, t.Name, yes(t.Suspended), t.FeedbackName, when(t.CreatedAt)}
			})
		}},
		&cobra.Command{Use: "show TENANT", Short: "Show a tenant, by id or name", Example: "  relais-control tenant show acme", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return show(a, cmd, call{method: http.MethodGet, path: "/tenants/" + url.PathEscape(args[0])}, print)
		}})
}

func (a *app) projectCommand() *cobra.Command {
	add := &cobra.Command{Use: "add NAME --tenant TENANT", Short: "Add a project", Example: "  relais-control project add shop --tenant acme", Args: cobra.ExactArgs(1)}
	reason := reasonFlag(add)
	tenant := add.Flags().String("tenant", "", "tenant, id or name")
	add.RunE = func(cmd *cobra.Command, args []string) error {
		if *tenant == "" {
			return usagef("--tenant is missing")
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/projects", body: map[string]string{"tenant": *tenant, "name": args[0]}, reason: *reason}, func(w io.Writer, p api.Project) error {
			return printPairs(w, "Id", p.ID, "Tenant", p.Tenant, "Name", p.Name)
		})
	}
	ls := &cobra.Command{Use: "list", Short: "List projects", Example: "  relais-control project list --tenant acme", Args: cobra.NoArgs}
	of := ls.Flags().String("tenant", "", "only those of this tenant, id or name")
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return list(a, cmd, "/projects", tenantQuery(*of), "ID TENANT NAME", func(p api.Project) []string { return []string{p.ID, p.Tenant, p.Name} })
	}
	return group("project", "Add and list projects", add, ls)
}

func (a *app) credentialCommand() *cobra.Command {
	var body api.CredentialCreate
	var ttl time.Duration
	create := &cobra.Command{
		Use: "create --tenant TENANT", Short: "Create an SMTP credential and print its secret once",
		Example: "  relais-control credential create --tenant acme\n  relais-control credential create --tenant acme --project shop --name web1 --stream bulk --ttl 30d --json\n  relais-control credential create --tenant acme --domain shop.example --cidr 192.0.2.0/24 --rate 1000 --require-client-cert web1.pem",
		Args:    cobra.NoArgs,
	}
	reason := reasonFlag(create)
	create.Flags().StringVar(&body.Tenant, "tenant", "", "tenant, id or name")
	create.Flags().StringVar(&body.Project, "project", "", "project, id or name (default: the project \"default\")")
	create.Flags().StringVar(&body.Name, "name", "", "what it is for")
	create.Flags().StringVar(&body.Stream, "stream", "", "stream used when a message names none")
	create.Flags().Var((*policy.DurationFlag)(&ttl), "ttl", "life, such as 90d (default: without end)")
	scope := scopeFlags(create, &body.CredentialScope)
	create.RunE = func(cmd *cobra.Command, _ []string) error {
		if body.Tenant == "" {
			return usagef("--tenant is missing")
		}
		if cmd.Flags().Changed("ttl") && ttl < time.Second {
			return usagef("--ttl is %s: use at least 1s, or leave it out for a credential without end", ttl)
		}
		if ttl > 0 {
			end := time.Now().Add(ttl).UTC()
			body.NotAfter = &end
		}
		if err := scope(); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/credentials", body: body, reason: *reason}, func(w io.Writer, c api.Credential) error {
			return printPairs(w, "User name", c.ID, "Password", c.Secret, "Ends", whenOr(c.NotAfter, "never"), "Scope", scopeText(&c.CredentialScope), "Note", "the password is not shown again")
		})
	}
	ls := &cobra.Command{Use: "list", Short: "List credentials", Example: "  relais-control credential list --tenant acme", Args: cobra.NoArgs}
	of := ls.Flags().String("tenant", "", "only those of this tenant, id or name")
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return list(a, cmd, "/credentials", tenantQuery(*of), "ID TENANT NAME STREAM ENDS REVOKED SCOPE", func(c api.Credential) []string {
			return []string{c.ID, c.Tenant, c.Name, c.Stream, whenOr(c.NotAfter, "never"), yes(c.Revoked), scopeText(&c.CredentialScope)}
		})
	}
	revoke := &cobra.Command{Use: "revoke ID", Short: "Revoke a credential for good", Example: "  relais-control credential revoke crd_01… --reason leaked", Args: cobra.ExactArgs(1)}
	why, yes := reasonFlag(revoke), yesFlag(revoke)
	revoke.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.confirm(cmd, *yes, "Credential %s is refused from now on, for good.", args[0]); err != nil {
			return err
		}
		return show(a, cmd, call{method: http.MethodPost, path: "/credentials/" + url.PathEscape(args[0]) + "/revoke", reason: *why}, func(w io.Writer, c api.Credential) error {
			_, err := fmt.Fprintln(w, c.ID, "revoked")
			return err
		})
	}
	return group("credential", "Create, list, rotate and revoke SMTP credentials", create, ls, a.credentialRotate(), revoke)
}

func (a *app) credentialRotate() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rotate ID", Short: "Give a credential a new secret and print it once",
		Long: `Give a credential a new secret and print it once. The old secret stays good for
the overlap, so that clients can be changed one by one; then it is refused, also
in sessions that are open. The user name stays.`,
		Example: "  relais-control credential rotate crd_01…\n  relais-control credential rotate crd_01… --overlap 0 --reason leaked",
		Args:    cobra.ExactArgs(1),
	}
	reason := reasonFlag(cmd)
	overlap := 24 * time.Hour
	cmd.Flags().Var((*policy.DurationFlag)(&overlap), "overlap", "the old secret stays good this long, at most 30d")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if overlap < 0 || overlap > service.MaxRotationOverlap {
			return usagef("--overlap is %s: the old secret stays good for 0s to %s", policy.Duration(overlap), policy.Duration(service.MaxRotationOverlap))
		}
		seconds := int64(overlap / time.Second)
		return show(a, cmd, call{method: http.MethodPost, path: "/credentials/" + url.PathEscape(args[0]) + "/rotate", body: api.CredentialRotate{OverlapSeconds: &seconds}, reason: *reason}, func(w io.Writer, c api.Credential) error {
			return printPairs(w, "User name", c.ID, "Password", c.Secret, "Old password ends", whenOr(c.PreviousUntil, "now"), "Note", "the password is not shown again")
		})
	}
	return cmd
}

// maxAuditLimit is how many entries the server sends at once.
const maxAuditLimit = 1000

func (a *app) auditCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "audit", Short: "List the newest changes: who, what, why",
		Long:    "List the newest changes. With --json they show the objects before and after.",
		Example: "  relais-control audit --limit 20\n  relais-control audit --actor admin --since 24h --json\n  relais-control audit --object 198.51.100.7", Args: cobra.NoArgs,
	}
	limit := cmd.Flags().Int("limit", 100, "how many, at most 1000")
	actor := cmd.Flags().String("actor", "", "only changes by this operator or part of the server")
	object := cmd.Flags().String("object", "", "only changes of objects with this text in their name or id")
	action := cmd.Flags().String("action", "", "only changes of this kind, such as policy.put")
	since := cmd.Flags().String("since", "", "only changes since then: a span such as 24h, or a time such as 2026-01-02T15:04:05Z")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *limit < 1 || *limit > maxAuditLimit {
			return usagef("--limit is %d: use 1 to %d", *limit, maxAuditLimit)
		}
		query := url.Values{"limit": {fmt.Sprint(*limit)}}
		for name, value := range map[string]string{"actor": *actor, "object": *object, "action": *action} {
			if value != "" {
				query.Set(name, value)
			}
		}
		if *since != "" {
			at, err := parseSince(*since, time.Now())
			if err != nil {
				return err
			}
			query.Set("since", at.UTC().Format(time.RFC3339Nano))
		}
		return list(a, cmd, "/audit", query, "REVISION TIME ACTOR ACTION OBJECT REASON", func(e api.AuditEntry) []string {
			return []string{fmt.Sprint(e.Index), when(e.Time), e.Actor, e.Action, e.Object, e.Reason}
		})
	}
	return cmd
}

// parseSince reads a span before now or a time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if span, err := policy.ParseDuration(text); err == nil && span > 0 {
		return now.Add(-span.D()), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, usagef("--since is %q: use a span such as 24h or 7d, or a time such as 2026-01-02T15:04:05Z", text)
	}
	return at, nil
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show the server that answers", Example: "  relais-control status --json", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return show(a, cmd, call{method: http.MethodGet, path: "/version"}, func(w io.Writer, v api.Version) error {
			return printPairs(w, "Version", v.Version, "Cluster", v.Cluster, "Commands", fmt.Sprint("version ", v.Commands), "Leads", yes(v.Leader), "Index", fmt.Sprint(v.Index), "Revision", fmt.Sprint(v.Revision))
		})
	}}
}
