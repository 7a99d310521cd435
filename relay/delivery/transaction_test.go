package delivery

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

func TestDeliveredInOneGroup(t *testing.T) {
	p := &peer{}
	_, s := dialPeer(t, p)
	committed := false
	tx := transaction(2)
	tx.SignatureBytes = 30
	tx.Sign = func(converted []byte) ([]byte, error) {
		if converted != nil {
			t.Error("7-bit content was converted")
		}
		return []byte("DKIM-Signature: v=1; b=x\r\n"), nil
	}
	tx.Commit = func() error {
		if _, messages := p.got(); len(messages) != 0 {
			t.Error("the message was complete before the journal record was")
		}
		committed = true
		return nil
	}
	out := s.Send(tx)
	if got, want := brief(out), "delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0"; got != want {
		t.Errorf("outcomes %s, want %s", got, want)
	}
	if out[0].Index != 10 || out[1].Index != 11 || out[0].Reply.Text != "queued as 1" {
		t.Errorf("outcomes %+v", out)
	}
	if !committed || s.Dead() || s.Delivered() != 1 || s.Transactions() != 1 {
		t.Errorf("committed %v, dead %v, delivered %d, transactions %d", committed, s.Dead(), s.Delivered(), s.Transactions())
	}
	commands, messages := p.got()
	want := []string{"EHLO out.sender.example", "MAIL FROM:<b+1@bounce.sender.example> SIZE=86", "RCPT TO:<r0@example.com>", "RCPT TO:<r1@example.com>", "DATA"}
	if !slices.Equal(commands, want) {
		t.Errorf("commands\n%q, want\n%q", commands, want)
	}
	if len(messages) != 1 || string(unstuff(messages[0])) != "DKIM-Signature: v=1; b=x\r\n"+testMessage {
		t.Errorf("message %q", messages)
	}
	// Without an error there is no RSET, and the next transaction follows.
	if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
		t.Error(got)
	}
	if commands, _ = p.got(); slices.Contains(commands, "RSET") {
		t.Errorf("commands %q", commands)
	}
}

