package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// What TestOperatorsCommands holds to be purged, in two goes.
const (
	heldMessages   = 200
	heldRecipients = 200 // of each
)

// operator runs the commands of a relay's operator and looks at what happened.
type operator struct {
	t *testing.T
	f *fleet.Fleet
	r *fleet.Relay
}

// TestOperatorsCommands acts on real mail with the built program: rules hold
// what comes, releasing delivers it, a bounce is told to the sender and a purge
// is not, a retry goes at once, and a long action is interrupted and resumed.
func TestOperatorsCommands(t *testing.T) {
	t.Parallel()
	f := start(t, fleet.Config{Open: true, Policy: map[string]string{
		"queue": "retry = [\"1h\"]\nretry_max = \"1h\"\ngreylist_retry = \"1h\"\n",
	}})
	o := &operator{t: t, f: f, r: f.Relays[0]}
	o.usage()
	o.holdAndRelease()
	o.checksItself()
	o.bounceTells()
	o.purgeIsSilent()
	o.retryGoesNow()
	o.interruptAndResume()
}

// run runs a command of the queue.
func (o *operator) run(args ...string) string {
	o.t.Helper()
	return string(relayCommand(o.t, o.r, append([]string{"queue"}, args...)...))
}

// usage: what names no mail is refused as a mistake in the command's words.
func (o *operator) usage() {
	o.t.Helper()
	for _, args := range [][]string{
		{"purge"}, {"bounce", "--domain", "a.test"}, {"hold"}, {"release"}, {"retry"}, {"purge", "--all"}, {"bounce", "--all", "--reason", "x"},
		{"purge", "--all", "--domain", "a.test", "--yes"}, {"hold", "--domain", "a.test", "--until", "1h"}, {"hold", "--domain", "a.test", "--rule"},
	} {
		out, err := command(o.t, filepath.Join(binaries, "relais-relay"), append(append([]string{"queue"}, args...), "--data", o.r.Dir)...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 {
			o.t.Errorf("queue %v: %v, want exit code 2\n%s", args, err, out)
		}
	}
	if out := o.run("purge", "--domain", "nobody.test"); !strings.Contains(out, "No queued recipient matches") {
		o.t.Errorf("purging nothing says %q", out)
	}
	if out := o.run("holds"); !strings.Contains(out, "No rule holds mail") {
		o.t.Errorf("no rules: %q", out)
	}
}

// listed is one message of `queue list --json`.
type listed struct {
	ID         string
	Recipients []struct {
		ID      string
		Address string
		State   string
	}
}

// listedAs waits until a filter lists n messages.
func (o *operator) listedAs(n int, filter ...string) []listed {
	o.t.Helper()
	var list []listed
	eventually(o.t, 30*time.Second, fmt.Sprintf("%d messages as %v", n, filter), func() bool {
		list = nil
		if err := json.Unmarshal([]byte(o.run(append([]string{"list", "--json"}, filter...)...)), &list); err != nil {
			o.t.Fatal(err)
		}
		return len(list) == n
	})
	return list
}

// rule makes a rule and returns its id.
func (o *operator) rule(filter ...string) string {
	o.t.Helper()
	var rule struct{ ID string }
	out := o.run(append([]string{"hold", "--rule", "--reason", "a complaint is looked into", "--json"}, filter...)...)
	if err := json.Unmarshal([]byte(out), &rule); err != nil || !strings.HasPrefix(rule.ID, "hld_") {
		o.t.Fatalf("%v: %s", err, out)
	}
	return rule.ID
}

// delivered waits for the arrival of a mail.
func (o *operator) delivered(name, to string) {
	o.t.Helper()
	eventually(o.t, 30*time.Second, name+" delivered", func() bool {
		return o.f.Lab.Deliveries("<"+name+"@"+fleet.Domain+">", to) == 1
	})
}

// checksItself: a relay that runs checks its queue, and neither repairs nor
// exports it; a message's priority is shown and found.
func (o *operator) checksItself() {
	o.t.Helper()
	rule := o.rule("--domain", "yahoo.test")
	submitOne(o.t, o.f, "accept-1@yahoo.test", "checked", "X-Relais-Priority: 80\r\n")
	m := o.listedAs(1, "--state", "held", "--priority", "60-100")[0]
	o.listedAs(0, "--priority", "0-79")
	if show := o.run("show", m.ID); !strings.Contains(show, "priority  80") || !strings.Contains(show, "tenant    "+fleet.Tenant) {
		o.t.Errorf("show says %q", show)
	}
	if why := o.run("why", m.ID); !strings.Contains(why, "(priority 80)") {
		o.t.Errorf("why says %q", why)
	}
	if out := o.run("fsck", "--bodies"); !strings.Contains(out, "1 held") {
		o.t.Errorf("a check says %q", out)
	}
	var line struct{ Result *struct{ Held int64 } }
	if out := o.run("fsck", "--json"); json.Unmarshal([]byte(out), &line) != nil || line.Result == nil || line.Result.Held != 1 {
		o.t.Errorf("a check says %q", out)
	}
	for _, args := range [][]string{{"fsck", "--repair"}, {"export", filepath.Join(o.t.TempDir(), "x")}} {
		out, err := command(o.t, filepath.Join(binaries, "relais-relay"), append(append([]string{"queue"}, args...), "--data", o.r.Dir)...)
		if err == nil || !strings.Contains(string(out), "runs") {
			o.t.Errorf("queue %v of a running relay: %v\n%s", args, err, out)
		}
	}
	o.run("release", rule)
	o.delivered("checked", "accept-1@yahoo.test")
}

func (o *operator) holdAndRelease() {
	o.t.Helper()
	const to = "accept-1@yahoo.test"
	rule := o.rule("--stream", "transactional")
	submitOne(o.t, o.f, to, "held-1", "")
	m := o.listedAs(1, "--state", "held", "--domain", "yahoo.test")[0]
	if why := o.run("why", m.ID); !strings.Contains(why, rule) || !strings.Contains(why, "a complaint is looked into") || !strings.Contains(why, "until") {
		o.t.Errorf("why says %q", why)
	}
	if holds := o.run("holds"); !strings.Contains(holds, rule) || !strings.Contains(holds, "stream=transactional") {
		o.t.Errorf("holds says %q", holds)
	}
	if out := o.run("release", "--state", "held"); !strings.Contains(out, "1 are held by rules in force") {
		o.t.Errorf("releasing what a rule holds says %q", out)
	}
	if out := o.run("summary"); !strings.Contains(out, "held recipients       1") {
		o.t.Errorf("summary says %q", out)
	}
	if out := o.run("summary", "--full"); !strings.Contains(out, "held") || !strings.Contains(out, "acme/transactional") {
		o.t.Errorf("summary --full says %q", out)
	}
	if n := o.f.Lab.Deliveries("<held-1@"+fleet.Domain+">", to); n != 0 {
		o.t.Errorf("held mail was delivered %d times", n)
	}
	o.run("release", rule)
	o.delivered("held-1", to)
	submitOne(o.t, o.f, to, "free-1", "")
	o.delivered("free-1", to)
}

func (o *operator) bounceTells() {
	o.t.Helper()
	rule := o.rule("--domain", "gmx.test", "--until", "1h")
	submitOne(o.t, o.f, "accept-1@gmx.test", "bounced-1", "")
	m := o.listedAs(1, "--domain", "gmx.test")[0]
	if out := o.run("bounce", m.Recipients[0].ID, "--reason", "sent by mistake"); !strings.Contains(out, "1 recipients bounced") {
		o.t.Errorf("bounce says %q", out)
	}
	var report []byte
	eventually(o.t, 30*time.Second, "a report to the sender", func() bool {
		for _, content := range o.notifications() {
			report = content
		}
		return report != nil
	})
	checkNotification(o.t, report)
	for _, want := range []string{"\r\nFinal-Recipient: rfc822; accept-1@gmx.test\r\n", "sent by mistake", "\r\nStatus: 5.0.0\r\n"} {
		if !strings.Contains(string(report), want) {
			o.t.Errorf("the report has no %q:\n%s", want, report)
		}
	}
	o.run("release", rule)
}

// notifications are the mails from nobody that arrived.
func (o *operator) notifications() (found [][]byte) {
	o.t.Helper()
	for _, p := range o.f.Lab.Providers() {
		for m, err := range o.f.Lab.Mails(p.Name) {
			if err != nil {
				o.t.Fatal(err)
			}
			if m.From != "" {
				continue
			}
			_, content, err := o.f.Lab.Mail(p.Name, m.ID)
			if err != nil {
				o.t.Fatal(err)
			}
			found = append(found, content)
		}
	}
	return found
}

func (o *operator) purgeIsSilent() {
	o.t.Helper()
	before := len(o.notifications())
	rule := o.rule("--domain", "gmx.test", "--tag", "june")
	submitOne(o.t, o.f, "accept-2@gmx.test", "purged-1", "X-Relais-Tag: june\r\n")
	o.listedAs(1, "--tag", "june")
	if out := o.run("purge", "--tag", "june", "--older-than", "1d"); !strings.Contains(out, "No queued recipient matches") {
		o.t.Errorf("a filter that matches nothing: %q", out)
	}
	if out := o.run("purge", "--tag", "june", "--reason", "cancelled"); !strings.Contains(out, "1 recipients purged") {
		o.t.Errorf("purge says %q", out)
	}
	o.run("release", rule)
	o.listedAs(0)
	events := o.events("purged")
	if len(events) != 1 || !strings.HasPrefix(events[0].Actor, "local:") || events[0].Reply != "cancelled" {
		o.t.Errorf("events of the purge: %+v", events)
	}
	if n := len(o.notifications()); n != before {
		o.t.Errorf("a purge made %d notifications", n-before)
	}
}

// events returns the events of a type.
func (o *operator) events(kind string) (found []fleet.Event) {
	o.t.Helper()
	if err := o.f.NewLedger().Read(o.t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Type == kind {
			found = append(found, *e)
		}
	}); err != nil {
		o.t.Fatal(err)
	}
	return found
}

