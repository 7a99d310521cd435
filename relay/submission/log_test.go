package submission

import (
	"strings"
	"testing"
)

// The log line of each message says who sent it and from where.
func TestAcceptedMessageIsLogged(t *testing.T) {
	w := newWorld(t, nil)
	p := w.login(t)
	for range 2 {
		p.mail(goodMessage, "250 2.0.0")
	}
	lines := 0
	for line := range strings.Lines(w.log.String()) {
		if strings.Contains(line, `"msg":"message accepted"`) {
			lines++
			for _, want := range []string{`"credential":"` + w.user + `"`, `"client_ip":"127.0.0.1"`} {
				if !strings.Contains(line, want) {
					t.Errorf("the line lacks %s: %s", want, line)
				}
			}
		}
	}
	if lines != 2 {
		t.Errorf("%d lines for two messages", lines)
	}
}
