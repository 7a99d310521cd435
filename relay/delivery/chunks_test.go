package delivery

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// chunkedText is a mail of at least n octets with dots where DATA would double
// them.
func chunkedText(n int) []byte {
	out := []byte("Subject: chunks\r\n\r\n")
	for i := 0; len(out) < n; i++ {
		out = append(out, fmt.Sprintf("line %d\r\n.\r\n..\r\n", i)...)
	}
	return out
}

// TestChunkedTextAgainstLibraryServer: large text arrives octet for octet, signed
// or not, from memory or not, and what is small goes by DATA.
func TestChunkedTextAgainstLibraryServer(t *testing.T) {
	b := &backend{}
	server := smtp.NewServer(b)
	server.Domain, server.MaxMessageBytes = "library.example", 64<<20
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
	f.policy.Chunking, f.policy.ChunkFromBytes = policy.ChunkAuto, 1000
	s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
	if failure != nil {
		t.Fatalf("%+v", failure)
	}
	defer s.Quit()
	const signature = "DKIM-Signature: v=1; b=x\r\n"
	var want []string
	for i, n := range []int{10, 1000, maxChunkBytes, maxChunkBytes + 1, 10*maxChunkBytes + 7} {
		message := chunkedText(n)
		tx := transaction(2)
		if tx.Content = (Content{Bytes: message}); i%2 == 1 {
			tx.Content = Content{Reader: bytes.NewReader(message), Length: int64(len(message))}
		}
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
		if got := brief(s.Send(tx)); got != deliveredBrief+" "+deliveredBrief {
			t.Fatalf("%d: %s", n, got)
		}
		want = append(want, signature+string(message))
	}
	for i, w := range want {
		if m := b.mails[i]; string(m.data) != w {
			t.Errorf("mail %d arrived with %d bytes of %d", i, len(m.data), len(w))
		}
	}
}

