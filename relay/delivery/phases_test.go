package delivery

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/policy"
)

// The table of every phase × reply × number of recipients × pipelining. The
// expected outcome of each is not written down but follows from rules, which
// are RFC 5321's: see expectation.

// effect is what a reply means whatever it answers.
type effect int

const (
	positive     effect = iota // 2yz
	intermediate               // 3yz
	transient                  // 4yz
	permanent                  // 5yz
	closing                    // 421
	noSMTP                     // not a reply at all
	noAnswer                   // closed, or silent until the timeout
	twice                      // the right reply, and then one that nobody asked for
)

type wireReply struct {
	name   string
	text   string // "" with late and twice: what belongs there
	effect effect
	brief  string // code and enhanced code as brief writes them
	slowly bool   // byte by byte
}

var wireReplies = []wireReply{
	{name: "odd 2yz", text: "299 2.9.9 odd", effect: positive, brief: "299/2.9.9"},
	{name: "2yz on many lines", text: "250-2.9.9 one\r\n250-2.9.9 two\r\n250 2.9.9 three", effect: positive, brief: "250/2.9.9"},
	{name: "3yz", text: "333 go on", effect: intermediate, brief: "333"},
	{name: "4yz", text: "451 4.3.0 later", effect: transient, brief: "451/4.3.0"},
	{name: "4yz on many lines", text: "450-4.2.1 one\r\n450-4.2.1 two\r\n450 4.2.1 three", effect: transient, brief: "450/4.2.1"},
	{name: "452", text: "452 4.3.1 full", effect: transient, brief: "452/4.3.1"},
	{name: "421", text: "421 4.3.2 closing", effect: closing, brief: "421/4.3.2"},
	{name: "5yz", text: "550 5.7.1 no", effect: permanent, brief: "550/5.7.1"},
	{name: "554", text: "554 5.0.0 no", effect: permanent, brief: "554/5.0.0"},
	{name: "521", text: "521 5.3.2 takes no mail", effect: permanent, brief: "521/5.3.2"}, // RFC 7504
	{name: "556", text: "556 5.1.10 takes no mail", effect: permanent, brief: "556/5.1.10"},
	{name: "5yz on many lines", text: "554-5.7.1 one\r\n554 5.7.1 two", effect: permanent, brief: "554/5.7.1"},
	{name: "1yz", text: "150 wait", effect: noSMTP},
	{name: "nonsense", text: "hello", effect: noSMTP},
	{name: "closed", text: closeNow, effect: noAnswer},
	{name: "silent", text: hang, effect: noAnswer},
	{name: "twice", effect: twice},
	{name: "late", effect: positive, brief: "", slowly: true},
}

// faulty is a peer that errs at one point and is right elsewhere. The fault
// is in the first transaction, or in the second one for "rset" and "between".
type faulty struct {
	pipelining bool
	chunking   bool // mail goes in two chunks
	phase      string
	at         func(i int) bool // which RCPT
	reply      wireReply

	stage atomic.Int32 // transactions begun
	quits atomic.Int32
}

// right is what a host says where nothing is wrong.
var right = map[string]string{"connect": "220 hi", "mail": "250 2.1.0 ok", "rcpt": "250 2.1.5 ok", "data": "354 go", "dot": "250 2.0.0 ok",
	"chunk": "250 2.0.0 ok", "last": "250 2.0.0 ok",
	"rset": "250 2.0.0 ok", "starttls": "454 4.7.0 not now", "quit": "221 2.0.0 bye"}

func (p *faulty) ehlo() string {
	if p.chunking && p.pipelining {
		return "250-hi\r\n250-STARTTLS\r\n250-CHUNKING\r\n250 PIPELINING"
	}
	if p.chunking {
		return "250-hi\r\n250-STARTTLS\r\n250 CHUNKING"
	}
	if p.pipelining {
		return "250-hi\r\n250-STARTTLS\r\n250 PIPELINING"
	}
	return "250-hi\r\n250 STARTTLS"
}

// answer returns what to say at a phase, and whether it is the fault.
func (p *faulty) answer(phase string, i int) (string, bool) {
	normal := right[phase]
	if phase == "ehlo" {
		normal = p.ehlo()
	}
	first := p.stage.Load() <= 1
	switch {
	case p.phase == "rset" && phase == "mail" && first:
		return "550 5.7.1 the session needs a RSET", false
	case p.phase != phase, phase == "rcpt" && !p.at(i), !first && phase != "rset" && phase != "quit":
		return normal, false
	case p.reply.text != "":
		return p.reply.text, true
	case p.reply.effect == twice:
		return normal + "\r\n250 2.0.0 more", true
	}
	return normal, true
}

