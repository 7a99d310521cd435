package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// caStatus is what `ca status --json` tells, as far as these tests look.
type caStatus struct {
	Signs    string   `json:"signs"`
	Believed []string `json:"believed"`
	Refused  []string `json:"refused"`
	Change   *struct {
		Phase   string `json:"phase"`
		Running bool   `json:"running"`
		To      string `json:"to"`
		Waiting []struct {
			Name string `json:"name"`
			Why  string `json:"why"`
		} `json:"waiting"`
	} `json:"change"`
	Revoked []struct {
		Server  string   `json:"server"`
		Serials []string `json:"serials"`
	} `json:"revoked"`
}

func (s *caStatus) phase() string {
	if s.Change == nil {
		return ""
	}
	return s.Change.Phase
}

// waits returns the names of those a phase waits for.
func (s *caStatus) waits() string {
	var names []string
	if s.Change != nil {
		for _, m := range s.Change.Waiting {
			names = append(names, m.Name)
		}
	}
	return strings.Join(names, " ")
}

func (f *trio) ca(s *fleet.ControlServer, args ...string) (st caStatus, err error) {
	out, err := f.CtlAt(f.t.Context(), s, append(append([]string{"ca"}, args...), "--json")...)
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	return st, err
}

// waitCA waits until a change of the issuing key stands as wanted.
func (f *trio) waitCA(s *fleet.ControlServer, what string, holds func(caStatus) bool) (st caStatus) {
	f.t.Helper()
	var err error
	defer func() {
		if f.t.Failed() {
			f.t.Logf("the change stands at %+v, %v", st.Change, err)
		}
	}()
	eventually(f.t, 2*time.Minute, what, func() bool {
		st, err = f.ca(s, "status")
		return err == nil && holds(st)
	})
	return st
}

// mailTo submits to one relay without a pause until it is stopped.
type mailTo struct {
	stop      atomic.Bool
	running   sync.WaitGroup
	submitted []fleet.Submitted
}

func startMail(t *testing.T, f *fleet.Fleet, r *fleet.Relay) *mailTo {
	m := &mailTo{}
	to := recipients(t, f, 20)
	m.running.Go(func() {
		for round := 0; !m.stop.Load(); round++ {
			load := &lab.Load{Addr: r.Submissions(), ImplicitTLS: true, TLS: f.ClientTLS(r), Username: f.User, Password: f.Secret, Messages: len(to), Connections: 2, Size: 2000,
				Tag: fmt.Sprint("rotation", round), From: func(int) string { return "news@" + fleet.Domain }, To: func(i int) string { return to[i] }}
			sent, err := lab.Send(t.Context(), load)
			if err != nil {
				t.Errorf("mail stopped: %v", err)
				return
			}
			for i := range sent.Results {
				m.submitted = append(m.submitted, fleet.Submitted{Relay: r, Recipient: to[i], MessageID: load.MessageID(i), Result: sent.Results[i]})
			}
		}
	})
	return m
}

func (m *mailTo) end() []fleet.Submitted {
	m.stop.Store(true)
	m.running.Wait()
	return m.submitted
}

// identityOf reads a node's certificate and key from its directory, with the
// CAs it believes.
func identityOf(t *testing.T, dir string) *pki.Holder {
	t.Helper()
	p := func(name string) string { return filepath.Join(dir, "identity", name) }
	h, err := pki.LoadHolder(pki.Files{Cert: p("leaf.pem"), Key: p("node.key"), CA: p("ca.pem")})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// How long a server that is not spoken to is listened to: one that takes the
// certificate says nothing, and one that refuses it ends the wait by saying so.
const (
	takenQuiet  = 2 * time.Second
	refusedWait = 20 * time.Second
)

// greeted reports whether a server takes a certificate on the link: it does not
// answer before it was spoken to, so silence is a yes and an alert is a no.
func greeted(t *testing.T, h *pki.Holder, address string, quiet time.Duration) bool {
	t.Helper()
	identity, err := pki.CertIdentity(h.Leaf())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := (&tls.Dialer{Config: pki.ClientConfig(h, pki.Peer{Cluster: identity.Cluster, Role: pki.RoleControl}, wire.ALPNLink)}).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(quiet)); err != nil {
		t.Fatal(err)
	}
	_, err = conn.Read(make([]byte, 1))
	if err != nil && !os.IsTimeout(err) && !link.HandshakeRefused(err) {
		t.Errorf("neither taken nor refused: %v", err)
	}
	return os.IsTimeout(err)
}