// TestWhatGoesInChunks: size, the provider's word before that of all, what the
// host takes.
func TestWhatGoesInChunks(t *testing.T) {
	const from = 5000
	for _, tt := range []struct {
		name, all, provider, extensions string
		content                         []byte
		want                            bool
	}{
		{"large", policy.ChunkAuto, "", "CHUNKING", chunkedText(from), true},
		{"small", policy.ChunkAuto, "", "CHUNKING", chunkedText(from - 100)[:from-100], false},
		{"the host cannot", policy.ChunkAuto, "", "8BITMIME", chunkedText(from), false},
		{"binary only", policy.ChunkBinaryOnly, "", "CHUNKING", chunkedText(from), false},
		{"off", policy.ChunkOff, "", "CHUNKING", chunkedText(from), false},
		{"off, but not for this provider", policy.ChunkOff, policy.ChunkAuto, "CHUNKING", chunkedText(from), true},
		{"not for this provider", policy.ChunkAuto, policy.ChunkOff, "CHUNKING", chunkedText(from), false},
		{"no line end at the end", policy.ChunkAuto, "", "CHUNKING", append(chunkedText(from), 'x'), false},
	} {
		p := &peer{extensions: []string{tt.extensions, "PIPELINING"}}
		f, s := dialPeer(t, p)
		f.policy.Chunking, f.policy.ChunkFromBytes = tt.all, from
		tx := transaction(1)
		tx.Chunking, tx.Content.Bytes = tt.provider, tt.content
		if got := brief(s.Send(tx)); tt.want == (got == deliveredBrief) { // this peer knows DATA only
			t.Errorf("%s: %s", tt.name, got)
		}
		commands, _ := p.got()
		if got := strings.Contains(strings.Join(commands, "\n"), "BDAT"); got != tt.want {
			t.Errorf("%s: BDAT %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestPolicyAgainstBinary: without chunks binary mail cannot go.
func TestPolicyAgainstBinary(t *testing.T) {
	for mode, want := range map[string]string{policy.ChunkOff: "failed/local/5.6.3", policy.ChunkBinaryOnly: deliveredBrief} {
		f := newFixture(t, chunkPeer(t, true, "250 2.1.5 ok"))
		f.policy.Chunking = mode
		s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		defer s.Abort()
		tx := transaction(1)
		tx.Binary, tx.Content.Bytes = true, binary(10)
		if got := brief(s.Send(tx)); got != want {
			t.Errorf("%s: %s, want %s", mode, got, want)
		}
	}
}

// TestRefusalAheadOfChunks: a refusal comes while chunks behind it are under way.
// No more are begun, and the session knows which replies are whose.
func TestRefusalAheadOfChunks(t *testing.T) {
	const ok, sequence = "250 2.0.0 ok", "503 5.5.1 the message was refused"
	for _, tt := range []struct {
		name   string
		chunks []string
		want   string
		dead   bool
	}{
		{"refused", []string{"552 5.3.4 too big", sequence, sequence, sequence, sequence, sequence, sequence, sequence}, "failed/data/552/5.3.4", false},
		{"put off later", []string{ok, ok, ok, "452 4.3.1 full", sequence, sequence, sequence, sequence, sequence, sequence, sequence}, "deferred/data/452/4.3.1", false},
		{"refused near the end", append(strings.Split(strings.Repeat(ok+"\n", 11)[:11*(len(ok)+1)-1], "\n"), "554 5.6.0 no"), "failed/data/554/5.6.0", false},
		{"421 behind the refusal", []string{"552 5.3.4 too big", "421 4.3.2 bye"}, "failed/data/552/5.3.4", true},
		{"closed behind the refusal", []string{"552 5.3.4 too big", closeNow}, "failed/data/552/5.3.4", true},
		{"closed", []string{ok, ok, closeNow}, "deferred/data/4.4.2", true},
		{"go-ahead", []string{ok, "354 go"}, "deferred/data/4.5.0", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, chunkPeer(t, true, ok, tt.chunks...))
			s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
			if failure != nil {
				t.Fatalf("%+v", failure)
			}
			defer s.Abort()
			tx := transaction(1)
			text := chunkedText(12*maxChunkBytes + 1)
			tx.Chunking, tx.Content = policy.ChunkAuto, Content{Reader: bytes.NewReader(text), Length: int64(len(text))}
			tx.Commit = func() error {
				t.Error("the end was journalled although the message was refused before")
				return nil
			}
			if out := s.Send(tx); brief(out) != tt.want || s.Dead() != tt.dead {
				t.Fatalf("%s with %q, dead %v, want %s, %v", brief(out), out[0].Reply.Text, s.Dead(), tt.want, tt.dead)
			}
			if !tt.dead {
				again := transaction(1)
				again.Chunking, again.Content.Bytes = policy.ChunkAuto, chunkedText(100)
				if out := s.Send(again); out[0].Status != relay.Delivered {
					t.Errorf("the transaction behind: %s", brief(out))
				}
			}
		})
	}
}

// TestHostClosesWithinChunks: a host that breaks off while chunks are written may
// have said why to one before; nothing that broke off before LAST is in doubt.
func TestHostClosesWithinChunks(t *testing.T) {
	for _, tt := range []struct{ say, want string }{
		{"", "deferred/data/4.4.2"},
		{"250 2.0.0 ok\r\n554 5.7.1 no\r\n", "failed/data/554/5.7.1"},
		{"250 2.0.0 ok\r\n", "deferred/data/4.4.2"},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			r := bufio.NewReader(c)
			say(c, "220 hi")
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				switch {
				case strings.HasPrefix(line, "EHLO"):
					say(c, "250-hi\r\n250-PIPELINING\r\n250 CHUNKING")
				case strings.HasPrefix(line, "BDAT"):
					_, _ = io.CopyN(io.Discard, r, 3*maxChunkBytes/2)
					_, _ = io.WriteString(c, tt.say)
					_ = c.(*net.TCPConn).CloseWrite()
					_, _ = io.CopyN(io.Discard, r, maxChunkBytes)
					return
				default:
					say(c, "250 2.0.0 ok")
				}
			}
		}()
		f := newFixture(t, l.Addr().(*net.TCPAddr).AddrPort().Port())
		s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		tx := transaction(1)
		tx.Chunking, tx.Content.Bytes = policy.ChunkAuto, chunkedText(16*maxChunkBytes)
		if got := brief(s.Send(tx)); got != tt.want || !s.Dead() {
			t.Errorf("%q: %s, dead %v, want %s", tt.say, got, s.Dead(), tt.want)
		}
		s.Abort()
		l.Close()
		<-done
	}
}

// TestChunksCarryTextOnly: a bare CR or LF that got this far does not get further.
func TestChunksCarryTextOnly(t *testing.T) {
	for _, bad := range []string{"a\rb", "a\nb", "\r\r\n", "\n\r\n"} {
		f := newFixture(t, chunkPeer(t, true, "250 2.1.5 ok"))
		s, failure := f.dialer.Dial(t.Context(), target("", hostsAt("127.0.0.1")...))
		if failure != nil {
			t.Fatalf("%+v", failure)
		}
		tx := transaction(1)
		tx.Chunking = policy.ChunkAuto
		tx.Content.Bytes = append(append(chunkedText(readBytes*3), bad...), "\r\nend\r\n"...)
		if got := brief(s.Send(tx)); got != "failed/local/5.6.0" || !s.Dead() {
			t.Errorf("%q: %s", bad, got)
		}
		s.Abort()
	}
}

func FuzzTextCheck(f *testing.F) {
	f.Add([]byte("a\r\nb\r\n"), 2)
	f.Add([]byte("a\r\r\n"), 2)
	f.Add([]byte("\n"), 1)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		text = append(text, '\r', '\n') // as what goes in chunks ends
		var c textCheck
		ok := true
		for rest := text; ok && len(rest) > 0; {
			n := min(max(1, piece), len(rest))
			ok = c.add(rest[:n])
			rest = rest[n:]
		}
		var st stuffer
		st.start()
		_, err := st.append(nil, text)
		if ok != (err == nil) {
			t.Errorf("in chunks %v, by DATA %v", ok, err)
		}
	})
}
