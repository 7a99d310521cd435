package service

import (
	"bytes"
	"testing"
	"time"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// TestTokenMadeAMomentAgo: a server that follows knows a token that was made at
// another one, as soon as it was made, and says so when it cannot find out.
func TestTokenMadeAMomentAgo(t *testing.T) {
	f := newFixture(t)
	id := ids.Token{1}
	secret := bytes.Repeat([]byte{7}, 32)
	f.log.stale = true
	f.log.fence = func() error { // what was committed elsewhere arrives
		_, err := f.log.Propose(ctx, &command.TokenCreate{Token: &command.JoinToken{Id: id[:], Role: "relay", SecretHash: secret, UsesMax: 1, UsesLeft: 1, NotAfterMs: time.Now().Add(time.Hour).UnixMilli()}})
		return err
	}
	if got, err := f.TokenSecretHash(ctx, id); err != nil || !bytes.Equal(got[:], secret) {
		t.Errorf("%x, %v", got, err)
	}
	f.log.fence = func() error { return fault.New(fault.Unavailable, "test", "no leader") }
	if _, err := f.TokenSecretHash(ctx, id); !fault.Is(err, fault.Unavailable) {
		t.Errorf("without a leader: %v", err)
	}
	f.log.stale, f.log.fence = false, func() error { t.Error("the leader waits for itself"); return nil }
	if _, err := f.TokenSecretHash(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := f.TokenSecretHash(ctx, ids.Token{2}); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("an unknown token: %v", err)
	}
}
