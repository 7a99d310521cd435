package fleet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/lab"
)

// Names of what the fleet sets up.
const (
	Tenant       = "acme"
	Domain       = "brand.test"
	inboundHost  = "in.relais.test"
	secondStream = "bulk"
)

// Config says what to start.
type Config struct {
	Bin     string // directory with both binaries
	Dir     string // data directories, logs and mail; made, must not hold an earlier run
	Relays  int    // 1 to 16
	Sources int    // source addresses of each relay, 1 to 64
	Seed    uint64
	Open    bool // providers and policy without limits, faults and rates
	NoDKIM  bool
	Older   bool // Bin is of the release before this one: the policy says nothing that it does not know
	// DNS is where the lab's name server listens, and SMTPPort the port to which
	// relays deliver, when it is not the farm's but another's; 0: the block's own.
	DNS      netip.AddrPort
	SMTPPort uint16
	// Clear lets clients log in and send without TLS on the submission port.
	Clear      bool
	NoHandover bool // relays take no mail of each other
	// Policy adds to or replaces sections of the lab's policy.
	Policy map[string]string
	// Dirs overrides the data directory of relay i, e.g. with a small disk.
	Dirs map[int]string
	// Users has relay i run as another user, with root's rights over files and ports:
	// for rules of routing that are to concern it alone.
	Users map[int]uint32
	Tune  func(*lab.Profile)
	// Init makes the data directory of the first control server in place of
	// relais-control init, whose address is given; nil: that does.
	Init func(ctx context.Context, dir string, advertise netip.Addr) error
	Log  io.Writer // progress, one line per step; nil: none
}

// Fleet is a running control server, its relays and the lab around them.
type Fleet struct {
	cfg     Config
	block   *Block
	Lab     *lab.Lab
	Control *Process
	Relays  []*Relay
	servers []*ControlServer // besides Control
	User    string           // credential of the tenant, transactional by default
	Secret  string
	CAFile  string
	ca      *x509.CertPool
	dirCtl  string
}

// Relay is one relay of the fleet.
type Relay struct {
	*Process
	Dir     string
	Node    string
	Addr    netip.Addr // of its listeners
	Sources []netip.Addr
	ready   string
}

// Submission is the relay's address for STARTTLS submission.
func (r *Relay) Submission() string { return netip.AddrPortFrom(r.Addr, portSubmission).String() }

// Submissions is the relay's address for submission over implicit TLS.
func (r *Relay) Submissions() string { return netip.AddrPortFrom(r.Addr, portSubmissions).String() }

// Inbound is the relay's address for mail to signed return paths.
func (r *Relay) Inbound() string { return netip.AddrPortFrom(r.Addr, portSMTP).String() }

// Metrics is the base URL of the relay's metrics and health.
func (r *Relay) Metrics() string {
	return "http://" + netip.AddrPortFrom(r.Addr, portMetrics).String()
}

// Start brings everything up; when it returns, mail can be submitted to every
// relay. On error what was started is stopped again.
func Start(ctx context.Context, cfg Config) (_ *Fleet, err error) {
	if cfg.Relays < 1 || cfg.Relays > 16 || cfg.Sources < 1 || cfg.Sources > 64 {
		return nil, fault.Field("fleet.Start", "relays, sources", "want 1 to 16 relays with 1 to 64 sources, got %d and %d", cfg.Relays, cfg.Sources)
	}
	if cfg.SMTPPort == 0 {
		cfg.SMTPPort = portSMTP
	}
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	f := &Fleet{cfg: cfg, dirCtl: filepath.Join(cfg.Dir, "control")}
	if f.block, err = LockBlock(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.MkdirAll(f.dirCtl, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "fleet.Start", "the directory %s cannot be made", f.dirCtl)
	}
	for _, step := range []func(context.Context) error{f.startLab, f.startControl, f.setUp, f.startRelays, f.publish} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *Fleet) say(text string, args ...any) { fmt.Fprintf(f.cfg.Log, text+"\n", args...) }

func (f *Fleet) addrPort(place int, port uint16) string {
	return netip.AddrPortFrom(f.block.Addr(place), port).String()
}

