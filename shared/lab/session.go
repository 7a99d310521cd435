package lab

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	sessionBufferBytes = 64 << 10
	maxCommandBytes    = 4096    // RFC 5321 section 4.5.3.1.4 asks for 512 plus what extensions add
	maxKeptBytes       = 1 << 20 // message memory a connection keeps between messages
	maxBadCommands     = 20      // after that many errors the connection is closed
	replyTimeout       = time.Minute
	sizeMargin         = 1024 // bytes past SIZE read before the message is given up
)

var (
	errClosing = errors.New("lab: session closed by the provider")
	errTooLong = errors.New("lab: command line too long")
)

// session is one connection to a simulated provider.
type session struct {
	farm   *farm
	p      *provider
	lane   *lane
	conn   net.Conn
	source netip.Addr
	mx     netip.Addr
	host   string
	tls    string // negotiated version, "" in clear

	in   []byte // read but not used: in[r:w]
	r, w int
	out  []byte // replies not sent yet
	msg  []byte // message being read, after two bytes of CRLF

	hello    string
	extended bool // EHLO, not HELO
	bad      int
	begun    int // transactions on this connection
	messages int // of those, the ones that reached their final dot
	tx       transaction
}

// transaction is the state MAIL begins and RSET, DATA and EHLO end.
type transaction struct {
	open     bool
	from     string
	eightBit bool
	utf8     bool
	at       time.Time
	to       []string
	worst    fate // what a recipient asked for at DATA or the final dot
	delay    time.Duration
}

func newSession(f *farm, p *provider, conn net.Conn) *session {
	s := &session{farm: f, p: p, conn: conn, in: make([]byte, sessionBufferBytes), msg: []byte("\r\n")}
	if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		s.source = a.AddrPort().Addr().Unmap()
	}
	if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
		s.mx = a.AddrPort().Addr().Unmap()
	}
	s.host = p.hosts[s.mx]
	s.lane = p.lane(s.source, f.start)
	return s
}

// run serves the connection to its end.
func (s *session) run() {
	if s.lane == nil {
		s.say("421 4.3.2 too many different clients")
		_ = s.flush() // the connection ends either way
		return
	}
	limit := s.p.limits.Load().Connections
	seen, over := s.lane.connect(limit, s.farm.ctx.Done())
	s.farm.moved()
	var err error
	if over {
		s.p.breach(s.lane, LimitConnections, limit, seen, 0, time.Now())
		s.refuse(s.word(s.p.profile.Wording.OverConns, "", limit), 1)
		err = errClosing
	} else {
		err = s.serve()
	}
	if ferr := s.flush(); ferr != nil {
		err = ferr
	}
	s.lane.disconnect() // what a client does after our last reply is no open connection
	s.farm.moved()
	if errors.Is(err, errClosing) {
		s.drain()
	}
}

// serve greets and obeys commands until the connection has to end.
func (s *session) serve() error {
	if err := s.greet(); err != nil {
		return err
	}
	for {
		line, err := s.line()
		if errors.Is(err, errTooLong) {
			s.p.fault("command line too long", s.source, "")
			s.say("500 5.5.6 line too long")
			return errClosing
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.say("421 4.4.2 waited too long for a command")
			return errClosing
		}
		if err != nil {
			return err
		}
		if err := s.command(line); err != nil {
			return err
		}
		s.farm.moved()
	}
}

// drain closes so that the last reply arrives although the client may have
// sent more: closing with unread input would reset the connection.
func (s *session) drain() {
	tcp, ok := s.conn.(interface{ CloseWrite() error })
	if !ok || tcp.CloseWrite() != nil {
		return
	}
	if s.conn.SetReadDeadline(time.Now().Add(connectionGrace)) != nil {
		return
	}
	for {
		if _, err := s.conn.Read(s.in); err != nil {
			return
		}
	}
}

func (s *session) greet() error {
	if done, err := s.ask(Event{Phase: PhaseConnect}); err != nil || done {
		if err == nil {
			err = s.flush()
		}
		if err == nil { // a refused greeting leaves only QUIT (RFC 5321 section 3.1)
			_, err = s.line()
		}
		if err == nil {
			s.say("221 bye")
			err = s.flush()
		}
		return errors.Join(errClosing, err)
	}
	if s.w > s.r {
		s.p.fault("spoke before the greeting", s.source, "")
	}
	s.say("220 " + s.word(s.p.profile.Wording.Banner, "", 0))
	return nil
}

// ask consults the behaviour at a phase. done means it replied.
func (s *session) ask(e Event) (done bool, err error) {
	b := s.p.behaviour.Load()
	if b.Answer == nil {
		return false, nil
	}
	e.Provider, e.Source, e.MX, e.Hello, e.TLS = s.p.profile.Name, s.source, s.mx, s.hello, s.tls != ""
	e.Message = s.begun
	if e.Phase > PhaseMail {
		e.From = s.tx.from
	}
	a := b.Answer(e)
	return s.act(a)
}

