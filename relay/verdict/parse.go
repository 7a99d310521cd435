package verdict

import (
	"strings"

	"github.com/relais-mta/relais/relay"
)

// ParseReply reads a reply as logs and people write it: one line or several,
// "550-5.7.1 text" or "550 5.7.1 text", the code and enhanced code repeated on
// each line or not. Text without a code at the front has Code 0.
func ParseReply(text string) relay.Reply {
	var out relay.Reply
	var joined []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if code, rest, ok := cutCode(line); ok && (out.Code == 0 || code == out.Code) {
			out.Code, line = code, rest
		}
		esc, rest := CutEnhanced(line)
		if out.Enhanced == "" || esc == out.Enhanced {
			out.Enhanced, line = esc, rest
		}
		if line = strings.TrimSpace(line); line != "" {
			joined = append(joined, line)
		}
	}
	out.Text = strings.Join(joined, " ")
	if len(out.Text) > relay.MaxReplyTextBytes {
		out.Text = strings.ToValidUTF8(out.Text[:relay.MaxReplyTextBytes], "")
	}
	return out
}

func cutCode(line string) (uint16, string, bool) {
	if len(line) < 3 || line[0] < '2' || line[0] > '5' || !digit(line[1]) || !digit(line[2]) {
		return 0, line, false
	}
	code := uint16(line[0]-'0')*100 + uint16(line[1]-'0')*10 + uint16(line[2]-'0')
	if len(line) == 3 {
		return code, "", true
	}
	if line[3] != ' ' && line[3] != '-' {
		return 0, line, false
	}
	return code, line[4:], true
}
