package admin

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/delivery"
	"github.com/relais-mta/relais/relay/egress"
	"github.com/relais-mta/relais/relay/engine"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/resolve"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// desk is a server over a queue that nobody delivers from.
type desk struct {
	t   *testing.T
	dir string
	st  *store.Store
	ob  *outbox.Outbox
	q   *queue.Queue
	s   *Server
}

func (d *desk) open() {
	d.t.Helper()
	doc, err := policy.Parse(nil)
	if err != nil {
		d.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	limits := policy.Storage{MinFreeBytes: 1 << 20, MinFreeInodes: 10, ReserveBytes: 1 << 20, SegmentBytes: 16 << 20, MaxOutboxBytes: 1 << 30}
	if d.st, err = store.Open(context.Background(), store.Config{Dir: filepath.Join(d.dir, "store"), Storage: limits, Logger: log, MemTableBytes: 8 << 20}); err != nil {
		d.t.Fatal(err)
	}
	if d.ob, err = outbox.Open(d.st, outbox.Config{MaxBytes: 1 << 20, Logger: log}); err != nil {
		d.t.Fatal(err)
	}
	e, err := engine.New(engine.Config{
		Store: d.st, Directory: func() *policy.Directory { return nil }, Resolver: new(resolve.Resolver), Egress: new(egress.Manager), Dialer: new(delivery.Dialer),
		Outbox: d.ob, Now: time.Now, Logger: log,
	})
	if err != nil {
		d.t.Fatal(err)
	}
	if d.q, err = queue.Open(context.Background(), d.st, d.ob, queue.Config{Now: time.Now, Policy: doc.Queue, Logger: log, Strict: true}); err != nil {
		d.t.Fatal(err)
	}
	e.Attach(d.q)
	if d.s, err = Listen(Config{Dir: d.dir, Queue: d.q, Outbox: d.ob, Engine: e, Status: func() Status { return Status{} }, Logger: log}); err != nil {
		d.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.s.Serve() }()
	d.t.Cleanup(func() { <-ended })
}

func (d *desk) close() {
	d.t.Helper()
	if err := d.s.Close(); err != nil {
		d.t.Error(err)
	}
	if err := d.q.Close(); err != nil {
		d.t.Error(err)
	}
	d.ob.Close()
	if err := d.st.Close(); err != nil {
		d.t.Error(err)
	}
}

func (d *desk) accept() *relay.Envelope {
	d.t.Helper()
	now := time.Now()
	env := &relay.Envelope{
		ID: ids.NewMessage(now), Tenant: acme, Pool: pool, Stream: "default", Kind: policy.Transactional, From: "example.com",
		Sender: mailaddr.Address{Local: "sender", Domain: "example.com"}, AcceptedAt: now, ExpiresAt: now.Add(time.Hour),
		Recipients: []relay.Recipient{{Address: mailaddr.Address{Local: "a", Domain: "one.example"}}},
	}
	if err := d.q.Accept(context.Background(), env, nil); err != nil {
		d.t.Fatal(err)
	}
	return env
}

// show asks what `queue show` and `queue why` ask.
func (d *desk) show(id ids.Message) (m Message) {
	d.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(d.dir, SocketName))
	}, DisableKeepAlives: true}}
	resp, err := client.Get("http://relay/v1/queue/messages/" + id.String())
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil || resp.StatusCode != http.StatusOK || len(m.Recipients) != 1 {
		d.t.Fatalf("%s: %+v, %v", resp.Status, m, err)
	}
	return m
}

// TestWhyADamagedMessageIsSetAside: a message whose journalled attempt cannot be read
// is shown as in doubt, with what it waits for.
func TestWhyADamagedMessageIsSetAside(t *testing.T) {
	d := &desk{t: t, dir: t.TempDir()}
	d.open()
	env := d.accept()
	b := d.st.NewBatch()
	b.Set(store.AppendAttemptKey(nil, env.ID, 0), []byte{99})
	if err := d.st.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
	d.close()
	d.open()
	defer d.close()
	r := d.show(env.ID).Recipients[0]
	if r.Why == nil || r.Why.Reason != "damaged" || !strings.Contains(r.Why.Text, "fsck --repair") || r.InDoubt != 1 || r.State != relay.StateWaiting.String() {
		t.Errorf("shown as %+v, because %+v", r, r.Why)
	}
}