func (f *Fleet) startLab(ctx context.Context) (err error) {
	mode := lab.Realistic
	if f.cfg.Open {
		mode = lab.Open
	}
	dns := f.cfg.DNS
	if !dns.IsValid() {
		dns = netip.AddrPortFrom(f.block.Addr(placeDNS), portDNS)
	}
	f.Lab, err = lab.Start(ctx, lab.Config{
		Seed: f.cfg.Seed, Mode: mode, DNSAddr: dns,
		FarmAddrs: func(i int) netip.Addr { return f.block.Addr(placeFarm + i) }, SMTPPort: portSMTP,
		HTTPAddr: f.addrPort(placeHTTP, portHTTP), Dir: filepath.Join(f.cfg.Dir, "lab"), Small: 100, SkipDKIM: f.cfg.NoDKIM,
		SlowDelay: time.Second, Tune: f.cfg.Tune, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		return err
	}
	f.say("lab       DNS %v, %d providers on port %d, report http://%s/report", f.Lab.DNSAddr(), len(f.Lab.Providers()), portSMTP, f.Lab.HTTPAddr())
	// The sending domain's own mailboxes, where notifications go.
	return f.Lab.HostDomain(f.smallProvider(), Domain)
}

// smallProvider is a receiver without a profile.
func (f *Fleet) smallProvider() string {
	for _, p := range f.Lab.Providers() {
		if strings.HasPrefix(p.Name, "mx:") && !strings.Contains(p.Name, lab.DomainDeadFirst) && len(p.Addrs) > 0 {
			return p.Name
		}
	}
	return "mx:" + lab.DomainEqualMX
}

func (f *Fleet) startControl(ctx context.Context) error {
	config := filepath.Join(f.dirCtl, "control.toml")
	text := fmt.Sprintf("[listen]\nhttps = %q\nlink = %q\nraft = %q\nmetrics = %q\n[dns]\nresolvers = [%q]\n", f.addrPort(placeControl, portAPI),
		f.addrPort(placeControl, portLink), f.addrPort(placeControl, portRaft), f.addrPort(placeControl, portMetrics), f.Lab.DNSAddr())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.startControl", "%s cannot be written", config)
	}
	var made struct {
		Password string `json:"password"`
		Admin    string `json:"admin"`
		CAFile   string `json:"ca_file"`
		Endpoint string `json:"endpoint"`
	}
	if f.cfg.Init != nil {
		if err := f.cfg.Init(ctx, f.dirCtl, f.block.Addr(placeControl)); err != nil {
			return err
		}
		made.CAFile = filepath.Join(f.dirCtl, "ca.pem")
	} else if err := f.controlJSON(ctx, &made, "init", "--advertise", f.block.Addr(placeControl).String()); err != nil {
		return err
	}
	f.CAFile = made.CAFile
	f.Control = &Process{Name: "control", Log: filepath.Join(f.cfg.Dir, "control.log"), bin: f.bin("relais-control"), args: []string{"serve", "--data", f.dirCtl}}
	if err := f.Control.start(); err != nil {
		return err
	}
	if err := f.Control.waitReady(ctx, "http://"+f.addrPort(placeControl, portMetrics)+"/readyz"); err != nil {
		return err
	}
	f.say("control   %s, account %s, password %s", made.Endpoint, made.Admin, made.Password)
	pem, err := os.ReadFile(f.CAFile)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.startControl", "the CA certificate cannot be read")
	}
	f.ca = x509.NewCertPool()
	if !f.ca.AppendCertsFromPEM(pem) {
		return fault.New(fault.Internal, "fleet.startControl", "%s holds no certificate", f.CAFile)
	}
	return nil
}

func (f *Fleet) bin(name string) string { return filepath.Join(f.cfg.Bin, name) }

// Ctl runs a relais-control command and returns its standard output.
func (f *Fleet) Ctl(ctx context.Context, args ...string) ([]byte, error) {
	return run(ctx, f.bin("relais-control"), append(args, "--data", f.dirCtl)...)
}

func (f *Fleet) controlJSON(ctx context.Context, v any, args ...string) error {
	return runJSON(ctx, v, f.bin("relais-control"), append(args, "--data", f.dirCtl)...)
}

// setUp makes tenant, domain, credential and policy.
func (f *Fleet) setUp(ctx context.Context) error {
	if _, err := f.Ctl(ctx, "tenant", "add", Tenant); err != nil {
		return err
	}
	sections := labPolicy(f.cfg.Open, !f.cfg.NoDKIM, f.cfg.Older)
	for name, text := range f.cfg.Policy {
		sections[name] = text
	}
	if err := f.PutPolicy(ctx, sections); err != nil {
		return err
	}
	var credential struct {
		ID     string `json:"id"`
		Secret string `json:"secret"`
	}
	if err := f.controlJSON(ctx, &credential, "credential", "create", "--tenant", Tenant, "--stream", "transactional", "--name", "lab"); err != nil {
		return err
	}
	f.User, f.Secret = credential.ID, credential.Secret
	f.say("tenant    %s, domain %s, user %s, password %s", Tenant, Domain, f.User, f.Secret)
	return nil
}

