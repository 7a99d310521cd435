package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab/fleet"
	"github.com/relais-mta/relais/shared/lab/peers"
)

// minPassedPercent is how many of the mails of other projects must go through.
const minPassedPercent = 90

// corpusFrom is what Python's and SpamAssassin's mails are rewritten to
// come from.
const corpusFrom = "From: Corpus <corpus@" + fleet.Domain + ">\r\n"

var (
	anyLineEnd = regexp.MustCompile("\r\n|\r|\n")
	fieldName  = regexp.MustCompile(`^[!-9;-~]+[ \t]*:`)
)

// fromCorpus reads a mail of another project's tests: line ends made CRLF, a
// line of mbox's on top taken away, From and Sender rewritten to an address of
// the sending domain. All the rest stays, however odd.
func fromCorpus(t *testing.T, path string) outgoing {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw = anyLineEnd.ReplaceAll(raw, []byte("\r\n"))
	if bytes.HasPrefix(raw, []byte("From ")) || bytes.HasPrefix(raw, []byte(">From ")) {
		_, raw, _ = bytes.Cut(raw, []byte("\r\n"))
	}
	if !bytes.HasSuffix(raw, []byte("\r\n")) {
		raw = append(raw, "\r\n"...)
	}
	name := filepath.Base(filepath.Dir(path)) + "/" + filepath.Base(path)
	text := []byte(corpusFrom + "X-Case: " + name + "\r\n")
	skipping, header := false, true
	for line := range bytes.SplitAfterSeq(raw, []byte("\r\n")) {
		if header {
			switch folded := len(line) > 0 && (line[0] == ' ' || line[0] == '\t'); {
			case len(bytes.TrimRight(line, "\r\n")) == 0:
				header, skipping = false, false
			case !folded:
				lower := bytes.ToLower(fieldName.Find(line))
				skipping = bytes.HasPrefix(lower, []byte("from")) && len(bytes.TrimRight(lower, " \t:")) == 4 || bytes.HasPrefix(lower, []byte("sender"))
			}
		}
		if !skipping {
			text = append(text, line...)
		}
	}
	m := outgoing{name: name, text: text}
	if bytes.ContainsFunc(text, func(r rune) bool { return r > 0x7f }) {
		m.body = "8BITMIME"
	}
	return m
}

// TestPeersTakeCorpora sends the mails of Python's test suite and SpamAssassin's
// samples to a Postfix, and reads what arrived.
func TestPeersTakeCorpora(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(peers.Folder(), "mails", "*", "*.txt"))
	if err != nil || len(paths) < 40 {
		t.Fatalf("%d mails in %s, %v: run scripts/more-peers.sh as root", len(paths), peers.Folder(), err)
	}
	f := startSigning(t)
	const domain, host = "corpus.test", "mx.corpus.test"
	server, err := peers.Postfix(t.Context(), peers.Config{Dir: filepath.Join(t.TempDir(), "postfix"), Addr: f.PeerAddr(0), Host: host, Domain: domain})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	if err := f.PublishMX(0, domain, host); err != nil {
		t.Fatal(err)
	}
	accepted, refused := make(map[string]outgoing), make(map[string][]string)
	for _, path := range paths {
		m := fromCorpus(t, path)
		m.to = []string{"box@" + domain}
		// A session of its own, so that one mail's trouble is not the next one's.
		reply := submitter(t, f).offer(&m)
		if strings.HasPrefix(reply, "250 2.0.0") {
			accepted[m.name] = m
			continue
		}
		refused[reply] = append(refused[reply], m.name)
	}
	arrived, err := server.Wait(within(t, 3*time.Minute), len(accepted))
	if err != nil {
		t.Error(err)
		if arrived, err = server.Mails(); err != nil {
			t.Fatal(err)
		}
	}
	signed := newSignatures(t)
	passed := 0
	for i := range arrived {
		a := &arrived[i]
		m, ok := accepted[a.Field("X-Case")]
		if !ok {
			t.Errorf("a mail that was not sent: %.600q", a.Content)
			continue
		}
		delete(accepted, m.name)
		signed.add(a)
		if !bytes.Equal(a.Body, m.content()) {
			t.Errorf("%s: the body was\n%.600q\nand is\n%.600q", m.name, m.content(), a.Body)
			continue
		}
		passed++
	}
	for name := range accepted {
		t.Errorf("%s was accepted and has not arrived", name)
	}
	signed.check(f)
	t.Logf("%d of %d mails went through with their bodies as they were", passed, len(paths))
	for reply, names := range refused {
		t.Logf("refused: %s: %s", reply, strings.Join(names, ", "))
	}
	if passed*100 < len(paths)*minPassedPercent {
		t.Errorf("fewer than %d %% of the mails went through", minPassedPercent)
	}
}
