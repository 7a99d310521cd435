// Command relais-relay accepts mail, keeps it in its queue and delivers it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/relais-mta/relais/relay/config"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
)

// The exit codes of every command.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := newRoot().ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "relais-relay:", message(err))
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// usageError is a mistake in the command's words.
type usageError struct{ error }

func message(err error) string {
	var e *fault.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	// A system's cause says what our own words could not; others repeat them.
	var ours *fault.Error
	if e.Cause == nil || errors.As(e.Cause, &ours) {
		return fault.Public(err)
	}
	return fault.Public(err) + " (" + e.Cause.Error() + ")"
}

// options are the flags that all commands share.
type options struct {
	data   string
	config string
	json   bool
}

func newRoot() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:           "relais-relay",
		Short:         "Accept mail, keep it in a queue that survives power cuts, and deliver it",
		Version:       buildinfo.Get().Version,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },

		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return checkFlags(cmd) },
	}
	root.PersistentFlags().StringVar(&o.data, "data", config.DefaultDataDir, "data directory")
	root.PersistentFlags().BoolVar(&o.json, "json", false, "print JSON")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	queue := newQueue(&o)
	queue.AddCommand(newQueueFsck(&o))
	root.AddCommand(newJoin(&o), newServe(&o), queue, newLanes(&o), newTrace(&o), newStatus(&o), newEvents(&o), newClassify())
	return root
}

// noCommand refuses the name of a command that is not there.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("there is no command %q; see %s --help", args[0], cmd.CommandPath())}
	}
	return nil
}

// checkFlags refuses flags that are there and empty, which are a script's variables
// that were not set: a filter of which one part is empty would mean more mail.
func checkFlags(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if err == nil && f.Value.Type() == "string" && f.Value.String() == "" {
			err = usageError{fmt.Errorf("--%s is empty: give a value, or leave the flag out", f.Name)}
		}
	})
	return err
}

// exactly is cobra.ExactArgs with a usage error.
func exactly(n int) cobra.PositionalArgs { return wrapArgs(cobra.ExactArgs(n)) }

func wrapArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{err}
		}
		for i, arg := range args {
			if arg == "" {
				return usageError{fmt.Errorf("argument %d is empty: %s", i+1, cmd.UseLine())}
			}
		}
		return nil
	}
}
