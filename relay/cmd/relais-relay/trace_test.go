package main

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay/trace"
)

// Who talks is said when a session is first seen, and again when it changes.
func TestTraceText(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 1, 234_000_000, time.Local)
	first := trace.Line{At: at, Session: 7, Kind: trace.Out, Side: ">", Text: "EHLO out.example", Provider: "google", MX: "mx.google.com", Remote: "192.0.2.1", Source: "198.51.100.1", Domain: "gmail.com"}
	reply, mail, header := first, first, first
	reply.Side, reply.Text = "<", "250 mx.google.com"
	mail.Text, mail.Message, mail.Lost = "MAIL FROM:<>", "msg_1", 12
	header.Text, header.Header, header.Message = "Subject: x", true, "msg_1"
	client := trace.Line{At: at, Session: 8, Kind: trace.Submission, Side: "*", Text: "192.0.2.7 connects", Remote: "192.0.2.7"}
	var p printer
	var got strings.Builder
	for _, l := range []trace.Line{first, reply, mail, header, client} {
		got.WriteString(p.text(&l))
	}
	const want = `10:00:01.234      7 = out mx.google.com [192.0.2.1] from 198.51.100.1 provider google domain gmail.com
10:00:01.234      7 > EHLO out.example
10:00:01.234      7 < 250 mx.google.com
… 12 lines were left out: more came than could be shown
10:00:01.234      7 = out mx.google.com [192.0.2.1] from 198.51.100.1 provider google domain gmail.com message msg_1
10:00:01.234      7 > MAIL FROM:<>
10:00:01.234      7 > | Subject: x
10:00:01.234      8 = submission [192.0.2.7]
10:00:01.234      8 * 192.0.2.7 connects
`
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}
	for i := range uint64(2 * maxSeenSessions) {
		first.Session = i
		p.text(&first)
	}
	if len(p.seen) > maxSeenSessions {
		t.Errorf("%d sessions are remembered", len(p.seen))
	}
}

// TestLengthsOfTime: every flag for one takes what the policy does.
func TestLengthsOfTime(t *testing.T) {
	for _, of := range []string{"trace for", "lanes interval"} {
		name, flagName, _ := strings.Cut(of, " ")
		cmd, _, err := newRoot().Find([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		flag := cmd.Flags().Lookup(flagName)
		if flag == nil || flag.Value.Set("1d12h") != nil || flag.Value.String() != "1d12h" || flag.Value.Set("-1s") == nil {
			t.Errorf("%s does not take 1d12h, or takes what is negative: %+v", of, flag)
		}
	}
}
