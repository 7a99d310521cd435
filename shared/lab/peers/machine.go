package peers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	readyTimeout    = 60 * time.Second
	readyPoll       = 20 * time.Millisecond
	greetingTimeout = 5 * time.Second
	maxLogTailBytes = 6000
	// mailboxID is user and group of the mailbox, in the server's Debian.
	mailboxID = 1000
	// maxMessageBytes is more than any mail of a test has.
	maxMessageBytes = 50 << 20
)

// Folder returns where scripts/more-peers.sh puts the Debians and the mails of
// other projects.
func Folder() string { return "/var/cache/relais-peers/1" }

// Config says how a server is to run.
type Config struct {
	Dir    string         // of this server alone; made
	Addr   netip.AddrPort // it listens here
	Host   string         // its name
	Domain string         // it takes mail for every address there; empty: for none
	// Without names EHLO keywords that the server is not to offer. Which can be
	// taken from a server, its start function says.
	Without []string
}

// Server is a running mail server.
type Server struct {
	cfg  Config
	cmd  *exec.Cmd
	done chan struct{}
}

// recipe is how one kind of server is started in its Debian.
type recipe struct {
	debian string            // folder with its Debian
	files  map[string]string // configuration, by path in the Debian
	args   []string
}

// prepareScript builds the server's root from its Debian and runs the server
// there as the first process of its namespace. What it writes outside of /peer
// is memory, and gone with it.
const prepareScript = `set -e
debian=$1 dir=$2
shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$dir/memory"
mkdir "$dir/memory/upper" "$dir/memory/work" "$dir/memory/root"
root=$dir/memory/root
mount -t overlay overlay -o "lowerdir=$debian,upperdir=$dir/memory/upper,workdir=$dir/memory/work" "$root"
cp -R "$dir/files/." "$root/"
mkdir "$root/peer"
mount --bind "$dir/peer" "$root/peer"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
exec chroot "$root" "$@"
`

// run starts a server and returns when it greets.
func run(ctx context.Context, cfg Config, r recipe) (*Server, error) {
	debian := filepath.Join(Folder(), r.debian)
	if _, err := os.Stat(filepath.Join(debian, "etc", "passwd")); err != nil {
		return nil, fmt.Errorf("peers: %s is missing: run scripts/more-peers.sh as root", debian)
	}
	if err := cfg.lay(debian, r.files); err != nil {
		return nil, err
	}
	log, err := os.Create(cfg.logFile())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s := &Server{cfg: cfg, done: make(chan struct{})}
	s.cmd = exec.Command("sh", append([]string{"-c", prepareScript, "sh", debian, cfg.Dir}, r.args...)...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	// The end of the first process of a process namespace is the end of all.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("peers: %s: %w", r.debian, err)
	}
	go func() {
		_ = s.cmd.Wait() // it is killed; how it ended says nothing
		close(s.done)
	}()
	if err := s.waitReady(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("peers: %s: %w; the end of its log:\n%s", r.debian, err, s.Log())
	}
	return s, nil
}

func (c *Config) logFile() string { return filepath.Join(c.Dir, "log") }
func (c *Config) mailDir() string { return filepath.Join(c.Dir, "peer", "mail") }

// lay makes the server's folders and writes its configuration.
func (c *Config) lay(debian string, files map[string]string) error {
	for _, d := range []string{"memory", "peer", "files"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"", "new", "cur", "tmp"} {
		dir := filepath.Join(c.mailDir(), d)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := os.Chown(dir, mailboxID, mailboxID); err != nil {
			return err
		}
	}
	passwd, err := os.ReadFile(filepath.Join(debian, "etc", "passwd"))
	if err != nil {
		return err
	}
	cert, key, err := certificate(c.Host)
	if err != nil {
		return err
	}
	all := map[string]string{
		"etc/passwd": string(passwd) + fmt.Sprintf("mailbox:x:%d:%d::/peer/mail:/usr/sbin/nologin\n", mailboxID, mailboxID),
		// Nothing here needs a name looked up; what asks all the same is refused
		// at once.
		"etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
		"etc/hosts":       "127.0.0.1 localhost\n" + c.Addr.Addr().String() + " " + c.Host + "\n",
		"etc/peer.pem":    string(key) + string(cert),
	}
	for name, text := range files {
		all[name] = text
	}
	for name, text := range all {
		path := filepath.Join(c.Dir, "files", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// waitReady returns when the server greets.
func (s *Server) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		err := s.greets(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-s.done:
			return errors.New("it ended before it was ready")
		case <-ctx.Done():
			return fmt.Errorf("it is not ready after %v: %w", readyTimeout, err)
		case <-time.After(readyPoll):
		}
	}
}

func (s *Server) greets(ctx context.Context) error {
	d := net.Dialer{Timeout: greetingTimeout}
	conn, err := d.DialContext(ctx, "tcp", s.cfg.Addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(greetingTimeout)); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(line, "220") {
		return errors.New("it greets with " + strconv.Quote(line))
	}
	_, err = conn.Write([]byte("QUIT\r\n"))
	return err
}

// Log returns the end of what the server logged.
func (s *Server) Log() string {
	text, err := os.ReadFile(s.cfg.logFile())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-maxLogTailBytes):])
}

// Logged returns the lines of the server's log that hold the text.
func (s *Server) Logged(text string) ([]string, error) {
	log, err := os.ReadFile(s.cfg.logFile())
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSuffix(line, "\n"))
		}
	}
	return found, nil
}

// Close ends the server at once, with all its processes.
func (s *Server) Close() {
	_ = s.cmd.Process.Kill()
	<-s.done
}
