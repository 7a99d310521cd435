package fleet

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/relais-mta/relais/shared/fault"
)

// Bounds of waiting for a process.
const (
	commandTimeout = 60 * time.Second
	readyTimeout   = 60 * time.Second
	pollInterval   = 20 * time.Millisecond
	stopTimeout    = 40 * time.Second
	maxOutputBytes = 4 << 20
)

// Process is a running server of the fleet.
type Process struct {
	Name string
	Log  string // file with its standard error
	args []string
	bin  string
	env  []string
	user uint32 // 0: as this program

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// start runs the binary; its output goes to the end of the log file.
func (p *Process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.start", "the log of %s cannot be opened", p.Name)
	}
	defer log.Close()
	cmd := exec.Command(p.bin, p.args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), p.env...)
	// A server must not outlive the program that started it, and must not get
	// the terminal's Ctrl-C before its clients have stopped.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if p.user != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: p.user}
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_NET_BIND_SERVICE}
	}
	if err := cmd.Start(); err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.start", "%s cannot be started", p.Name)
	}
	done := make(chan struct{})
	p.cmd, p.done, p.err = cmd, done, nil
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		if p.cmd == cmd {
			p.err = err
		}
		p.mu.Unlock()
		close(done)
	}()
	return nil
}

// PID returns the process id, 0 if it does not run.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil || p.cmd.Process == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Signal sends a signal to the process.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return fault.New(fault.Conflict, "fleet.Signal", "%s does not run", p.Name)
	}
	return p.cmd.Process.Signal(sig)
}

// Kill ends the process with SIGKILL and waits for its end.
func (p *Process) Kill() {
	if p.Signal(syscall.SIGKILL) == nil {
		<-p.ended()
	}
}

// Stop asks the process to end and waits; one that does not is killed.
func (p *Process) Stop() error {
	if p.Signal(syscall.SIGTERM) != nil {
		return nil
	}
	select {
	case <-p.ended():
	case <-time.After(stopTimeout):
		p.Kill()
		return fault.New(fault.Timeout, "fleet.Stop", "%s did not stop within %v and was killed; its log is %s", p.Name, stopTimeout, p.Log)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return fault.Wrap(p.err, fault.Internal, "fleet.Stop", "%s ended badly; its log is %s", p.Name, p.Log)
	}
	return nil
}

func (p *Process) ended() chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// running reports whether the process has not ended.
func (p *Process) running() bool {
	select {
	case <-p.ended():
		return false
	default:
		return true
	}
}

// waitReady asks url until it answers 200, the process ends or time is up.
func (p *Process) waitReady(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		if ok(ctx, url) {
			return nil
		}
		if !p.running() {
			return fault.New(fault.Internal, "fleet.waitReady", "%s ended before it was ready; the end of its log:\n%s", p.Name, tail(p.Log))
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Timeout, "fleet.waitReady", "%s is not ready after %v (%s); the end of its log:\n%s", p.Name, readyTimeout, url, tail(p.Log))
		case <-time.After(pollInterval):
		}
	}
}

func ok(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxOutputBytes))
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func tail(path string) string {
	const maxTailBytes = 4000
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(text) > maxTailBytes {
		text = text[len(text)-maxTailBytes:]
	}
	return string(text)
}

// run executes a command of a binary and returns its standard output. It is given
// commandTimeout, unless ctx says how long it may take, as for one that waits.
func run(ctx context.Context, bin string, args ...string) ([]byte, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, commandTimeout)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, bin, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fault.Wrap(err, fault.Internal, "fleet.run", "%s %s: %s", filepath.Base(bin), fmt.Sprint(args), bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}

// runJSON executes a command with --json and decodes its output into v.
func runJSON(ctx context.Context, v any, bin string, args ...string) error {
	out, err := run(ctx, bin, append(args, "--json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, v); err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.runJSON", "%s %v did not print JSON: %.200s", filepath.Base(bin), args, out)
	}
	return nil
}

// Alive reports whether the process was started and has not ended.
func (p *Process) Alive() bool { return p.PID() != 0 && p.running() }
