package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/verdict"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// maxAnswerBytes bounds an answer of the admin socket.
const maxAnswerBytes = 256 << 20

// request asks the admin socket of the running relay. The answer's body, which
// is there if the error is nil, must be closed.
func request(ctx context.Context, o *options, method, path string, in any) (*http.Response, error) {
	const op = "relais-relay.ask"
	socket := filepath.Join(o.data, admin.SocketName)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://relay"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "no relay answers on %s: is it running with --data %s, and may you read its socket?", socket, o.data)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, op, "the relay broke off its answer")
	}
	var p admin.Problem
	if json.Unmarshal(text, &p) == nil && p.Detail != "" {
		return nil, fault.New(fault.Invalid, op, "%s", p.Detail)
	}
	return nil, fault.New(fault.Internal, op, "the relay answered %s", resp.Status)
}

// ask gets a path from the admin socket of the running relay and decodes it.
func ask(ctx context.Context, o *options, path string, v any) error {
	return call(ctx, o, http.MethodGet, path, nil, v)
}

// call is ask with a method and what to send. With --json the answer is written
// as it is.
func call(ctx context.Context, o *options, method, path string, in, v any) error {
	resp, err := request(ctx, o, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "relais-relay.ask", "the relay broke off its answer")
	}
	if o.json {
		_, err = os.Stdout.Write(body)
		return err
	}
	return json.Unmarshal(body, v)
}

func newQueue(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "queue", Args: noCommand, Short: "See what waits and why, and act on it", RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(newQueueSummary(o), newQueueList(o), newQueueShow(o), newQueueWhy(o), newQueueExport(o), newQueueImport(o))
	cmd.AddCommand(newQueueActions(o)...)
	return cmd
}

func printMessage(w io.Writer, m *admin.Message) {
	for i := range m.Recipients {
		r := &m.Recipients[i]
		fmt.Fprintf(w, "%s\t%s\t%d\t<%s>\t<%s>\t%s\t%d\t%s\t%s\n", m.ID, m.Stream, m.Priority, m.Sender, r.Address, stateText(r), r.Attempts, timeText(r.Next), clip(r.LastReply))
	}
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format(time.DateTime)
}

func clip(s string) string {
	const maxShown = 70
	if r := []rune(s); len(r) > maxShown {
		return string(r[:maxShown]) + "…"
	}
	return s
}

func newQueueShow(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show one message with the state of each recipient, or of one", Args: exactly(1),
		Example: "  relais-relay queue show msg_01kampxh00041061050r3gg28a\n  relais-relay queue show rcp_01kampxh00041061050r3gg28a-0",
		RunE: func(cmd *cobra.Command, args []string) error {
			var m admin.Message
			if err := ask(cmd.Context(), o, "/v1/queue/messages/"+url.PathEscape(args[0]), &m); err != nil || o.json {
				return err
			}
			fmt.Printf("message   %s\ntenant    %s\nstream    %s\npriority  %d\ntag       %s\npool      %s\nsender    <%s>\nbytes     %d\naccepted  %s\nexpires   %s\n\n",
				m.ID, m.TenantName, m.Stream, m.Priority, cmp.Or(m.Tag, "-"), m.PoolName, m.Sender, m.Bytes, timeText(m.Accepted), timeText(m.Expires))
			w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "RECIPIENT\tSTATE\tATTEMPTS\tNEXT\tMX\tCLASS\tLAST REPLY")
			for i := range m.Recipients {
				r := &m.Recipients[i]
				fmt.Fprintf(w, "<%s>\t%s\t%d\t%s\t%s\t%s\t%s\n", r.Address, stateText(r), r.Attempts, timeText(r.Next), r.LastMX, r.LastClass, r.LastReply)
			}
			return w.Flush()
		},
	}
}

func newQueueWhy(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "why ID", Short: "Name the one thing each recipient waits for, and when it ends", Args: exactly(1),
		Example: "  relais-relay queue why msg_01kampxh00041061050r3gg28a\n  relais-relay queue why rcp_01kampxh00041061050r3gg28a-0",
		RunE: func(cmd *cobra.Command, args []string) error {
			var m admin.Message
			if err := ask(cmd.Context(), o, "/v1/queue/messages/"+url.PathEscape(args[0]), &m); err != nil || o.json {
				return err
			}
			for _, r := range m.Recipients {
				if r.Why == nil {
					fmt.Printf("<%s>: %s\n", r.Address, r.State)
					continue
				}
				fmt.Printf("<%s>: %s%s%s%s\n", r.Address, r.Why.Text, laneText(r.Why), priorityText(m.Priority), untilText(r.Why.Until))
			}
			return nil
		},
	}
}

