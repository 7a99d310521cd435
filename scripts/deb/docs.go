package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// manual writes the manual page from what the program itself says with --help,
// so that the two cannot disagree.
func manual(binary string, p *product, version string, at time.Time) (string, error) {
	var page strings.Builder
	fmt.Fprintf(&page, ".TH %s 8 %q %q Relais\n.SH NAME\n%s \\- %s\n.SH SYNOPSIS\n.B %s\n.I command\n[\\fIargument\\fR ...]\n.SH COMMANDS\n",
		strings.ToUpper(p.name), at.UTC().Format(time.DateOnly), version, p.name, p.synopsis, p.name)
	if err := describe(&page, binary, p.name); err != nil {
		return "", err
	}
	fmt.Fprintf(&page, ".SH EXIT STATUS\n0 when it worked, 1 when it failed, 2 when it was called wrongly.\n.SH FILES\n.TP\n.I /etc/relais/%s.toml\nlisteners, certificates, resolvers\n.TP\n.I %s\nall state\n.SH SEE ALSO\n.I /usr/share/doc/%s/operations.md\n",
		p.side, p.state(), p.name)
	return page.String(), nil
}

// commandLine is a line of the list of commands in a help text.
var commandLine = regexp.MustCompile(`^  ([a-z-]+) +\S`)

// describe writes the help of a command, and then of those below it.
func describe(page *strings.Builder, binary, name string, below ...string) error {
	help, err := output(binary, append(below, "--help")...)
	if err != nil {
		return err
	}
	fmt.Fprintf(page, ".SS %s\n.nf\n%s\n.fi\n", roff(strings.Join(append([]string{name}, below...), " ")), roff(help))
	listed := false
	for _, line := range strings.Split(help, "\n") {
		if line == "" || line[0] != ' ' {
			listed = strings.HasSuffix(line, "Commands:")
			continue
		}
		m := commandLine.FindStringSubmatch(line)
		if !listed || m == nil || m[1] == "help" || m[1] == "completion" {
			continue
		}
		if err := describe(page, binary, name, append(below[:len(below):len(below)], m[1])...); err != nil {
			return err
		}
	}
	return nil
}

// roff keeps troff from reading its own commands in a text.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...").Replace(text)
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
			lines[i] = `\&` + line
		}
	}
	return strings.Join(lines, "\n")
}

// licences gathers the licence texts of everything that is linked into the
// binary, which is what most of those licences ask for.
func licences(binary string) (string, error) {
	linked, err := output("go", "version", "-m", binary)
	if err != nil {
		return "", err
	}
	folders, err := moduleFolders()
	if err != nil {
		return "", err
	}
	goroot, err := output("go", "env", "GOROOT")
	if err != nil {
		return "", err
	}
	var out strings.Builder
	if err := licencesIn(&out, "the Go standard library", goroot); err != nil {
		return "", err
	}
	for _, line := range strings.Split(linked, "\n") {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[0] != "dep" {
			continue
		}
		module := fields[1] + " " + fields[2]
		if err := licencesIn(&out, module, folders[module]); err != nil {
			return "", err
		}
	}
	return out.String(), nil
}

// moduleFolders tells where the source of each module is, by "path version".
func moduleFolders() (map[string]string, error) {
	text, err := output("go", "list", "-m", "-f", "{{.Path}} {{.Version}}|{{.Dir}}", "all")
	if err != nil {
		return nil, err
	}
	folders := make(map[string]string)
	for _, line := range strings.Split(text, "\n") {
		if module, dir, ok := strings.Cut(line, "|"); ok && dir != "" {
			folders[module] = dir
		}
	}
	return folders, nil
}

func licencesIn(out *strings.Builder, module, dir string) error {
	found := false
	for _, pattern := range []string{"LICEN[CS]E*", "COPYING*", "NOTICE*", "PATENTS*"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			found = true
			fmt.Fprintf(out, "==== %s: %s\n\n%s\n\n", module, filepath.Base(name), text)
		}
	}
	if !found {
		return fmt.Errorf("no licence of %s was found in %q; a package without it may not be handed on", module, dir)
	}
	return nil
}
