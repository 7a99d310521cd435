package delivery

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func utf8Recipient(i int) Recipient {
	return Recipient{Index: uint16(i), Address: mailaddr.Address{Local: "josé", Domain: "xn--bcher-kva.example"}}
}

// TestSMTPUTF8: what needs the extension goes with it or fails with 5.6.7; what
// does not need it goes to any host, and never with it (RFC 6531 section 3.4).
func TestSMTPUTF8(t *testing.T) {
	const (
		fine    = "delivered/final-dot/250/2.0.0"
		refused = "failed/local/5.6.7"
	)
	able, unable, without8 := []string{"PIPELINING", "8BITMIME", "SMTPUTF8"}, []string{"PIPELINING", "8BITMIME"}, []string{"SMTPUTF8"}
	for _, tc := range []struct {
		name       string
		extensions []string
		address    bool // the second of two recipients needs it
		content    bool
		want       string
		mail       string // behind the path; "-": no MAIL
	}{
		{"nothing needs it", able, false, false, fine + " " + fine, ""},
		{"address", able, true, false, fine + " " + fine, " SMTPUTF8"},
		{"content", able, false, true, fine + " " + fine, " BODY=8BITMIME SMTPUTF8"},
		{"nothing needs it, host lacks it", unable, false, false, fine + " " + fine, ""},
		{"address, host lacks it", unable, true, false, fine + " " + refused, ""},
		{"content, host lacks it", unable, false, true, refused + " " + refused, "-"},
		{"address, host lacks 8BITMIME", without8, true, false, fine + " " + refused, ""},
		{"content, host lacks 8BITMIME", without8, false, true, refused + " " + refused, "-"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := &peer{extensions: tc.extensions}
			_, s := dialPeer(t, p)
			tx := transaction(2)
			if tc.address {
				tx.Recipients[1] = utf8Recipient(11)
			}
			if tc.content {
				tx.UTF8, tx.EightBit = true, true
				tx.Content.Bytes = []byte("Subject: déjà vu\r\n\r\nhello\r\n")
			}
			if got := brief(s.Send(tx)); got != tc.want || s.Dead() {
				t.Errorf("%s, want %s", got, tc.want)
			}
			commands, _ := p.got()
			i := slices.IndexFunc(commands, func(c string) bool { return strings.HasPrefix(c, "MAIL") })
			if i < 0 != (tc.mail == "-") || i >= 0 && commands[i] != "MAIL FROM:<b+1@bounce.sender.example>"+tc.mail {
				t.Errorf("commands %q", commands)
			}
			wrote := slices.Contains(commands, "RCPT TO:<josé@xn--bcher-kva.example>")
			if wrote != (tc.address && tc.want == fine+" "+fine) {
				t.Errorf("commands %q", commands)
			}
		})
	}
}

func TestAddressThatIsNoUTF8(t *testing.T) {
	p := &peer{extensions: []string{"8BITMIME", "SMTPUTF8"}}
	_, s := dialPeer(t, p)
	for _, local := range []string{"a\xff", "a\u0085b", "é\r\nDATA", "é\u2028"} {
		tx := transaction(1)
		tx.Recipients[0].Address.Local = local
		if got := brief(s.Send(tx)); got != "failed/local/5.1.3" {
			t.Errorf("%q: %s", local, got)
		}
	}
}

// binary is a message with everything that no line of text has.
func binary(n int) []byte {
	out := []byte("From: a@sender.example\r\nContent-Transfer-Encoding: binary\r\n\r\n")
	for i := range n {
		out = append(out, byte(i*7), '\n', '.', '\r', 0, '\r', '\n', '.', '\r', '\n')
	}
	return out
}

// TestBinaryAgainstLibraryServer: BINARYMIME arrives octet for octet, of
// whatever size, and ordinary mail goes on by DATA beside it.
func TestBinaryAgainstLibraryServer(t *testing.T) {
	b := &backend{}
	server := smtp.NewServer(b)
	server.Domain, server.EnableBINARYMIME, server.EnableSMTPUTF8, server.MaxMessageBytes = "library.example", true, true, 8<<20
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
	f := newFixture(t, l.Addr().(*net.TCPAddr).AddrPort().Port())
	s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	defer s.Quit()
	const signature = "DKIM-Signature: v=1; b=x\r\n"
	var want [][]byte
	for _, n := range []int{0, 1, 100_000, 500_000} {
		message := binary(n)
		tx := transaction(2)
		tx.Binary, tx.EightBit = true, n > 0
		tx.Content = Content{Reader: bytes.NewReader(message), Length: int64(len(message))}
		tx.Sign = func([]byte) ([]byte, error) { return []byte(signature), nil }
		tx.SignatureBytes = len(signature)
		tx.Commit = func() error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if len(b.mails) != len(want) {
				t.Error("the message was complete before the journal record was")
			}
			return nil
		}
		if got := brief(s.Send(tx)); got != "delivered/final-dot/250/2.0.0 delivered/final-dot/250/2.0.0" {
			t.Fatalf("%d: %s", n, got)
		}
		want = append(want, append([]byte(signature), message...))
	}
	tx := transaction(1)
	tx.Recipients[0] = utf8Recipient(10)
	if got := brief(s.Send(tx)); got != "delivered/final-dot/250/2.0.0" {
		t.Fatal(got)
	}
	want = append(want, []byte(testMessage))
	big := binary(1_000_000)
	tx = transaction(1)
	tx.Binary, tx.Content = true, Content{Bytes: big}
	if got := brief(s.Send(tx)); got != "failed/local/5.3.4" {
		t.Errorf("larger than SIZE: %s", got)
	}
	for i, w := range want {
		m := b.mails[i]
		kind := smtp.BodyBinaryMIME
		if i == len(want)-1 {
			kind = ""
		}
		if !bytes.Equal(m.data, w) || m.body != kind || m.size != int64(len(w)) {
			t.Errorf("mail %d arrived with %d bytes of %d as %q, SIZE=%d", i, len(m.data), len(w), m.body, m.size)
		}
	}
	if got := b.mails[len(want)-1].to; !slices.Equal(got, []string{"josé@xn--bcher-kva.example"}) {
		t.Errorf("mail with UTF-8 went to %q", got)
	}
}

