package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lab/peers"
)

// destination is a mail server that others wrote, as MX host of a domain.
type destination struct {
	name     string
	start    func(context.Context, peers.Config) (*peers.Server, error)
	without  []string
	eightBit bool // it offers 8BITMIME
	utf8     bool // it offers SMTPUTF8
	// received is in the field that it puts on top: whether TLS was used.
	received string
	chunking bool // it offers CHUNKING
	server   *peers.Server
	domain   string
}

// destinations starts the servers and publishes them.
func destinations(t *testing.T, f *fleet.Fleet) []*destination {
	t.Helper()
	all := []*destination{
		{name: "postfix", start: peers.Postfix, eightBit: true, utf8: true, chunking: true, received: "SMTPS id "},
		{name: "postfix-plain", start: peers.Postfix, without: []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "DSN"}, received: "SMTPS id "},
		{name: "exim", start: peers.Exim, eightBit: true, utf8: true, chunking: true, received: "(TLS1.3)"},
		{name: "exim-plain", start: peers.Exim, without: []string{"8BITMIME", "SMTPUTF8", "CHUNKING", "PIPELINING", "STARTTLS"}, received: "with esmtp "},
		// Its STARTTLS fails, or not, as its version has it.
		{name: "opensmtpd", start: peers.OpenSMTPD, eightBit: true, received: "with ESMTP"},
	}
	for i, d := range all {
		d.domain = d.name + ".test"
		host := "mx." + d.domain
		server, err := d.start(t.Context(), peers.Config{Dir: filepath.Join(t.TempDir(), d.name), Addr: f.PeerAddr(i), Host: host, Domain: d.domain, Without: d.without})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(server.Close)
		d.server = server
		if err := f.PublishMX(i, d.domain, host); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

const (
	plainUTF8 = "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n"
	plain7Bit = "MIME-Version: 1.0\r\nContent-Type: text/plain; charset=us-ascii\r\n"
)

// letters are the corners of RFC 5321 and 5322 that a body has.
func letters() []outgoing {
	eight := letter("eight bit", plainUTF8, "Grüße à tous, с приветом,\r\n.\r\n..deux\r\nfin = ő  \r\n\r\n")
	eight.body = "8BITMIME"
	parts := letter("parts", "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"=_a\"\r\nContent-Transfer-Encoding: 8bit\r\n",
		"préambule\r\n--=_a\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nça va\r\n--=_a\r\n"+
			"Content-Type: multipart/alternative; boundary=b\r\n\r\n--b\r\nContent-Type: text/html; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n\r\n<p>\xe9t\xe9</p>\r\n--b--\r\n\r\n--=_a--\r\n")
	parts.body = "8BITMIME"
	chunked := letter("chunked", plainUTF8, strings.Repeat("čtyři řádky\r\n.\r\n..\r\n\r\n", 400))
	chunked.body, chunked.bdat = "8BITMIME", 777
	wide := letter("large eight bit", plainUTF8, strings.Repeat("žluťoučký kůň\r\n.\r\n..\r\n", 1<<20/32))
	wide.body = "8BITMIME"
	return []outgoing{
		letter("dots", plain7Bit, ".\r\n..\r\n...\r\n.a\r\n \r\n\t.\r\n\r\n.\r\n"),
		letter("only dots", plain7Bit, ".\r\n"),
		letter("no body", plain7Bit, ""),
		letter("empty lines", plain7Bit, "\r\n\r\nx\r\n\r\n\r\n"),
		letter("long line", plain7Bit, strings.Repeat("x", 998)+"\r\n."+strings.Repeat("y", 997)+"\r\n"),
		letter("long header", plain7Bit+"X-Long: "+strings.Repeat("z", 990)+"\r\nX-Folded: a\r\n  b\r\n\tc\r\n", "folded\r\n"),
		letter("large", plain7Bit, strings.Repeat(strings.Repeat("0123456789", 7)+"\r\n", 10<<20/72)),
		eight, parts, chunked, wide,
	}
}

// TestPeersTakeMail sends the corners to Debian's Postfix, Exim and OpenSMTPD,
// also to ones that lack extensions, and reads what they stored.
func TestPeersTakeMail(t *testing.T) {
	f := startSigning(t)
	all := destinations(t, f)
	c := submitter(t, f)
	sent := letters()
	hundred := letter("hundred recipients", plain7Bit, "to many\r\n")
	for i := range sent {
		for _, d := range all {
			sent[i].to = append(sent[i].to, "box@"+d.domain)
		}
	}
	for _, d := range all {
		for i := range 100 {
			hundred.to = append(hundred.to, fmt.Sprintf("box%d@%s", i, d.domain))
		}
	}
	sent = append(sent, hundred)
	for i := range sent {
		if reply := c.offer(&sent[i]); !strings.HasPrefix(reply, "250 2.0.0") {
			t.Fatalf("%s: %s", sent[i].name, reply)
		}
	}
	tooLong := letter("line of 999", plain7Bit, strings.Repeat("x", 999)+"\r\n")
	tooLong.to = []string{"box@" + all[0].domain}
	if reply := c.offer(&tooLong); !strings.HasPrefix(reply, "554 5.6.0") || !strings.Contains(reply, "998") {
		t.Errorf("a line of 999 octets got %q", reply)
	}
	international, refused := offerInternational(t, c, all)
	sent = append(sent, international...)
	signed := newSignatures(t)
	for _, d := range all {
		t.Run(d.name, func(t *testing.T) {
			want := 0
			for i := range sent {
				want += d.expects(&sent[i])
			}
			arrived, err := d.server.Wait(within(t, 3*time.Minute), want)
			if err != nil {
				t.Fatal(err)
			}
			for i := range sent {
				d.compare(t, &sent[i], arrived, signed)
			}
		})
	}
	for _, d := range all {
		d.checkChunks(t)
	}
	signed.check(f)
	settle(t, f, nil)
	checkRefused(t, f, refused)
}

// checkChunks has the server say which mail came in chunks. Exim notes the
// command that ended a mail, Postfix counts the commands of each session.
func (d *destination) checkChunks(t *testing.T) {
	t.Helper()
	if !strings.HasPrefix(d.name, "postfix") {
		return
	}
	want := 0
	if d.chunking {
		want = 11 + 1 // the large mail has 10 MiB and its header, the other less than 1 MiB
	}
	eventually(t, time.Minute, fmt.Sprintf("%s has counted %d chunks", d.name, want), func() bool {
		data, chunks := 0, 0
		lines, err := d.server.Logged("disconnect from ")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range lines {
			for _, word := range strings.Fields(line) {
				verb, count, _ := strings.Cut(word, "=")
				n, _, _ := strings.Cut(count, "/")
				said, err := strconv.Atoi(n)
				switch {
				case err != nil:
				case verb == "data":
					data += said
				case verb == "bdat":
					chunks += said
				}
			}
		}
		return data > 0 && chunks == want
	})
}

// offerInternational submits mail that not every server can be given. It
// returns the mail, and why which recipients must fail.
func offerInternational(t *testing.T, c *client, all []*destination) (sent []outgoing, refused map[string]string) {
	t.Helper()
	refused = make(map[string]string)
	header := letter("international header", plainUTF8, "körper\r\n.\r\n")
	header.text = bytes.Replace(header.text, []byte("From: News"), []byte("From: Nüüs"), 1)
	address := letter("international address", plainUTF8, "körper\r\n")
	needless := letter("international needlessly", plain7Bit, "all of it ASCII\r\n")
	header.utf8, address.utf8, needless.utf8 = true, true, true
	header.body, address.body = "8BITMIME", "8BITMIME"
	binary := letter("binary", "MIME-Version: 1.0\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n", "\x00\n.\n\r\x01\xff")
	binary.body, binary.bdat = "BINARYMIME", 100
	for _, d := range all {
		header.to = append(header.to, "kopf@"+d.domain)
		address.to = append(address.to, "jürgen@"+d.domain)
		needless.to = append(needless.to, "box@"+d.domain)
		binary.to = append(binary.to, "binary@"+d.domain)
		// None of them has BINARYMIME.
		refused["binary@"+d.domain] = "5.6.3"
		if !d.utf8 {
			refused["kopf@"+d.domain], refused["jürgen@"+d.domain] = "5.6.7", "5.6.7"
		}
	}
	sent = []outgoing{header, address, needless}
	for _, m := range append(sent, binary) {
		if reply := c.offer(&m); !strings.HasPrefix(reply, "250 2.0.0") {
			t.Fatalf("%s: %s", m.name, reply)
		}
	}
	return sent, refused
}

// checkRefused expects these recipients to have failed for these reasons, and
// no others.
func checkRefused(t *testing.T, f *fleet.Fleet, want map[string]string) {
	t.Helper()
	got := make(map[string]string)
	if err := f.NewLedger().Read(t.Context(), func(_ *fleet.Relay, e *fleet.Event) {
		if e.Final() && e.Type != "delivered" {
			got[e.Address] = e.Reply
		}
	}); err != nil {
		t.Fatal(err)
	}
	for address, code := range want {
		if !strings.HasPrefix(got[address], code+" ") {
			t.Errorf("%s failed with %q, want %s", address, got[address], code)
		}
		delete(got, address)
	}
	for address, reply := range got {
		t.Errorf("%s failed with %q, want it delivered", address, reply)
	}
}

// expects counts the recipients of a mail that are here and can be given it.
func (d *destination) expects(m *outgoing) (n int) {
	needs := m.utf8 && slices.ContainsFunc(m.text, func(c byte) bool { return c > 0x7f })
	for _, to := range m.to {
		if strings.HasSuffix(to, "@"+d.domain) && (d.utf8 || !needs) {
			n++
		}
	}
	return n
}

// compare finds the mail among those that arrived: as often as it has
// recipients there, with its body as it was, or in another encoding where the
// server cannot take 8-bit text.
func (d *destination) compare(t *testing.T, m *outgoing, arrived []peers.Mail, signed *signatures) {
	t.Helper()
	want := d.expects(m)
	got := 0
	for i := range arrived {
		a := &arrived[i]
		if a.Field("X-Case") != m.name {
			continue
		}
		if got++; got == 1 || got == want {
			signed.add(a)
		}
		large := len(m.text) > 256<<10
		if command := a.Field("X-Peer-Command"); strings.HasPrefix(d.name, "exim") && strings.HasPrefix(command, "BDAT ") != (large && d.chunking) {
			t.Errorf("%s: %d octets came by %q", m.name, len(m.text), command)
		}
		if r := a.Field("Received"); !strings.Contains(r, d.received) {
			t.Errorf("%s: it came as %q, want %q", m.name, r, d.received)
		}
		if id, cfbl := a.Field("Feedback-ID"), a.Field("CFBL-Address"); !strings.HasSuffix(id, ":examplecorp") || !strings.HasSuffix(cfbl, "; report=arf") {
			t.Errorf("%s: Feedback-ID is %q, CFBL-Address %q", m.name, id, cfbl)
		}
		switch downgraded := m.body == "8BITMIME" && !d.eightBit; {
		case downgraded && slices.ContainsFunc(a.Body, func(c byte) bool { return c > 0x7f }):
			t.Errorf("%s: 8-bit text went to a server that does not take it", m.name)
		case downgraded:
			if was, is := leaves(t, m.text), leaves(t, a.Content); !slices.Equal(was, is) {
				t.Errorf("%s: the contents were\n%q\nand are\n%q", m.name, was, is)
			}
		case !bytes.Equal(a.Body, m.content()):
			t.Errorf("%s: the body of %d bytes arrived with %d: %.300q", m.name, len(m.content()), len(a.Body), a.Body)
		}
		if from := a.Field("From"); bytes.Contains(m.text, []byte("Nüüs")) != strings.Contains(from, "Nüüs") {
			t.Errorf("%s: From is %q", m.name, from)
		}
	}
	if got != want {
		t.Errorf("%s: %d arrived, want %d", m.name, got, want)
	}
}

// leaves returns the decoded contents of a mail's parts.
func leaves(t *testing.T, text []byte) []string {
	t.Helper()
	m, err := mail.ReadMessage(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return leavesOf(t, m.Header.Get("Content-Type"), m.Header.Get("Content-Transfer-Encoding"), m.Body)
}

func leavesOf(t *testing.T, contentType, encoding string, body io.Reader) (out []string) {
	t.Helper()
	kind, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		t.Fatalf("%q: %v", contentType, err)
	}
	if strings.HasPrefix(kind, "multipart/") {
		for r := multipart.NewReader(body, params["boundary"]); ; {
			p, err := r.NextRawPart()
			if err == io.EOF {
				return out
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, leavesOf(t, p.Header.Get("Content-Type"), p.Header.Get("Content-Transfer-Encoding"), p)...)
		}
	}
	switch strings.ToLower(encoding) {
	case "quoted-printable":
		body = quotedprintable.NewReader(body)
	case "base64":
		body = base64.NewDecoder(base64.StdEncoding, body)
	}
	all, err := io.ReadAll(body)
	if err != nil {
		t.Fatal(err)
	}
	return append(out, contentType+": "+string(all))
}
