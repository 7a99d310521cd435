package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/pki/pkitest"
	"github.com/relais-mta/relais/shared/policy"
	"github.com/relais-mta/relais/shared/wire"
)

func TestViewArrivesIsUsedAndAcknowledged(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, _ := running(t, dir)
	changes := a.Subscribe()
	if a.Directory() != nil {
		t.Error("there is a view before any came")
	}
	s := c.next()
	answer, err := s.send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	select {
	case <-changes:
	case <-time.After(patience):
		t.Fatal("nobody was told of the view")
	}
	if got := a.Directory().View(); got.Revision != 10 || got.Node != node || len(got.Sources) != 2 {
		t.Errorf("in use is %+v", got)
	}
	waitFor(t, "a report of the view", func() bool {
		report := <-s.reports
		if report.GetApplied().GetIndex() != 10 {
			return false
		}
		if report.GetWaitingRecipients() != 7 || len(report.GetProblems()) != 1 || len(report.GetSources()) != 2 ||
			!report.GetSources()[0].GetPresent() || report.GetSources()[1].GetPresent() {
			t.Errorf("report %v", report)
		}
		return true
	})
	// Each comparison may be wrong by half of what its exchange took, which is long
	// when the machine stands still; the next one, a report later, is right again.
	waitFor(t, "the server's clock to be found an hour ahead", func() bool {
		offset, ok := a.ClockOffset()
		return ok && (offset-time.Hour).Abs() <= time.Second
	})
	health := a.Health()
	if !a.Connected() || !health.Connected || health.Server != c.address || health.Revision != 10 || health.Problem != "" || time.Since(a.LastContact()) > patience {
		t.Errorf("health %+v", health)
	}
}

func TestHelloSaysWhatIsHeld(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	_, stop := running(t, dir)
	answer, err := c.next().send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	stop()
	_, stop = running(t, dir)
	c.next()
	stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	first, second := c.hellos[0], c.hellos[1]
	if first.GetHeld() != nil || len(first.GetLocalAddresses()) != 1 {
		t.Errorf("first hello %v", first)
	}
	if second.GetHeld().GetIndex() != 10 || second.GetHeld().GetGeneration() != 1 || len(second.GetHeldSha256()) != 32 {
		t.Errorf("second hello %v", second)
	}
	if c.prefaces[0].GetIncarnation() != 1 || c.prefaces[1].GetIncarnation() != 2 || bytes.Equal(c.prefaces[0].GetBootNonce(), c.prefaces[1].GetBootNonce()) {
		t.Errorf("prefaces %v, %v", c.prefaces[0], c.prefaces[1])
	}
}

func TestRefusedViewKeepsTheLastGood(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, _ := running(t, dir)
	s := c.next()
	answer, err := s.send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	cases := map[string]struct {
		change func(*policy.View)
		want   string
	}{
		"does not compile": {func(v *policy.View) { v.Sections = map[string]string{"queue": "retry_max = \"x\"\n"} }, "retry_max"},
		"other cluster":    {func(v *policy.View) { v.Cluster = ids.Cluster(pkitest.NewNode()) }, "this relay belongs to " + c.ca.Cluster.String()},
		"other node":       {func(v *policy.View) { v.Node = pkitest.NewNode() }, "this is " + node.String()},
		"goes back":        {func(v *policy.View) { v.Revision = 9 }, "revision 9 of generation 1 is older than revision 10"},
		"old generation":   {func(v *policy.View) { v.Generation, v.Revision = 0, 99 }, "generation 0 is older"},
	}
	for name, test := range cases {
		view := c.view(node, 11)
		test.change(view)
		answer, err := s.send(view)
		nack, ok := answer.(*wire.Nack)
		if err != nil || !ok {
			t.Fatalf("%s: answered %v, %v", name, answer, err)
		}
		if text := fault.Public(nack.GetError().Fault()); !strings.Contains(text, test.want) {
			t.Errorf("%s: %q lacks %q", name, text, test.want)
		}
		if got := a.Directory().View().Revision; got != 10 {
			t.Errorf("%s: revision %d is in use", name, got)
		}
		waitFor(t, "health to say it", func() bool { return strings.Contains(a.Health().Problem, "newest policy is refused") })
	}
	answer, err = s.send(c.view(node, 12))
	mustAck(t, answer, err, 12)
	waitFor(t, "health to be good again", func() bool { return a.Health().Problem == "" })
}

