package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// tracing is what a trace was asked for.
type tracing struct {
	provider, domain, source, mx, message, tenant string
	inbound, headers                              bool
	length                                        time.Duration
	count                                         int
}

func newTrace(o *options) *cobra.Command {
	var t tracing
	cmd := &cobra.Command{
		Use: "trace", Short: "Show SMTP dialogues while they happen", Args: exactly(0),
		Long: `Show the SMTP dialogues of deliveries while they happen, or with --inbound those of
clients and of servers that bring bounces. ">" is what the relay says, "<" what the
other end says, "*" what happens to the connection. Secrets are masked, and of a
message only its size is shown. It ends with Ctrl-C, --for or --count. When more
comes than can be shown, lines are left out and counted; mail never waits for it.`,
		Example: "  relais-relay trace --provider orange\n  relais-relay trace --domain example.com --headers --for 1m\n  relais-relay trace --inbound --source 192.0.2.7 --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return t.run(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&t.provider, "provider", "", "of mail to this provider, such as google or mx:example.net")
	f.StringVar(&t.domain, "domain", "", "about mail to this domain")
	f.StringVar(&t.source, "source", "", "from this source address; with --inbound, of this client")
	f.StringVar(&t.mx, "mx", "", "with this mail host")
	f.StringVar(&t.message, "message", "", "about this message; with --inbound, from where its id is known on")
	f.StringVar(&t.tenant, "tenant", "", "about mail of this tenant, by id or name")
	f.BoolVar(&t.headers, "headers", false, "show the header sections of messages, too (not of bounces)")
	f.BoolVar(&t.inbound, "inbound", false, "dialogues of clients and servers that connect to the relay")
	f.Var((*policy.DurationFlag)(&t.length), "for", "end after this time, such as 30s (default: never)")
	f.IntVar(&t.count, "count", 0, "end after so many lines (default: never)")
	return cmd
}

func (t *tracing) query() string {
	v := url.Values{}
	for name, value := range map[string]string{"provider": t.provider, "domain": t.domain, "source": t.source, "mx": t.mx, "message": t.message, "tenant": t.tenant} {
		if value != "" {
			v.Set(name, value)
		}
	}
	if t.inbound {
		v.Set("incoming", "true")
	}
	if t.headers {
		v.Set("headers", "true")
	}
	return v.Encode()
}

// maxTraceLineBytes bounds one line of the stream.
const maxTraceLineBytes = 64 << 10

// run prints lines until it has had enough.
func (t *tracing) run(ctx context.Context, o *options, out, told io.Writer) error {
	const op = "relais-relay.trace"
	if t.length < 0 || t.count < 0 {
		return usageError{errors.New("--for and --count are not negative")}
	}
	if t.length > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, t.length)
		defer cancel()
	}
	socket := filepath.Join(o.data, admin.SocketName)
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://relay/v1/trace?"+t.query(), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fault.Wrap(err, fault.Unavailable, op, "no relay answers on %s: is it running with --data %s, and may you read its socket?", socket, o.data)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var p admin.Problem
		if json.NewDecoder(io.LimitReader(resp.Body, maxTraceLineBytes)).Decode(&p) == nil && p.Detail != "" {
			return fault.New(fault.Invalid, op, "%s", p.Detail)
		}
		return fault.New(fault.Internal, op, "the relay answered %s", resp.Status)
	}
	_, _ = fmt.Fprintln(told, "watching; Ctrl-C ends it")
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxTraceLineBytes)
	var printed printer
	for n := 0; (t.count == 0 || n < t.count) && lines.Scan(); n++ {
		if o.json {
			_, err = fmt.Fprintf(out, "%s\n", lines.Bytes())
		} else {
			var l trace.Line
			if err = json.Unmarshal(lines.Bytes(), &l); err == nil {
				_, err = io.WriteString(out, printed.text(&l))
			}
		}
		if err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil && ctx.Err() == nil {
		return fault.Wrap(err, fault.Unavailable, op, "the relay broke off the trace")
	}
	return nil
}

// maxSeenSessions bounds the sessions whose ends are remembered as told.
const maxSeenSessions = 10_000

// printer turns lines into text; it tells once who talks in a session.
type printer struct{ seen map[uint64]string }

func (p *printer) text(l *trace.Line) string {
	var b strings.Builder
	head := fmt.Sprintf("%s %6d ", l.At.Local().Format("15:04:05.000"), l.Session)
	if l.Lost > 0 {
		fmt.Fprintf(&b, "… %d lines were left out: more came than could be shown\n", l.Lost)
	}
	if who := who(l); p.seen[l.Session] != who {
		if len(p.seen) >= maxSeenSessions || p.seen == nil {
			p.seen = make(map[uint64]string)
		}
		p.seen[l.Session] = who
		b.WriteString(head + "= " + who + "\n")
	}
	b.WriteString(head + l.Side + " ")
	if l.Header {
		b.WriteString("| ")
	}
	b.WriteString(l.Text + "\n")
	return b.String()
}

// who says on one line whose dialogue it is and what it is about.
func who(l *trace.Line) string {
	words := []string{string(l.Kind)}
	add := func(before, text string) {
		if text != "" {
			words = append(words, before+text)
		}
	}
	add("", l.MX)
	if l.Remote != "" {
		add("", "["+l.Remote+"]")
	}
	add("from ", l.Source)
	add("provider ", l.Provider)
	add("domain ", l.Domain)
	add("message ", l.Message)
	add("tenant ", l.Tenant)
	return strings.Join(words, " ")
}
