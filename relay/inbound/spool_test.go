package inbound

import (
	"log/slog"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/policy"
)

// The real queue takes inbound mail up to its bound, and the client hears of it.
func TestRealSpool(t *testing.T) {
	doc, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	storage := doc.Storage
	storage.MinFreeBytes, storage.ReserveBytes, storage.SegmentBytes = 1<<20, 1<<20, 1<<20
	logger := slog.New(slog.DiscardHandler)
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Storage: storage, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	}()
	ob, err := outbox.Open(st, outbox.Config{MaxBytes: storage.MaxOutboxBytes, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	const maxInbound = 2000 // bytes
	q, err := queue.Open(t.Context(), st, ob, queue.Config{
		Now: time.Now, Notify: func(queue.Number) {}, Policy: doc.Queue, MaxInbound: maxInbound, Logger: logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	}()
	w := newWorld(t, nil)
	w.server.opt.Spool = NewSpool(st, q)
	p := w.dial(t)
	to := "RCPT TO:<" + returnPath(t, 3, time.Now()) + "@rp.acme.example>"
	send := func() string {
		p.do("MAIL FROM:<>", "250")
		p.do(to, "250")
		p.do("DATA", "354")
		p.send("Subject: bounce\r\n\r\nit did not arrive\r\n.\r\n")
		return p.expect("")
	}
	if got := send(); got[:3] != "250" {
		t.Fatalf("the first mail gets %q", got)
	}
	for i := 0; ; i++ {
		got := send()
		if got[:9] == "452 4.3.1" {
			break
		}
		if got[:3] != "250" || i > maxInbound/100 {
			t.Fatalf("mail %d gets %q, want 452 4.3.1 before long", i, got)
		}
	}
}
