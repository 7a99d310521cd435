package resolve

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// program returns the path of a peer's program. One that is missing fails the
// test: scripts/debian-peers.sh installs it.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/usr/bin"} {
		if path := filepath.Join(dir, name); exec.Command("test", "-x", path).Run() == nil {
			return path
		}
	}
	t.Fatalf("%s is missing: run scripts/debian-peers.sh", name)
	return ""
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	pc, l := bothPorts(t)
	defer pc.Close()
	defer l.Close()
	return netip.MustParseAddrPort(pc.LocalAddr().String())
}

// start runs a server until the test ends, or until the returned function is
// called, and waits until it answers for a name with any of the codes.
func start(t *testing.T, at netip.AddrPort, ready string, name string, args ...string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program(t, name), args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	client := dns.Client{Timeout: time.Second}
	for limit := time.After(time.Minute); ; {
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", name, said.String())
		case <-limit:
			t.Fatalf("%s does not answer for %s", name, ready)
		case <-tick.C:
			q := new(dns.Msg).SetQuestion(ready, dns.TypeSOA)
			if m, _, err := client.Exchange(q, at.String()); err == nil && m.Rcode == dns.RcodeSuccess {
				return stop
			}
		}
	}
}

// sign signs a zone with ldns and returns the signed file and the DS record.
func sign(t *testing.T, dir, zone string) (file, ds string) {
	t.Helper()
	run := func(name string, args ...string) string {
		cmd := exec.Command(program(t, name), args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	key := run("ldns-keygen", "-k", "-a", "ECDSAP256SHA256", "-r", "/dev/urandom", zone)
	run("ldns-signzone", zone+".zone", key)
	text, err := os.ReadFile(filepath.Join(dir, key+".ds"))
	if err != nil {
		t.Fatal(err)
	}
	return zone + ".zone.signed", strings.TrimSpace(string(text))
}

// TestUnboundAndNSD: NSD has the zones, one signed, one whose records do not
// fit their signatures, one unsigned; unbound resolves and validates.
func TestUnboundAndNSD(t *testing.T) {
	dir := t.TempDir()
	zones := []string{"good.example", "bogus.example", "plain.example"}
	files := map[string]string{"plain.example": "plain.example.zone"}
	var anchors strings.Builder
	for _, zone := range zones {
		var z strings.Builder
		fmt.Fprintf(&z, "$ORIGIN %[1]s.\n$TTL 300\n@ IN SOA ns root 1 3600 600 86400 60\n@ IN NS ns\nns IN A 127.0.0.1\n@ IN MX 10 mx\n@ IN MX 20 far.plain.example.\nmx IN A 192.0.2.1\nmx IN AAAA 2001:db8::1\nfar IN A 192.0.2.2\n", zone)
		z.WriteString("null IN MX 0 .\nalias IN CNAME @\ndangling IN CNAME gone\nimplicit IN A 192.0.2.3\ntext IN TXT \"x\"\nmxalias IN MX 10 hostalias\nhostalias IN CNAME mx\nloop IN CNAME pool\npool IN CNAME loop\n")
		for i := range 60 {
			fmt.Fprintf(&z, "big IN MX %d mx.with-a-rather-long-name-to-fill-the-answer-%d\n*.with-a-rather-long-name-to-fill-the-answer-%d IN A 192.0.2.4\n", i, i, i)
		}
		write(t, filepath.Join(dir, zone+".zone"), z.String())
		if zone == "plain.example" {
			continue
		}
		file, ds := sign(t, dir, zone)
		files[zone] = file
		fmt.Fprintln(&anchors, ds)
	}
	signed, err := os.ReadFile(filepath.Join(dir, files["bogus.example"]))
	if err != nil {
		t.Fatal(err)
	}
	// Somebody on the way leads the mail elsewhere.
	forged := strings.Replace(string(signed), "\t10 mx.bogus.example.", "\t10 evil.plain.example.", 1)
	if forged == string(signed) {
		t.Fatalf("the zone has no MX record to forge:\n%.2000s", signed)
	}
	write(t, filepath.Join(dir, files["bogus.example"]), forged)
	write(t, filepath.Join(dir, "anchors"), anchors.String())

	authority, resolver := freePort(t), freePort(t)
	nsd := fmt.Sprintf("server:\n ip-address: 127.0.0.1@%d\n server-count: 1\n username: \"\"\n zonesdir: %q\n pidfile: \"\"\n database: \"\"\n zonelistfile: \"%[2]s/zones\"\n xfrdfile: \"%[2]s/xfrd\"\n logfile: \"%[2]s/nsd.log\"\nremote-control:\n control-enable: no\n", authority.Port(), dir)
	unbound := fmt.Sprintf("server:\n interface: 127.0.0.1@%d\n port: %[1]d\n num-threads: 1\n username: \"\"\n chroot: \"\"\n directory: %[2]q\n pidfile: \"\"\n use-syslog: no\n logfile: \"%[2]s/unbound.log\"\n do-not-query-localhost: no\n do-ip6: no\n module-config: \"validator iterator\"\n trust-anchor-file: \"%[2]s/anchors\"\n qname-minimisation: no\n val-bogus-ttl: 1\nremote-control:\n control-enable: no\n", resolver.Port(), dir)
	for _, zone := range zones {
		nsd += fmt.Sprintf("zone:\n name: %q\n zonefile: %q\n", zone, files[zone])
		unbound += fmt.Sprintf("stub-zone:\n name: %q\n stub-addr: 127.0.0.1@%d\n", zone, authority.Port())
	}
	write(t, filepath.Join(dir, "nsd.conf"), nsd)
	write(t, filepath.Join(dir, "unbound.conf"), unbound)
	stopNSD := start(t, authority, "plain.example.", "nsd", "-d", "-c", filepath.Join(dir, "nsd.conf"))
	start(t, resolver, "plain.example.", "unbound", "-d", "-c", filepath.Join(dir, "unbound.conf"))

	r := newResolver(t, func(c *Config) { c.Servers = []netip.AddrPort{resolver} })
	for _, tc := range []struct {
		domain    mailaddr.Domain
		want      string
		authentic bool
	}{
		{"good.example", "mx.good.example@10=192.0.2.1,2001:db8::1 far.plain.example@20=192.0.2.2", true},
		{"alias.good.example", "mx.good.example@10=192.0.2.1,2001:db8::1 far.plain.example@20=192.0.2.2", true},
		{"mxalias.good.example", "hostalias.good.example@10=192.0.2.1,2001:db8::1", true},
		{"implicit.good.example", "implicit.good.example@0=192.0.2.3", true},
		{"null.good.example", "failed 5.1.10", true},
		{"gone.good.example", "failed 5.1.2", true},
		{"dangling.good.example", "failed 5.1.2", true},
		{"text.good.example", "failed 5.1.2", true},
		{"loop.good.example", "deferred 4.4.3", false},
		{"plain.example", "mx.plain.example@10=192.0.2.1,2001:db8::1 far.plain.example@20=192.0.2.2", false},
		{"gone.plain.example", "failed 5.1.2", false},
		{"bogus.example", "deferred 4.4.3", false}, // never "does not exist"
		{"null.bogus.example", "failed 5.1.10", true},
	} {
		route := r.Route(t.Context(), tc.domain, IPv4|IPv6)
		if got := show(route); got != tc.want || route.Authentic != tc.authentic {
			t.Errorf("%s: %s, authentic %v, want %s, %v (%+v)", tc.domain, got, route.Authentic, tc.want, tc.authentic, route.Failure)
		}
	}
	if hosts := r.Route(t.Context(), "good.example", IPv4|IPv6).Hosts; !hosts[0].Authentic || hosts[1].Authentic {
		t.Errorf("hosts of a signed and of an unsigned zone: %+v", hosts)
	}
	// Too large for UDP: 60 records come over TCP, the best 20 are used.
	for _, domain := range []mailaddr.Domain{"big.good.example", "big.plain.example"} {
		if route := r.Route(t.Context(), domain, IPv4); len(route.Hosts) != maxHosts || route.Failure != nil || len(route.Hosts[maxHosts-1].Addrs) != 1 {
			t.Errorf("%s: %s %+v", domain, show(route), route.Failure)
		}
	}
	// Without their name server, names that were never asked for are unknown,
	// not missing.
	stopNSD()
	hasty := newResolver(t, func(c *Config) { c.Servers, c.QueryTimeout = []netip.AddrPort{resolver}, 200*time.Millisecond })
	if got := show(hasty.Route(t.Context(), "later.plain.example", IPv4)); got != "deferred 4.4.3" {
		t.Errorf("without a name server: %s", got)
	}
}