// TestBinaryIsNeverDowngraded: without both extensions nothing is offered.
func TestBinaryIsNeverDowngraded(t *testing.T) {
	for _, extensions := range [][]string{{"8BITMIME"}, {"CHUNKING", "8BITMIME"}, {"BINARYMIME", "8BITMIME", "PIPELINING"}} {
		p := &peer{extensions: extensions}
		_, s := dialPeer(t, p)
		tx := transaction(2)
		tx.Binary, tx.Content.Bytes = true, binary(1)
		if got := brief(s.Send(tx)); got != "failed/local/5.6.3 failed/local/5.6.3" || s.Dead() {
			t.Errorf("%q: %s", extensions, got)
		}
		if commands, _ := p.got(); len(commands) != 1 {
			t.Errorf("commands %q", commands)
		}
	}
}

// chunkPeer takes BDAT and answers the n-th chunk by script.
func chunkPeer(t *testing.T, pipelining bool, rcpt string, chunks ...string) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		r := bufio.NewReader(c)
		say(c, "220 hi")
		for n := 0; ; {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			verb, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			reply := "250 2.0.0 ok"
			switch verb {
			case "EHLO":
				reply = "250-hi\r\n250-CHUNKING\r\n250 BINARYMIME"
				if pipelining {
					reply = "250-PIPELINING\r\n" + reply
					reply = "250-hi\r\n" + reply
				}
			case "RCPT":
				reply = rcpt
			case "DATA":
				reply = "503 5.5.1 not with BINARYMIME"
			case "BDAT":
				size, _, _ := strings.Cut(rest, " ")
				bytes, err := strconv.Atoi(size)
				if err != nil {
					return
				}
				if n < len(chunks) {
					reply = chunks[n]
				}
				n++
				if reply != closeNow {
					if _, err := io.CopyN(io.Discard, r, int64(bytes)); err != nil {
						return
					}
				}
			}
			if !say(c, reply) {
				return
			}
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// TestChunkReplies is the table of the replies to BDAT, in the middle and at
// the end.
func TestChunkReplies(t *testing.T) {
	const ok = "250 2.0.0 ok"
	for _, tc := range []struct {
		name   string
		rcpt   string
		chunks []string
		want   string
		dead   bool
	}{
		{"taken", ok, nil, "delivered/final-dot/250/2.0.0", false},
		{"first refused", ok, []string{"552 5.3.4 too big"}, "failed/data/552/5.3.4", false},
		{"first deferred", ok, []string{"452 4.3.1 full"}, "deferred/data/452/4.3.1", false},
		{"first 421", ok, []string{"421 4.3.2 bye"}, "deferred/data/421/4.3.2", true},
		{"first 354", ok, []string{"354 go"}, "deferred/data/4.5.0", true},
		{"first nonsense", ok, []string{"hello"}, "deferred/data/4.5.0", true},
		{"first silent", ok, []string{hang}, "deferred/data/4.4.2", true},
		{"first closed", ok, []string{closeNow}, "deferred/data/4.4.2", true},
		{"last refused", ok, []string{ok, "554 5.7.1 spam"}, "failed/final-dot/554/5.7.1", false},
		{"last deferred", ok, []string{ok, "451 4.7.1 later"}, "deferred/final-dot/451/4.7.1", false},
		{"last 421", ok, []string{ok, "421 4.3.2 bye"}, "deferred/final-dot/421/4.3.2", true},
		{"last silent", ok, []string{ok, hang}, "doubt/final-dot/4.4.2", true},
		{"last nonsense", ok, []string{ok, "hello"}, "doubt/final-dot/4.5.0", true},
		{"nobody accepted", "550 5.1.1 no", nil, "failed/rcpt/550/5.1.1", false},
	} {
		for _, pipelining := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/%v", tc.name, pipelining), func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, chunkPeer(t, pipelining, tc.rcpt, tc.chunks...))
				s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
				if failure != nil {
					t.Fatalf("%+v", failure)
				}
				defer s.Abort()
				if slices.Contains(tc.chunks, hang) {
					// The silent reply may be the second: the first must come within it on a busy machine.
					f.policy.BlockTimeout, f.policy.FinalDotTimeout = policy.Duration(1e9), policy.Duration(1e9)
				}
				tx := transaction(1)
				tx.Binary, tx.Content.Bytes = true, binary(maxChunkBytes/10+1000) // two chunks
				out := s.Send(tx)
				if got := brief(out); got != tc.want || s.Dead() != tc.dead {
					t.Errorf("%s with %q, dead %v, want %s", got, out[0].Reply.Text, s.Dead(), tc.want)
				}
				if !tc.dead && tc.rcpt == ok {
					again := transaction(1)
					again.Binary, again.Content.Bytes = true, binary(1)
					if out := s.Send(again); out[0].Status != relay.Delivered {
						t.Errorf("the transaction behind: %s", brief(out))
					}
				}
			})
		}
	}
}