// TestReplies is the table of phase × reply × recipients.
func TestReplies(t *testing.T) {
	rcpts := func(replies ...string) func(int) string { return func(i int) string { return replies[i] } }
	const ok = "250 2.1.5 ok"
	for _, tc := range []struct {
		name string
		peer peer
		n    int
		want string
		dead bool
	}{
		{"5xx at MAIL", peer{mail: "550 5.7.1 no"}, 2, "failed/mail/550/5.7.1 failed/mail/550/5.7.1", false},
		{"4xx at MAIL", peer{mail: "451 4.3.0 later"}, 2, "deferred/mail/451/4.3.0 deferred/mail/451/4.3.0", false},
		{"421 at first MAIL", peer{mail: "421 4.7.0 bye"}, 2, "deferred/mail/421/4.7.0 deferred/mail/421/4.7.0", true},
		{"nonsense at MAIL", peer{mail: "hello"}, 1, "deferred/mail/4.5.0", true},
		{"3xx at MAIL", peer{mail: "354 what"}, 1, "deferred/mail/4.5.0", true},
		{"closed at MAIL", peer{mail: closeNow}, 2, "deferred/mail/4.4.2 deferred/mail/4.4.2", true},
		{"one RCPT refused", peer{rcpt: rcpts("550 5.1.1 no", ok)}, 2, "failed/rcpt/550/5.1.1 delivered/final-dot/250/2.0.0", false},
		{"last RCPT refused", peer{rcpt: rcpts(ok, ok, "452 4.5.3 too many")}, 3,
			"delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0 deferred/rcpt/452/4.5.3", false},
		{"all RCPT refused, DATA too", peer{rcpt: rcpts("550 5.1.1 no", "450 4.2.1 no"), data: "554 5.5.1 no recipients"}, 2,
			"failed/rcpt/550/5.1.1 deferred/rcpt/450/4.2.1", false},
		{"all RCPT refused, DATA accepted", peer{rcpt: rcpts("550 5.1.1 no"), final: "554 5.5.1 nothing"}, 1, "failed/rcpt/550/5.1.1", false},
		{"251 and 252 accept", peer{rcpt: rcpts("251 forward", "252 maybe")}, 2, "delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0", false},
		{"421 at second of three RCPT", peer{rcpt: rcpts("550 5.1.1 no", "421 4.7.0 bye", ok)}, 3,
			"failed/rcpt/550/5.1.1 deferred/rcpt/421/4.7.0 not-tried/rcpt/421/4.7.0", true},
		{"421 after an accepted RCPT", peer{rcpt: rcpts(ok, "421 4.7.0 bye", ok)}, 3,
			"deferred/rcpt/421/4.7.0 deferred/rcpt/421/4.7.0 not-tried/rcpt/421/4.7.0", true},
		{"closed at second RCPT", peer{rcpt: rcpts("550 5.1.1 no", closeNow)}, 3, "failed/rcpt/550/5.1.1 deferred/rcpt/4.4.2 deferred/rcpt/4.4.2", true},
		{"5xx at DATA", peer{rcpt: rcpts(ok, "550 5.1.1 no"), data: "554 5.7.1 no"}, 2, "failed/data/554/5.7.1 failed/rcpt/550/5.1.1", false},
		{"4xx at DATA", peer{data: "451 4.3.0 no"}, 2, "deferred/data/451/4.3.0 deferred/data/451/4.3.0", false},
		{"2xx at DATA", peer{data: "250 ok"}, 1, "deferred/data/4.5.0", true},
		{"421 at DATA", peer{data: "421 4.3.2 bye"}, 2, "deferred/data/421/4.3.2 deferred/data/421/4.3.2", true},
		{"closed at DATA", peer{data: closeNow}, 1, "deferred/data/4.4.2", true},
		{"5xx at the final dot", peer{rcpt: rcpts("450 4.2.1 no", ok), final: "554 5.7.1 spam"}, 2, "deferred/rcpt/450/4.2.1 failed/final-dot/554/5.7.1", false},
		{"4xx at the final dot", peer{final: "451 4.7.1 later"}, 2, "deferred/final-dot/451/4.7.1 deferred/final-dot/451/4.7.1", false},
		{"421 at the final dot", peer{final: "421 4.7.0 no"}, 1, "deferred/final-dot/421/4.7.0", true},
		{"closed at the final dot", peer{final: closeNow}, 1, "doubt/final-dot/4.4.2", true},
		{"3xx at the final dot", peer{final: "354 more"}, 1, "doubt/final-dot/4.5.0", true},
		{"nonsense at the final dot", peer{final: "\x00\xff"}, 1, "doubt/final-dot/4.5.0", true},
		{"reply before the dot: refusal", peer{data: "354 go\r\n552 5.3.4 too big"}, 1, "failed/data/552/5.3.4", true},
		{"reply before the dot: acceptance", peer{data: "354 go\r\n250 2.0.0 sure"}, 1, "deferred/data/4.5.0", true},
		{"multi-line", peer{final: "554-5.7.1 one\r\n554-5.7.1 two\r\n554 5.7.1 three"}, 1, "failed/final-dot/554/5.7.1", false},
		{"bare LF in replies", peer{mail: "250 ok\n"}, 1, "delivered/final-dot/250/2.0.0", false},
		{"code alone", peer{final: "250"}, 1, "delivered/final-dot/250", false},
		{"mixed codes of one class", peer{final: "550-5.7.1 one\r\n554 5.7.1 two"}, 1, "failed/final-dot/554/5.7.1", false},
		{"mixed codes of two classes", peer{mail: "250-ok\r\n550 no"}, 1, "deferred/mail/4.5.0", true},
		{"endless lines", peer{mail: strings.Repeat("250-x\r\n", 300) + "250 x"}, 1, "deferred/mail/4.5.0", true},
		{"endless line", peer{mail: "250 " + strings.Repeat("x", 5000)}, 1, "deferred/mail/4.5.0", true},
		{"long text", peer{final: "554 5.7.1 " + strings.Repeat("x", 3000)}, 1, "failed/final-dot/554/5.7.1", false},
	} {
		for _, pipelining := range []bool{true, false} {
			name := tc.name + ", pipelined"
			p := tc.peer
			if !pipelining {
				name = tc.name + ", step by step"
				p.extensions = []string{"8BITMIME"}
			}
			t.Run(name, func(t *testing.T) {
				_, s := dialPeer(t, &p)
				out := s.Send(transaction(tc.n))
				if got := brief(out); got != tc.want {
					t.Errorf("outcomes %s, want %s", got, tc.want)
				}
				for _, o := range out {
					if len(o.Reply.Text) > relay.MaxReplyTextBytes {
						t.Errorf("a reply text of %d bytes is kept", len(o.Reply.Text))
					}
				}
				if s.Dead() != tc.dead {
					t.Errorf("session dead: %v, want %v", s.Dead(), tc.dead)
				}
				if _, messages := p.got(); strings.HasPrefix(tc.name, "all RCPT refused") && pipelining && tc.peer.data == "" && (len(messages) != 1 || len(messages[0]) != 0) {
					t.Errorf("the lone dot carried %q", messages)
				}
				if tc.dead {
					if got := brief(s.Send(transaction(1))); got != "not-tried//4.4.2" {
						t.Errorf("a dead session says %s", got)
					}
				}
			})
		}
	}
}