// priorityText names the priority of a message that has another one than most.
func priorityText(n int) string {
	if n == policy.DefaultPriority {
		return ""
	}
	return fmt.Sprintf(" (priority %d)", n)
}

func laneText(x *engine.Explanation) string {
	switch {
	case x.Provider == "":
		return ""
	case x.Source == "":
		return " (provider " + x.Provider + ")"
	}
	return " (source " + x.Source + ", provider " + x.Provider + ")"
}

func untilText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return ", until " + timeText(t)
}

func newStatus(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Say which node this is and whether control is reachable", Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s admin.Status
			if err := ask(cmd.Context(), o, "/v1/status", &s); err != nil || o.json {
				return err
			}
			link := "control is reachable"
			if !s.Connected {
				link = "control is not reachable; the relay works on with what it knows"
			}
			if s.Problem != "" {
				link += ": " + s.Problem
			}
			if s.Evicted {
				link = s.Problem
			}
			fmt.Printf("node      %s\ncluster   %s\nversion   %s\nrevision  %d\nlink      %s\n", s.Node, s.Cluster, s.Version, s.Revision, link)
			return nil
		},
	}
}

func newEvents(o *options) *cobra.Command {
	var after uint64
	cmd := &cobra.Command{
		Use: "events", Short: "Print what happened to mail, as JSON lines", Args: exactly(0),
		Example: "  relais-relay events --after 1000",
		RunE: func(cmd *cobra.Command, _ []string) error {
			plain := *o
			plain.json = false
			out := json.NewEncoder(os.Stdout)
			for {
				var events []admin.Event
				if err := ask(cmd.Context(), &plain, "/v1/events?after="+strconv.FormatUint(after, 10), &events); err != nil {
					return err
				}
				if len(events) == 0 {
					return nil
				}
				for i := range events {
					after = events[i].Seq
					if err := out.Encode(&events[i]); err != nil {
						return err
					}
				}
			}
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "begin behind this sequence number")
	return cmd
}

// checkProvider wants a provider that the shipped profiles name, or one named
// after its MX: rules of a misspelt one would silently not be tried.
func checkProvider(name string) error {
	if name == "" || strings.HasPrefix(name, "mx:") {
		return nil
	}
	var known []string
	for _, p := range defaults().Providers.Provider {
		if p.Name == name {
			return nil
		}
		known = append(known, p.Name)
	}
	return usageError{fmt.Errorf("--provider %q is unknown: use mx: and a domain, or one of %s", name, strings.Join(known, ", "))}
}

// maxReplyLineBytes bounds one line of classify's input.
const maxReplyLineBytes = 64 << 10

func newClassify() *cobra.Command {
	var provider string
	cmd := &cobra.Command{
		Use: "classify", Short: "Tell what remote replies mean", Args: exactly(0),
		Long:    "Read remote replies on standard input, one per line, and print class, scope, action and\nrule of each as JSON lines.",
		Example: "  echo '550 5.1.1 no such user' | relais-relay classify --provider google",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkProvider(provider); err != nil {
				return err
			}
			in := bufio.NewScanner(cmd.InOrStdin())
			in.Buffer(nil, maxReplyLineBytes)
			out := json.NewEncoder(cmd.OutOrStdout())
			for in.Scan() {
				line := strings.TrimSpace(in.Text())
				if line == "" {
					continue
				}
				v := verdict.Classify(provider, relay.PhaseRCPT, verdict.ParseReply(line))
				if err := out.Encode(map[string]string{
					"reply": line, "class": string(v.Class), "scope": string(v.Scope), "action": string(v.Action), "rule": v.Rule,
				}); err != nil {
					return err
				}
			}
			return in.Err()
		},
	}
	cmd.Flags().StringVar(&provider, "provider", "", "provider the replies come from, such as google or orange")
	return cmd
}
