package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of how often the view is drawn anew.
const (
	minTopInterval = 200 * time.Millisecond
	maxTopInterval = time.Minute
)

func newLanes(o *options) *cobra.Command {
	var top bool
	sorting, interval := sortSessions, time.Second
	cmd := &cobra.Command{
		Use: "lanes", Short: "List source × provider with sessions and waiting work, busiest first", Args: exactly(0),
		Long: `List the lanes, source × provider: sessions, recipients under way and due, results of
the last ten seconds, what keeps due mail from the lane now and until when, how the
relay slows the lane down by itself, and for how long the oldest has been due. Due mail may take any source of its pool, so it
is counted at each of them. With --top the list is shown anew all the time: ` + keyHelp + `.
Where standard output is no terminal --top prints once.`,
		Example: "  relais-relay lanes --json\n  relais-relay lanes --top --sort waiting",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, ok := sortings[sorting]; !ok {
				return usageError{fmt.Errorf("--sort %q is unknown: use one of %s", sorting, sortNames)}
			}
			if interval < minTopInterval || interval > maxTopInterval {
				return usageError{fmt.Errorf("--interval is %v to %v", minTopInterval, maxTopInterval)}
			}
			read := func(ctx context.Context) (lanes []engine.LaneInfo, err error) {
				err = ask(ctx, o, "/v1/lanes", &lanes)
				return lanes, err
			}
			if screen, ok := openScreen(os.Stdin, os.Stdout); top && ok && !o.json {
				return runTop(cmd.Context(), screen, read, sorting, interval)
			}
			lanes, err := read(cmd.Context())
			if err != nil || o.json {
				return err
			}
			if len(lanes) == 0 {
				fmt.Println("There are no lanes: nothing was sent lately.")
				return nil
			}
			_, err = fmt.Print(renderLanes(lanes, view{sorting: sorting, now: time.Now()}))
			return err
		},
	}
	cmd.Flags().BoolVar(&top, "top", false, "show the list anew all the time, until q or Ctrl-C")
	cmd.Flags().StringVar(&sorting, "sort", sorting, "order: "+sortNames)
	cmd.Flags().Var((*policy.DurationFlag)(&interval), "interval", "with --top: time between two looks")
	return cmd
}