// TestSessionGoesOnAfterErrors sends a good message behind every kind of bad
// one: RSET comes first and the session stays usable.
func TestSessionGoesOnAfterErrors(t *testing.T) {
	for name, first := range map[string]string{"MAIL": "mail", "RCPT": "rcpt", "DATA": "data", "dot": "dot"} {
		t.Run(name, func(t *testing.T) {
			bad := true
			p := &peer{rcpt: func(int) string {
				if bad && first == "rcpt" {
					return "550 5.1.1 no"
				}
				return "250 ok"
			}}
			switch first {
			case "mail":
				p.mail = "550 5.7.1 no"
			case "data":
				p.data = "554 5.7.1 no"
			case "dot":
				p.final = "554 5.7.1 no"
			}
			_, s := dialPeer(t, p)
			if out := s.Send(transaction(1)); out[0].Status != relay.Failed {
				t.Fatalf("%s", brief(out))
			}
			bad, p.mail, p.data, p.final = false, "", "", ""
			if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
				t.Errorf("then %s", got)
			}
			commands, _ := p.got()
			i := slices.Index(commands, "RSET")
			if i < 0 || !strings.HasPrefix(commands[i+1], "MAIL") {
				t.Errorf("commands %q", commands)
			}
		})
	}
}

func TestUsedUpSessionCostsNothing(t *testing.T) {
	for name, reply := range map[string]string{"421": "421 4.7.0 max messages", "closed": closeNow} {
		t.Run(name, func(t *testing.T) {
			p := &peer{}
			_, s := dialPeer(t, p)
			if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
				t.Fatal(got)
			}
			p.mail = reply
			for _, o := range s.Send(transaction(2)) {
				if o.Status != relay.NotTried {
					t.Errorf("outcome %+v, want not tried", o)
				}
			}
			if !s.Dead() {
				t.Error("the session lives on")
			}
		})
	}
}

func TestRefusedReset(t *testing.T) {
	p := &peer{rcpt: func(int) string { return "550 5.1.1 no" }, rset: "502 5.5.1 what"}
	_, s := dialPeer(t, p)
	s.Send(transaction(1))
	if got := brief(s.Send(transaction(1))); got != "not-tried/mail/502/5.5.1" || !s.Dead() {
		t.Errorf("%s, dead %v", got, s.Dead())
	}
}