// PutPolicy changes sections of the policy.
func (f *Fleet) PutPolicy(ctx context.Context, sections map[string]string) error {
	dir, err := os.MkdirTemp(f.cfg.Dir, "policy-")
	if err != nil {
		return fault.Wrap(err, fault.Internal, "fleet.PutPolicy", "no directory for the policy")
	}
	for name, text := range sections {
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), []byte(text), 0o600); err != nil {
			return fault.Wrap(err, fault.Internal, "fleet.PutPolicy", "section %s cannot be written", name)
		}
	}
	_, err = f.Ctl(ctx, "policy", "put", dir)
	return err
}

func (f *Fleet) startRelays(ctx context.Context) error {
	var token struct {
		Token string `json:"token"`
	}
	if err := f.controlJSON(ctx, &token, "token", "create", "--role", "relay", "--ttl", "1h", "--uses", fmt.Sprint(f.cfg.Relays)); err != nil {
		return err
	}
	for i := range f.cfg.Relays {
		r, err := f.joinRelay(ctx, i, token.Token)
		if err != nil {
			return err
		}
		f.Relays = append(f.Relays, r)
		if err := r.start(); err != nil {
			return err
		}
	}
	for _, r := range f.Relays {
		if err := r.waitReady(ctx, r.ready); err != nil {
			return err
		}
		f.say("%-9s submission %s (STARTTLS), %s (TLS), sources %v", r.Name, r.Submission(), r.Submissions(), r.Sources)
	}
	return nil
}

func (f *Fleet) joinRelay(ctx context.Context, i int, token string) (*Relay, error) {
	r := &Relay{Dir: filepath.Join(f.cfg.Dir, fmt.Sprintf("relay%d", i+1)), Addr: f.block.Addr(placeRelay + i)}
	if dir := f.cfg.Dirs[i]; dir != "" {
		r.Dir = dir
	}
	r.ready = r.Metrics() + "/readyz"
	name := fmt.Sprintf("relay%d", i+1)
	r.Process = &Process{Name: name, Log: filepath.Join(f.cfg.Dir, name+".log"), bin: f.bin("relais-relay"), args: []string{"serve", "--data", r.Dir}, user: f.cfg.Users[i]}
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "fleet.joinRelay", "the directory %s cannot be made", r.Dir)
	}
	listen := func(port uint16) string { return netip.AddrPortFrom(r.Addr, port).String() }
	text := fmt.Sprintf("hostname = %q\n[listen]\nsubmissions = [%q]\nsubmission = [%q]\ninbound = [%q]\nmetrics = %q\n[dns]\nresolvers = [%q]\n[lab]\nsmtp_port = %d\nallow_private = true\n",
		name+".relais.test", listen(portSubmissions), listen(portSubmission), listen(portSMTP), listen(portMetrics), f.Lab.DNSAddr(), f.cfg.SMTPPort)
	if !f.cfg.Older {
		handover := fmt.Sprintf("handover = [%q]\n", listen(portHandover))
		if f.cfg.NoHandover {
			handover = "handover = []\n"
		}
		text = strings.Replace(text, "[listen]\n", "[listen]\n"+handover, 1)
	}
	if f.cfg.Clear { // a release before does not know the key
		text += "clear_submission = true\n"
	}
	if err := writeSynced(r.Dir, "relay.toml", text); err != nil {
		return nil, err
	}
	var joined struct {
		Node string `json:"node"`
	}
	if err := runJSON(ctx, &joined, f.bin("relais-relay"), "join", "--token", token, f.addrPort(placeControl, portLink), "--data", r.Dir); err != nil {
		return nil, err
	}
	r.Node = joined.Node
	for j := range f.cfg.Sources {
		addr := f.block.Addr(placeSource + 64*i + j)
		ehlo := fmt.Sprintf("mta%d-%d.relais.test", i+1, j+1)
		if err := f.Lab.AddPTR(addr, ehlo); err != nil {
			return nil, err
		}
		if _, err := f.Ctl(ctx, "ip", "add", addr.String(), "--ehlo", ehlo, "--pool", "default", "--node", r.Node); err != nil {
			return nil, err
		}
		// The leader would do it by itself a moment later.
		if _, err := f.Ctl(ctx, "ip", "check", addr.String()); err != nil {
			return nil, err
		}
		r.Sources = append(r.Sources, addr)
	}
	return r, nil
}