// act carries out an answer.
func (s *session) act(a Answer) (done bool, err error) {
	if a.Delay > 0 {
		if err := s.flush(); err != nil {
			return false, err
		}
		if !s.farm.pause(a.Delay) {
			return false, errClosing
		}
	}
	if a.Reply != "" {
		s.refuse(a.Reply, 1)
	}
	if a.Close {
		if a.Reply == "" {
			s.lane.drop()
			s.out = s.out[:0]
		}
		return true, errClosing
	}
	return a.Reply != "", nil
}

// word fills in a provider's wording.
func (s *session) word(text, rcpt string, n int) string {
	if strings.IndexByte(text, '{') < 0 {
		return text
	}
	return strings.NewReplacer("{ip}", s.source.String(), "{rcpt}", rcpt, "{host}", s.host, "{n}", strconv.Itoa(n)).Replace(text)
}

// command carries out one command.
func (s *session) command(line []byte) error {
	verb, rest, _ := bytes.Cut(line, []byte(" "))
	switch {
	case fieldIs(line, []byte("MAIL FROM:")):
		return s.mail(string(line[len("MAIL FROM:"):]))
	case fieldIs(line, []byte("RCPT TO:")):
		return s.rcpt(string(line[len("RCPT TO:"):]))
	case bytes.EqualFold(verb, []byte("DATA")):
		return s.data()
	case bytes.EqualFold(verb, []byte("EHLO")):
		return s.ehlo(string(rest), true)
	case bytes.EqualFold(verb, []byte("HELO")):
		return s.ehlo(string(rest), false)
	case bytes.EqualFold(verb, []byte("STARTTLS")):
		return s.startTLS()
	case bytes.EqualFold(verb, []byte("RSET")):
		s.tx = transaction{to: s.tx.to[:0]}
		s.say("250 2.0.0 reset")
	case bytes.EqualFold(verb, []byte("NOOP")):
		s.say("250 2.0.0 nothing done")
	case bytes.EqualFold(verb, []byte("VRFY")):
		s.say("252 2.1.5 send it and see")
	case bytes.EqualFold(verb, []byte("QUIT")):
		s.say("221 2.0.0 bye")
		return errClosing
	default:
		s.bad++
		s.p.fault("unknown command", s.source, string(verb[:min(len(verb), 32)]))
		if s.bad >= maxBadCommands {
			s.say("421 4.7.0 too many errors")
			return errClosing
		}
		s.say("500 5.5.2 command not recognised")
	}
	return nil
}

func (s *session) ehlo(name string, extended bool) error {
	if s.w > s.r { // RFC 2920 section 3.1
		s.p.fault("pipelined after EHLO", s.source, "")
	}
	s.hello, s.extended = name, extended
	s.tx = transaction{to: s.tx.to[:0]}
	s.lane.greet(name)
	if done, err := s.ask(Event{Phase: PhaseEhlo}); err != nil || done {
		return err
	}
	if name == "" {
		s.say("501 5.5.4 a name is needed")
		return nil
	}
	if !extended {
		s.say("250 " + s.host)
		return nil
	}
	s.say("250 " + s.host + "\n" + strings.Join(s.p.keywords(s.tls != ""), "\n"))
	return nil
}

func (s *session) startTLS() error {
	if done, err := s.ask(Event{Phase: PhaseStartTLS}); err != nil || done {
		return err
	}
	mode := s.p.behaviour.Load().TLS
	switch {
	case s.tls != "":
		s.say("503 5.5.1 TLS is on already")
		return nil
	case mode == TLSAbsent:
		s.say("502 5.5.1 not offered")
		return nil
	case mode == TLSRefused:
		s.refuse("454 4.7.0 TLS not available now", 1)
		return nil
	}
	if s.w > s.r { // RFC 3207 section 6: what came in clear must not be obeyed later
		s.p.fault("pipelined after STARTTLS", s.source, "")
		s.r, s.w = 0, 0
	}
	s.say("220 2.0.0 go ahead")
	if mode == TLSBroken {
		s.say("this is no TLS record")
		return errClosing
	}
	if err := s.flush(); err != nil {
		return err
	}
	cfg := s.p.tls
	if mode == TLSWrongName {
		cfg = s.p.wrongTLS
	}
	conn := tls.Server(s.conn, cfg)
	if err := conn.SetDeadline(time.Now().Add(replyTimeout)); err != nil {
		return err
	}
	if err := conn.HandshakeContext(s.farm.ctx); err != nil {
		s.lane.drop()
		return err
	}
	s.conn = conn
	s.tls = tls.VersionName(conn.ConnectionState().Version)
	s.hello, s.extended = "", false // RFC 3207 section 4.2: start over
	s.tx = transaction{to: s.tx.to[:0]}
	return nil
}
