package lab

import (
	"bufio"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// A transcript is what a hostile or broken mail host does, step by step. The
// corpus in transcripts/ holds one per file, in lines:
//
//	# what is wrong with this host
//	expect deferred/connect/4.5.0 words that the recipient's reason holds
//	say 220 hello            sends the line with CRLF
//	raw "250 x\n"            sends the bytes of a Go string
//	repeat 10000 250-x       sends a line that often
//	flood "250-x\r\n"        sends the bytes until the client goes away
//	drip 220 hello           sends the line one byte per pace
//	read EHLO                reads a line; hangs up if it begins otherwise
//	data                     reads to the final dot
//	wait                     reads and says nothing until the client goes away
//	stall                    neither reads nor says anything until the lab's end or the client's patience
//	reset                    breaks the connection with a RST
//	---                      what follows is for the next connection; the last part is for all further ones
//
// After its last step a host closes the connection.
type Transcript struct {
	Name   string // of the file, without its ending
	About  string
	Expect string // outcome as status/phase/code/enhanced, without what there was not
	Reason string // words in the reply kept for the recipient
	parts  [][]step
}

type step struct {
	verb  string
	text  string
	times int
}

//go:embed transcripts/*.txt
var transcriptFiles embed.FS

// Bounds of a host that never ends by itself.
const (
	maxFloodBytes       = 64 << 20
	maxTranscriptRepeat = 1_000_000
	stallTime           = time.Minute
	defaultPace         = time.Second // between the bytes of a drip
)

// Transcripts returns the corpus, by name.
func Transcripts() ([]Transcript, error) {
	files, err := transcriptFiles.ReadDir("transcripts")
	if err != nil {
		return nil, fmt.Errorf("lab: transcripts: %w", err)
	}
	var out []Transcript
	for _, f := range files {
		text, err := transcriptFiles.ReadFile("transcripts/" + f.Name())
		if err != nil {
			return nil, fmt.Errorf("lab: transcripts: %w", err)
		}
		t, err := ParseTranscript(strings.TrimSuffix(f.Name(), ".txt"), string(text))
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// ParseTranscript reads a transcript in the form that Transcript describes.
func ParseTranscript(name, text string) (Transcript, error) {
	t := Transcript{Name: name, parts: [][]step{nil}}
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimSuffix(line, "\n")
		verb, rest, _ := strings.Cut(line, " ")
		last := len(t.parts) - 1
		switch {
		case line == "":
		case verb == "#":
			t.About = strings.TrimSpace(t.About + " " + rest)
		case verb == "expect":
			t.Expect, t.Reason, _ = strings.Cut(rest, " ")
		case verb == "---":
			t.parts = append(t.parts, nil)
		default:
			s, err := parseStep(verb, rest)
			if err != nil {
				return t, fmt.Errorf("lab: transcript %s, line %d: %w", name, number, err)
			}
			t.parts[last] = append(t.parts[last], s)
		}
	}
	if t.About == "" || t.Expect == "" {
		return t, fmt.Errorf("lab: transcript %s: tell with # what is wrong with the host, and with expect what comes of it", name)
	}
	return t, nil
}

func parseStep(verb, rest string) (step, error) {
	s := step{verb: verb, text: rest, times: 1}
	switch verb {
	case "say", "drip":
		s.text += "\r\n"
	case "raw", "flood":
		text, err := strconv.Unquote(rest)
		if err != nil || text == "" {
			return s, errors.New("want a Go string in quotes")
		}
		s.text = text
	case "repeat":
		times, line, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(times)
		if err != nil || n < 1 || n > maxTranscriptRepeat {
			return s, fmt.Errorf("repeat wants 1 to %d times", maxTranscriptRepeat)
		}
		s.times, s.text = n, line+"\r\n"
	case "read":
		s.text = strings.ToUpper(rest)
	case "data", "wait", "stall", "reset":
	default:
		return s, fmt.Errorf("unknown step %q", verb)
	}
	return s, nil
}

// Play serves the n-th connection of a client, from 0, and closes it. It ends
// when ctx does.
func (t *Transcript) Play(ctx context.Context, conn net.Conn, n int, pace time.Duration) {
	defer func() { _ = conn.Close() }() // whatever is left is the client's loss
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	r := bufio.NewReaderSize(conn, sessionBufferBytes)
	for _, s := range t.parts[min(n, len(t.parts)-1)] {
		if !s.play(ctx, conn, r, pace) {
			return
		}
	}
}

func (s *step) play(ctx context.Context, conn net.Conn, r *bufio.Reader, pace time.Duration) bool {
	switch s.verb {
	case "say", "raw":
		_, err := io.WriteString(conn, s.text)
		return err == nil
	case "repeat":
		return pour(conn, s.text, s.times*len(s.text))
	case "flood":
		return pour(conn, s.text, maxFloodBytes)
	case "drip":
		for i := range len(s.text) {
			if _, err := io.WriteString(conn, s.text[i:i+1]); err != nil || !idle(ctx, pace) {
				return false
			}
		}
		return true
	case "read":
		line, err := r.ReadString('\n')
		return err == nil && strings.HasPrefix(strings.ToUpper(line), s.text)
	case "data":
		for {
			line, err := r.ReadString('\n')
			if err != nil || line == ".\r\n" {
				return err == nil
			}
		}
	case "wait":
		_, _ = io.Copy(io.Discard, r)
		return false
	case "stall":
		return idle(ctx, stallTime)
	}
	// reset
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.SetLinger(0) // without it this is an ordinary close, which is also the end
	}
	return false
}

// pour writes a text over and over, n bytes of it.
func pour(w io.Writer, text string, n int) bool {
	many := []byte(strings.Repeat(text, max(1, sessionBufferBytes/len(text))))
	for ; n > 0; n -= len(many) {
		if _, err := w.Write(many[:min(n, len(many))]); err != nil {
			return false
		}
	}
	return true
}

func idle(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// HostileDomain is the domain of the lab's host that plays a transcript, if
// Config.Hostile is set.
func (t *Transcript) HostileDomain() string { return t.Name + ".hostile.test" }

// hostileProfiles are the hosts that play the corpus.
func hostileProfiles() ([]Profile, error) {
	all, err := Transcripts()
	if err != nil {
		return nil, err
	}
	var out []Profile
	for i := range all {
		t := &all[i]
		p := unlisted(t.HostileDomain(), MXHost{Name: "mx." + t.HostileDomain(), Preference: 10})
		p.Transcript = t
		out = append(out, p)
	}
	return out, nil
}
