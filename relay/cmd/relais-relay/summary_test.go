package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// TestSummaryOfAStoppedRelay: what waits and what is held on its disk is counted,
// all of it, and said to be all.
func TestSummaryOfAStoppedRelay(t *testing.T) {
	o := &options{data: t.TempDir()}
	if err := os.Mkdir(filepath.Join(o.data, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	fill(t, o.data, "held.test", "held.test", "other.test")
	s, err := summary(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if s.Waiting != 1 || s.Held != 2 || !s.Counted {
		t.Errorf("summary %+v, want 1 waiting, 2 held, all counted", s)
	}
}

// fill puts a message for each domain into a queue that holds mail to held.test.
func fill(t *testing.T, dir string, domains ...mailaddr.Domain) {
	t.Helper()
	q, err := openOffline(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := q.close(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := q.PutHold(queue.HoldRule{Match: queue.Match{Domain: "held.test"}, Cause: "a test", Owner: "operator"}); err != nil {
		t.Fatal(err)
	}
	for _, domain := range domains {
		now := time.Now()
		env := &relay.Envelope{
			Tenant: ids.Tenant{1}, Stream: "default", Kind: policy.Transactional, Pool: ids.Pool{1}, From: "brand.test",
			Sender: mailaddr.Address{Local: "me", Domain: "brand.test"}, AcceptedAt: now, ExpiresAt: now.Add(time.Hour),
			Recipients: []relay.Recipient{{Address: mailaddr.Address{Local: "you", Domain: domain}}},
		}
		fresh(&env.ID)
		body := q.store.NewBody()
		const text = "From: me@brand.test\r\n\r\n"
		if _, err := body.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := body.Seal(int64(len(text)), [32]byte{}); err != nil {
			t.Fatal(err)
		}
		if err := q.Accept(t.Context(), env, body); err != nil {
			t.Fatal(err)
		}
	}
}
