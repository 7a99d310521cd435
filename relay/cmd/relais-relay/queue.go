package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/shared/fault"
)

// maxLineBytes bounds one line of a streamed answer.
const maxLineBytes = 4 << 20

// stream asks for an answer that comes as JSON objects a line, and gives each to
// line, which decodes it.
func stream(ctx context.Context, o *options, method, path string, in any, line func([]byte) error) error {
	resp, err := request(ctx, o, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLineBytes)
	for lines.Scan() {
		if err := line(lines.Bytes()); err != nil {
			return err
		}
	}
	return fault.Wrap(lines.Err(), fault.Unavailable, "relais-relay.stream", "the relay broke off its answer")
}

// atTerminal reports whether a person is at the other end of a file.
func atTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// progressLine shows how far a long answer is, to a person only.
type progressLine struct{ shown bool }

func (p *progressLine) show(format string, args ...any) {
	if atTerminal(os.Stderr) {
		fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
		p.shown = true
	}
}

func (p *progressLine) end() {
	if p.shown {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}

// filterFlags adds the flags of a filter to a command.
func filterFlags(cmd *cobra.Command, f *admin.Filter) {
	for _, flag := range []struct {
		into       *string
		name, help string
	}{
		{&f.Tenant, "tenant", "tenant, by id or name"},
		{&f.Stream, "stream", "stream name"},
		{&f.FromDomain, "from-domain", "domain of the From header"},
		{&f.Domain, "domain", "recipient domain"},
		{&f.Provider, "provider", "provider, such as google or mx:example.net"},
		{&f.Source, "source", "bind address of the last attempt, or kept for a greylisting peer"},
		{&f.Pool, "pool", "pool, by id or name"},
		{&f.Tag, "tag", "the client's own mark, such as a campaign"},
		{&f.Priority, "priority", "priority of the message, such as 80, or a range such as 60-100"},
		{&f.State, "state", "waiting, held or in-doubt"},
		{&f.OlderThan, "older-than", "accepted longer ago than this, such as 2h or 3d"},
		{&f.YoungerThan, "younger-than", "accepted more recently than this"},
		{&f.LastReply, "last-reply", "class of the last attempt, or a part of its reply"},
	} {
		cmd.Flags().StringVar(flag.into, flag.name, "", flag.help)
	}
	// The flag is there, so this cannot fail.
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions([]string{"waiting", "held", "in-doubt"}, cobra.ShellCompDirectiveNoFileComp))
}

func newQueueSummary(o *options) *cobra.Command {
	var full bool
	var f admin.Filter
	cmd := &cobra.Command{
		Use: "summary", Short: "Count what is in the queue", Args: exactly(0),
		Long: "Count what is in the queue of the relay, whether it runs or not. A relay that runs also\n" +
			"counts by tenant, stream and provider, without reading the queue. --full reads it: it\n" +
			"counts held mail and mail in doubt by tenant, stream and provider too, with the age of\n" +
			"the oldest, and takes a filter.",
		Example: "  relais-relay queue summary --json\n  relais-relay queue summary --full --older-than 1d",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if full {
				return printSurvey(cmd.Context(), o, &f)
			}
			if !f.Empty() {
				return usageError{fmt.Errorf("a filter needs --full: without it the queue is not read")}
			}
			s, err := summary(cmd.Context(), o)
			if err != nil || o.json {
				return err
			}
			return printSummary(&s)
		},
	}
	cmd.Flags().BoolVar(&full, "full", false, "read the whole queue")
	filterFlags(cmd, &f)
	return cmd
}