// TestIssuingKeyIsChanged changes the issuing key under mail: with a relay that
// is off, back in the middle, and through a leader that is killed.
func TestIssuingKeyIsChanged(t *testing.T) {
	f := startTrio(t, fleet.Config{Relays: 2, Open: true, NoDKIM: true})
	first, sender, other := f.servers[0], f.Relays[0], f.Relays[1]
	mail := startMail(t, f.Fleet, sender)
	defer mail.end()
	before := f.waitCA(first, "the CA", func(s caStatus) bool { return len(s.Believed) == 1 })
	old := identityOf(t, sender.Dir)
	if !greeted(t, old, f.LinkAddr(), takenQuiet) {
		t.Fatal("a good certificate is refused")
	}

	begun := time.Now()
	if err := other.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ca(first, "rotate", "--reason", "yearly"); err != nil {
		t.Fatal(err)
	}
	st := f.waitCA(first, "the change waits for the relay that is off, and nobody else", func(s caStatus) bool {
		return s.phase() == "distribute" && len(s.Change.Waiting) == 1 && strings.Contains(s.Change.Waiting[0].Why, "not linked")
	})
	t.Logf("waits for %s after %s: %s", st.waits(), time.Since(begun).Round(time.Millisecond), st.Change.Waiting[0].Why)
	if st.Signs != before.Signs || len(st.Believed) != 2 {
		t.Errorf("%s signs already, believed are %v", st.Signs, st.Believed)
	}
	if out, err := f.Ctl(t.Context(), "ca", "rotate"); err == nil || !strings.Contains(string(out)+err.Error(), "already") {
		t.Errorf("a second change at the same time: %v\n%s", err, out)
	}
	begun = time.Now()
	if err := f.Restart(within(t, time.Minute), other); err != nil {
		t.Fatal(err)
	}
	st = f.waitCA(first, "the change ends", func(s caStatus) bool { return s.phase() == "done" })
	t.Logf("done %s after the relay was started", time.Since(begun).Round(time.Millisecond))
	if st.Signs == before.Signs || len(st.Believed) != 1 {
		t.Errorf("%s signs, believed are %v", st.Signs, st.Believed)
	}
	for _, dir := range []string{sender.Dir, other.Dir, f.servers[0].Dir, f.servers[1].Dir, f.servers[2].Dir} {
		eventually(t, 20*time.Second, dir+" has a certificate of the new CA and believes no other", func() bool {
			h := identityOf(t, dir)
			return pki.IssuerKeyID(h.Leaf()) == st.Signs && len(h.Bundle()) == 2
		})
	}
	for _, s := range f.servers {
		if greeted(t, old, s.Link(), refusedWait) {
			t.Errorf("%s takes a certificate of the CA that was dropped", s.Name)
		}
		if !greeted(t, identityOf(t, sender.Dir), s.Link(), takenQuiet) {
			t.Errorf("%s refuses a certificate of the new CA", s.Name)
		}
	}
	renewWith(t, old, first.Link(), sender.Dir, st.Signs)

	f.rollBack(first, st.Signs)
	f.rotateThroughAKill(other)

	submitted := mail.end()
	a := settle(t, f.Fleet, submitted)
	t.Logf("%d messages answered 250, %d refused", a.accepted, a.refused)
	if a.refused > 0 || a.accepted == 0 {
		t.Errorf("%d messages were refused, %d accepted: mail depends on the CA", a.refused, a.accepted)
	}
}

