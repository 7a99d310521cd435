package delivery

import (
	"io"
	"net"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/relay/tlspolicy"
	"github.com/relais-mta/relais/shared/policy"
)

// FuzzSession has a host say any bytes, whatever it is asked, and then hang up.
// Every recipient gets an outcome whose words are fit to be kept, and nobody is
// delivered to by a host that never said so.
func FuzzSession(f *testing.F) {
	for _, seed := range []string{
		"220 hi\r\n250-x\r\n250 PIPELINING\r\n250 ok\r\n250 ok\r\n550 no\r\n354 go\r\n250 taken\r\n",
		"220 hi\n500 what\n250 helo\n250 ok\n450 4.2.1 no\n421 bye\n",
		"220 hi\r\n250-CHUNKING\r\n250-BINARYMIME\r\n250-SMTPUTF8\r\n250 8BITMIME\r\n250 a\r\n250 b\r\n251 c\r\n552 5.3.4 d\r\n",
		"421 4.3.2 \x00\xff\r\n", "220-\r\n", "\r\n", "220 \r\n250 STARTTLS\r\n220 \r\n",
	} {
		f.Add([]byte(seed), false)
		f.Add([]byte(seed), true)
	}
	p := testPolicy()
	f.Fuzz(func(t *testing.T, said []byte, binary bool) {
		client, host := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(io.Discard, host)
		}()
		go func() {
			_, _ = host.Write(said) // cut off when the session ends
			host.Close()
		}()
		defer func() {
			client.Close()
			<-done
		}()
		s := newSession(client, func() *policy.Delivery { return p }, Peer{MX: "mx.example"})
		tx := transaction(2)
		tx.Binary = binary
		if !binary {
			tx.Chunking = policy.ChunkAuto // with ChunkFromBytes 0, whatever the size
		}
		tx.Recipients[1] = utf8Recipient(11)
		var outcomes []relay.Outcome
		if failure := s.begin("out.sender.example", tlspolicy.Clear, nil); failure != nil {
			outcomes = append(outcomes, failure.Outcome(10))
		} else if outcomes = s.Send(tx); len(outcomes) != 2 {
			t.Fatalf("%d outcomes", len(outcomes))
		}
		s.Abort()
		for _, o := range outcomes {
			if o.Status == undecided || o.Status == accepted || o.Phase == relay.PhaseNone {
				t.Errorf("no outcome: %+v", o)
			}
			if o.Status == relay.Delivered && o.Reply.Code/100 != 2 || o.Status == relay.Failed && o.Reply.Code/100 != 5 && o.Phase != relay.PhaseLocal {
				t.Errorf("%+v on such a reply", o)
			}
			if len(o.Reply.Text) > relay.MaxReplyTextBytes || !utf8.ValidString(o.Reply.Text) {
				t.Errorf("a reason of %d bytes: %q", len(o.Reply.Text), o.Reply.Text)
			}
			for _, c := range o.Reply.Text {
				if c < 0x20 || c == 0x7f {
					t.Errorf("a control character in %q", o.Reply.Text)
				}
			}
		}
	})
}

// TestTimeoutsOfTheDefaultPolicy: none is shorter than RFC 5321 section 4.5.3.2
// wants it.
func TestTimeoutsOfTheDefaultPolicy(t *testing.T) {
	document, err := policy.Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &document.Delivery
	for name, tc := range map[string]struct {
		is    policy.Duration
		least time.Duration
	}{
		"greeting":  {d.GreetingTimeout, 5 * time.Minute}, // section 4.5.3.2.1
		"EHLO":      {d.EHLOTimeout, 5 * time.Minute},
		"MAIL":      {d.MailTimeout, 5 * time.Minute},      // section 4.5.3.2.2
		"RCPT":      {d.RcptTimeout, 5 * time.Minute},      // section 4.5.3.2.3
		"DATA":      {d.DataTimeout, 2 * time.Minute},      // section 4.5.3.2.4
		"block":     {d.BlockTimeout, 3 * time.Minute},     // section 4.5.3.2.5
		"final dot": {d.FinalDotTimeout, 10 * time.Minute}, // section 4.5.3.2.6
	} {
		if tc.is.D() < tc.least {
			t.Errorf("%s: %v, want %v or more", name, tc.is.D(), tc.least)
		}
	}
}
