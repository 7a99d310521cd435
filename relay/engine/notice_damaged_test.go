package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/lab"
)

// TestTheEndOfADamagedMessageIsTold: whatever of a message's body is damaged, its
// sender is told that it ended, without the text.
func TestTheEndOfADamagedMessageIsTold(t *testing.T) {
	w := newWorld(t, nil)
	accepted := w.accept(nil, w.at(lab.Google, 0, lab.Accept))
	for name, damage := range map[string]func(*relay.Envelope){
		"a wrong checksum, all of it wanted": func(e *relay.Envelope) { e.Body.CRC32C++; e.RetFull = true },
		"a file that is missing":             func(e *relay.Envelope) { e.Body.Segment += 1 << 20 },
		"a place behind the end":             func(e *relay.Envelope) { e.Body.Offset = 1 << 40 },
	} {
		env := *accepted
		damage(&env)
		s := &settlement{
			failed:  []failedRecipient{{0, relay.RecipientState{State: relay.StateExpired}, classExpired}},
			results: []queue.Result{{Index: 0}},
		}
		mail := w.engine.notices(&env, time.Now(), w.policy.Load(), s)
		if len(mail) != 1 {
			t.Errorf("%s: %d notifications", name, len(mail))
			continue
		}
		text := string(mail[0].Body.Bytes())
		if !strings.Contains(text, "\r\nAction: failed\r\n") || !strings.Contains(text, "nothing of it is attached") {
			t.Errorf("%s: the notification says\n%s", name, text)
		}
		mail[0].Body.Discard()
	}
}
