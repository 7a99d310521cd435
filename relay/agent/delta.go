package agent

import (
	"time"

	"github.com/relais-mta/relais/shared/link"
	"github.com/relais-mta/relais/shared/wire"
)

// receiveDelta takes what has changed since the view in use and answers with
// Ack or Nack, or with Resync when the change is one of another view.
func (s *session) receiveDelta(stream link.Stream, conn *wire.Conn, begin *wire.DeltaBegin) error {
	delta, err := wire.ReceiveDelta(conn, begin)
	if err != nil {
		return err
	}
	encoded, err := s.agent.merge(begin, delta)
	if err != nil {
		s.agent.options.Logger.Warn("a change of the policy does not fit the view in use, the whole view is asked for", "error", err)
		s.agent.metrics.views.WithLabelValues("resync").Inc()
		if err := stream.SetWriteDeadline(time.Now().Add(ackTimeout)); err != nil {
			return err
		}
		answer := &wire.Resync{}
		if held := s.agent.current.Load(); held != nil {
			answer.Held = &wire.Revision{Generation: held.generation, Index: held.revision}
		}
		return conn.Send(answer)
	}
	return s.useView(stream, conn, begin.GetTo(), encoded)
}

// merge makes the encoding of the new view from the stored one and a delta. The
// view in use is always the one that is stored.
func (a *Agent) merge(begin *wire.DeltaBegin, delta []byte) ([]byte, error) {
	base, _, err := a.store.load()
	if err != nil {
		return nil, err
	}
	if err := wire.CheckSum(base, begin.GetFromSha256()); err != nil {
		return nil, err
	}
	encoded, err := wire.ApplyDelta(base, delta)
	if err != nil {
		return nil, err
	}
	return encoded, wire.CheckSum(encoded, begin.GetToSha256())
}
