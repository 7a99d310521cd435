package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestAChangedPolicyIsWaitedForThroughAnElection: a leader may be lost right behind
// the change of a policy. The command waits until a server tells again who applied it;
// if none does, it says that the policy is changed, and what the servers say.
func TestAChangedPolicyIsWaitedForThroughAnElection(t *testing.T) {
	var silent atomic.Int32 // questions that find no leader
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if silent.Add(-1) >= 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, `{"detail": "this server is not in touch with the leader", "retry": true}`)
			return
		}
		fmt.Fprint(w, `{"revision": 7, "applied": 1, "total": 1, "relays": [{"id": "nod_1", "name": "edge-1", "connected": true, "acked_revision": 7}]}`)
	})
	first, second := httptest.NewTLSServer(handler), httptest.NewTLSServer(handler)
	defer first.Close()
	defer second.Close()
	c := &client{file: cliFile{Endpoints: []string{first.URL, second.URL}}}
	c.patience.Store(int64(connectLimit))
	trusted := first.Client().Transport.(*http.Transport).TLSClientConfig
	c.http = &http.Client{Transport: &http.Transport{DialTLSContext: c.dialTLS(trusted)}}

	silent.Store(4)
	if s, err := c.waitApplied(t.Context(), 7, time.Minute); err != nil || s.Revision != 7 || s.Applied != 1 {
		t.Errorf("%v, %+v", err, s)
	}
	silent.Store(1000)
	_, err := c.waitApplied(t.Context(), 7, 0)
	if err == nil || !strings.Contains(err.Error(), "the policy is changed, its revision is 7") || !strings.Contains(err.Error(), "not in touch with the leader") || strings.Contains(err.Error(), "can be reached") {
		t.Errorf("a change of which nothing more is known ends with %v", err)
	}
}
