// Command deb builds the Debian packages of both programs into a folder. The
// same commit built by the same Go release gives the same bytes, so that
// anybody can check what they install.
//
//	go run ./scripts/deb -out bin [-version v1.2.3] [-level 6]
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func main() {
	var b builder
	flag.StringVar(&b.out, "out", "bin", "folder for the packages")
	flag.StringVar(&b.described, "version", "", "version, as git describe --tags writes it (default: asks git)")
	flag.StringVar(&b.maintainer, "maintainer", "Relais developers <developers@relais.invalid>", "name and address of who builds the packages")
	flag.IntVar(&b.level, "level", 6, "compression level of xz, 0 to 9")
	flag.Parse()
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "deb:", err)
		os.Exit(1)
	}
}

// builder makes the packages.
type builder struct {
	out, described, maintainer string
	level                      int

	version string    // of the packages
	at      time.Time // of everything in them
}

func (b *builder) run() error {
	if err := b.identify(); err != nil {
		return err
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	for i := range products {
		if err := b.build(&products[i]); err != nil {
			return fmt.Errorf("%s: %w", products[i].name, err)
		}
	}
	return nil
}

// identify finds out what is built: the version, and the time of the commit or
// SOURCE_DATE_EPOCH.
func (b *builder) identify() error {
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		text, err := output("git", "log", "-1", "--format=%ct")
		if err != nil {
			return err
		}
		epoch = text
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH is %q: write seconds since 1970", epoch)
	}
	b.at = time.Unix(seconds, 0)
	if b.described == "" {
		if b.described, err = output("git", "describe", "--tags", "--always", "--dirty"); err != nil {
			return err
		}
	}
	b.version, err = debianVersion(b.described, b.at)
	return err
}

func (b *builder) build(p *product) error {
	stage, err := os.MkdirTemp("", p.name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stage)
	t := tree{root: stage, at: b.at}
	if err := b.fill(&t, p); err != nil {
		return err
	}
	if err := t.seal(); err != nil {
		return err
	}
	file := filepath.Join(b.out, fmt.Sprintf("%s_%s_amd64.deb", p.name, b.version))
	cmd := exec.Command("dpkg-deb", "--root-owner-group", "-Zxz", "-z"+strconv.Itoa(b.level), "--build", stage, file)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(b.at.Unix(), 10))
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("dpkg-deb: %w", err)
	}
	// A fixed name, for scripts that install what was built last.
	latest := filepath.Join(b.out, p.name+".deb")
	if err := os.RemoveAll(latest); err != nil {
		return err
	}
	fmt.Println(file)
	return os.Symlink(filepath.Base(file), latest)
}

// fill puts everything into the tree.
func (b *builder) fill(t *tree, p *product) error {
	binary := t.path("/usr/bin/" + p.name)
	if err := b.compile(p, binary); err != nil {
		return err
	}
	read := func(path string) string { return t.keep(os.ReadFile(path)) }
	own := func(name string) string { return read(filepath.Join("scripts/deb/files", name)) }
	doc := "/usr/share/doc/" + p.name + "/"
	t.write("/usr/lib/systemd/system/"+p.unit(), 0o644, read(filepath.Join("scripts/systemd", p.unit())))
	t.write("/etc/relais/"+p.side+".toml", 0o644, own(p.side+".toml"))
	t.directory("/var/lib/relais")
	t.write(doc+"copyright", 0o644, own("copyright"))
	t.write(doc+"operations.md", 0o644, read("shared/docs/operations.md"))
	// Two static programs that need nothing of the system are the point.
	t.write("/usr/share/lintian/overrides/"+p.name, 0o644, p.name+": statically-linked-binary\n")
	t.compress(doc+"changelog.gz", p.changelog(b.version, b.maintainer, b.at))
	t.compress(doc+"CHANGELOG.md.gz", read("CHANGELOG.md"))
	t.compress(doc+"third-party-licences.gz", t.note(licences(binary)))
	t.compress("/usr/share/man/man8/"+p.name+".8.gz", t.note(manual(binary, p, b.described, b.at)))
	t.write("/usr/share/bash-completion/completions/"+p.name, 0o644, t.note(output(binary, "completion", "bash")))

	t.write("/DEBIAN/md5sums", 0o644, t.sums())
	t.write("/DEBIAN/control", 0o644, p.control(b.version, b.maintainer, t.kib()))
	t.write("/DEBIAN/conffiles", 0o644, "/etc/relais/"+p.side+".toml\n")
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		text := own(script)
		for _, more := range p.scripts {
			if strings.HasPrefix(more, script+".") {
				text += own(more)
			}
		}
		t.write("/DEBIAN/"+script, 0o755, p.fill(text))
	}
	return t.err
}

// compile builds the static program.
func (b *builder) compile(p *product, to string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-o", to,
		"-ldflags", "-s -w -X github.com/relais-mta/relais/shared/buildinfo.version="+b.described, "./"+p.side+"/cmd/"+p.name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1")
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// output runs a program and returns what it prints, without the last newline.
func output(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSuffix(string(text), "\n"), nil
}
