package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// checkInputs refuses, before a command's own code runs, what no command can
// mean: an empty argument or flag is a script's variable that was not set, and
// without the check `--cidr "$NET"` would allow every network.
func checkInputs(cmd *cobra.Command, args []string) (err error) {
	for i, arg := range args {
		if arg == "" {
			return usagef("argument %d is empty: %s", i+1, cmd.UseLine())
		}
	}
	if err := cmd.ValidateFlagGroups(); err != nil {
		return usagef("%s", err)
	}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		switch f.Value.Type() {
		case "string", "stringSlice", "stringToString":
			if text := f.Value.String(); err == nil && (text == "" || text == "[]") {
				err = usagef("--%s is empty: give a value, or leave the flag out", f.Name)
			}
		}
		if err == nil && f.Name == "reason" {
			err = checkReason(f.Value.String())
		}
	})
	return err
}

// checkReason wants what fits into an audit entry.
func checkReason(text string) error {
	switch {
	case len(text) > command.MaxTextBytes:
		return usagef("--reason has %d bytes, allowed are %d: shorten it", len(text), command.MaxTextBytes)
	case !utf8.ValidString(text):
		return usagef("--reason is not UTF-8 text")
	case strings.ContainsFunc(text, unicode.IsControl):
		return usagef("--reason holds a line break or another control character: write it on one line")
	}
	return nil
}

// yesFlag adds the flag that answers confirm's question.
func yesFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("yes", false, "do not ask, also at a terminal")
}

// confirm asks at a terminal before something that cannot be taken back.
// Without a terminal there is nobody to ask: who wrote the script meant it.
func (a *app) confirm(cmd *cobra.Command, yes bool, format string, what ...any) error {
	if yes || !a.atTerminal(cmd) {
		return nil
	}
	fmt.Fprintf(cmd.ErrOrStderr(), format+" Go on? [y/N] ", what...)
	answer, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if answer = strings.ToLower(strings.TrimSpace(answer)); err == nil && (answer == "y" || answer == "yes") {
		return nil
	}
	return fault.New(fault.Denied, "relais-control", "nothing was changed")
}

// atTerminal reports whether a person types at standard input.
func (a *app) atTerminal(cmd *cobra.Command) bool {
	if a.terminal != nil {
		return *a.terminal
	}
	f, ok := cmd.InOrStdin().(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// systemCause returns the text of a cause that comes from the system and so
// says what our own words could not; other causes repeat them.
func systemCause(err error) string {
	var ours *fault.Error
	if err == nil || errors.As(err, &ours) {
		return ""
	}
	return " (" + err.Error() + ")"
}
