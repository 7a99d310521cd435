package submission

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/outbox"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/policy"
)

// What is answered with 250 is in the real queue, with the bytes and the hash
// that a signature will need.
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
	q, err := queue.Open(t.Context(), st, ob, queue.Config{
		Now: time.Now, Notify: func(queue.Number) {}, Policy: doc.Queue, MaxInbound: doc.Inbound.MaxStoredBytes, Logger: logger,
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
	fake := w.spool
	w.server.opt.Spool = both{NewSpool(st, q), fake}
	w.login(t).mail(goodMessage, "250 2.0.0 OK queued as msg_")
	want := fake.last(t)
	info, err := q.Show(want.env.ID)
	if err != nil {
		t.Fatal(err)
	}
	ref := info.Env.Body
	text, err := st.ReadBody(ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != want.text || ref.HeaderBytes != want.headerBytes || ref.BodyHash != want.hash || ref.Length != int64(len(text)) {
		t.Errorf("stored %q with reference %+v, want %q", text, ref, want.text)
	}
	if len(info.Env.Recipients) != 1 || info.Env.Recipients[0].Address.String() != "ann@example.net" || info.Env.From != "acme.example" {
		t.Errorf("envelope is %+v", info.Env)
	}
}

// both hands each message to a real spool and to one that can be looked at.
type both struct {
	Spool
	fake *fakeSpool
}

type bothBody struct {
	Body
	fake Body
}

func (b both) NewBody() Body { return bothBody{b.Spool.NewBody(), b.fake.NewBody()} }

func (b both) Accept(ctx context.Context, env *relay.Envelope, body Body) error {
	if err := b.Spool.Accept(ctx, env, body.(bothBody).Body); err != nil {
		return err
	}
	return b.fake.Accept(ctx, env, body.(bothBody).fake)
}

func (b bothBody) Write(p []byte) (int, error) {
	if n, err := b.Body.Write(p); err != nil {
		return n, err
	}
	return b.fake.Write(p)
}

func (b bothBody) Seal(headerBytes int64, hash [32]byte) error {
	if err := b.Body.Seal(headerBytes, hash); err != nil {
		return err
	}
	return b.fake.Seal(headerBytes, hash)
}

func (b bothBody) Discard() {
	b.Body.Discard()
	b.fake.Discard()
}