func TestTimeouts(t *testing.T) {
	for _, tc := range []struct {
		name string
		peer peer
		set  func(*policy.Delivery)
		want string
	}{
		{"MAIL", peer{mail: hang}, func(p *policy.Delivery) { p.MailTimeout = short }, "deferred/mail/4.4.2"},
		{"RCPT", peer{rcpt: func(int) string { return hang }}, func(p *policy.Delivery) { p.RcptTimeout = short }, "deferred/rcpt/4.4.2"},
		{"DATA", peer{data: hang}, func(p *policy.Delivery) { p.DataTimeout = short }, "deferred/data/4.4.2"},
		{"dot", peer{beforeDot: hang}, func(p *policy.Delivery) { p.FinalDotTimeout = short }, "doubt/final-dot/4.4.2"},
		{"half a reply", peer{mail: "250-wait\r\n250-for\r\n250-it\r\n", extensions: []string{"8BITMIME"}}, func(p *policy.Delivery) { p.MailTimeout = short }, "deferred/mail/4.4.2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := tc.peer
			f, s := dialPeer(t, &p)
			tc.set(f.policy)
			if got := brief(s.Send(transaction(1))); got != tc.want || !s.Dead() {
				t.Errorf("%s, dead %v, want %s and dead", got, s.Dead(), tc.want)
			}
		})
	}
}

// TestBlockedWriter: a host that stops reading ends at the block timeout, and
// before the end of the data nothing is in doubt.
func TestBlockedWriter(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	p := &peer{stalled: release, extensions: []string{"PIPELINING"}}
	f, s := dialPeer(t, p)
	f.policy.BlockTimeout = short
	tx := transaction(1)
	tx.Content = Content{Reader: endlessLines{}, Length: 64 << 20}
	tx.Commit = func() error { t.Error("the last block was reached"); return nil }
	if got := brief(s.Send(tx)); got != "deferred/data/4.4.2" || !s.Dead() {
		t.Errorf("%s, dead %v", got, s.Dead())
	}
}

// endlessLines is a message of any length.
type endlessLines struct{}

func (endlessLines) ReadAt(b []byte, at int64) (int, error) {
	const line = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcd\r\n"
	for i := range b {
		b[i] = line[(at+int64(i))%int64(len(line))]
	}
	return len(b), nil
}

func TestLocalFailures(t *testing.T) {
	boom := fault.New(fault.Unavailable, "x", "the key is away")
	for _, tc := range []struct {
		name string
		edit func(*Transaction)
		want string
	}{
		{"journal", func(tx *Transaction) { tx.Commit = func() error { return errors.New("disk") } }, "deferred/local/4.3.0"},
		{"signing, later", func(tx *Transaction) { tx.Sign = func([]byte) ([]byte, error) { return nil, boom } }, "deferred/local/4.6.0"},
		{"signing, never", func(tx *Transaction) {
			tx.Sign = func([]byte) ([]byte, error) { return nil, fault.Field("x", "From", "bad") }
		}, "failed/local/5.6.0"},
		{"bare LF", func(tx *Transaction) { tx.Content.Bytes = []byte("a: b\r\n\r\nx\n.\r\n") }, "failed/local/5.6.0"},
		{"short store", func(tx *Transaction) { tx.Content = Content{Reader: bytes.NewReader([]byte("x\r\n")), Length: 100} }, "deferred/local/4.6.0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &peer{}
			_, s := dialPeer(t, p)
			tx := transaction(1)
			tc.edit(tx)
			if got := brief(s.Send(tx)); got != tc.want || !s.Dead() {
				t.Errorf("%s, dead %v, want %s and a broken connection", got, s.Dead(), tc.want)
			}
			if _, messages := p.got(); len(messages) != 0 {
				t.Errorf("a message got out: %q", messages)
			}
		})
	}
}

func TestRefusedBeforeSending(t *testing.T) {
	p := &peer{extensions: []string{"PIPELINING", "SIZE 60"}}
	_, s := dialPeer(t, p)
	tx := transaction(1)
	tx.SignatureBytes = 10
	if got := brief(s.Send(tx)); got != "failed/local/5.3.4" || s.Dead() {
		t.Errorf("too large: %s", got)
	}
	tx = transaction(3)
	tx.Recipients[1].Address.Local = "r\r\nRCPT TO:<evil@example.com>"
	tx.Content.Bytes = []byte("a: b\r\n\r\n")
	if got := brief(s.Send(tx)); got != "delivered/final-dot/250/2.0.0 failed/local/5.1.3 delivered/final-dot/250/2.0.0" {
		t.Errorf("line end in an address: %s", got)
	}
	tx = transaction(1)
	tx.Content.Bytes = []byte("a: b\r\n\r\n")
	tx.Sender.Domain = "x>\r\nDATA"
	if got := brief(s.Send(tx)); got != "failed/local/5.1.7" {
		t.Errorf("line end in the sender: %s", got)
	}
	if got := brief(s.Send(&Transaction{})); got != "" {
		t.Errorf("no recipients: %s", got)
	}
	commands, _ := p.got()
	for _, c := range commands {
		if strings.Contains(c, "evil") {
			t.Errorf("commands %q", commands)
		}
	}
}

