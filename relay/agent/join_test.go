package agent

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/pki/pkitest"
)

func TestJoinWritesTheIdentity(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir := t.TempDir()
	result, err := Join(context.Background(), c.joinOptions(dir))
	if err != nil {
		t.Fatal(err)
	}
	if result.Cluster != c.ca.Cluster || result.Node.IsZero() || result.State != "active" || result.Server != c.address || result.Already || result.Skew.Abs() > 30*time.Second {
		t.Errorf("result %+v", result)
	}
	member, err := LoadMembership(dir)
	if err != nil || member.Cluster != c.ca.Cluster || member.Node != result.Node || len(member.Servers) != 1 || member.Servers[0] != c.address {
		t.Errorf("membership %+v, %v", member, err)
	}
	for name, mode := range map[string]os.FileMode{keyFile: 0o600, csrFile: 0o600, leafFile: 0o644, caFile: 0o644, membershipFile: 0o600} {
		info, err := os.Stat(filepath.Join(dir, identityDir, name))
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(dir, identityDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, identityDir, entry.Name()))
		if err != nil || strings.Contains(string(data), c.token.Secret) {
			t.Errorf("%s holds the token's secret, or %v", entry.Name(), err)
		}
	}
}

func TestJoinAgainChangesNothing(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	before, err := os.ReadFile(filepath.Join(dir, identityDir, leafFile))
	if err != nil {
		t.Fatal(err)
	}
	result, err := Join(context.Background(), c.joinOptions(dir))
	if err != nil || !result.Already || result.Node != node {
		t.Errorf("%+v, %v", result, err)
	}
	if c.requests != 1 {
		t.Errorf("%d requests reached the server", c.requests)
	}
	if after, err := os.ReadFile(filepath.Join(dir, identityDir, leafFile)); err != nil || string(after) != string(before) {
		t.Errorf("the certificate changed: %v", err)
	}
}

func TestJoinAfterALostAnswerIsTheSameNode(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	dir, node := c.joined()
	for _, name := range []string{membershipFile, leafFile, caFile} { // as if the answer had been lost
		if err := os.Remove(filepath.Join(dir, identityDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	result, err := Join(context.Background(), c.joinOptions(dir))
	if err != nil || result.Already || result.Node != node {
		t.Errorf("%+v, %v; want node %s", result, err, node)
	}
}

func TestJoinRefusesAnotherCluster(t *testing.T) {
	c, other := startControl(t, pkitest.New(t)), startControl(t, pkitest.New(t))
	dir, node := c.joined()
	_, err := Join(context.Background(), other.joinOptions(dir))
	if !fault.Is(err, fault.Conflict) {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{c.ca.Cluster.String(), node.String(), other.ca.Cluster.String(), dir} {
		if !strings.Contains(fault.Public(err), want) {
			t.Errorf("the message lacks %s: %s", want, fault.Public(err))
		}
	}
	if other.requests != 0 {
		t.Error("the other cluster got a join request")
	}
}

func TestJoinWrongPin(t *testing.T) {
	c, other := startControl(t, pkitest.New(t)), startControl(t, pkitest.New(t))
	jo := c.joinOptions(t.TempDir())
	jo.Servers = []string{other.address}
	_, err := Join(context.Background(), jo)
	want := "the server at " + other.address + " presents a CA with pin " + other.ca.Pin().String() + ", the token names " + c.ca.Pin().String()
	if !fault.Is(err, fault.Denied) || !strings.Contains(fault.Public(err), want) {
		t.Errorf("got %v", err)
	}
	if other.requests != 0 {
		t.Error("the wrong server got a join request")
	}
	if strings.Contains(err.Error(), c.token.Secret) {
		t.Error("the error tells the secret")
	}
	jo.Servers = []string{other.address, c.address} // the second is the right one
	if _, err := Join(context.Background(), jo); err != nil {
		t.Errorf("with a good second address: %v", err)
	}
}

// seconds is a difference of clocks of seven minutes, and what the message that told
// of it took on a busy machine.
var seconds = regexp.MustCompile(`\b(7m|6m[345])\d+s`)

func TestJoinRefusals(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	control := pki.NewJoinToken(pki.RoleControl, ids.Token(ids.NewMessage(time.Now())), c.ca.Pin())
	cases := map[string]struct {
		change func(*JoinOptions)
		server func()
		kind   fault.Kind
		want   string
	}{
		"refused":       {func(*JoinOptions) {}, func() { c.refusal = fault.Field("x", "token", "it expired: create another") }, fault.Invalid, "token: it expired"},
		"control token": {func(o *JoinOptions) { o.Token = control.String() }, func() {}, fault.Invalid, "lets a control server join"},
		"no token":      {func(o *JoinOptions) { o.Token = "" }, func() {}, fault.Invalid, "token: "},
		"no address":    {func(o *JoinOptions) { o.Servers = nil }, func() {}, fault.Invalid, "address: "},
		"bad address":   {func(o *JoinOptions) { o.Servers = []string{"192.0.2.1"} }, func() {}, fault.Invalid, "host:port"},
		"clock behind":  {func(*JoinOptions) {}, func() { c.skew = 7 * time.Minute }, fault.Denied, "clock is 7m behind the server's"},
		"clock ahead":   {func(*JoinOptions) {}, func() { c.skew = -7 * time.Minute }, fault.Denied, "clock is 7m ahead of the server's"},
	}
	for name, test := range cases {
		t.Run(name, func(t *testing.T) {
			c.mu.Lock()
			c.refusal, c.skew = nil, 0
			test.server()
			c.mu.Unlock()
			dir := t.TempDir()
			jo := c.joinOptions(dir)
			test.change(&jo)
			_, err := Join(context.Background(), jo)
			if !fault.Is(err, test.kind) || !strings.Contains(seconds.ReplaceAllString(fault.Public(err), "7m"), test.want) {
				t.Errorf("got %v", err)
			}
			if _, err := LoadMembership(dir); !fault.Is(err, fault.NotFound) {
				t.Errorf("a refused join left a membership: %v", err)
			}
		})
	}
}

func TestJoinNobodyAnswers(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	jo := c.joinOptions(t.TempDir())
	jo.Servers, jo.DialTimeout = []string{silent.LocalAddr().String()}, 200*time.Millisecond
	if _, err := Join(context.Background(), jo); !fault.Is(err, fault.Timeout) || !strings.Contains(fault.Public(err), "let UDP through") {
		t.Errorf("got %v", err)
	}
	// Each address has the time that the good one takes on a busy machine.
	jo.Servers, jo.DialTimeout = append(jo.Servers, c.address), 2*time.Second
	if _, err := Join(context.Background(), jo); err != nil {
		t.Errorf("with a good second address: %v", err)
	}
}

func TestParallelJoinsOfDifferentMachines(t *testing.T) {
	c := startControl(t, pkitest.New(t))
	const machines = 8
	var wg sync.WaitGroup
	nodes := make([]ids.Node, machines)
	for i := range machines {
		dir := t.TempDir()
		wg.Go(func() {
			result, err := Join(context.Background(), c.joinOptions(dir))
			if err != nil {
				t.Error(err)
			}
			nodes[i] = result.Node
		})
	}
	wg.Wait()
	seen := make(map[ids.Node]bool)
	for _, node := range nodes {
		if seen[node] {
			t.Errorf("two machines became %s", node)
		}
		seen[node] = true
	}
}
