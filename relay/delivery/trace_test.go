package delivery

import (
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/relay/trace"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// watchedFixture is newFixture with somebody who watches.
func watchedFixture(t *testing.T, port uint16, filter trace.Filter) (*fixture, *trace.Watcher) {
	t.Helper()
	var hub trace.Hub
	w, err := hub.Watch(filter)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{broken: tlspolicy.NewMemory(), policy: testPolicy(), reg: prometheus.NewRegistry()}
	f.dialer, err = New(Config{Egress: plainEgress{}, Broken: f.broken, Port: port, Policy: func() *policy.Delivery { return f.policy },
		Trace: &hub, Log: slog.New(slog.DiscardHandler), Registerer: f.reg})
	if err != nil {
		t.Fatal(err)
	}
	return f, w
}

// dialogue is what a watcher saw, a line each.
func dialogue(w *trace.Watcher) string {
	var out strings.Builder
	for _, l := range w.Take() {
		fmt.Fprintln(&out, l.Side, l.Text)
	}
	return out.String()
}

func TestTraceOfADelivery(t *testing.T) {
	p := &peer{extensions: []string{"PIPELINING", "SIZE"}}
	p.start(t)
	f, w := watchedFixture(t, p.port, trace.Filter{Headers: true, Provider: "example", Domain: "example.com"})
	to := target(policy.TLSOpportunistic, hostsAt("127.0.0.1")...)
	to.Provider, to.Subject = "example", trace.Subject{Message: ids.Message{1}, Domain: "example.com"}
	s, failure := f.dialer.Dial(t.Context(), to)
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	const token = "b1-signed-return-path"
	tx := transaction(1)
	tx.Sender, tx.Subject = address(token+"@bounce.sender.example"), trace.Subject{Message: ids.Message{1}, Domain: "example.com"}
	if got := brief(s.Send(tx)); got != deliveredBrief {
		t.Fatal(got)
	}
	tx = transaction(1)
	tx.Subject = trace.Subject{Message: ids.Message{2}, Domain: "elsewhere.example"}
	s.Send(tx) // of no interest
	s.Quit()
	got := dialogue(w)
	at := 0
	for _, want := range []string{
		fmt.Sprintf("* connects to mx1.example [127.0.0.1] port %d from 127.0.0.1\n", p.port), "< 220", "> EHLO out.sender.example\n", "< 250-PIPELINING\n", "< 250 SIZE\n",
		"> MAIL FROM:<(secret)@bounce.sender.example> SIZE=", "> RCPT TO:<r0@example.com>\n> DATA\n", "< 354",
		"> From: a@sender.example\n> Subject: x\n* a message of 56 octets, without our signatures\n> .\n", "< 250",
	} {
		i := strings.Index(got[at:], want)
		if i < 0 {
			t.Fatalf("%q is missing behind %q in\n%s", want, got[:at], got)
		}
		at += i + len(want)
	}
	for _, unwanted := range []string{token, "hello", "elsewhere"} {
		if strings.Contains(got, unwanted) {
			t.Errorf("%q is shown in\n%s", unwanted, got)
		}
	}
}

func TestTraceOfFailures(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	l.Close() // nobody is there
	f, w := watchedFixture(t, port, trace.Filter{})
	if _, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...)); failure == nil {
		t.Fatal("a session opened")
	}
	if got := dialogue(w); !strings.Contains(got, "* no connection: ") {
		t.Error(got)
	}
	f, w = watchedFixture(t, chunkPeer(t, true, "250 2.1.5 ok", "250 2.0.0 ok", closeNow), trace.Filter{})
	s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	tx := transaction(1)
	tx.Chunking, tx.Content.Bytes = policy.ChunkAuto, twoChunks()
	s.Send(tx)
	s.Quit()
	got := dialogue(w)
	for _, want := range []string{"> BDAT 1048576\n", "> BDAT ", " LAST\n", "* the host closed the connection\n", "* the session is over\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, "line 1") {
		t.Errorf("the message is shown in\n%.2000s", got)
	}
}