func (p *faulty) say(c net.Conn, phase string, i int) (string, bool) {
	text, fault := p.answer(phase, i)
	if !fault || !p.reply.slowly {
		return text, say(c, text)
	}
	for _, b := range []byte(text + "\r\n") {
		if _, err := c.Write([]byte{b}); err != nil {
			return text, false
		}
	}
	return text, true
}

func (p *faulty) serve(c net.Conn) {
	defer c.Close()
	if _, ok := p.say(c, "connect", 0); !ok {
		return
	}
	r := bufio.NewReader(c)
	for rcpts := 0; ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		phase := strings.ToLower(strings.TrimSpace(strings.SplitN(line, " ", 2)[0]))
		switch phase {
		case "mail":
			p.stage.Add(1)
			rcpts = 0
		case "rcpt":
			rcpts++
		case "quit":
			p.quits.Add(1)
			p.say(c, phase, 0)
			return
		}
		if phase == "bdat" {
			size, last := 0, ""
			if _, err := fmt.Sscan(strings.TrimPrefix(line, "BDAT ")+" more", &size, &last); err != nil {
				return
			}
			if _, err := io.CopyN(io.Discard, r, int64(size)); err != nil {
				return
			}
			if phase = "chunk"; last == "LAST" {
				phase = "last"
			}
		}
		said, ok := p.say(c, phase, rcpts-1)
		if !ok {
			return
		}
		if phase != "data" || said[0] != '3' {
			continue
		}
		for line != ".\r\n" {
			if line, err = r.ReadString('\n'); err != nil {
				return
			}
		}
		if _, ok = p.say(c, "dot", 0); ok && p.phase == "between" && p.stage.Load() == 1 {
			ok = say(c, p.reply.text)
		}
		if !ok {
			return
		}
	}
}

func (p *faulty) start(t *testing.T) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// expectation is what the rules say about a case.
type expectation struct {
	dial  string   // outcome of a dial that fails; "" if a session opens
	sent  []string // outcomes of the transaction
	alive bool     // the session goes on
}

func all(n int, brief string) []string { return slices.Repeat([]string{brief}, n) }

const deliveredBrief = "delivered/final-dot/250/2.0.0"

// opening holds the rules before MAIL: whatever is said is about us or about
// that host, so nobody fails; STARTTLS is tried, not needed.
func opening(phase string, r *wireReply, n int) expectation {
	fine := expectation{sent: all(n, deliveredBrief), alive: true}
	switch {
	case phase == "starttls" && r.effect == closing:
		return expectation{dial: "deferred/starttls/" + r.brief}
	case phase == "starttls" && r.effect != twice, r.effect == positive:
		return fine // in clear text, over a new connection if need be
	case r.effect == twice && phase == "connect":
		return expectation{dial: "deferred/ehlo/4.5.0"}
	case r.effect == twice:
		return expectation{sent: all(n, "not-tried/mail/4.5.0")}
	case r.effect == noSMTP:
		return expectation{dial: "deferred/" + phase + "/4.5.0"}
	case r.effect == noAnswer:
		return expectation{dial: "deferred/" + phase + "/4.4.2"}
	}
	return expectation{dial: "deferred/" + phase + "/" + r.brief}
}

