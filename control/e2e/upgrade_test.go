package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// quarantineSince is the version of the commands that brought `ip quarantine`.
const quarantineSince = 4

// upgrade is a cluster whose programs are exchanged while mail flows.
type upgrade struct {
	*trio
	before, after release
	held          []string // providers that take nothing for now, in turn: sessions with the former may be open
	waiting       int      // recipients that it was given, on each relay
	tags          int

	mu        sync.Mutex
	submitted []fleet.Submitted
	last      time.Time // the last message answered 250
	pause     time.Duration
}

// TestUpgradeAndBack runs a cluster of the release before, upgrades it server by
// server and relay by relay, puts the old release back, upgrades again and gives
// up the way back, all with mail flowing and mail waiting in the queues.
func TestUpgradeAndBack(t *testing.T) {
	u := &upgrade{before: releaseBefore(t), after: thisRelease(t)}
	u.trio = startTrio(t, fleet.Config{Bin: u.before.bin, Older: true, Relays: 2, Open: true, NoDKIM: true})
	u.held = []string{"orange", "gmx"}
	u.hold()
	stop := make(chan struct{})
	var clients sync.WaitGroup
	to := u.flowing()
	for _, r := range u.Relays {
		clients.Go(func() { u.trickle(r, to, stop) })
	}
	var once sync.Once
	quiet := func() { once.Do(func() { close(stop); clients.Wait() }) }
	defer quiet()

	u.queue("old")
	// A relay of the new release with servers of the old one, and the reverse.
	u.exchange(u.Relays[0].Process, u.after)
	u.exchangeServers(u.after)
	u.exchange(u.Relays[1].Process, u.after)
	if rows := u.releases(u.servers[0]); rows[0].Commands != u.after.commands {
		t.Errorf("server list says that a server knows version %d of the commands, it knows %d", rows[0].Commands, u.after.commands)
	}
	u.queue("new")

	// And back, before the version of the commands was raised.
	u.exchange(u.Relays[0].Process, u.before)
	u.exchangeServers(u.before)
	u.exchange(u.Relays[1].Process, u.before)
	u.release() // mail that each of the releases had queued
	u.hold()
	u.queue("again")

	u.exchangeServers(u.after)
	for _, r := range u.Relays {
		u.exchange(r.Process, u.after)
	}
	u.noReflex()
	u.release()
	u.finish()
	quiet()
	a := settle(t, u.Fleet, u.submitted)
	report := u.Lab.Report()
	t.Logf("%d messages answered 250, %d arrived, %d twice; the longest time between two of them was %s", a.accepted, a.delivered, report.Duplicated, u.pause.Round(time.Millisecond))
	if a.delivered != a.accepted || a.accepted < 200 {
		t.Errorf("%+v: all mail is to arrive, and there is to be some", a)
	}
	// A relay that is asked to stop finishes what is in flight.
	if report.Duplicated > 0 {
		t.Errorf("%d messages arrived twice", report.Duplicated)
	}
	if u.pause > 10*time.Second {
		t.Errorf("for %s no relay accepted anything", u.pause)
	}
}

// trickle is a client that submits to one relay, and tries again while that is
// being restarted.
func (u *upgrade) trickle(r *fleet.Relay, to []string, stop <-chan struct{}) {
	pace := time.NewTicker(50 * time.Millisecond)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		case <-pace.C:
		}
		u.submit(r, fmt.Sprintf("flow-%s-%d", r.Name, n), to[n%len(to)])
	}
}

// submitTries bounds how often a client offers a message. A relay that stops
// answers 421, after which any client tries again.
const submitTries = 20

func (u *upgrade) submit(r *fleet.Relay, tag string, to ...string) {
	for try := 0; len(to) > 0; try++ {
		if try == submitTries {
			u.t.Errorf("%s did not take %d messages in %d tries", r.Name, len(to), try)
			return
		}
		to = u.offer(r, fmt.Sprint(tag, "-", try), to)
	}
}

