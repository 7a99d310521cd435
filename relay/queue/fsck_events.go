package queue

import (
	"encoding/hex"

	"github.com/relais-mta/relais/relay/outbox"
)

// events checks the outbox. It is looked at first, because repairs write events
// themselves.
func (c *checker) events() error {
	c.snap = c.st.Snapshot()
	defer c.snap.Close()
	c.batch = c.st.NewBatch()
	err := outbox.Check(c.snap, c.cfg.Now(), c.step, func(d outbox.Damage) error {
		f := Finding{Kind: EventsDamaged, Key: hex.EncodeToString(d.Key), Detail: d.Detail}
		if !c.report(f) {
			return nil
		}
		if err := c.asideRecord(EventsDamaged, d.Key, d.Value, d.Detail); err != nil {
			return err
		}
		if d.Instead != nil {
			c.set(d.Key, d.Instead)
		}
		return nil
	})
	if err != nil {
		c.batch.Abandon()
		return err
	}
	err = c.flush()
	c.batch.Abandon()
	return err
}
