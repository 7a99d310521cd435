package outbox

import "context"

// Write stores events that belong to no change of the queue, and returns when
// they are on stable storage.
func (o *Outbox) Write(ctx context.Context, events []Event) error {
	if len(events) == 0 {
		return nil
	}
	b := o.st.NewBatch()
	var scratch []byte
	for i := range events {
		scratch = o.Add(b, &events[i], scratch)
	}
	return o.st.Commit(ctx, b)
}