// writeSynced writes a file so that it survives the power cuts of tests.
func writeSynced(dir, name, text string) error {
	const op = "fleet.writeSynced"
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "%s cannot be made", name)
	}
	defer f.Close()
	if _, err = f.WriteString(text); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "%s cannot be written", name)
	}
	parent, err := os.Open(dir)
	if err != nil {
		return fault.Wrap(err, fault.Internal, op, "%s cannot be opened", dir)
	}
	defer parent.Close()
	return parent.Sync()
}

// publish adds the sending domain, puts its records into the lab's DNS, and
// waits until every relay works with the newest view.
func (f *Fleet) publish(ctx context.Context) error {
	var domain struct {
		Records []struct {
			Zone string `json:"zone"`
		} `json:"records"`
	}
	if err := f.controlJSON(ctx, &domain, "domain", "add", Domain, "--tenant", Tenant); err != nil {
		return err
	}
	for _, r := range domain.Records {
		if err := f.Lab.AddRecords(r.Zone); err != nil {
			return err
		}
	}
	for _, r := range f.Relays {
		if err := f.Lab.AddRecords(fmt.Sprintf("%s. 60 IN A %s", inboundHost, r.Addr)); err != nil {
			return err
		}
	}
	return f.WaitApplied(ctx)
}

// applyTimeout bounds the wait for relays to acknowledge a change. A relay that
// lost its servers for long looks for one every 30 s, half as much more for the
// spread, and may spend 5 s on one that does not answer (maxBackoff and jitter of
// relay/agent, DefaultDialTimeout of shared/link).
const applyTimeout = 75 * time.Second

// WaitApplied returns when every running relay has acknowledged the newest
// change.
func (f *Fleet) WaitApplied(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, applyTimeout)
	defer cancel()
	var status struct {
		Revision uint64 `json:"revision"`
	}
	if err := f.controlJSON(ctx, &status, "status"); err != nil {
		return err
	}
	for {
		var nodes []struct {
			ID       string `json:"id"`
			Name     string `json:"name"`
			Acked    uint64 `json:"acked_revision"`
			Refusing string `json:"refused_why"`
		}
		if err := f.controlJSON(ctx, &nodes, "node", "list"); err != nil {
			return err
		}
		behind := len(f.Relays)
		for _, n := range nodes {
			if !slices.ContainsFunc(f.Relays, func(r *Relay) bool { return r.Node == n.ID }) {
				continue // joined by a test, and not started
			}
			if n.Refusing != "" {
				return fault.New(fault.Internal, "fleet.WaitApplied", "%s refuses the view: %s", n.Name, n.Refusing)
			}
			if n.Acked >= status.Revision {
				behind--
			}
		}
		if behind == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Timeout, "fleet.WaitApplied", "%d relays have not acknowledged revision %d", behind, status.Revision)
		case <-time.After(pollInterval):
		}
	}
}

// ClientTLS is the configuration of a mail client that trusts the cluster's CA.
func (f *Fleet) ClientTLS(r *Relay) *tls.Config {
	return &tls.Config{RootCAs: f.ca, ServerName: r.Addr.String(), MinVersion: tls.VersionTLS12}
}

// Restart starts a relay that was stopped or killed, and waits until it is ready.
func (f *Fleet) Restart(ctx context.Context, r *Relay) error {
	if err := r.start(); err != nil {
		return err
	}
	return r.waitReady(ctx, r.ready)
}

// RestartUnready starts a relay that runs without being ready, such as an
// evicted one, and waits until it answers.
func (f *Fleet) RestartUnready(ctx context.Context, r *Relay) error {
	if err := r.start(); err != nil {
		return err
	}
	return r.waitReady(ctx, r.Metrics()+"/healthz")
}

// RestartControl starts the control server again.
func (f *Fleet) RestartControl(ctx context.Context) error {
	if err := f.Control.start(); err != nil {
		return err
	}
	return f.Control.waitReady(ctx, "http://"+f.addrPort(placeControl, portMetrics)+"/readyz")
}

// Close stops everything and gives the addresses back. It returns the first
// error; the others are in the logs.
func (f *Fleet) Close() error {
	var first error
	keep := func(err error) {
		if first == nil {
			first = err
		}
	}
	for _, r := range f.Relays {
		if r.Process != nil && r.Alive() {
			keep(r.Stop())
		}
	}
	for _, s := range f.servers {
		if s.Alive() {
			keep(s.Stop())
		}
	}
	if f.Control != nil && f.Control.Alive() {
		keep(f.Control.Stop())
	}
	if f.Lab != nil {
		keep(f.Lab.Close())
	}
	if f.block != nil {
		f.block.Release()
	}
	return first
}

// LinkAddr is where relays join and link.
func (f *Fleet) LinkAddr() string { return f.addrPort(placeControl, portLink) }