func TestNewGenerationMayStartLower(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, _ := running(t, dir)
	s := c.next()
	answer, err := s.send(c.view(node, 1000))
	mustAck(t, answer, err, 1000)
	view := c.view(node, 5)
	view.Generation = 2
	answer, err = s.send(view)
	mustAck(t, answer, err, 5)
	if got := a.Directory().View(); got.Generation != 2 || got.Revision != 5 {
		t.Errorf("in use is revision %d of generation %d", got.Revision, got.Generation)
	}
	if member, err := LoadMembership(dir); err != nil || member.Generation != 2 {
		t.Errorf("membership %+v, %v", member, err)
	}
}

// bigView has so many domains with keys that it takes ten megabytes.
func bigView(c *controlServer, node ids.Node, revision uint64) *policy.View {
	view := c.view(node, revision)
	tenant := ids.Tenant(ids.NewMessage(time.UnixMilli(1_700_000_000_005)))
	view.Tenants = []policy.Tenant{{ID: tenant, Name: "acme"}}
	for i := range 8000 {
		name := mailaddr.Domain(fmt.Sprintf("d%d.example", i))
		view.Domains = append(view.Domains, policy.Domain{
			Name: name, Tenant: tenant, ReturnPath: "rp." + name,
			DKIM: []policy.DKIMKey{{Selector: "r1", Algorithm: "rsa-sha256", Private: bytes.Repeat([]byte("SECRETKEY-"), 122)}},
		})
	}
	return view
}

func TestTenMegabyteView(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, stop := running(t, dir)
	start := time.Now()
	answer, err := c.next().send(bigView(c, node, 10))
	mustAck(t, answer, err, 10)
	t.Logf("sent, checked, stored and acknowledged in %v", time.Since(start))
	if got := len(a.Directory().View().Domains); got != 8000 {
		t.Errorf("%d domains arrived", got)
	}
	stop()
	stored, err := os.ReadFile(filepath.Join(dir, viewDir, viewFile))
	if err != nil || len(stored) < 9<<20 {
		t.Fatalf("%d bytes stored, %v", len(stored), err)
	}
	if bytes.Contains(stored, []byte("SECRETKEY")) {
		t.Error("private keys are readable on disk")
	}
}

func TestRestartWithoutControl(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	_, stop := running(t, dir)
	answer, err := c.next().send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	stop()
	c.stop()
	a, _ := running(t, dir)
	if a.Directory() == nil || a.Directory().View().Revision != 10 || a.Directory().View().CredentialKey[0] != 1 {
		t.Fatal("the stored view is not in use")
	}
	if a.Connected() || !a.LastContact().IsZero() {
		t.Error("says that control was heard")
	}
	waitFor(t, "health to say that control is away", func() bool { return strings.Contains(a.Health().Problem, "no link to control") })
}

func TestReconnects(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, _ := running(t, dir)
	s := c.next()
	s.code = link.CodeRefresh
	close(s.over)
	s = c.next()
	answer, err := s.send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	if !a.Connected() {
		t.Error("not connected")
	}
}

func TestEvictedRelayIsCutOffAndSaysSo(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	a, _ := running(t, dir)
	s := c.next()
	answer, err := s.send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	s.code = link.CodeDenied
	close(s.over)
	waitFor(t, "the link to end", func() bool { return !a.Connected() })
	if problem := a.Health().Problem; !strings.Contains(problem, "denied") || !strings.Contains(problem, "the test says so") {
		t.Errorf("health says %q", problem)
	}
	if a.Directory() == nil {
		t.Error("the last view is gone")
	}
}

func TestRedirect(t *testing.T) {
	ca := pkitest.New(t)
	c, second := startControl(t, ca), startControl(t, ca)
	dir, _ := c.joined()
	a, _ := running(t, dir)
	s := c.next()
	if err := s.say(&wire.Redirect{Servers: []string{second.address}, Reason: "stopping"}); err != nil {
		t.Fatal(err)
	}
	second.next()
	waitFor(t, "the link to the second server", func() bool { return a.Connected() && a.Health().Server == second.address })
}

