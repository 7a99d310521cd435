package trace

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
)

func watch(t testing.TB, h *Hub, f Filter) *Watcher {
	t.Helper()
	w, err := h.Watch(f)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func texts(w *Watcher) (out []string) {
	for _, l := range w.Take() {
		out = append(out, l.Side+l.Text)
	}
	return out
}

var party = Party{Kind: Out, Provider: "google", MX: "mx.google.com", Remote: netip.MustParseAddr("192.0.2.1"), Local: netip.MustParseAddr("198.51.100.1")}

func TestFilters(t *testing.T) {
	about := Subject{Message: ids.Message{1}, Tenant: ids.Tenant{2}, Domain: "gmail.com"}
	other := netip.MustParseAddr("203.0.113.1")
	for name, tt := range map[string]struct {
		filter Filter
		want   bool
	}{
		"everything": {Filter{}, true}, "incoming": {Filter{Incoming: true}, false},
		"provider": {Filter{Provider: "google"}, true}, "another provider": {Filter{Provider: "orange"}, false},
		"mx": {Filter{MX: "mx.google.com"}, true}, "another mx": {Filter{MX: "google.com"}, false},
		"source": {Filter{Address: party.Local}, true}, "another source": {Filter{Address: other}, false}, "the host's address": {Filter{Address: party.Remote}, false},
		"domain": {Filter{Domain: "gmail.com"}, true}, "another domain": {Filter{Domain: "example.com"}, false},
		"message": {Filter{Message: ids.Message{1}}, true}, "another message": {Filter{Message: ids.Message{9}}, false},
		"tenant": {Filter{Tenant: ids.Tenant{2}}, true}, "another tenant": {Filter{Tenant: ids.Tenant{9}}, false},
		"all": {Filter{Provider: "google", MX: "mx.google.com", Address: party.Local, Domain: "gmail.com", Message: ids.Message{1}, Tenant: ids.Tenant{2}}, true},
	} {
		var h Hub
		w := watch(t, &h, tt.filter)
		s := h.Session(party)
		s.About(about)
		s.Note("x")
		if got := len(w.Take()) == 1; got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	var h Hub
	w := watch(t, &h, Filter{Incoming: true, Address: other})
	s := h.Session(Party{Kind: Submission, Remote: party.Remote})
	s.Note("another client")
	s.From(other)
	s.Note("its client")
	if got := texts(w); len(got) != 1 || got[0] != "*its client" {
		t.Errorf("%q", got)
	}
}

func TestLinesSayWhose(t *testing.T) {
	var h Hub
	w := watch(t, &h, Filter{})
	s, again := h.Session(party), h.Session(party)
	s.About(Subject{Message: ids.Message{1}, Tenant: ids.Tenant{2}, Domain: mailaddr.Domain("gmail.com")})
	s.Sent([]byte("MAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\n"))
	again.Received([]byte("250 ok"))
	<-w.Ready()
	l := w.Take()
	if len(l) != 3 || l[0].Text != "MAIL FROM:<>" || l[1].Text != "RCPT TO:<a@b.example>" || l[0].Session == l[2].Session || l[2].Message != "" || l[2].Side != Received {
		t.Fatalf("%+v", l)
	}
	if f := l[0]; f.Provider != "google" || f.MX != "mx.google.com" || f.Remote != "192.0.2.1" || f.Source != "198.51.100.1" || f.Domain != "gmail.com" ||
		f.Message != (ids.Message{1}).String() || f.Tenant != (ids.Tenant{2}).String() || f.At.IsZero() {
		t.Errorf("%+v", f)
	}
}

// Nobody's password is shown, wherever a client puts it.
func TestSecretsAreMasked(t *testing.T) {
	const secret = "c2VjcmV0LXNlY3JldA=="
	for command, want := range map[string]string{
		"AUTH PLAIN " + secret:    "AUTH PLAIN (secret)",
		"auth login " + secret:    "AUTH login (secret)",
		"AUTH LOGIN":              "AUTH LOGIN",
		"AUTH " + secret:          "AUTH (secret)",
		"AUTH   " + secret + " x": "AUTH (secret)",
		secret:                    "(no command, 20 octets)",
		"PASS " + secret:          "(no command, 25 octets)",
		"NOOP " + secret:          "NOOP (secret)",
		"MAIL FROM:<a@b> AUTH=" + secret + " X=1": "MAIL FROM:<a@b> AUTH=(secret) X=1",
		"MAIL FROM:<a@b> SIZE=1 auth=" + secret:   "MAIL FROM:<a@b> SIZE=1 AUTH=(secret)",
		"RCPT TO:<a@b> NOTIFY=NEVER":              "RCPT TO:<a@b> NOTIFY=NEVER",
		"EHLO client.example":                     "EHLO client.example",
		"BDAT 10 LAST":                            "BDAT 10 LAST",
		"QUIT":                                    "QUIT", "DATA": "DATA",
	} {
		var h Hub
		w := watch(t, &h, Filter{Incoming: true})
		s := h.Session(Party{Kind: Submission})
		s.Command([]byte(command))
		s.Secret()
		got := texts(w)
		if len(got) != 2 || got[0] != "<"+want || got[1] != "<(secret)" {
			t.Errorf("%q is shown as %q", command, got)
		}
		if strings.Contains(strings.Join(got, " "), secret) {
			t.Errorf("%q shows the secret", command)
		}
	}
}

// A signed return path is a right to send bounces.
func TestReturnPathsAreMasked(t *testing.T) {
	const token = "b1-0123456789abcdef"
	var h Hub
	out, in := watch(t, &h, Filter{}), watch(t, &h, Filter{Incoming: true})
	s := h.Session(party)
	s.Hide(token)
	s.Sent([]byte("MAIL FROM:<" + token + "@bounce.example>\r\n"))
	s.Received([]byte("250 2.1.0 <" + token + "@bounce.example> ok"))
	s.Hide("short")
	s.Received([]byte("250 short"))
	if got := fmt.Sprint(texts(out)); got != "[>MAIL FROM:<(secret)@bounce.example> <250 2.1.0 <(secret)@bounce.example> ok <250 short]" {
		t.Error(got)
	}
	s = h.Session(Party{Kind: Inbound})
	s.Command([]byte("RCPT TO:<" + token + "@bounce.example>"))
	s.Sent([]byte("550 5.7.1 " + token + " is over"))
	if got := fmt.Sprint(texts(in)); got != "[<RCPT TO:<(secret)@bounce.example> >550 5.7.1 (secret) is over]" {
		t.Error(got)
	}
}

func TestHeaders(t *testing.T) {
	var h Hub
	with, without := watch(t, &h, Filter{Headers: true}), watch(t, &h, Filter{})
	s := h.Session(party)
	s.Header(Sent, []byte("Subject: x\r\n y\r\nList-Unsubscribe: <https://example.com/u/secret>,\r\n <mailto:secret@example.com>\r\nTo: a\r\n\r\nbody\r\n"))
	if got := fmt.Sprintf("%q", texts(with)); got != `[">Subject: x" "> y" ">List-Unsubscribe: (secret)" ">To: a"]` {
		t.Error(got)
	}
	if got := without.Take(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	with.Close()
	if s.Headers() {
		t.Error("headers are prepared for nobody")
	}
}

func TestTextIsSafe(t *testing.T) {
	var h Hub
	w := watch(t, &h, Filter{})
	s := h.Session(party)
	s.Received([]byte("250 \x1b[31mred\x07\u009b \xff é\t."))
	s.Received([]byte(strings.Repeat("ü", maxTextBytes)))
	got := w.Take()
	if got[0].Text != "250 ?[31mred?? ? é ." {
		t.Errorf("%q", got[0].Text)
	}
	if n := len(got[1].Text); n > maxTextBytes+3 || !strings.HasSuffix(got[1].Text, "ü…") {
		t.Errorf("%d octets", n)
	}
}

// A watcher that reads nothing costs a bounded amount of memory and is told what
// it missed; the others miss nothing.
func TestSlowWatcher(t *testing.T) {
	var h Hub
	slow, fast := watch(t, &h, Filter{}), watch(t, &h, Filter{})
	s := h.Session(party)
	const lines = 3 * maxBufferedLines
	seen := 0
	for i := range lines {
		s.Note("%d", i)
		seen += len(fast.Take())
	}
	kept := slow.Take()
	if len(kept) != maxBufferedLines || kept[0].Lost != 0 || seen != lines {
		t.Errorf("%d lines are kept of %d, the first after %d lost; the other watcher saw %d", len(kept), lines, kept[0].Lost, seen)
	}
	s.Note("on")
	if next := slow.Take(); len(next) != 1 || next[0].Lost != lines-maxBufferedLines {
		t.Errorf("%+v", next)
	}
	for range 2000 {
		s.Note("%s", strings.Repeat("x", maxTextBytes))
	}
	if slow.bytes > maxBufferedBytes {
		t.Errorf("%d octets are kept", slow.bytes)
	}
}

func TestWatchersAreBounded(t *testing.T) {
	var h Hub
	s := h.Session(party)
	if s.On() {
		t.Error("somebody watches")
	}
	var all []*Watcher
	for range maxWatchers {
		all = append(all, watch(t, &h, Filter{}))
	}
	if _, err := h.Watch(Filter{}); !fault.Is(err, fault.Exhausted) || !s.On() {
		t.Errorf("one more: %v", err)
	}
	all[0].Close()
	all[0].Close() // twice is once
	<-all[0].Ended()
	watch(t, &h, Filter{})
	h.Close()
	<-all[1].Ended()
	if s.On() {
		t.Error("somebody watches a hub that is closed")
	}
	if _, err := h.Watch(Filter{}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
	var none *Hub
	s = none.Session(party)
	s.Note("x")
	s.Command([]byte("NOOP"))
	s.Header(Sent, []byte("a: b\r\n"))
	if s.On() {
		t.Error("somebody watches no hub")
	}
}

func TestManyDialoguesAtOnce(t *testing.T) {
	var h Hub
	w := watch(t, &h, Filter{})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			s := h.Session(party)
			for range 100 {
				s.Sent([]byte("NOOP\r\n"))
			}
		})
	}
	all.Go(func() { watch(t, &h, Filter{Provider: "x"}).Close() })
	all.Wait()
	if n := len(w.Take()); n != 800 {
		t.Errorf("%d lines", n)
	}
}

func BenchmarkNobodyWatches(b *testing.B) {
	var h Hub
	s := h.Session(party)
	line := []byte("MAIL FROM:<a@b.example>\r\n")
	b.ReportAllocs()
	for b.Loop() {
		s.Sent(line)
	}
}
