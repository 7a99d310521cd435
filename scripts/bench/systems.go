package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lab/peers"
)

const (
	startTimeout = 30 * time.Second
	startPoll    = 20 * time.Millisecond
)

// relaisSystem is a control server and one relay.
type relaisSystem struct {
	bin  string
	dkim bool
	f    *fleet.Fleet
}

// relaisPolicy is what is changed of the shipped policy: no provider limits,
// and clients that stay.
func relaisPolicy(dkim bool) map[string]string {
	return map[string]string{
		"providers":  fleet.NoProviderLimits,
		"submission": "max_messages_per_session = 1000000\nmax_commands_per_session = 10000000\n",
		"delivery":   fmt.Sprintf("sign_dkim = %v\n", dkim),
		"queue":      "",
		"storage":    "",
		"inbound":    "hosts = [\"in.relais.test\"]\n",
	}
}

func (s *relaisSystem) start(ctx context.Context, _ *world, dir string) (target, error) {
	var err error
	policy := relaisPolicy(s.dkim)
	s.f, err = fleet.Start(ctx, fleet.Config{Bin: s.bin, Dir: dir, Relays: 1, Sources: 1, Seed: 1, Open: true, NoDKIM: !s.dkim,
		Policy: policy, DNS: dnsAddr, SMTPPort: sinkPort, Clear: true})
	if err != nil {
		return target{}, err
	}
	if err := s.f.Lab.AddRecords(records()...); err != nil {
		return target{}, err
	}
	r := s.f.Relays[0]
	text := ""
	for _, section := range []string{"providers", "submission", "delivery"} {
		text += "# " + section + "\n" + policy[section]
	}
	return target{addr: r.Submission(), user: s.f.User, secret: s.f.Secret, pids: []int{s.f.Control.PID(), r.PID()},
		policy: text, pprof: r.Metrics() + "/debug/pprof/profile"}, nil
}

func (s *relaisSystem) stop() error {
	if s.f == nil {
		return nil
	}
	return s.f.Close()
}

// postfixSystem is Debian's Postfix in its own Debian.
type postfixSystem struct {
	lab    *lab.Lab
	server *peers.Server
}

func (s *postfixSystem) start(ctx context.Context, _ *world, dir string) (_ target, err error) {
	if s.lab, err = nameServer(ctx, dir); err != nil {
		return target{}, err
	}
	s.server, err = peers.PostfixSender(ctx, peers.Config{Dir: filepath.Join(dir, "postfix"), Addr: serverAddr, Host: "postfix.test"}, dnsAddr.Addr())
	if err != nil {
		return target{}, err
	}
	return target{addr: serverAddr.String(), pids: []int{s.server.PID()}, policy: peers.PostfixSenderSettings()}, nil
}

func (s *postfixSystem) stop() error {
	if s.server != nil {
		s.server.Close()
	}
	if s.lab != nil {
		return s.lab.Close()
	}
	return nil
}

// program is a system that is one command.
type program struct {
	lab  *lab.Lab
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

// launch starts a command in a process namespace of its own, whose end is the
// end of all its processes, and waits until it greets.
func (p *program) launch(ctx context.Context, dir string, args ...string) (err error) {
	if p.lab, err = nameServer(ctx, dir); err != nil {
		return err
	}
	p.log = filepath.Join(dir, "log")
	log, err := os.Create(p.log)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.done = make(chan struct{})
	go func() {
		_ = p.cmd.Wait() // it is killed; how it ended says nothing
		close(p.done)
	}()
	return p.waitReady(ctx)
}

func (p *program) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		conn, err := net.DialTimeout("tcp", serverAddr.String(), time.Second)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("it ended before it was ready; its log:\n%s", read(p.log))
		case <-ctx.Done():
			return fmt.Errorf("it is not ready after %v (%w); its log:\n%s", startTimeout, err, read(p.log))
		case <-time.After(startPoll):
		}
	}
}

func (p *program) stop() error {
	if p.done != nil {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.done
	}
	if p.lab != nil {
		return p.lab.Close()
	}
	return nil
}

// harakaSystem is Haraka with its relay plugin.
type harakaSystem struct{ program }

// harakaSettings are the files of its configuration that are not Haraka's own.
func harakaSettings() map[string]string {
	return map[string]string{
		"me":              "haraka.test\n",
		"plugins":         "relay\n",
		"relay.ini":       "[relay]\nacl=true\n",
		"relay_acl_allow": "127.0.0.0/8\n",
		"smtp.ini":        fmt.Sprintf("listen=%s\nnodes=%d\n", serverAddr, runtime.NumCPU()),
		"outbound.ini":    "local_mx_ok=true\nenable_tls=false\nconcurrency_max=100\n",
		"log.ini":         "[main]\nlevel=notice\n",
		"queue_dir":       "",
	}
}

func (s *harakaSystem) start(ctx context.Context, _ *world, dir string) (target, error) {
	program := filepath.Join(peers.Folder(), "haraka", "node_modules", "Haraka", "bin", "haraka")
	if _, err := os.Stat(program); err != nil {
		return target{}, fmt.Errorf("%w; run scripts/bench-peers.sh", err)
	}
	for _, d := range []string{"queue", "plugins"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return target{}, err
		}
	}
	// Haraka does not start without the files that it ships.
	if err := os.CopyFS(filepath.Join(dir, "config"), os.DirFS(filepath.Join(program, "..", "..", "config"))); err != nil {
		return target{}, err
	}
	text := ""
	for name, value := range harakaSettings() {
		if name == "queue_dir" {
			value = filepath.Join(dir, "queue") + "\n"
		}
		if err := os.WriteFile(filepath.Join(dir, "config", name), []byte(value), 0o644); err != nil {
			return target{}, err
		}
	}
	for _, name := range []string{"plugins", "smtp.ini", "outbound.ini", "log.ini"} {
		text += "# " + name + "\n" + harakaSettings()[name]
	}
	if err := s.launch(ctx, dir, "node", program, "-c", dir); err != nil {
		return target{}, err
	}
	return target{addr: serverAddr.String(), pids: []int{s.cmd.Process.Pid}, policy: text}, nil
}

// nullSystem is this program as a relay that keeps nothing.
type nullSystem struct{ program }

func (s *nullSystem) start(ctx context.Context, _ *world, dir string) (target, error) {
	to := netip.AddrPortFrom(netip.MustParseAddr("127.70.0.1"), sinkPort)
	if err := s.launch(ctx, dir, "/proc/self/exe", nullArg, serverAddr.String(), to.String()); err != nil {
		return target{}, err
	}
	return target{addr: serverAddr.String(), pids: []int{s.cmd.Process.Pid}}, nil
}

var errUsage = errors.New("wants two addresses: where to listen and where to deliver")
