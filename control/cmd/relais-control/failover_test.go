package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestASilentServerIsNotWaitedForWhileALeaderIsChosen: a server that was stopped
// takes connections and says nothing. Where another one says that the cluster is
// choosing a leader, that costs little, and the answer comes from who answers.
func TestASilentServerIsNotWaitedForWhileALeaderIsChosen(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	asked := 0
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked++; asked == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, `{"detail": "the cluster is choosing a leader", "retry": true}`)
			return
		}
		fmt.Fprint(w, `{"name": "acme"}`)
	}))
	defer server.Close()
	c := &client{file: cliFile{Endpoints: []string{server.URL, "https://" + silent.Addr().String()}}}
	c.patience.Store(int64(connectLimit))
	trusted := server.Client().Transport.(*http.Transport).TLSClientConfig
	c.http = &http.Client{Transport: &http.Transport{DialTLSContext: c.dialTLS(trusted)}}
	var out struct{ Name string }
	if err := c.do(t.Context(), call{method: http.MethodPost, path: "/tenants"}, &out); err != nil || out.Name != "acme" || asked != 2 {
		t.Errorf("%v after %d questions: %+v", err, asked, out)
	}
	if got := time.Duration(c.patience.Load()); got != hurriedLimit {
		t.Errorf("a silent server is waited for %s, want %s", got, hurriedLimit)
	}
}
