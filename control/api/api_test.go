package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/ca"
	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/service"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

// oneServer is a log that applies at once.
type oneServer struct {
	state   *state.Store
	index   uint64
	leads   bool
	unsound error
}

func (l *oneServer) Propose(_ context.Context, c command.Command) (state.Result, error) {
	if err := c.Validate(); err != nil {
		return state.Result{}, err
	}
	b, err := command.Encode(c, time.Now(), 1)
	if err != nil {
		return state.Result{}, err
	}
	e, err := command.Decode(b)
	if err != nil {
		return state.Result{}, err
	}
	l.index++
	r := l.state.Apply(l.index, e)
	return r, r.Err
}

func (l *oneServer) Ready() bool               { return l.leads }
func (l *oneServer) Fresh() bool               { return l.leads }
func (*oneServer) Fence(context.Context) error { return nil }
func (l *oneServer) Health() error             { return l.unsound }

type fixture struct {
	t   *testing.T
	url string
	key string
	log *oneServer
	svc *service.Service
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	st := state.New()
	log := &oneServer{state: st, leads: true}
	cluster := ids.Cluster{1}
	material, kek, _, err := ca.Create(cluster, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	svc := service.New(service.Options{State: st, Log: log, Sealer: pki.NewSealer(kek), Logger: slog.New(slog.DiscardHandler), Version: "1.2.3"})
	result, err := svc.Init(context.Background(), service.InitRequest{Cluster: cluster, CABundle: material.Bundle, CASealed: material.Sealed, KEKID: material.KEKID, RecoverySealed: material.RecoverySealed,
		Server: control.Server{ID: ids.Node{1}, Name: "c1", State: control.NodeActive}})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(New(Options{Service: svc, Logger: slog.New(slog.DiscardHandler)}))
	t.Cleanup(srv.Close)
	return &fixture{t: t, url: srv.URL, key: result.APIKey, log: log, svc: svc}
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (f *fixture) do(method, path string, body any, header ...string) answer {
	f.t.Helper()
	text := ""
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			f.t.Fatal(err)
		}
		text = string(b)
	}
	return f.raw(method, path, text, header...)
}