func TestNewServersAreRemembered(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, _ := c.joined()
	c.mu.Lock()
	c.servers = []string{c.address, "192.0.2.2:7443", "not an address"}
	c.mu.Unlock()
	_, stop := running(t, dir)
	session := c.next()
	onDisk := func(n int, last string) func() bool {
		return func() bool {
			member, err := LoadMembership(dir)
			return err == nil && len(member.Servers) == n && member.Servers[n-1] == last
		}
	}
	waitFor(t, "the list on disk", onDisk(2, "192.0.2.2:7443"))
	if err := session.say(&wire.Welcome{Servers: []string{c.address, "192.0.2.2:7443", "192.0.2.3:7443"}}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the list that came later", onDisk(3, "192.0.2.3:7443"))
	stop()
}

func TestDamagedViewIsRefusedAndReplaced(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	_, stop := running(t, dir)
	answer, err := c.next().send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	stop()
	path := filepath.Join(dir, viewDir, viewFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int{0, 7, 10, 20, 30, len(good) / 2, len(good) - 1} {
		bad := bytes.Clone(good)
		bad[offset] ^= 0x10
		checkDamaged(t, dir, path, bad)
	}
	checkDamaged(t, dir, path, good[:len(good)/2])
	checkDamaged(t, dir, path, nil)
	a, _ := running(t, dir)
	answer, err = c.next().send(c.view(node, 10)) // the same revision again: nothing is held
	mustAck(t, answer, err, 10)
	if a.Directory() == nil || a.Health().Problem != "" {
		t.Errorf("health %+v", a.Health())
	}
	if now, err := os.ReadFile(path); err != nil || len(now) != len(good) {
		t.Errorf("the file has %d bytes, %v", len(now), err)
	}
}

func checkDamaged(t *testing.T, dir, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := Open(options(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.Directory() != nil {
		t.Errorf("%d bytes of a damaged view are in use", len(content))
	}
	if problem := a.Health().Problem; !strings.Contains(problem, path) || !strings.Contains(problem, "waits for control") {
		t.Errorf("health says %q", problem)
	}
}

func TestViewOfAnotherKeyIsRefused(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	one, node := c.joined()
	_, stop := running(t, one)
	answer, err := c.next().send(c.view(node, 10))
	mustAck(t, answer, err, 10)
	stop()
	two, _ := c.joined()
	stolen, err := os.ReadFile(filepath.Join(one, viewDir, viewFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(two, viewDir), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(two, viewDir, viewFile)
	if err := os.WriteFile(path, stolen, 0o600); err != nil {
		t.Fatal(err)
	}
	checkDamaged(t, two, path, stolen)
}

func TestRenewal(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	c.leafLife = 2 * time.Second // begun a minute ago: due at once
	dir, _ := c.joined()
	c.mu.Lock()
	c.leafLife = time.Hour
	c.mu.Unlock()
	a, _ := running(t, dir)
	waitFor(t, "a new certificate", func() bool { return time.Until(a.Health().LeafEnds) > time.Minute })
	c.mu.Lock()
	if c.renewals != 1 {
		t.Errorf("%d renewals", c.renewals)
	}
	c.mu.Unlock()
	again, err := LoadMembership(dir)
	if err != nil || again.Node != a.Membership().Node {
		t.Errorf("membership %+v, %v", again, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	if _, err := Open(options(t.TempDir())); !fault.Is(err, fault.NotFound) || !strings.Contains(fault.Public(err), "relais-relay join") {
		t.Errorf("not joined: %v", err)
	}
	c := startControl(t, pkitest.New(t))
	dir, _ := c.joined()
	a, err := Open(options(dir))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(options(dir)); !fault.Is(err, fault.Conflict) {
		t.Errorf("a second process: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	other, _ := c.joined()
	foreign, err := os.ReadFile(filepath.Join(other, identityDir, leafFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, identityDir, leafFile), foreign, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(options(dir)); !fault.Is(err, fault.Invalid) || !strings.Contains(fault.Public(err), "join again") {
		t.Errorf("a foreign certificate: %v", err)
	}
}