func (o *operator) retryGoesNow() {
	o.t.Helper()
	const to = "accept-3@gmx.test"
	behave := func(b lab.Behaviour) {
		o.t.Helper()
		if err := o.f.Lab.SetBehaviour(lab.GMX, b); err != nil {
			o.t.Fatal(err)
		}
	}
	behave(lab.Behaviour{Answer: lab.At(lab.PhaseData, lab.Answer{Reply: "451 4.7.1 come back later"})})
	submitOne(o.t, o.f, to, "retried-1", "")
	m := o.listedAs(1, "--provider", "gmx", "--last-reply", "451 4.7.1 COME back")[0]
	if why := o.run("why", m.ID); !strings.Contains(why, "451 4.7.1 come back later") || !strings.Contains(why, "until") {
		o.t.Errorf("why says %q", why)
	}
	behave(lab.Behaviour{})
	if out := o.run("retry", "--provider", "gmx", "--last-reply", "451"); !strings.Contains(out, "1 recipients made due at once") {
		o.t.Errorf("retry says %q", out)
	}
	o.delivered("retried-1", to)
}

// progress is a line of a long action.
type progress struct {
	Looked, Matched, Done int64
	Resume                string
	Finished              bool
}

// interruptAndResume purges a backlog, interrupted behind the first step.
func (o *operator) interruptAndResume() {
	o.t.Helper()
	o.rule("--domain", "held.test")
	c := dial(o.t, o.r.Submission())
	c.startTLS(o.f.ClientTLS(o.r))
	c.cmd("EHLO client.test", "250")
	c.cmd("AUTH PLAIN "+plain(o.f.User, o.f.Secret), "235")
	for i := range heldMessages {
		text := "MAIL FROM:<news@" + fleet.Domain + ">\r\n"
		for j := range heldRecipients {
			text += fmt.Sprintf("RCPT TO:<user%d@held.test>\r\n", j)
		}
		c.send(text + "DATA\r\n") // pipelined
		for range heldRecipients + 1 {
			c.expect("250")
		}
		c.expect("354")
		c.send(fmt.Sprintf("From: news@%s\r\nMessage-ID: <backlog-%d@%s>\r\nSubject: much\r\n\r\nMuch mail\r\n.\r\n", fleet.Domain, i, fleet.Domain))
		c.expect("250 2.0.0")
	}
	const all = heldMessages * heldRecipients
	args := []string{"queue", "purge", "--domain", "held.test", "--yes", "--json", "--data", o.r.Dir}
	first := o.interrupted(args)
	if first.Done == 0 || first.Resume == "" {
		o.t.Fatalf("the first part: %+v", first)
	}
	out := relayCommand(o.t, o.r, append(args[:len(args)-2:len(args)-2], "--resume", first.Resume)...)
	var last progress
	for line := range strings.Lines(string(out)) {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			o.t.Fatalf("%v: %s", err, line)
		}
	}
	if o.t.Logf("interrupted at %+v, resumed to %+v", first, last); !last.Finished || last.Looked > all-first.Looked {
		o.t.Errorf("after the first part %+v the second is %+v", first, last)
	}
	o.listedAs(0)
	purged := 0
	for _, e := range o.events("purged") {
		if strings.HasSuffix(e.Address, "@held.test") {
			purged++
		}
	}
	if purged != all {
		o.t.Errorf("%d recipients were purged, want %d", purged, all)
	}
}

// interrupted runs a command, interrupts it when it tells of its first step,
// and returns the last that it told.
func (o *operator) interrupted(args []string) (last progress) {
	o.t.Helper()
	cmd := exec.CommandContext(within(o.t, time.Minute), filepath.Join(binaries, "relais-relay"), args...)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		o.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for n := 0; lines.Scan(); n++ {
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			o.t.Errorf("%v: %s", err, lines.Bytes())
		}
		if n == 0 {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				o.t.Errorf("interrupting: %v", err)
			}
		}
	}
	if err := cmd.Wait(); err == nil && !last.Finished {
		o.t.Errorf("an interrupted command succeeded")
	}
	return last
}
