package admin

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"net/url"

	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// traceType is the media type of a stream of trace.Line, one a line.
const traceType = "application/x-ndjson"

// trace streams SMTP dialogues until the client goes or the relay stops.
func (s *Server) trace(w http.ResponseWriter, r *http.Request) {
	f, err := traceFilter(r.URL.Query(), s.directory())
	if err == nil && s.cfg.Trace == nil {
		err = fault.New(fault.Unavailable, "admin.trace", "this relay shows no dialogues")
	}
	var watcher *trace.Watcher
	if err == nil {
		watcher, err = s.cfg.Trace.Watch(f)
	}
	if err != nil {
		s.answer(func(*http.Request) (any, error) { return nil, err })(w, r)
		return
	}
	defer watcher.Close()
	w.Header().Set("Content-Type", traceType)
	out, flusher := json.NewEncoder(w), http.NewResponseController(w)
	if flusher.Flush() != nil { // the client learns at once that it watches
		return
	}
	for {
		select {
		case <-watcher.Ready():
			for _, l := range watcher.Take() {
				if out.Encode(&l) != nil {
					return
				}
			}
			if flusher.Flush() != nil {
				return
			}
		case <-watcher.Ended():
			return
		case <-r.Context().Done():
			return
		}
	}
}

// traceFilter reads what a client wants to see; dir, which may be nil, knows names.
func traceFilter(v url.Values, dir *policy.Directory) (f trace.Filter, err error) {
	const op = "admin.trace"
	f.Provider, f.MX = v.Get("provider"), v.Get("mx")
	f.Incoming, f.Headers = v.Get("incoming") == "true", v.Get("headers") == "true"
	if t := v.Get("source"); t != "" {
		if f.Address, err = netip.ParseAddr(t); err != nil {
			return f, fault.Field(op, "source", "%q is not an IP address", t)
		}
		f.Address = f.Address.Unmap()
	}
	if t := v.Get("domain"); t != "" {
		if f.Domain, err = mailaddr.ParseDomain(t); err != nil {
			return f, fault.Field(op, "domain", "%s", fault.Public(err))
		}
	}
	if t := v.Get("message"); t != "" {
		if err = f.Message.UnmarshalText([]byte(t)); err != nil {
			return f, fault.Field(op, "message", "%s", fault.Public(err))
		}
	}
	if f.Tenant, err = tenantOf(dir, v.Get("tenant")); err != nil {
		return f, err
	}
	if err = checkProvider(dir, f.Provider); err != nil {
		return f, err
	}
	if f.Incoming && (f.Provider != "" || f.MX != "") {
		return f, fault.Field(op, "incoming", "who brings mail has no provider and no MX: leave out provider and mx")
	}
	return f, nil
}