// command holds the rules of MAIL, DATA and the final dot, whose replies are
// about all recipients; after the dot, silence means doubt.
func command(phase string, r *wireReply, n int, pipelining bool) expectation {
	name, lost := phase, "deferred/"
	switch phase {
	case "dot", "last":
		name, lost, phase = "final-dot", "doubt/", "dot"
	case "chunk":
		name = "data"
	}
	switch r.effect {
	case positive:
		switch {
		case phase == "data" && r.text != "":
			return expectation{sent: all(n, "deferred/data/4.5.0")} // 250 is no go-ahead
		case phase == "dot" && r.text != "":
			return expectation{sent: all(n, "delivered/final-dot/"+r.brief), alive: true}
		}
		return expectation{sent: all(n, deliveredBrief), alive: true}
	case intermediate:
		if phase == "data" {
			return expectation{sent: all(n, deliveredBrief), alive: true} // RFC 5321 section 4.2.1: the first digit counts
		}
		return expectation{sent: all(n, lost+name+"/4.5.0")}
	case transient:
		return expectation{sent: all(n, "deferred/"+name+"/"+r.brief), alive: true}
	case permanent:
		return expectation{sent: all(n, "failed/"+name+"/"+r.brief), alive: true}
	case closing:
		return expectation{sent: all(n, "deferred/"+name+"/"+r.brief)}
	case noSMTP:
		return expectation{sent: all(n, lost+name+"/4.5.0")}
	case noAnswer:
		return expectation{sent: all(n, lost+name+"/4.4.2")}
	}
	// Twice. Pipelined, every reply answers the command before its own, until
	// DATA gets what a recipient was told.
	switch {
	case phase == "mail" && !pipelining:
		return expectation{sent: all(n, "deferred/rcpt/4.5.0")}
	case phase == "dot":
		return expectation{sent: all(n, deliveredBrief)} // what follows is the next transaction's trouble
	}
	return expectation{sent: all(n, "deferred/data/4.5.0")}
}

// recipients holds the rules of RCPT: a refusal is about that recipient only.
func recipients(r *wireReply, n int, at func(int) bool, pipelining bool) expectation {
	firstAt := 0
	for !at(firstAt) {
		firstAt++
	}
	each := func(hit string) []string {
		out := all(n, deliveredBrief)
		for i := range out {
			if at(i) {
				out[i] = hit
			}
		}
		return out
	}
	switch r.effect {
	case positive:
		return expectation{sent: all(n, deliveredBrief), alive: true}
	case transient:
		return expectation{sent: each("deferred/rcpt/" + r.brief), alive: true}
	case permanent:
		return expectation{sent: each("failed/rcpt/" + r.brief), alive: true}
	case closing:
		out := all(n, "deferred/rcpt/"+r.brief)
		for i := firstAt + 1; i < n; i++ {
			out[i] = "not-tried/rcpt/" + r.brief // nobody has judged those
		}
		return expectation{sent: out}
	case noAnswer:
		return expectation{sent: all(n, "deferred/rcpt/4.4.2")}
	case twice:
		if pipelining || firstAt == n-1 {
			return expectation{sent: all(n, "deferred/data/4.5.0")}
		}
	}
	return expectation{sent: all(n, "deferred/rcpt/4.5.0")}
}

// between holds the rules of RSET and of what a host says unasked between two
// transactions: the session is used up, and the message was never offered.
func between(phase string, r *wireReply, n int, pipelining bool) expectation {
	switch {
	case r.effect == closing:
		return expectation{sent: all(n, "not-tried/mail/"+r.brief)}
	case r.effect == noAnswer:
		return expectation{sent: all(n, "not-tried/mail/4.4.2")}
	case phase == "between":
		return expectation{sent: all(n, "not-tried/mail/4.5.0")}
	case r.effect == positive:
		return expectation{sent: all(n, deliveredBrief), alive: true}
	case r.effect == noSMTP, r.effect == twice && !pipelining:
		return expectation{sent: all(n, "deferred/mail/4.5.0")}
	case r.effect == twice:
		return expectation{sent: all(n, "deferred/data/4.5.0")}
	}
	return expectation{sent: all(n, "not-tried/mail/"+r.brief)}
}

func TestEveryPhaseAndReply(t *testing.T) {
	everyone := func(int) bool { return true }
	for _, phase := range []string{"connect", "ehlo", "starttls", "mail", "rcpt", "data", "dot", "chunk", "last", "rset", "between", "quit"} {
		t.Run(phase, func(t *testing.T) {
			t.Parallel()
			for _, r := range wireReplies {
				for _, n := range []int{1, 2, 100} {
					for _, pipelining := range []bool{true, false} {
						name := fmt.Sprintf("%s/%d/pipelining=%v", r.name, n, pipelining)
						p := &faulty{pipelining: pipelining, phase: phase, at: everyone, reply: r, chunking: phase == "chunk" || phase == "last"}
						switch phase {
						case "connect", "ehlo", "starttls":
							if phase == "ehlo" && r.name == "odd 2yz" {
								p.pipelining = false // it offered nothing
							}
							p.check(t, name, n, opening(phase, &r, n))
						case "rcpt":
							for where, at := range map[string]func(int) bool{"first": func(i int) bool { return i == 0 }, "middle": func(i int) bool { return i == n/2 },
								"last": func(i int) bool { return i == n-1 }, "all": everyone} {
								q := &faulty{pipelining: pipelining, phase: phase, at: at, reply: r}
								q.check(t, name+"/"+where, n, recipients(&r, n, at, pipelining))
							}
						case "rset", "between":
							if phase == "between" && (r.text == "" || r.text == hang) {
								continue // nothing is said there
							}
							p.check(t, name, n, between(phase, &r, n, pipelining))
						case "quit":
							if r.text == hang && n != 1 {
								continue // it takes a second
							}
							p.check(t, name, n, expectation{sent: all(n, deliveredBrief), alive: true})
						default:
							p.check(t, name, n, command(phase, &r, n, pipelining))
						}
					}
				}
			}
		})
	}
}

