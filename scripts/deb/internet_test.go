//go:build deb

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
)

// What the machine finds in its network.
const (
	labDir     = "RELAIS_DEB_LAB" // environment: serve the lab, with its files there
	labPort    = 2525
	labReport  = "127.0.0.1:8053"
	source     = "192.0.2.10"
	sourceName = "mx10.example.net"
	// Of the relay that the machine is after it was purged.
	nextSource     = "192.0.2.11"
	nextSourceName = "mx11.example.net"
	destination    = "recipients.test"
	stopTimeout    = 10 * time.Second
)

// TestMain is the test, or the lab for the machine of another one.
func TestMain(m *testing.M) {
	if dir := os.Getenv(labDir); dir != "" {
		if err := serveLab(dir); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveLab is names and mail exchangers until SIGTERM.
func serveLab(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	l, err := lab.Start(ctx, lab.Config{
		Seed: 1, Mode: lab.Open, DNSAddr: netip.MustParseAddrPort("127.0.0.1:53"), SMTPPort: labPort, HTTPAddr: labReport, Dir: dir,
		SkipDKIM: true, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Zones: []lab.Zone{{Origin: "example.net.", Records: []string{sourceName + ". IN A " + source, nextSourceName + ". IN A " + nextSource}}},
	})
	if err != nil {
		return err
	}
	if err := errors.Join(l.AddPTR(netip.MustParseAddr(source), sourceName), l.AddPTR(netip.MustParseAddr(nextSource), nextSourceName)); err != nil {
		return err
	}
	for _, p := range l.Providers() {
		if strings.HasPrefix(p.Name, "mx:") && !strings.Contains(p.Name, lab.DomainDeadFirst) && len(p.Addrs) > 0 {
			if err := l.HostDomain(p.Name, destination); err != nil {
				return err
			}
			break
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "ready"), nil, 0o600); err != nil {
		return err
	}
	<-ctx.Done()
	return l.Close()
}

// surround gives the machine, which reaches nothing else, names to ask for and
// receivers to deliver to: this program once more, in the machine's network.
func (m *machine) surround() {
	t := m.t
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "lab")
	log, err := os.Create(filepath.Join(t.TempDir(), "lab.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("nsenter", "--target", m.leader, "--net", self)
	cmd.Env = append(os.Environ(), labDir+"="+dir)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(stopTimeout):
			_ = cmd.Process.Kill()
			<-ended
		}
		_ = log.Close()
	})
	wait(t, "the lab serves", func() (string, bool) {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return string(contents(t, log.Name())), err == nil
	})
	m.sh("echo nameserver 127.0.0.1 >/etc/resolv.conf")
}

// report is what the receivers saw.
func (m *machine) report() lab.Report {
	m.t.Helper()
	var r lab.Report
	if err := json.Unmarshal([]byte(m.sh("curl -fsS http://"+labReport+"/report")), &r); err != nil {
		m.t.Fatal(err)
	}
	return r
}

// arrived waits until so many mails arrived, and demands that none came twice.
func (m *machine) arrived(want int64) {
	m.t.Helper()
	wait(m.t, fmt.Sprintf("%d mails have arrived", want), func() (string, bool) {
		r := m.report()
		return fmt.Sprintf("%d arrived", r.Recipients), r.Recipients >= want
	})
	if r := m.report(); r.Recipients != want || r.Duplicated != 0 || len(r.ProtocolFaults) != 0 {
		m.t.Errorf("%d mails arrived, %d of them twice, want %d once; breaches of the protocol: %v", r.Recipients, r.Duplicated, want, r.ProtocolFaults)
	}
}
