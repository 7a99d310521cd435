package queue

import (
	"bytes"
	"encoding/hex"
	"time"

	"github.com/relais-mta/relais/relay/store"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// maxLifetime is the longest that a message may wait: 30 days for the time that its
// client set, and 30 from then on.
const maxLifetime = 60 * 24 * time.Hour

// transfers looks at what the queue remembers of messages on their way from relay to
// relay. Whom and which message it is about is in the keys, so an unreadable record
// is written again with the meaning that loses and doubles nothing.
func (c *checker) transfers() error {
	err := c.each(store.SpaceGiven, false, func(key, value []byte) error {
		_, id, _, ok := store.ParseTransferKey(key)
		if !ok {
			return c.stray(key, value, "the key of a message on its way to another relay has another length")
		}
		if _, known := parseGiven(value); known {
			return nil
		}
		const detail = "it is unreadable whether the other relay has the message for certain: it is asked"
		return c.rewrite(GivenDamaged, id, key, value, detail, func() ([]byte, error) {
			return appendGiven(nil, phaseOffered, c.cfg.Now()), nil
		})
	})
	if err != nil {
		return err
	}
	return c.each(store.SpaceTaken, false, func(key, value []byte) error {
		_, id, _, ok := store.ParseTransferKey(key)
		if !ok {
			return c.stray(key, value, "the key of a message that another relay handed over has another length")
		}
		if _, known := parseTaken(value); known {
			return nil
		}
		const detail = "it is unreadable until when it must be known that another relay handed the message over"
		return c.rewrite(TakenDamaged, id, key, value, detail, func() ([]byte, error) { return c.takenAgain(id) })
	})
}

// rewrite reports a damaged record and, for a repair, keeps it as it was and writes
// another in its place.
func (c *checker) rewrite(kind Damage, id ids.Message, key, value []byte, detail string, instead func() ([]byte, error)) error {
	f := about(kind, id, detail)
	f.Key = hex.EncodeToString(key)
	if !c.report(f) {
		return nil
	}
	again, err := instead()
	if err != nil {
		return err
	}
	key = bytes.Clone(key)
	if err := c.keepRecord(kind, key, bytes.Clone(value), detail); err != nil {
		return err
	}
	c.set(key, again)
	return c.settle()
}

// takenAgain is the memory of a message that was handed over: until its deadline, or,
// where nothing is left of it, until anything that was accepted before has its end.
func (c *checker) takenAgain(id ids.Message) ([]byte, error) {
	expires := c.cfg.Now().Add(maxLifetime)
	value, err := c.snap.Get(store.AppendMessageKey(nil, id), nil)
	if err == nil {
		if env, _, bad := parseEnvelope(id, value); bad == nil {
			expires = env.ExpiresAt
		}
	} else if !fault.Is(err, fault.NotFound) {
		return nil, err
	}
	return appendTaken(nil, expires), nil
}
