package delivery

import (
	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// takesUTF8 reports whether a host takes internationalized mail. RFC 6531
// section 3.1 makes 8BITMIME a part of that.
func (e *Extensions) takesUTF8() bool { return e.UTF8 && e.EightBit }

// needsUTF8 is the reason of mail that cannot go to a host without SMTPUTF8:
// RFC 6531 section 3.2 knows no way to rewrite it on the way. RFC 5248 has
// X.6.7 for it.
func needsUTF8(why string) relay.Reply {
	return relay.Reply{Enhanced: "5.6.7", Text: why + ", and the host does not take internationalized mail (SMTPUTF8)"}
}

// adapt makes the content fit what the host takes: as it is, converted from 8
// to 7 bits, which happens before it is signed, or not at all. It returns
// false when the transaction is decided by that.
func (s *Session) adapt(t *transfer) bool {
	tx := t.tx
	if tx.UTF8 && !s.ext.takesUTF8() {
		t.settle(relay.Failed, relay.PhaseLocal, needsUTF8("the message has UTF-8 in header fields"))
		return false
	}
	t.utf8 = tx.UTF8
	if t.chunked = tx.Binary; tx.Binary {
		if t.chunking() == policy.ChunkOff {
			t.settle(relay.Failed, relay.PhaseLocal, relay.Reply{Enhanced: "5.6.3", Text: "the message is binary (BINARYMIME), and the policy for the host allows no chunks"})
			return false
		}
		if !s.ext.Binary || !s.ext.Chunking {
			// RFC 3030 section 3: the content would have to be encoded anew,
			// which is not done behind the sender's back.
			t.settle(relay.Failed, relay.PhaseLocal, relay.Reply{Enhanced: "5.6.3", Text: "the message is binary (BINARYMIME), which the host does not take"})
			return false
		}
		return true
	}
	if tx.EightBit && !s.ext.EightBit {
		converted, err := downgrade(&tx.Content, tx.ClientDKIM)
		if err != nil {
			t.settleLocal(err, "5.6.3")
			return false
		}
		t.convertedBytes = converted
		t.content = Content{Bytes: converted}
	}
	return true
}
