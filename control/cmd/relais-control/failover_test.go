package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
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

// TestASlowServerIsAskedOnceMore: on a starved machine a handshake takes longer
// than a server is waited for while there are others.
func TestASlowServerIsAskedOnceMore(t *testing.T) {
	var unanswered atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"name": "acme"}`)
	}))
	server.Listener = &slowListener{Listener: server.Listener, left: &unanswered}
	server.StartTLS()
	defer server.Close()
	trusted := server.Client().Transport.(*http.Transport).TLSClientConfig
	for _, silent := range []int32{0, 1} {
		unanswered.Store(silent)
		c := &client{file: cliFile{Endpoints: []string{server.URL}}}
		c.patience.Store(int64(50 * time.Millisecond))
		c.http = &http.Client{Transport: &http.Transport{DialTLSContext: c.dialTLS(trusted)}}
		var out struct{ Name string }
		if err := c.do(t.Context(), call{method: http.MethodPost, path: "/tenants"}, &out); err != nil || out.Name != "acme" {
			t.Errorf("with %d silent connections: %v, %+v", silent, err, out)
		}
	}
}

// slowListener takes some connections and never says anything on them.
type slowListener struct {
	net.Listener
	left *atomic.Int32

	silent []net.Conn // kept, or the collector would close them
}

func (l *slowListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.left.Add(-1) < 0 {
			return conn, err
		}
		l.silent = append(l.silent, conn)
	}
}