// hurry makes the one timeout short that a silent host makes pass.
func hurry(p *policy.Delivery, phase string) {
	const soon = policy.Duration(40 * time.Millisecond)
	switch phase {
	case "connect":
		p.GreetingTimeout = soon
	case "ehlo":
		p.EHLOTimeout = soon
	case "starttls":
		p.EHLOTimeout = 15 * soon // EHLO before STARTTLS is answered, and again in clear text
	case "mail", "rset":
		p.MailTimeout = soon
	case "rcpt":
		p.RcptTimeout = soon
	case "data":
		p.DataTimeout = soon
	case "dot", "last":
		p.FinalDotTimeout = soon
	case "chunk":
		p.BlockTimeout = 5 * soon // also what a busy machine may take to write one
	}
}

func (p *faulty) check(t *testing.T, name string, n int, want expectation) {
	t.Run(name, func(t *testing.T) {
		f := newFixture(t, p.start(t))
		early := p.phase != "rset" && p.reply.text == hang
		if early {
			hurry(f.policy, p.phase)
		}
		s, failure := f.dialer.Dial(t.Context(), target(policy.TLSOpportunistic, hostsAt("127.0.0.1")...))
		if failure != nil {
			if got := brief([]relay.Outcome{failure.Outcome(0)}); got != want.dial {
				t.Errorf("dial: %s, want %q", got, want.dial)
			}
			return
		}
		t.Cleanup(s.Abort)
		if want.dial != "" {
			t.Fatalf("a session opened, want %s", want.dial)
		}
		if p.phase == "rset" || p.phase == "between" {
			first := "failed/mail/550/5.7.1"
			if p.phase == "between" {
				first = deliveredBrief
			}
			if got := brief(s.Send(transaction(1))); got != first {
				t.Fatalf("the transaction before: %s", got)
			}
			if p.phase == "between" {
				s.waitForTalk(t)
			}
			if !early && p.reply.text == hang {
				hurry(f.policy, p.phase)
			}
		}
		tx := transaction(n)
		if p.chunking {
			tx.Chunking, tx.Content.Bytes = policy.ChunkAuto, twoChunks()
		}
		for i, o := range s.Send(tx) {
			if got := brief([]relay.Outcome{o}); got != want.sent[i] || o.Reply.Text == "" {
				t.Errorf("recipient %d: %s with %q, want %s", i, got, o.Reply.Text, want.sent[i])
				break
			}
		}
		if p.reply.effect == twice && (p.phase == "dot" || p.phase == "last") {
			s.waitForTalk(t)
			want.alive = s.Alive()
			if want.alive {
				t.Error("a session with an unasked reply counts as alive")
			}
		}
		if s.Dead() == want.alive {
			t.Errorf("session dead: %v, want %v", s.Dead(), !want.alive)
		}
		if want.alive && p.phase != "quit" {
			// The fault was in one transaction only: the next is as good as any.
			if got := brief(s.Send(transaction(1))); got != deliveredBrief {
				t.Errorf("the transaction behind: %s", got)
			}
		}
		s.Quit()
		if want.alive && p.quits.Load() != 1 {
			t.Errorf("%d QUIT", p.quits.Load())
		}
	})
}

// twoChunks is text that goes in two chunks.
var twoChunks = sync.OnceValue(func() []byte { return chunkedText(maxChunkBytes + 1000) })

// waitForTalk waits until the host has said something unasked or closed.
func (s *Session) waitForTalk(t *testing.T) {
	t.Helper()
	if s.in.buffered() > 0 {
		return
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := s.conn.Read(s.in.buf[s.in.to:])
	if s.in.to += n; err != nil && err != io.EOF {
		t.Fatal(err)
	}
}
