package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// client is what all systems get their mail from: connections that stay open,
// on each one message after the other, MAIL, RCPT and DATA in one write (RFC
// 2920) and the message in another.
type client struct {
	target target
	conns  []*clientConn
}

// Bounds of the client.
const (
	dialTimeout    = 10 * time.Second
	clientBufBytes = 8 << 10
	sender         = "bench@brand.test"
)

// bodyLine has the length of lines that mail programs make.
const bodyLine = "The quick relay changes horses at every post, and goes on before they cool.\r\n"

func domainName(i int) string { return fmt.Sprintf("bench%03d.test", i%domains) }

type clientConn struct {
	net.Conn
	buf  []byte
	r, w int
	out  []byte
}

// dial opens the connections.
func dial(ctx context.Context, t target) (*client, error) {
	c := &client{target: t}
	for range connections {
		k, err := dialOne(ctx, t)
		if err != nil {
			c.close()
			return nil, err
		}
		c.conns = append(c.conns, k)
	}
	return c, nil
}

func dialOne(ctx context.Context, t target) (*clientConn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return nil, err
	}
	k := &clientConn{Conn: conn, buf: make([]byte, clientBufBytes)}
	if err := k.hello(t); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%s: %w", t.addr, err)
	}
	return k, nil
}

func (k *clientConn) hello(t target) error {
	if _, err := k.expect("", '2'); err != nil {
		return err
	}
	text, err := k.expect("EHLO client.test\r\n", '2')
	if err != nil {
		return err
	}
	if !strings.Contains(text, "PIPELINING") {
		return errors.New("does not offer PIPELINING, which the comparison uses")
	}
	if t.user == "" {
		return nil
	}
	secret := base64.StdEncoding.EncodeToString([]byte("\x00" + t.user + "\x00" + t.secret)) // RFC 4616
	_, err = k.expect("AUTH PLAIN "+secret+"\r\n", '2')
	return err
}

func (c *client) close() {
	for _, k := range c.conns {
		_ = k.Close()
	}
}

// expect sends a command and reads its reply, whose first digit is to be class.
func (k *clientConn) expect(command string, class byte) (string, error) {
	if command != "" {
		if _, err := k.Write([]byte(command)); err != nil {
			return "", err
		}
	}
	text, err := k.reply()
	if err != nil {
		return "", err
	}
	if text[0] != class {
		return "", errors.New(strings.TrimSpace(string(text))) // the reply, never the command
	}
	return string(text), nil
}

// reply returns the next reply with all its lines, valid until the next call.
func (k *clientConn) reply() ([]byte, error) {
	for end := k.r; ; {
		i := bytes.IndexByte(k.buf[end:k.w], '\n')
		if i >= 0 {
			line := k.buf[end : end+i+1]
			end += i + 1
			if len(line) < 5 {
				return nil, fmt.Errorf("malformed reply %q", line)
			}
			if line[3] == '-' {
				continue
			}
			text := k.buf[k.r:end]
			k.r = end
			return text, nil
		}
		if k.r > 0 {
			k.w = copy(k.buf, k.buf[k.r:k.w])
			end, k.r = end-k.r, 0
		}
		if k.w == len(k.buf) {
			return nil, fmt.Errorf("a reply has more than %d bytes", len(k.buf))
		}
		n, err := k.Read(k.buf[k.w:])
		k.w += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// sent is what became of the messages of a run.
type sent struct {
	at       []int64 // by message: nanoseconds since base when it was accepted; 0: it was not
	refused  atomic.Int64
	mu       sync.Mutex
	why      string // the first refusal
	began    time.Duration
	accepted int
}

// send submits messages of about size bytes and returns when all were answered.
func (c *client) send(ctx context.Context, run, messages, size int, base time.Time) (*sent, error) {
	s := &sent{at: make([]int64, messages), began: time.Since(base)}
	stop := context.AfterFunc(ctx, func() { // ends what waits
		for _, k := range c.conns {
			_ = k.SetDeadline(time.Unix(1, 0))
		}
	})
	defer stop()
	body := []byte(strings.Repeat(bodyLine, max(1, (size-headBytes)/len(bodyLine))) + ".\r\n")
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, len(c.conns))
	for i, k := range c.conns {
		wg.Go(func() {
			for {
				message := int(next.Add(1)) - 1
				if message >= messages {
					return
				}
				if errs[i] = k.message(s, run, message, body, base); errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("the client: %w", err)
	}
	for _, at := range s.at {
		if at != 0 {
			s.accepted++
		}
	}
	return s, nil
}

// headBytes is about what a message has beside its body.
const headBytes = 240

// message sends one.
func (k *clientConn) message(s *sent, run, message int, body []byte, base time.Time) error {
	o := append(k.out[:0], "MAIL FROM:<"+sender+">\r\nRCPT TO:<user"...)
	o = strconv.AppendInt(o, int64(message), 10)
	o = append(o, '@')
	o = append(o, domainNames[message%domains]...)
	o = append(o, ">\r\nDATA\r\n"...)
	if _, err := k.Write(o); err != nil {
		return err
	}
	ready := true
	for step := range 3 {
		text, err := k.reply()
		if err != nil {
			return err
		}
		if want := byte('2' + step/2); text[0] != want && ready {
			ready = false
			s.refuse(text)
		}
	}
	if !ready {
		return nil
	}
	o = append(o[:0], "From: Bench <"+sender+">\r\nTo: <user"...)
	o = strconv.AppendInt(o, int64(message), 10)
	o = append(o, '@')
	o = append(o, domainNames[message%domains]...)
	o = append(o, ">\r\nSubject: A message of the benchmark\r\nDate: "...)
	o = time.Now().UTC().AppendFormat(o, time.RFC1123Z)
	o = append(o, "\r\nMessage-ID: <"...)
	o = strconv.AppendInt(o, int64(run), 10)
	o = append(o, '.')
	o = strconv.AppendInt(o, int64(message), 10)
	o = append(o, "@brand.test>"+"\r"+idField...)
	o = strconv.AppendInt(o, int64(run), 10)
	o = append(o, '-')
	o = strconv.AppendInt(o, int64(message), 10)
	o = append(o, "\r\n\r\n"...)
	k.out = o
	parts := net.Buffers{o, body} // one system call, and no copy of the body
	if _, err := parts.WriteTo(k.Conn); err != nil {
		return err
	}
	text, err := k.reply()
	if err != nil {
		return err
	}
	if text[0] != '2' {
		s.refuse(text)
		return nil
	}
	s.at[message] = max(int64(time.Since(base)), 1)
	return nil
}

// domainNames is made once, so that the client makes no strings.
var domainNames = func() (names [domains]string) {
	for i := range names {
		names[i] = domainName(i)
	}
	return names
}()

func (s *sent) refuse(text []byte) {
	s.refused.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why == "" {
		s.why = strings.TrimSpace(string(text))
	}
}
