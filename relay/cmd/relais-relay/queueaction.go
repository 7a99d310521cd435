package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/admin"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

func parseSpan(text string) (time.Duration, error) {
	d, err := policy.ParseDuration(text)
	return d.D(), err
}

// queueAction is one of the commands that act on all mail that a filter names.
type queueAction struct {
	o       *options
	action  queue.Action
	past    string // what was done, for people
	ends    bool   // mail is gone afterwards
	op      admin.Operation
	yes     bool
	rule    bool
	until   string
	in      *os.File // who may be asked
	isHuman func(*os.File) bool
}

func newQueueActions(o *options) []*cobra.Command {
	return []*cobra.Command{
		newQueueAction(o, queueAction{action: queue.ActionRetry, past: "made due at once"}, &cobra.Command{
			Short: "Make what waits for a later attempt due at once",
			Long: "Make what waits for a later attempt due at once. Order and limits stay as they are, and\n" +
				"no mail goes out before the time that its client set. Mail in doubt, which may have\n" +
				"arrived, is left alone unless ids or --state in-doubt name it.",
			Example: "  relais-relay queue retry --provider orange --last-reply 421\n  relais-relay queue retry msg_01kampxh00041061050r3gg28a",
		}),
		newQueueAction(o, queueAction{action: queue.ActionBounce, past: "bounced", ends: true}, &cobra.Command{
			Short: "End mail as refused, and tell the senders as policy says",
			Long: "End mail as refused. Senders are told the reason as they are of any failure: by a\n" +
				"notification for transactional mail or where NOTIFY asked for one, else by events.",
			Example: "  relais-relay queue bounce --domain gmial.com --reason \"the domain is misspelt\"\n" +
				"  relais-relay queue bounce --all --yes --reason \"sent by mistake\"",
		}),
		newQueueAction(o, queueAction{action: queue.ActionPurge, past: "purged", ends: true}, &cobra.Command{
			Short: "Remove mail without telling its senders",
			Long: "Remove mail without telling its senders. Each recipient leaves an event. What is being\n" +
				"delivered is left alone and counted.",
			Example: "  relais-relay queue purge --tag spring-sale\n  relais-relay queue purge --tenant acme --stream newsletter --older-than 2d --yes",
		}),
		newQueueAction(o, queueAction{action: queue.ActionHold, past: "held"}, &cobra.Command{
			Short: "Hold mail until it is released",
			Long: "Hold what waits until it is released by hand. With --rule also what comes, until the rule\n" +
				"is released or --until; --reason is the cause that the rule shows. The deadlines of held\n" +
				"mail count.",
			Example: "  relais-relay queue hold --stream bulk --rule --reason \"complaints, see ticket 4711\" --until 4h\n" +
				"  relais-relay queue hold msg_01kampxh00041061050r3gg28a",
		}),
		newQueueAction(o, queueAction{action: queue.ActionRelease, past: "released"}, &cobra.Command{
			Short: "Release held mail, or a rule that holds mail",
			Long: "Release held mail, so that it is due at once. The id of a rule ends that rule and releases\n" +
				"all that it holds, in the background. What a rule in force holds stays held otherwise.",
			Example: "  relais-relay queue release hld_01kampxh00041061050r3gg28a\n  relais-relay queue release --state held --domain example.com",
		}),
		newQueueHolds(o),
	}
}

func newQueueAction(o *options, a queueAction, cmd *cobra.Command) *cobra.Command {
	a.o, a.in, a.isHuman = o, os.Stdin, atTerminal
	cmd.Use = string(a.action) + " [ID…]"
	cmd.Long += "\n\nIDs of messages or recipients and flags narrow down what is meant; all of them must match.\n" +
		"A long action shows its progress, as JSON lines with --json, and can be interrupted: what\n" +
		"was done stays done, and --resume with the last line's token goes on behind it."
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.run(cmd.Context(), args) }
	filterFlags(cmd, &a.op.Filter)
	flags := cmd.Flags()
	flags.BoolVar(&a.op.All, "all", false, "everything in the queue")
	flags.StringVar(&a.op.Reason, "reason", "", "why, for those who look later")
	flags.StringVar(&a.op.Resume, "resume", "", "go on behind this token of an interrupted run")
	if a.ends {
		flags.BoolVar(&a.yes, "yes", false, "do not ask")
	}
	if a.action == queue.ActionHold {
		flags.BoolVar(&a.rule, "rule", false, "hold what comes, too")
		flags.StringVar(&a.until, "until", "", "end of the rule: a span such as 4h, or a time")
	}
	return cmd
}

func (a *queueAction) run(ctx context.Context, args []string) error {
	a.op.Action = a.action
	for _, arg := range args {
		if arg == "" {
			return usageError{fmt.Errorf("an id is empty")}
		}
	}
	if a.action == queue.ActionRelease && len(args) > 0 && strings.HasPrefix(args[0], "hld_") {
		return a.releaseRules(ctx, args)
	}
	a.op.Filter.IDs = args
	switch {
	case a.op.Filter.Empty() && !a.op.All:
		return usageError{fmt.Errorf("say which mail: ids, a filter such as --domain or --tag, or --all for everything")}
	case !a.op.Filter.Empty() && a.op.All:
		return usageError{fmt.Errorf("--all and a filter contradict each other")}
	case a.action == queue.ActionBounce && a.op.Reason == "":
		return usageError{fmt.Errorf("--reason is needed: the senders are told it")}
	case a.until != "" && !a.rule:
		return usageError{fmt.Errorf("--until is the end of a rule: add --rule")}
	}
	if a.rule {
		return a.putRule(ctx)
	}
	if err := a.confirm(); err != nil {
		return err
	}
	return a.operate(ctx)
}

