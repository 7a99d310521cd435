package admin

import (
	"net/http"

	"github.com/relais-mta/relais/relay/queue"
	"github.com/relais-mta/relais/shared/fault"
)

// Fsck asks for a check of the queue while the relay runs. Nothing is repaired.
type Fsck struct {
	Bodies bool `json:"bodies,omitempty"` // read every message and compare its checksum
}

// FsckLine is one line of the answer to it: a finding, how far it is, or at the
// end what it saw.
type FsckLine struct {
	Finding  *queue.Finding   `json:"finding,omitempty"`
	Progress *queue.FsckCount `json:"progress,omitempty"`
	Result   *queue.FsckCount `json:"result,omitempty"`
	Error    string           `json:"error,omitempty"` // why it ended before its end
}

// fsck streams a check of the queue, a JSON object a line. It ends when the
// client goes away.
func (s *Server) fsck(w http.ResponseWriter, r *http.Request) {
	var in Fsck
	if err := decode(r, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	var out *lines // begun with the first line, so that a refusal has a status
	send := func(l FsckLine) {
		if out == nil {
			out = newLines(w)
		}
		out.send(l)
	}
	count, err := s.cfg.Queue.FsckOnline(r.Context(), queue.Online{
		Bodies:   in.Bodies,
		Report:   func(f queue.Finding) { send(FsckLine{Finding: &f}) },
		Progress: func(c queue.FsckCount) { send(FsckLine{Progress: &c}) },
	})
	switch {
	case err != nil && out == nil:
		s.fail(w, r, err)
	case err != nil:
		send(FsckLine{Error: fault.Public(err)})
	default:
		send(FsckLine{Result: &count})
	}
	s.cfg.Logger.Info("the queue was checked beside the mail", "actor", actor(r.Context()), "bodies", in.Bodies, "damaged", count.Total(), "clean", count.Clean, "error", err)
}