// offer submits once and returns the recipients whose mail was not taken for
// now.
func (u *upgrade) offer(r *fleet.Relay, tag string, to []string) (again []string) {
	load := &lab.Load{Addr: r.Submissions(), ImplicitTLS: true, TLS: u.ClientTLS(r), Username: u.User, Password: u.Secret, Messages: len(to), Size: 1500, Tag: tag,
		From: func(int) string { return "news@" + fleet.Domain }, To: func(i int) string { return to[i] }}
	sent, err := lab.Send(u.t.Context(), load)
	if err != nil {
		u.t.Errorf("%s takes no mail: %v", r.Name, err)
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for i := range sent.Results {
		switch result := &sent.Results[i]; {
		case result.State == lab.StateAccepted:
			now := time.Now()
			if !u.last.IsZero() {
				u.pause = max(u.pause, now.Sub(u.last))
			}
			u.last = now
			u.submitted = append(u.submitted, fleet.Submitted{Relay: r, Recipient: to[i], MessageID: load.MessageID(i), Result: *result})
		case result.Code < 500: // RFC 5321 section 4.2.1: the same command may be answered otherwise later
			u.t.Logf("%s: %d %s", r.Name, result.Code, result.Reply)
			again = append(again, to[i])
		default:
			u.t.Errorf("%s refused a message for good: %d %s", r.Name, result.Code, result.Reply)
		}
	}
	return again
}

// flowing returns recipients at providers that take mail.
func (u *upgrade) flowing() (out []string) {
	for i, p := range u.Lab.Providers() {
		if slices.Contains(u.held, p.Name) || len(p.Addrs) == 0 {
			continue
		}
		if a, err := u.Lab.Recipient(p.Name, i, lab.Accept); err == nil {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		u.t.Fatal("no provider takes mail")
	}
	return out
}

// hold lets a provider take nothing, so that its mail waits.
func (u *upgrade) hold() {
	u.t.Helper()
	if err := u.Lab.SetBehaviour(u.held[0], lab.Behaviour{Answer: lab.At(lab.PhaseConnect, lab.Answer{Reply: "421 4.3.2 down"})}); err != nil {
		u.t.Fatal(err)
	}
}

// queue gives each relay mail that waits.
func (u *upgrade) queue(tag string) {
	u.t.Helper()
	const each = 20
	for _, r := range u.Relays {
		to := make([]string, each)
		for i := range to {
			a, err := u.Lab.Recipient(u.held[0], 100*u.waiting+i, lab.Accept)
			if err != nil {
				u.t.Fatal(err)
			}
			to[i] = a
		}
		u.submit(r, "wait-"+tag+"-"+r.Name, to...)
	}
	u.waiting += each
	u.checkWaiting()
}

// checkWaiting expects that no relay lost mail that waits. What waited when it was
// started is counted beside its work, and the release before does not tell when it
// has done that.
func (u *upgrade) checkWaiting() {
	u.t.Helper()
	for _, r := range u.Relays {
		eventually(u.t, time.Minute, fmt.Sprintf("%s to hold the %d recipients that wait", r.Name, u.waiting), func() bool {
			q, err := r.Queue(u.t.Context())
			return err == nil && q.Waiting >= int64(u.waiting)
		})
	}
}

// release lets the held provider take mail, and waits until it has all.
func (u *upgrade) release() {
	u.t.Helper()
	if err := u.Lab.SetBehaviour(u.held[0], lab.Behaviour{}); err != nil {
		u.t.Fatal(err)
	}
	eventually(u.t, time.Minute, "the mail that waited", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		for i := range u.submitted {
			if s := &u.submitted[i]; strings.HasPrefix(s.MessageID, "<wait-") && u.Lab.Deliveries(s.MessageID, s.Recipient) == 0 {
				return false
			}
		}
		return true
	})
	u.held, u.waiting = append(u.held[1:], u.held[0]), 0
}

// noReflex lets the new release, which slows itself down at a provider that took
// nothing for a while, and brings that back over minutes, not do so: how long a
// provider took nothing depends on how fast the machine exchanges programs.
func (u *upgrade) noReflex() {
	u.t.Helper()
	u.putPolicy(map[string]string{"providers": fleet.NoProviderLimits + "[reflex]\noff = true\n"})
	if err := u.WaitApplied(u.t.Context()); err != nil {
		u.t.Fatal(err)
	}
}

// exchange stops a process and starts the other release's program in its place.
func (u *upgrade) exchange(p *fleet.Process, to release) {
	u.t.Helper()
	if err := p.Stop(); err != nil {
		u.t.Fatal(err)
	}
	p.Replace(to.bin)
	ctx := within(u.t, time.Minute)
	for _, r := range u.Relays {
		if r.Process != p {
			continue
		}
		if err := u.Restart(ctx, r); err != nil {
			u.t.Fatal(err)
		}
		// It is linked, and takes what the servers send.
		u.change()
		u.checkWaiting()
		return
	}
	for _, s := range u.servers {
		if s.Process == p {
			if err := u.StartServer(ctx, s); err != nil {
				u.t.Fatal(err)
			}
		}
	}
}

// exchangeServers does what operations.md says: the followers first, the leader
// last, which hands the lead over when it is stopped.
func (u *upgrade) exchangeServers(to release) {
	u.t.Helper()
	last, _ := u.leader()
	led := u.ledBesides(last)
	order := []*fleet.ControlServer{}
	for _, s := range u.servers {
		if s != last {
			order = append(order, s)
		}
	}
	for i, s := range append(order, last) {
		u.exchange(s.Process, to)
		u.waitVoters(3)
		u.change()
		if i == 0 { // servers of both releases, led by one of the former
			through := s
			if to == u.before {
				through = last
			}
			u.operate(through)
			u.readable(s, to)
		}
		u.agree()
	}
	u.UseRelease(to.bin)
	// It may have been chosen again since.
	if u.ledBesides(last) == led {
		u.t.Errorf("%s leads still, though it was stopped in between", last.Name)
	}
	for _, r := range u.releases(u.servers[0]) {
		if r.Version != to.version {
			u.t.Errorf("server list says that %s runs release %s, it runs %s", r.Name, r.Version, to.version)
		}
	}
}

// ledBesides counts how often other servers than one began to lead.
func (u *upgrade) ledBesides(one *fleet.ControlServer) (n int) {
	u.t.Helper()
	for _, s := range u.servers {
		if s == one {
			continue
		}
		text, err := os.ReadFile(s.Log)
		if err != nil {
			u.t.Fatal(err)
		}
		n += strings.Count(string(text), `"msg":"this server leads"`)
	}
	return n
}

// unknownOutcome is what the command line says of a change during which the leader
// was lost, as it may be on a machine that stands still for a second.
const unknownOutcome = "the change may or may not have been made"

// surely makes a change until it is known what became of it. One that turns out to
// be there already has been made.
func (u *upgrade) surely(change func() ([]byte, error)) (out []byte, err error) {
	u.t.Helper()
	const tries = 10
	for n := range tries {
		out, err = change()
		if err == nil || !strings.Contains(err.Error(), unknownOutcome) {
			if err != nil && n > 0 && strings.Contains(err.Error(), "already") {
				return out, nil
			}
			return out, err
		}
		u.t.Logf("made once more: %v", err)
	}
	return out, err
}

// putPolicy changes sections of the policy.
func (u *upgrade) putPolicy(sections map[string]string) {
	u.t.Helper()
	if _, err := u.surely(func() ([]byte, error) { return nil, u.PutPolicy(u.t.Context(), sections) }); err != nil {
		u.t.Fatal(err)
	}
}

// change makes changes through each of the servers that all others and the
// relays must take.
func (u *upgrade) change() {
	u.t.Helper()
	u.tags++
	for _, s := range u.servers {
		name := fmt.Sprintf("t%d-%s", u.tags, s.Name)
		if out, err := u.surely(func() ([]byte, error) { return u.CtlAt(u.t.Context(), s, "tenant", "add", name) }); err != nil {
			u.t.Fatalf("%v\n%s", err, out)
		}
	}
	u.putPolicy(map[string]string{"submission": fmt.Sprintf("max_connections_per_ip = %d\nmax_messages_per_session = 1000000\nmax_commands_per_session = 1000000\n", 1000-u.tags)})
	if err := u.WaitApplied(u.t.Context()); err != nil {
		u.t.Fatal(err)
	}
}

// policyFile writes one section of the policy and returns its path.
func (u *upgrade) policyFile(section, text string) string {
	u.t.Helper()
	path := filepath.Join(u.t.TempDir(), section+".toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		u.t.Fatal(err)
	}
	return path
}

// backup lets one server take a backup and returns its state's hash.
func (u *upgrade) backup(s *fleet.ControlServer, path string) (hash string) {
	u.t.Helper()
	var b struct {
		Manifest struct {
			StateHash string `json:"state_hash"`
		} `json:"manifest"`
	}
	out, err := u.CtlAt(within(u.t, time.Minute), s, "backup", path, "--json")
	if err == nil {
		err = json.Unmarshal(out, &b)
	}
	if err != nil || b.Manifest.StateHash == "" {
		u.t.Fatalf("backup by %s: %v\n%s", s.Name, err, out)
	}
	return b.Manifest.StateHash
}

// agree expects the servers to hold the same state, whatever release they run.
// A change in between makes two looks differ, so it looks again.
func (u *upgrade) agree() {
	u.t.Helper()
	dir := u.t.TempDir()
	var seen []string
	tries := 0
	same := func() bool {
		tries++
		seen = seen[:0]
		for i, s := range u.servers {
			path := filepath.Join(dir, fmt.Sprint(tries, "-", i))
			seen = append(seen, u.backup(s, path))
			_ = os.Remove(path)
		}
		return seen[0] == seen[1] && seen[1] == seen[2]
	}
	for deadline := time.Now().Add(time.Minute); !same(); {
		if time.Now().After(deadline) {
			u.t.Fatalf("servers of two releases hold different states: %v", seen)
		}
	}
}

// readable lets each release read a snapshot that the other one wrote.
func (u *upgrade) readable(s *fleet.ControlServer, wrote release) {
	u.t.Helper()
	path := filepath.Join(u.t.TempDir(), "backup")
	u.backup(s, path)
	for _, r := range []release{u.before, u.after} {
		if out, err := command(u.t, filepath.Join(r.bin, "relais-control"), "backup", "verify", path, "--data", s.Dir); err != nil {
			u.t.Errorf("release %s does not read a snapshot of release %s: %v\n%s", r.version, wrote.version, err, out)
		}
	}
}

type releaseRow struct {
	Name     string `json:"name"`
	Version  string `json:"version"`
	Commands uint16 `json:"commands"`
}

func (u *upgrade) releases(s *fleet.ControlServer) (rows []releaseRow) {
	u.t.Helper()
	out, err := u.CtlAt(u.t.Context(), s, "server", "list", "--json")
	if err == nil {
		err = json.Unmarshal(out, &rows)
	}
	if err != nil || len(rows) != len(u.servers) {
		u.t.Fatalf("server list: %v\n%s", err, out)
	}
	return rows
}

// finish gives up the way back and shows that it is closed.
func (u *upgrade) finish() {
	u.t.Helper()
	var stands struct {
		Commands uint16   `json:"commands"`
		Waiting  []string `json:"waiting"`
	}
	status := func(args ...string) {
		u.t.Helper()
		out, err := u.Ctl(u.t.Context(), append(args, "--json")...)
		if err == nil {
			err = json.Unmarshal(out, &stands)
		}
		if err != nil {
			u.t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	status("upgrade", "status")
	old := stands.Commands
	if u.after.commands <= old {
		u.t.Fatalf("release %s works at version %d of the commands, release %s before it at %d: an upgrade shows nothing about the way back; run scripts/previous-release.sh for an older release", u.after.version, u.after.commands, u.before.version, old)
	}
	// What the new release brought waits until then.
	quarantine := func(address string) (string, error) {
		out, err := u.Ctl(u.t.Context(), "ip", "quarantine", address, "--reason", "tested")
		return fmt.Sprint(string(out), err), err
	}
	if text, err := quarantine(u.operate(u.servers[0])); err == nil || !strings.Contains(text, fmt.Sprintf("needs version %d of the commands, the cluster works at %d", quarantineSince, old)) {
		u.t.Errorf("a command of the new release, too early: %s", text)
	}
	status("upgrade", "finish", "--reason", "tested")
	if stands.Commands != u.after.commands {
		u.t.Errorf("the cluster works at version %d of the commands, want %d", stands.Commands, u.after.commands)
	}
	u.change()
	if text, err := quarantine(u.operate(u.servers[0])); err != nil {
		u.t.Errorf("a command of the new release: %s", text)
	}
	u.agree()

	// The old release is not started on this cluster any more, nor joins it.
	_, s := u.leader()
	if err := s.Stop(); err != nil {
		u.t.Fatal(err)
	}
	s.Replace(u.before.bin)
	if err := s.Start(); err != nil {
		u.t.Fatal(err)
	}
	select {
	case <-s.Ended():
	case <-within(u.t, time.Minute).Done():
		u.t.Fatalf("a server of release %s runs in a cluster of release %s; its log is %s", u.before.version, u.after.version, s.Log)
	}
	log, err := os.ReadFile(s.Log)
	want := fmt.Sprintf("the cluster works at version %d of the commands, this program knows %d: this directory was written by a newer release", u.after.commands, old)
	if err != nil || !strings.Contains(string(log), want) {
		u.t.Errorf("the log of a server of release %s does not say %q (%v):\n%.2000s", u.before.version, want, err, log[max(0, len(log)-2000):])
	}
	joining, _ := token(u.t, u.Fleet, "--role", "control")
	out, err := runText(u.t, filepath.Join(u.before.bin, "relais-control"), "join", "--token", joining, "--data", u.t.TempDir(), "--advertise", "127.0.0.1", u.LinkAddr())
	if want := fmt.Sprintf("applies commands of version %d, this cluster uses %d", old, u.after.commands); err == nil || !strings.Contains(out, want) {
		u.t.Errorf("a server of release %s joins: %v, want %q:\n%s", u.before.version, err, want, out)
	}
	s.Replace(u.after.bin)
	if err := u.StartServer(within(u.t, time.Minute), s); err != nil {
		u.t.Fatal(err)
	}
	u.waitVoters(3)
	u.agree()
}