// confirm asks a person before mail is gone, and wants --yes from a program
// before all of it is.
func (a *queueAction) confirm() error {
	if !a.ends || a.yes {
		return nil
	}
	if !a.isHuman(a.in) {
		if a.op.All {
			return usageError{fmt.Errorf("to %s everything needs --yes as well as --all", a.action)}
		}
		return nil
	}
	what := "what matches"
	if a.op.All {
		what = "EVERYTHING in the queue"
	}
	fmt.Fprintf(os.Stderr, "%s %s? It cannot be undone. Type yes: ", strings.ToUpper(string(a.action[:1]))+string(a.action[1:]), what)
	answer, err := bufio.NewReader(io.LimitReader(a.in, maxAnswerLineBytes)).ReadString('\n')
	if (err != nil && err != io.EOF) || strings.TrimSpace(answer) != "yes" {
		return fault.New(fault.Invalid, "relais-relay.queue", "nothing was done")
	}
	return nil
}

const maxAnswerLineBytes = 64

func (a *queueAction) operate(ctx context.Context) error {
	var last admin.Progress
	var line progressLine
	err := stream(ctx, a.o, http.MethodPost, "/v1/queue/operations", &a.op, func(b []byte) error {
		last = admin.Progress{}
		if err := json.Unmarshal(b, &last); err != nil {
			return err
		}
		if a.o.json {
			_, err := fmt.Printf("%s\n", b)
			return err
		}
		line.show("%d of about %d recipients looked at, %d %s", last.Looked, last.Total, last.Done, a.past)
		return nil
	})
	line.end()
	switch {
	case last.Error != "":
		err = fault.New(fault.Unavailable, "relais-relay.queue", "%s; %s", last.Error, a.resumeText(&last))
	case ctx.Err() != nil && !last.Finished:
		err = fault.New(fault.Unavailable, "relais-relay.queue", "interrupted behind the step in hand; %s", a.resumeText(&last))
	case err == nil && !last.Finished:
		err = fault.New(fault.Unavailable, "relais-relay.queue", "the relay broke off its answer; %s", a.resumeText(&last))
	}
	if !a.o.json && (err == nil || last.Looked > 0) {
		a.tell(&last)
	}
	return err
}

func (a *queueAction) resumeText(p *admin.Progress) string {
	if p.Resume == "" {
		return "repeat the command to go on"
	}
	return "the same command with --resume " + p.Resume + " goes on"
}

// tell says what was done.
func (a *queueAction) tell(p *admin.Progress) {
	if p.Matched == 0 && p.Finished {
		fmt.Println("No queued recipient matches.")
		return
	}
	fmt.Printf("%d recipients %s.\n", p.Done, a.past)
	if p.InFlight > 0 {
		fmt.Printf("%d are being delivered and were left alone.\n", p.InFlight)
	}
	if p.Skipped == 0 {
		return
	}
	switch a.action {
	case queue.ActionRetry:
		fmt.Printf("%d were due already, or are in doubt.\n", p.Skipped)
	case queue.ActionRelease:
		fmt.Printf("%d are held by rules in force: release those, see relais-relay queue holds.\n", p.Skipped)
	default:
		fmt.Printf("%d were left as they were.\n", p.Skipped)
	}
}

func (a *queueAction) putRule(ctx context.Context) error {
	end, err := endOf(a.until, time.Now())
	if err != nil {
		return err
	}
	switch {
	case a.op.Reason == "":
		return usageError{fmt.Errorf("--reason is needed: it is what those see who wonder where their mail is")}
	case a.op.Resume != "":
		return usageError{fmt.Errorf("a rule goes on by itself: leave --resume away")}
	}
	in := admin.Hold{Filter: a.op.Filter, All: a.op.All, Cause: a.op.Reason, Until: end}
	var out admin.Hold
	if err := call(ctx, a.o, http.MethodPost, "/v1/queue/holds", &in, &out); err != nil || a.o.json {
		return err
	}
	fmt.Printf("Rule %s holds what comes and, within moments, what waits.\nrelais-relay queue release %s ends it.\n", out.ID, out.ID)
	return nil
}

func (a *queueAction) releaseRules(ctx context.Context, rules []string) error {
	if !a.op.Filter.Empty() || a.op.All {
		return usageError{fmt.Errorf("a rule is released as a whole: leave the filter away")}
	}
	for _, id := range rules {
		if !strings.HasPrefix(id, "hld_") {
			return usageError{fmt.Errorf("%q is not the id of a rule: release rules and messages in two commands", id)}
		}
	}
	for _, id := range rules {
		var out admin.Hold
		if err := call(ctx, a.o, http.MethodDelete, "/v1/queue/holds/"+url.PathEscape(id), nil, &out); err != nil {
			return err
		}
		if !a.o.json {
			fmt.Printf("Rule %s has ended; the %d recipients that it held are being released.\n", out.ID, out.Held)
		}
	}
	return nil
}
