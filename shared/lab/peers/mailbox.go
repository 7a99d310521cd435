package peers

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const arrivalPoll = 20 * time.Millisecond

// Mail is a mail as the server stored it, with line ends made CRLF again.
type Mail struct {
	// Content is the whole file: what the server put above the mail, and the mail.
	Content []byte
	// Body is what stands behind the header section.
	Body []byte
}

// Field returns the first field of the header section with the name, unfolded,
// "" if there is none.
func (m *Mail) Field(name string) string {
	head := m.Content[:len(m.Content)-len(m.Body)]
	head = bytes.ReplaceAll(bytes.ReplaceAll(head, []byte("\r\n\t"), []byte(" ")), []byte("\r\n "), []byte(" "))
	for line := range bytes.SplitSeq(head, []byte("\r\n")) {
		if got, value, ok := bytes.Cut(line, []byte(":")); ok && bytes.EqualFold(got, []byte(name)) {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

// Mails returns what has arrived, in no order.
func (s *Server) Mails() ([]Mail, error) {
	dir := filepath.Join(s.cfg.mailDir(), "new")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	mails := make([]Mail, 0, len(entries))
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		mail, err := parse(text)
		if err != nil {
			return nil, fmt.Errorf("peers: %s: %w", e.Name(), err)
		}
		mails = append(mails, mail)
	}
	return mails, nil
}

// Wait returns what has arrived as soon as that is n mails or more.
func (s *Server) Wait(ctx context.Context, n int) ([]Mail, error) {
	for {
		entries, err := os.ReadDir(filepath.Join(s.cfg.mailDir(), "new"))
		if err != nil {
			return nil, err
		}
		if len(entries) >= n {
			return s.Mails()
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("peers: %d of %d mails have arrived at %s; the end of its log:\n%s", len(entries), n, s.cfg.Host, s.Log())
		case <-s.done:
			return nil, fmt.Errorf("peers: %s has ended; the end of its log:\n%s", s.cfg.Host, s.Log())
		case <-time.After(arrivalPoll):
		}
	}
}

// parse undoes the line ends of Unix, which all three servers store.
func parse(text []byte) (Mail, error) {
	if bytes.Contains(text, []byte("\r\n")) {
		return Mail{}, fmt.Errorf("has CRLF, which is not how it is stored")
	}
	content := bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n"))
	end := bytes.Index(content, []byte("\r\n\r\n"))
	if end < 0 {
		return Mail{}, fmt.Errorf("has no end of the header section")
	}
	return Mail{Content: content, Body: slices.Clip(content[end+4:])}, nil
}