// renewWith renews at a server with a certificate of a CA that was dropped, as
// a relay does that was off meanwhile.
func renewWith(t *testing.T, old *pki.Holder, address, dir, signs string) {
	t.Helper()
	key, err := pki.LoadNodeKey(filepath.Join(dir, "identity", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := key.CSR(pki.Request{})
	if err != nil {
		t.Fatal(err)
	}
	identity, err := pki.CertIdentity(old.Leaf())
	if err != nil {
		t.Fatal(err)
	}
	dialer := link.NewDialer(link.DialerConfig{})
	defer dialer.Close()
	session, err := dialer.Dial(t.Context(), address, pki.ClientConfig(old, pki.Peer{Cluster: identity.Cluster, Role: pki.RoleControl}, wire.ALPNRenew))
	if err != nil {
		t.Fatal(err)
	}
	reply, err := link.Renew(t.Context(), session, csr, "test")
	if err != nil {
		t.Fatalf("a certificate of the CA that was dropped is not renewed: %v", err)
	}
	chain, err := pki.ParseChain(reply.GetChain())
	if err != nil || pki.IssuerKeyID(chain[0]) != signs {
		t.Errorf("renewed by another CA, %v", err)
	}
}

// rollBack goes back while the new key signs.
func (f *trio) rollBack(s *fleet.ControlServer, signs string) {
	f.t.Helper()
	for range 3 { // the phase in the middle takes seconds, or less with much luck
		if _, err := f.ca(s, "rotate"); err != nil {
			f.t.Fatal(err)
		}
		st := f.waitCA(s, "the new key signs", func(s caStatus) bool { return s.phase() == "sign" || s.phase() == "done" })
		back, err := f.ca(s, "rollback", "--reason", "second thoughts")
		if err != nil {
			signs = st.Change.To
			f.waitCA(s, "too late for a rollback", func(s caStatus) bool { return s.phase() == "done" })
			continue
		}
		if back.Signs != signs || back.phase() != "return" {
			f.t.Errorf("after the rollback %s signs, want %s; phase %s", back.Signs, signs, back.phase())
		}
		end := f.waitCA(s, "the rollback ends", func(s caStatus) bool { return s.phase() == "rolled-back" })
		if end.Signs != signs || len(end.Believed) != 1 || len(end.Refused) != 1 || end.Refused[0] != st.Change.To {
			f.t.Errorf("rolled back to %+v", end)
		}
		for _, r := range f.Relays {
			if got := pki.IssuerKeyID(identityOf(f.t, r.Dir).Leaf()); got != signs {
				f.t.Errorf("%s has a certificate of %s", r.Name, got)
			}
		}
		return
	}
	f.t.Error("every change was over before it could be rolled back")
}

// rotateThroughAKill kills the leader while a phase waits.
func (f *trio) rotateThroughAKill(off *fleet.Relay) {
	f.t.Helper()
	if err := off.Stop(); err != nil {
		f.t.Fatal(err)
	}
	leads, follows := f.leader()
	if _, err := f.ca(follows, "rotate"); err != nil {
		f.t.Fatal(err)
	}
	st := f.waitCA(follows, "the change waits for the relay that is off", func(s caStatus) bool { return s.phase() == "distribute" && len(s.Change.Waiting) == 1 })
	leads.Kill()
	after := f.waitCA(follows, "the new leader knows where the change stands", func(s caStatus) bool { return len(s.Believed) == 2 })
	if after.phase() != "distribute" || after.Change.To != st.Change.To || after.waits() != st.waits() {
		f.t.Errorf("before the kill it waited for %s, after it stands at %s and waits for %s", st.waits(), after.phase(), after.waits())
	}
	if err := f.Restart(within(f.t, time.Minute), off); err != nil {
		f.t.Fatal(err)
	}
	f.waitCA(follows, "the new key signs, and the change waits for the server that was killed", func(s caStatus) bool {
		return s.phase() == "sign" && len(s.Change.Waiting) == 1 && strings.Contains(s.Change.Waiting[0].Why, "does not answer")
	})
	if err := f.StartServer(within(f.t, time.Minute), leads); err != nil {
		f.t.Fatal(err)
	}
	f.waitCA(follows, "the change ends", func(s caStatus) bool { return s.phase() == "done" && s.Signs == st.Change.To })
}

// TestRemovedServerIsRefused removes a server and lets somebody answer with its
// key and certificate: relays do not talk to it.
func TestRemovedServerIsRefused(t *testing.T) {
	f := startTrio(t, fleet.Config{Open: true, NoDKIM: true})
	_, gone := f.leader()
	if gone == f.servers[0] { // the fleet's own commands need it
		if gone = f.servers[1]; gone == func() *fleet.ControlServer { l, _ := f.leader(); return l }() {
			gone = f.servers[2]
		}
	}
	stolen := identityOf(t, gone.Dir)
	gone.Kill()
	r := f.Relays[0]
	if !f.impersonate(stolen, gone.Link(), r) {
		t.Fatal("the relay does not talk to a server of its cluster: the test shows nothing")
	}
	if err := f.Restart(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	identity, err := pki.CertIdentity(stolen.Leaf())
	if err != nil {
		t.Fatal(err)
	}
	if out, err := f.Ctl(t.Context(), "server", "remove", identity.Node.String(), "--reason", "stolen"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	st, err := f.ca(f.servers[0], "status")
	if err != nil || len(st.Revoked) != 1 || st.Revoked[0].Server != identity.Node.String() || len(st.Revoked[0].Serials) != 1 || st.Revoked[0].Serials[0] != pki.Serial(stolen.Leaf()) {
		t.Fatalf("revoked are %+v, %v", st.Revoked, err)
	}
	eventually(t, 20*time.Second, "the relay hears of it", func() bool {
		var n struct {
			Acked uint64 `json:"acked_revision"`
		}
		showNode(t, f.Fleet, r.Node, &n)
		var v struct {
			Revision uint64 `json:"revision"`
		}
		out, err := f.Ctl(t.Context(), "status", "--json")
		return err == nil && json.Unmarshal(out, &v) == nil && v.Revision > 0 && n.Acked >= v.Revision
	})
	if f.impersonate(stolen, gone.Link(), r) {
		t.Error("the relay talks to the server that was removed")
	}
}

// impersonate answers at a server's address with its key, starts the relay with
// no other server to go to, and reports whether it opened a session. The relay
// is stopped before and after, and its list of servers is as it was.
func (f *trio) impersonate(as *pki.Holder, address string, r *fleet.Relay) bool {
	t := f.t
	t.Helper()
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	identity, err := pki.CertIdentity(as.Leaf())
	if err != nil {
		t.Fatal(err)
	}
	listener, err := link.Listen(link.ServerConfig{Address: netip.MustParseAddrPort(address), TLS: pki.ServerConfig(as, pki.Peer{Cluster: identity.Cluster}, wire.ALPNLink)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var opened atomic.Int64
	ended := make(chan error, 1)
	go func() {
		ended <- listener.Serve(ctx, map[string]link.Handler{wire.ALPNLink: func(context.Context, link.Session) (link.Code, string) {
			opened.Add(1)
			return link.CodeBusy, "not now"
		}})
	}()
	join := filepath.Join(r.Dir, "identity", "join.toml")
	text, err := os.ReadFile(join)
	if err != nil {
		t.Fatal(err)
	}
	only := regexp.MustCompile(`(?m)^servers = .*$`).ReplaceAll(text, []byte(fmt.Sprintf("servers = ['%s']", address)))
	config, err := os.ReadFile(filepath.Join(r.Dir, "relay.toml"))
	if err != nil || strings.Contains(string(config), "addresses = ['127") && strings.Contains(string(config), "[control]") {
		t.Fatalf("the relay's servers are configured: %v\n%s", err, config)
	}
	if string(only) == string(text) {
		t.Fatalf("the relay's list of servers was not found:\n%s", text)
	}
	if err := os.WriteFile(join, only, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.RestartUnready(within(t, time.Minute), r); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "the relay tries the server", func() bool {
		s, err := statusOf(r)
		return opened.Load() > 0 || err == nil && strings.Contains(s.Problem, "was removed")
	})
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(join, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return opened.Load() > 0
}
