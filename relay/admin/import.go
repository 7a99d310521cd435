package admin

import (
	"net/http"
	"path/filepath"

	"github.com/relais-mta/relais/relay/queue"
)

// ImportsDir is the folder of the data directory that remembers which exported
// queues were imported.
const ImportsDir = "imports"

// importQueue takes the exported queue in the body into the running queue.
func (s *Server) importQueue(r *http.Request) (any, error) {
	count, err := s.cfg.Queue.Import(r.Context(), r.Body, filepath.Join(s.cfg.Dir, ImportsDir), func(queue.ImportCount) {})
	if err != nil {
		return nil, err
	}
	s.cfg.Logger.Info("an exported queue was imported", "messages", count.Imported, "known", count.Known, "bytes", count.Bytes)
	return count, nil
}
