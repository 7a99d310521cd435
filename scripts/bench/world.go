package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/relais-mta/relais/shared/lab"
)

// Where things are within the benchmark's own network.
var (
	dnsAddr    = netip.MustParseAddrPort("127.0.0.1:53")
	sinkListen = "0.0.0.0:25"
	serverAddr = netip.MustParseAddrPort("127.0.0.1:2525") // of every system but Relais, which has its own
	sinkPort   = uint16(25)
)

// world is what surrounds every system: its mail exchangers and, system by
// system, its name server.
type world struct {
	dir  string
	sink *sink
	runs int
}

// newWorld brings the network up. The namespaces end with the process, and all
// of this with them.
func newWorld(dir string) (*world, error) {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("the mount namespace: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	resolv := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+dnsAddr.Addr().String()+"\n"), 0o644); err != nil {
		return nil, err
	}
	at, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		return nil, err
	}
	if err := syscall.Mount(resolv, at, "", syscall.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("resolv.conf: %w", err)
	}
	s, err := newSink(sinkListen)
	if err != nil {
		return nil, err
	}
	return &world{dir: dir, sink: s}, nil
}

func (w *world) close() { w.sink.close() }

// records are the destination domains: each has an MX host of its own.
func records() []string {
	var out []string
	for i := range domains {
		d := domainName(i)
		out = append(out, fmt.Sprintf("%s. 3600 IN MX 10 mx.%s.", d, d), fmt.Sprintf("mx.%s. 3600 IN A 127.70.0.%d", d, i+1))
	}
	return out
}

// nameServer starts the lab for its name server, for systems that do not bring
// it.
func nameServer(ctx context.Context, dir string) (*lab.Lab, error) {
	l, err := lab.Start(ctx, lab.Config{Seed: 1, Mode: lab.Open, DNSAddr: dnsAddr, Dir: filepath.Join(dir, "lab"), Small: 1, SkipDKIM: true,
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return nil, err
	}
	if err := l.AddRecords(records()...); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}

// machine is what the results were measured on.
type machine struct {
	CPU, Kernel, Disk, Memory, Load string
	Cores                           int
}

func describeMachine(dir string) machine {
	m := machine{CPU: field("/proc/cpuinfo", "model name"), Memory: field("/proc/meminfo", "MemTotal"), Disk: "unknown", Kernel: "unknown"}
	m.Cores = strings.Count(read("/proc/cpuinfo"), "processor\t")
	// At the start, when nothing of the benchmark runs: what others use.
	m.Load, _, _ = strings.Cut(read("/proc/loadavg"), " ")
	var u syscall.Utsname
	if syscall.Uname(&u) == nil {
		var b strings.Builder
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			b.WriteByte(byte(c))
		}
		m.Kernel = "Linux " + b.String()
	}
	if out, err := exec.Command("df", "--output=source,fstype", dir).Output(); err == nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		m.Disk = strings.Join(strings.Fields(lines[len(lines)-1]), ", ")
	}
	return m
}

func read(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(text)
}

// field returns the value of the first "name: value" line of a file.
func field(path, name string) string {
	for line := range strings.Lines(read(path)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