func TestNullSenderAndManyRecipients(t *testing.T) {
	p := &peer{}
	_, s := dialPeer(t, p)
	tx := transaction(MaxRecipients)
	tx.Sender.Local, tx.Sender.Domain = "", ""
	for i, o := range s.Send(tx) {
		if o.Status != relay.Delivered || o.Index != uint16(10+i) {
			t.Fatalf("recipient %d: %+v", i, o)
		}
	}
	commands, _ := p.got()
	if commands[1] != "MAIL FROM:<> SIZE=56" || len(commands) != 1+1+MaxRecipients+1 {
		t.Errorf("%d commands, MAIL was %q", len(commands), commands[1])
	}
	if got := brief(s.Send(transaction(MaxRecipients + 1))[:1]); got != "deferred/local/4.5.3" {
		t.Errorf("beyond the bound: %s", got)
	}
}

func TestUnexpectedTalkBetweenTransactions(t *testing.T) {
	p := &peer{afterDot: "421 4.4.2 idle\r\n"}
	_, s := dialPeer(t, p)
	if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
		t.Fatal(got)
	}
	out := s.Send(transaction(1))
	if out[0].Status != relay.NotTried || out[0].Reply.Code != 421 || !s.Dead() {
		t.Errorf("%+v, dead %v", out, s.Dead())
	}
}

func TestAlive(t *testing.T) {
	p := &peer{}
	_, s := dialPeer(t, p)
	s.Send(transaction(1))
	if !s.Alive() || s.Dead() {
		t.Fatal("an idle session counts as dead")
	}
	if got := brief(s.Send(transaction(1))); got != "delivered/final-dot/250/2.0.0" {
		t.Errorf("after the look: %s", got)
	}
	p2 := &peer{final: "250 ok\r\n421 4.4.2 idle"}
	_, s2 := dialPeer(t, p2)
	s2.Send(transaction(1))
	if s2.Alive() || !s2.Dead() {
		t.Error("a session with a pending 421 counts as alive")
	}
	s.Quit()
	if s.Alive() {
		t.Error("a session counts as alive after QUIT")
	}
	if commands, _ := p.got(); commands[len(commands)-1] != "QUIT" {
		t.Errorf("commands %q", commands)
	}
}

func TestAliveSeesClosedConnection(t *testing.T) {
	p := &peer{final: "250 ok"}
	_, s := dialPeer(t, p)
	s.Send(transaction(1))
	// The peer closes; the close has arrived when a read says so.
	s.out = append(s.out[:0], "QUIT\r\n"...)
	if err := s.flush(fallbackTimeout); err != nil {
		t.Fatal(err)
	}
	if _, err := s.in.read(fallbackTimeout); err != nil {
		t.Fatal(err)
	}
	if _, err := s.in.read(fallbackTimeout); !errors.Is(err, io.EOF) {
		t.Fatalf("want the end of the connection, got %v", err)
	}
	if s.Alive() {
		t.Error("a closed session counts as alive")
	}
}

func TestAbortEndsATransaction(t *testing.T) {
	reached := make(chan struct{})
	p := &peer{rcpt: func(int) string { close(reached); return hang }}
	_, s := dialPeer(t, p)
	go func() {
		<-reached
		s.Abort()
	}()
	// The reply to MAIL may or may not have been read before.
	if out := s.Send(transaction(1)); out[0].Status != relay.Deferred || out[0].Reply.Enhanced != "4.4.2" || !s.Dead() {
		t.Errorf("%s, dead %v", brief(out), s.Dead())
	}
}
