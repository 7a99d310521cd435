package main

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// product is one of the two packages.
type product struct {
	name     string // of package, binary and unit
	side     string // folder of the source, name of the configuration file
	synopsis string
	about    string // long description, wrapped, without the leading blanks
	depends  string
	scripts  []string // script.side: what this package's scripts do beside the common part
}

var products = []product{
	{
		name: "relais-relay", side: "relay", synopsis: "outbound mail relay: accepts, keeps and delivers mail",
		about: `A relay stands on its own addresses, accepts mail by authenticated SMTP,
keeps it in a queue that survives power cuts, and delivers it from named
source addresses under the limits of each mailbox provider. It takes its
policy from the servers of relais-control, and works on when they are away.`,
		depends: "adduser, ca-certificates",
		scripts: []string{"prerm.relay"},
	},
	{
		name: "relais-control", side: "control", synopsis: "control plane for Relais mail relays",
		about: `One, three or five control servers agree by Raft on who may send what, from
which address and how fast, and tell every relay its share. This package
holds the server and the command line that manages the cluster.`,
		depends: "adduser, ca-certificates",
	},
}

func (p *product) unit() string  { return p.name + ".service" }
func (p *product) state() string { return "/var/lib/relais/" + p.side }

// control is the control file of the package.
func (p *product) control(version, maintainer string, installedKiB int64) string {
	return fmt.Sprintf(`Package: %s
Version: %s
Architecture: amd64
Maintainer: %s
Installed-Size: %d
Depends: %s
Section: mail
Priority: optional
Description: %s
 %s
`, p.name, version, maintainer, installedKiB, p.depends, p.synopsis, strings.ReplaceAll(p.about, "\n", "\n "))
}

// changelog is the Debian changelog. What changed for users is in CHANGELOG.md.
func (p *product) changelog(version, maintainer string, at time.Time) string {
	return fmt.Sprintf("%s (%s) stable; urgency=medium\n\n  * Built from this version of the source; CHANGELOG.md.gz tells what changed.\n\n -- %s  %s\n",
		p.name, version, maintainer, at.UTC().Format(time.RFC1123Z))
}

// fill puts the package's own names into a maintainer script.
func (p *product) fill(script string) string {
	return strings.NewReplacer("@UNIT@", p.unit(), "@STATE@", p.state()).Replace(script)
}

var (
	tagged    = regexp.MustCompile(`^v(\d+\.\d+\.\d+)(-[A-Za-z][0-9A-Za-z.]*)?(?:-(\d+)-g([0-9a-f]+))?(-dirty)?$`)
	untagged  = regexp.MustCompile(`^([0-9a-f]+)(-dirty)?$`)
	stampForm = "20060102150405"
)

// debianVersion turns what git describe says into a version that sorts as the
// commits do: a pre-release before its release, a later commit behind it, and
// what was never tagged before everything, by time.
func debianVersion(described string, at time.Time) (string, error) {
	if m := tagged.FindStringSubmatch(described); m != nil {
		v := m[1]
		if m[2] != "" {
			v += "~" + m[2][1:]
		}
		if m[3] != "" {
			v += "+" + m[3] + ".g" + m[4]
		}
		if m[5] != "" {
			v += "+dirty" + at.UTC().Format(stampForm)
		}
		return v, nil
	}
	if m := untagged.FindStringSubmatch(described); m != nil {
		v := "0.0.0~" + at.UTC().Format(stampForm) + ".g" + m[1]
		if m[2] != "" {
			v += "+dirty"
		}
		return v, nil
	}
	return "", fmt.Errorf("git describe says %q, which is neither a tag like v1.2.3 nor a commit", described)
}