func printSummary(s *admin.Summary) error {
	fmt.Printf("waiting recipients    %d\nheld recipients       %d\nbeing delivered       %d\nwork queues           %d\nlongest past deadline %.0f s\n",
		s.Waiting, s.Held, s.InFlight, s.Queues, s.OverdueSecond)
	if !s.Counted {
		fmt.Println("The relay has just started and is still counting: there is more.")
	}
	for _, part := range []struct {
		title  string
		groups []admin.Group
	}{{"TENANT", s.Tenants}, {"TENANT/STREAM", s.Streams}, {"PROVIDER", s.Providers}} {
		if len(part.groups) == 0 {
			continue
		}
		w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
		fmt.Fprintf(w, "\n%s\tWAITING\tBEING DELIVERED\tDUE SINCE\n", part.title)
		for _, g := range part.groups {
			fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", g.Name, g.Waiting, g.InFlight, timeText(g.DueSince))
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if len(s.Holds) > 0 {
		fmt.Println()
		return printHolds(s.Holds)
	}
	return nil
}

func printSurvey(ctx context.Context, o *options, f *admin.Filter) error {
	var last admin.Survey
	var line progressLine
	err := stream(ctx, o, http.MethodGet, "/v1/queue/survey?"+f.Values().Encode(), nil, func(b []byte) error {
		if o.json {
			_, err := fmt.Printf("%s\n", b)
			return err
		}
		last = admin.Survey{}
		if err := json.Unmarshal(b, &last); err != nil {
			return err
		}
		line.show("%d of about %d recipients read", last.Looked, last.Total)
		return nil
	})
	line.end()
	if err == nil && last.Error != "" {
		err = fault.New(fault.Unavailable, "relais-relay.summary", "%s", last.Error)
	}
	if err != nil || o.json {
		return err
	}
	if len(last.States) == 0 {
		fmt.Println("No queued recipient matches.")
		return nil
	}
	for i, part := range []struct {
		title  string
		shares []admin.Share
	}{{"STATE", last.States}, {"TENANT", last.Tenants}, {"TENANT/STREAM", last.Streams}, {"PROVIDER", last.Providers}} {
		if i > 0 {
			fmt.Println()
		}
		w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
		fmt.Fprintf(w, "%s\tRECIPIENTS\tHELD\tOLDEST\n", part.title)
		for _, s := range part.shares {
			fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", s.Name, s.Count, s.Held, timeText(s.Oldest))
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

func newQueueList(o *options) *cobra.Command {
	var f admin.Filter
	var after, limit string
	cmd := &cobra.Command{
		Use: "list [ID…]", Short: "List queued messages, oldest first",
		Long: "List queued messages, oldest first. A message is listed when one of its recipients matches.",
		Example: "  relais-relay queue list --domain example.com --limit 20\n  relais-relay queue list --state held --json\n" +
			"  relais-relay queue list --provider google --last-reply 421",
		RunE: func(cmd *cobra.Command, args []string) error {
			f.IDs = args
			v := f.Values()
			for name, value := range map[string]string{"after": after, "limit": limit} {
				if value != "" {
					v.Set(name, value)
				}
			}
			var list []admin.Message
			if err := ask(cmd.Context(), o, "/v1/queue/messages?"+v.Encode(), &list); err != nil || o.json {
				return err
			}
			if len(list) == 0 {
				fmt.Println("No queued message matches.")
				return nil
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
			fmt.Fprintln(w, "MESSAGE\tSTREAM\tPRIORITY\tSENDER\tRECIPIENT\tSTATE\tATTEMPTS\tNEXT\tLAST REPLY")
			for i := range list {
				printMessage(w, &list[i])
			}
			if err := w.Flush(); err != nil {
				return err
			}
			if n, err := strconv.Atoi(cmp.Or(limit, strconv.Itoa(admin.DefaultListed))); err == nil && len(list) >= n {
				fmt.Fprintf(os.Stderr, "There may be more: --after %s goes on behind these, --limit lists more at once.\n", list[len(list)-1].ID)
			}
			return nil
		},
	}
	filterFlags(cmd, &f)
	cmd.Flags().StringVar(&after, "after", "", "continue behind this message id")
	cmd.Flags().StringVar(&limit, "limit", "", "number of messages (default 100)")
	return cmd
}

// stateText is a recipient's state for people.
func stateText(r *admin.Recipient) string {
	switch {
	case r.InFlight:
		return "being delivered"
	case r.State == "waiting" && r.InDoubt > 0:
		return "in doubt"
	}
	return r.State
}

func printHolds(holds []admin.Hold) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "RULE\tHOLDS\tRECIPIENTS\tOWNER\tUNTIL\tCAUSE")
	for i := range holds {
		h := &holds[i]
		held := fmt.Sprint(h.Held)
		switch {
		case h.Ending:
			held += ", being released"
		case h.Sweeping:
			held += ", more to come"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", h.ID, filterText(h), held, h.Owner, timeText(h.Until), clip(h.Cause))
	}
	return w.Flush()
}

func filterText(h *admin.Hold) string {
	if h.All {
		return "everything"
	}
	v := h.Filter.Values()
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(v)) {
		parts = append(parts, name+"="+v.Get(name))
	}
	return strings.Join(parts, " ")
}

func newQueueHolds(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "holds", Short: "List the rules that hold mail", Args: exactly(0),
		Example: "  relais-relay queue holds --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var holds []admin.Hold
			if err := ask(cmd.Context(), o, "/v1/queue/holds", &holds); err != nil || o.json {
				return err
			}
			if len(holds) == 0 {
				fmt.Println("No rule holds mail.")
				return nil
			}
			return printHolds(holds)
		},
	}
}

// endOf reads when a rule ends: a span from now, or a time (RFC 3339).
func endOf(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	d, err := parseSpan(text)
	if err != nil {
		return time.Time{}, usageError{fmt.Errorf("--until %q is neither a time such as 2026-01-02T15:04:05Z nor a span such as 2h or 3d", text)}
	}
	return now.Add(d), nil
}