// raw sends a body that need not be JSON.
func (f *fixture) raw(method, path, body string, header ...string) answer {
	f.t.Helper()
	r, err := http.NewRequest(method, f.url+Prefix+path, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	if f.key != "" {
		r.Header.Set("Authorization", "Bearer "+f.key)
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, text}
}

// get decodes a good answer.
func get[T any](f *fixture, a answer) (v T) {
	f.t.Helper()
	if a.status >= 300 {
		f.t.Fatalf("status %d: %s", a.status, a.body)
	}
	if err := json.Unmarshal(a.body, &v); err != nil {
		f.t.Fatal(err)
	}
	return v
}

// problem checks a refusal.
func (f *fixture) problem(a answer, status int, field, text string) {
	f.t.Helper()
	var p Problem
	if err := json.Unmarshal(a.body, &p); err != nil {
		f.t.Fatalf("%s: %v", a.body, err)
	}
	if a.status != status || p.Status != status || p.Field != field || !strings.Contains(p.Detail, text) || p.Kind == "" {
		f.t.Errorf("got %d %s, want %d about %q with %q", a.status, a.body, status, field, text)
	}
	if ct := a.header.Get("Content-Type"); ct != "application/problem+json" {
		f.t.Errorf("a problem is served as %s", ct)
	}
}

type m map[string]any

func TestEveryResource(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	created := f.do("POST", "/tenants", m{"name": "acme"}, "Relais-Reason", "contract 7")
	tenant := get[Tenant](f, created)
	if created.status != http.StatusCreated || created.header.Get("ETag") != fmt.Sprintf("%q", fmt.Sprint(tenant.Revision)) || tenant.OwnershipToken == "" {
		t.Errorf("%d %v %+v", created.status, created.header, tenant)
	}
	if got := get[Tenant](f, f.do("GET", "/tenants/acme", nil)); got != tenant {
		t.Errorf("got %+v", got)
	}
	if got := get[Tenant](f, f.do("GET", "/tenants/"+tenant.ID, nil)); got != tenant {
		t.Errorf("got %+v", got)
	}
	project := get[Project](f, f.do("POST", "/projects", m{"tenant": "acme", "name": "shop"}))
	if got := get[ListBody[Project]](f, f.do("GET", "/projects?tenant=acme", nil)); len(got.Items) != 2 || got.Items[1] != project {
		t.Errorf("got %+v", got)
	}
	domain := get[Domain](f, f.do("POST", "/domains", m{"tenant": "acme", "name": "example.com"}))
	if len(domain.Records) < 4 || domain.ReturnPath != "rp.example.com" || len(domain.Selectors) != 2 {
		t.Errorf("got %+v", domain)
	}
	if got := get[Domain](f, f.do("GET", "/domains/example.com", nil)); got.TenantName != "acme" {
		t.Errorf("got %+v", got)
	}
	credential := get[Credential](f, f.do("POST", "/credentials", CredentialCreate{Tenant: "acme", Project: "shop", Stream: "bulk"}))
	list := f.do("GET", "/credentials?tenant=acme", nil)
	if got := get[ListBody[Credential]](f, list); len(got.Items) != 1 || got.Items[0].ID != credential.ID || credential.Secret == "" || bytes.Contains(list.body, []byte(credential.Secret)) {
		t.Errorf("got %s", list.body)
	}
	scoped := CredentialCreate{Tenant: "acme", CredentialScope: CredentialScope{Domains: []string{"SHOP.example.com"}, Networks: []string{"192.0.2.7", "2001:db8::/32"}, MessagesPerHour: 5, Certificates: []string{strings.Repeat("AB:", 31) + "AB"}}}
	want := CredentialScope{Domains: []string{"shop.example.com"}, Networks: []string{"192.0.2.7/32", "2001:db8::/32"}, MessagesPerHour: 5, Certificates: []string{strings.Repeat("ab", 32)}}
	if got := get[Credential](f, f.do("POST", "/credentials", scoped)); !reflect.DeepEqual(got.CredentialScope, want) || got.Secret == "" {
		t.Errorf("got %+v", got)
	}
	for _, bad := range []CredentialScope{{Domains: []string{"foreign.example"}}, {Domains: []string{"-"}}, {Networks: []string{"192.0.2.7/24"}}, {Networks: []string{"x"}}, {Certificates: []string{"ab"}}} {
		if got := f.do("POST", "/credentials", CredentialCreate{Tenant: "acme", CredentialScope: bad}); got.status != 422 && got.status != 400 {
			t.Errorf("%+v is answered %d %s", bad, got.status, got.body)
		}
	}
	if got := get[Credential](f, f.do("POST", "/credentials/"+credential.ID+"/revoke", nil)); !got.Revoked {
		t.Errorf("got %+v", got)
	}
	if got := get[Pool](f, f.do("POST", "/pools", PoolAdd{Name: "own", Tenant: "acme"})); got.Kind != "dedicated" || got.Tenant != tenant.ID {
		t.Errorf("got %+v", got)
	}
	ip := get[IP](f, f.do("POST", "/ips", IPAdd{Bind: "2001:db8::1", EHLO: "mta1.example.net", Pool: "own"}))
	if ip.PoolName != "own" || ip.Public != "2001:db8::1" || !ip.Pinned {
		t.Errorf("got %+v", ip)
	}
	if got := get[IP](f, f.do("GET", "/ips/2001:db8::1", nil)); got.ID != ip.ID || got.PoolName != "own" || got.Leased {
		t.Errorf("got %+v", got)
	}
	if got := get[Pool](f, f.do("GET", "/pools/own", nil)); len(got.IPs) != 1 {
		t.Errorf("got %+v", got)
	}
	token := get[Token](f, f.do("POST", "/tokens", TokenCreate{Role: "relay", Uses: 3, TTLSeconds: 60, CIDRs: []string{"198.51.100.7"}, Labels: map[string]string{"a": "b"}}))
	if token.UsesLeft != 3 || !slices.Equal(token.CIDRs, []string{"198.51.100.7/32"}) || !strings.HasPrefix(token.Secret, "rl1.") || time.Until(token.NotAfter) > time.Minute {
		t.Errorf("got %+v", token)
	}
	if got := get[Token](f, f.do("POST", "/tokens/"+token.ID+"/revoke", nil)); !got.Revoked || got.Secret != "" {
		t.Errorf("got %+v", got)
	}
	audit := get[ListBody[AuditEntry]](f, f.do("GET", "/audit?limit=1000", nil))
	if i := slices.IndexFunc(audit.Items, func(e AuditEntry) bool { return e.Object == tenant.ID }); i < 0 || audit.Items[i].Reason != "contract 7" || audit.Items[i].Actor != "admin" {
		t.Errorf("got %+v", audit.Items)
	}
}

func TestNodesAndAssignment(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	token := get[Token](f, f.do("POST", "/tokens", TokenCreate{Role: "relay"}))
	var id ids.Token
	if err := id.UnmarshalText([]byte(token.ID)); err != nil {
		t.Fatal(err)
	}
	node, _, err := f.svc.RedeemToken(context.Background(), service.RedeemRequest{TokenID: id, CSRHash: [32]byte{1}, Role: "relay", Name: "edge-1", RemoteAddr: mustAddr(t, "198.51.100.7")})
	if err != nil {
		t.Fatal(err)
	}
	ip := get[IP](f, f.do("POST", "/ips", IPAdd{Bind: "198.51.100.1", EHLO: "mta1.example.net"}))
	f.problem(f.do("POST", "/ips/198.51.100.1/assign", IPAssign{Node: "edge-1"}, "If-Match", `"1"`), 409, "", "revision")
	f.problem(f.do("POST", "/ips/198.51.100.1/assign", IPAssign{Node: "edge-1"}, "If-Match", "soon"), 422, "If-Match", "revision")
	f.problem(f.do("POST", "/ips/198.51.100.1/assign", IPAssign{Node: "edge-1"}, "If-Match", `"0"`), 422, "If-Match", "no object's revision")
	got := get[IP](f, f.do("POST", "/ips/198.51.100.1/assign", IPAssign{Node: "edge-1", Pool: "default"}, "If-Match", fmt.Sprintf("%q", fmt.Sprint(ip.Revision))))
	if got.Node != node.String() || got.NodeName != "edge-1" || got.State != "assigned" {
		t.Errorf("got %+v", got)
	}
	n := get[Node](f, f.do("GET", "/nodes/edge-1", nil))
	if n.ID != node.String() || !slices.Equal(n.Sources, []string{"198.51.100.1"}) || n.Connected {
		t.Errorf("got %+v", n)
	}
	f.problem(f.do("PUT", "/nodes/edge-1/state", m{"state": "draining"}, "If-Match", `"1"`), 409, "", "revision")
	f.problem(f.do("PUT", "/nodes/edge-1/state", m{"state": "draining"}, "If-Match", "soon"), 422, "If-Match", "revision")
	f.problem(f.do("PUT", "/nodes/edge-2/state", m{"state": "draining"}), 404, "node", "edge-2")
	if got := get[Node](f, f.do("PUT", "/nodes/edge-1/state", m{"state": "draining"}, "If-Match", fmt.Sprintf("%q", fmt.Sprint(n.Revision)), "Relais-Reason", "new disk")); got.State != "draining" {
		t.Errorf("got %+v", got)
	}
	if entries := get[ListBody[AuditEntry]](f, f.do("GET", "/audit?limit=1", nil)); len(entries.Items) != 1 || entries.Items[0].Reason != "new disk" || entries.Items[0].Object != node.String() {
		t.Errorf("the audit tail has %+v", entries.Items)
	}
	if got := get[ListBody[Node]](f, f.do("GET", "/nodes", nil)); len(got.Items) != 1 {
		t.Errorf("got %+v", got)
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := get[Policy](f, f.do("GET", "/policy", nil))
	if p.Revision != 0 || len(p.Sections) < 8 || !p.Sections[0].Default || p.Sections[0].Text == "" {
		t.Fatalf("got %+v", p)
	}
	put := PolicyPut{Sections: map[string]string{"queue": "retry_jitter_percent = 10\n"}}
	changed := get[Policy](f, f.do("PUT", "/policy", put, "If-Match", `"0"`))
	if changed.Revision == 0 {
		t.Errorf("got %+v", changed)
	}
	f.problem(f.do("PUT", "/policy", put, "If-Match", `"0"`), 409, "", "revision")
	f.problem(f.do("PUT", "/policy", PolicyPut{Sections: map[string]string{"queue": "retri = 1\n"}}), 422, "queue.retri", "line 1")
	f.problem(f.do("PUT", "/policy", PolicyPut{Sections: map[string]string{"queue": strings.Repeat("#", 300<<10)}}), 413, "queue", "bytes")
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	get[Tenant](f, f.do("POST", "/tenants", m{"name": "acme"}))
	get[Tenant](f, f.do("POST", "/tenants", m{"name": "rival"}))
	get[Domain](f, f.do("POST", "/domains", m{"tenant": "acme", "name": "example.com"}))
	get[IP](f, f.do("POST", "/ips", IPAdd{Bind: "198.51.100.1", EHLO: "mta1.example.net"}))
	before := f.log.state.Read().Hash()
	f.problem(f.do("POST", "/tenants", m{"name": "acme"}), 409, "name", "already")
	f.problem(f.do("POST", "/tenants", m{"name": "a me"}), 422, "name", "letters")
	f.problem(f.do("GET", "/tenants/nobody", nil), 404, "tenant", "nobody")
	f.problem(f.do("POST", "/domains", m{"tenant": "rival", "name": "sub.example.com"}), 403, "domain", "another tenant")
	f.problem(f.do("POST", "/ips", IPAdd{Bind: "198.51.100.1", EHLO: "mta2.example.net"}), 409, "bind", "already")
	f.problem(f.do("POST", "/ips", IPAdd{Bind: "198.51.100.2", EHLO: "mta2.example.net", Pool: "none"}), 404, "pool", "none")
	f.problem(f.do("POST", "/ips", IPAdd{Bind: "here", EHLO: "mta2.example.net"}), 422, "bind", "IP address")
	f.problem(f.do("POST", "/ips", IPAdd{Bind: "198.51.100.2", EHLO: "mta"}), 422, "ehlo", "host name")
	f.problem(f.do("POST", "/tokens", TokenCreate{Role: "relay", CIDRs: []string{"198.51.100.0/99"}}), 422, "cidr", "network")
	f.problem(f.do("POST", "/tokens", TokenCreate{Role: "relay", TTLSeconds: 90000}), 422, "ttl", "24h")
	f.problem(f.raw("POST", "/tenants", `{"name":"x"}`, "Relais-Reason", "\xff"), 422, "Relais-Reason", "UTF-8")
	f.problem(f.do("POST", "/tokens", TokenCreate{Role: "relay", CIDRs: []string{"fe80::1%eth0/64"}}), 422, "cidr", "network")
	// What the schema forbids is refused by name as well.
	f.problem(f.raw("POST", "/tenants", `{"name":"x","colour":"red"}`), 422, "colour", "unexpected property")
	f.problem(f.raw("POST", "/tenants", `{}`), 422, "body", "required property name")
	f.problem(f.raw("POST", "/tenants", `{"name":`), 400, "body", "unexpected end")
	f.problem(f.do("GET", "/audit?limit=0", nil), 422, "limit", "limit: expected number >= 1")
	f.problem(f.raw("POST", "/tenants", `{"name":"`+strings.Repeat("x", 2<<20)+`"}`), 413, "", "large")
	if f.log.state.Read().Hash() != before {
		t.Error("a refused request changed something")
	}
}

func mustAddr(t *testing.T, text string) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddr(text)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestWhoMayAsk(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	key := f.key
	for _, bad := range []string{"", "rk1.key_x.y", key[:len(key)-1]} {
		f.key = bad
		a := f.do("GET", "/tenants", nil)
		f.problem(a, 401, "", "key")
		if a.header.Get("WWW-Authenticate") != "Bearer" || bad != "" && bytes.Contains(a.body, []byte(bad)) {
			t.Errorf("got %v %s", a.header, a.body)
		}
	}
	f.key = ""
	if v := get[Version](f, f.do("GET", "/version", nil)); v.Version != "1.2.3" || !v.Leader {
		t.Errorf("got %+v", v)
	}
	if h := get[Health](f, f.do("GET", "/health", nil)); h.Status != "ok" {
		t.Errorf("got %+v", h)
	}
	// The admin socket needs no key, but a wrong one is still wrong.
	local := service.Actor{Name: "admin.sock", Role: control.RoleAdmin}
	h := New(Options{Service: f.svc, Logger: slog.New(slog.DiscardHandler), Local: &local})
	for header, want := range map[string]int{"": 200, "Bearer rk1.x.y": 401} {
		r := httptest.NewRequest("GET", Prefix+"/tenants", nil)
		if header != "" {
			r.Header.Set("Authorization", header)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("over the socket with %q: %d", header, w.Code)
		}
	}
	f.key = key
	f.log.leads = false
	a := f.do("GET", "/tenants", nil)
	f.problem(a, 503, "", "leader")
	if !bytes.Contains(a.body, []byte(`"retry":true`)) {
		t.Errorf("a client cannot tell that it may ask again: %s", a.body)
	}
	if a := f.do("GET", "/health", nil); a.status != 503 || !bytes.Contains(a.body, []byte("no-leader")) {
		t.Errorf("got %d %s", a.status, a.body)
	}
	f.log.leads, f.log.unsound = true, errors.New("diverged")
	if a := f.do("GET", "/health", nil); a.status != 503 || !bytes.Contains(a.body, []byte("unsound")) {
		t.Errorf("got %d %s", a.status, a.body)
	}
}

func TestOpenAPI(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	doc := get[struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}](f, f.do("GET", "/openapi.json", nil))
	if !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Errorf("OpenAPI %s", doc.OpenAPI)
	}
	for _, path := range []string{"/tokens", "/nodes/{node}", "/tenants", "/projects", "/domains/{domain}", "/credentials", "/ips/{ip}/assign", "/pools/{pool}", "/policy", "/version", "/health"} {
		if doc.Paths[Prefix+path] == nil {
			t.Errorf("%s is not described", path)
		}
	}
}

func TestEveryKindHasAStatus(t *testing.T) {
	t.Parallel()
	for k := fault.Internal; k <= fault.TooLarge; k++ {
		p := problemOf(fault.New(k, "x", "y"))
		if (p.Status == http.StatusInternalServerError) != (k == fault.Internal) || p.Kind != k.String() {
			t.Errorf("%s becomes %d %s", k, p.Status, p.Kind)
		}
	}
	if p := problemOf(errors.New("disk /dev/sda1 is on fire")); p.Status != 500 || strings.Contains(p.Detail, "sda1") {
		t.Errorf("a strange error becomes %+v", p)
	}
}
