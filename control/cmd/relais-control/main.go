// Command relais-control runs a server of the control plane and is the command
// line that manages the cluster: everything but init, serve and ca goes over
// the management API, with the key that init left in DIR/cli.toml.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/relais-mta/relais/control/config"
	"github.com/relais-mta/relais/shared/buildinfo"
	"github.com/relais-mta/relais/shared/fault"
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

// run executes one command line and returns its exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	app := &app{}
	root := app.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(os.Stderr, "relais-control: "+message(err))
	// Whatever fails before a command's own code runs is about how it was called.
	var usage *usageError
	if !app.entered || errors.As(err, &usage) {
		fmt.Fprintln(os.Stderr, "run with --help for usage")
		return exitUsage
	}
	return exitFailed
}

// usageError is an error about how the command was called.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// message words an error for a person: our own text, and the cause only where
// it comes from the system and so says what we could not.
func message(err error) string {
	var f *fault.Error
	if !errors.As(err, &f) {
		return err.Error()
	}
	return fault.Public(err) + systemCause(f.Cause)
}

// app holds what all commands share.
type app struct {
	entered bool // a command's own code was reached
	json    bool
	dataDir string
	cliFile string

	terminal *bool // a person types at standard input; nil: look
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "relais-control",
		Short:         "Run and manage the control plane of Relais",
		Version:       buildinfo.Version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			a.entered = true
			return checkInputs(cmd, args)
		},
	}
	flags := root.PersistentFlags()
	flags.BoolVar(&a.json, "json", false, "print JSON")
	flags.StringVar(&a.dataDir, "data", config.DefaultDataDir, "data directory of the server")
	flags.StringVar(&a.cliFile, "cli", "", "file with endpoints, CA pin and API key (default: $RELAIS_CLI, else cli.toml in the data directory)")
	root.AddCommand(
		a.initCommand(), a.joinCommand(), a.serveCommand(), a.caCommand(),
		a.tokenCommand(), a.nodeCommand(), a.serverCommand(), a.tenantCommand(), a.projectCommand(), a.domainCommand(),
		a.credentialCommand(), a.ipCommand(), a.poolCommand(), a.policyCommand(), a.limitCommand(), a.auditCommand(), a.statusCommand(),
		a.backupCommand(), a.restoreCommand(), a.recoverCommand(), a.recoveryCommand(),
		a.brakeCommand(), a.warmupCommand(), a.upgradeCommand(), a.versionCommand(),
	)
	for _, group := range root.Commands() {
		if group.HasSubCommands() && group.RunE == nil {
			requireSubcommand(group)
		}
	}
	return root
}

// requireSubcommand makes a group without or with an unknown subcommand a usage
// error; cobra would print the help and succeed.
func requireSubcommand(group *cobra.Command) {
	group.Args = cobra.ArbitraryArgs
	group.RunE = func(cmd *cobra.Command, args []string) error {
		var names []string
		for _, c := range cmd.Commands() {
			names = append(names, c.Name())
		}
		if len(args) == 0 {
			return usagef("%s needs a command: %s", cmd.Name(), strings.Join(names, ", "))
		}
		return usagef("%s has no command %q: use %s", cmd.Name(), args[0], strings.Join(names, ", "))
	}
}
