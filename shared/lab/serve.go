package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"
)

const (
	httpTimeout      = 10 * time.Second
	maxMailsPerReply = 1000
)

// reportServer serves what the lab saw as JSON:
//
//	GET /report                      Report
//	GET /arrivals                    []Arrivals
//	GET /providers                   []ProviderInfo
//	GET /mails?provider=P[&from=ID]  up to 1000 lines of JSON, a Mail each
//	GET /mail?provider=P&id=ID       the message itself
type reportServer struct {
	srv  *http.Server
	ln   net.Listener
	done chan error
}

func startReportServer(l *Lab, addr string) (*reportServer, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("lab: HTTPAddr: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /report", func(w http.ResponseWriter, _ *http.Request) { l.sendJSON(w, l.Report()) })
	mux.HandleFunc("GET /arrivals", func(w http.ResponseWriter, _ *http.Request) { l.sendJSON(w, l.Arrivals()) })
	mux.HandleFunc("GET /providers", func(w http.ResponseWriter, _ *http.Request) { l.sendJSON(w, l.Providers()) })
	mux.HandleFunc("GET /mails", l.serveMails)
	mux.HandleFunc("GET /mail", l.serveMail)
	s := &reportServer{
		srv:  &http.Server{Handler: mux, ReadHeaderTimeout: httpTimeout, WriteTimeout: httpTimeout},
		ln:   ln,
		done: make(chan error, 1),
	}
	go func() { s.done <- s.srv.Serve(ln) }()
	return s, nil
}

func (s *reportServer) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), httpTimeout)
	defer cancel()
	err := s.srv.Shutdown(ctx)
	if served := <-s.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// HTTPAddr returns where the report is served, "" for nowhere.
func (l *Lab) HTTPAddr() string {
	if l.http == nil {
		return ""
	}
	return l.http.ln.Addr().String()
}

func (l *Lab) sendJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		l.cfg.Logger.Warn("lab report", "err", err)
	}
}

func (l *Lab) serveMails(w http.ResponseWriter, r *http.Request) {
	p := l.farm.providers[r.FormValue("provider")]
	if p == nil {
		http.Error(w, "provider: unknown; GET /providers lists them", http.StatusNotFound)
		return
	}
	from := 0
	if v := r.FormValue("from"); v != "" {
		var err error
		if from, err = strconv.Atoi(v); err != nil || from < 0 {
			http.Error(w, "from: want a number from 0", http.StatusBadRequest)
			return
		}
	}
	w.Header().Set("Content-Type", "application/jsonl")
	enc := json.NewEncoder(w)
	for id := from; id < min(p.store.count(), from+maxMailsPerReply); id++ {
		m, err := p.store.mail(id)
		if err == nil {
			err = enc.Encode(m)
		}
		if err != nil {
			l.cfg.Logger.Warn("lab mails", "err", err)
			return
		}
	}
}

func (l *Lab) serveMail(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.Atoi(r.FormValue("id"))
	if err != nil {
		http.Error(w, "id: want a number from 0", http.StatusBadRequest)
		return
	}
	_, content, err := l.Mail(r.FormValue("provider"), id)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "message/rfc822")
	if _, err := w.Write(content); err != nil {
		l.cfg.Logger.Warn("lab mail", "err", err)
	}
}
