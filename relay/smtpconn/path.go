package smtpconn

import (
	"strings"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
)

// parsePath reads the path of a MAIL or RCPT argument: keyword is "FROM:" or
// "TO:". The null path "<>" gives the zero address, which only MAIL may have.
// Source routes are accepted and ignored (RFC 5321 section 4.1.1.3). go-smtp
// gives local parts without their quotes, which makes some addresses read as
// others: that is why the argument is read here.
func parsePath(argument, keyword string, utf8 bool) (mailaddr.Address, error) {
	const op = "smtpconn.parsePath"
	if len(argument) < len(keyword) || !strings.EqualFold(argument[:len(keyword)], keyword) {
		return mailaddr.Address{}, fault.New(fault.Invalid, op, "the argument does not begin with %s", keyword)
	}
	rest := strings.TrimLeft(argument[len(keyword):], " ")
	if !strings.HasPrefix(rest, "<") {
		return mailaddr.Address{}, fault.New(fault.Invalid, op, "the address must stand in angle brackets")
	}
	end := pathEnd(rest)
	if end < 0 || end+1 < len(rest) && rest[end+1] != ' ' {
		return mailaddr.Address{}, fault.New(fault.Invalid, op, "the address has no closing bracket, or something follows it")
	}
	path := rest[1:end]
	if path == "" {
		return mailaddr.Address{}, nil
	}
	if path[0] == '@' {
		_, mailbox, ok := strings.Cut(path, ":")
		if !ok {
			return mailaddr.Address{}, fault.New(fault.Invalid, op, "the source route has no colon")
		}
		path = mailbox
	}
	if utf8 {
		return mailaddr.ParseUTF8(path) // RFC 6531 section 3.3
	}
	return mailaddr.Parse(path)
}

// pathEnd returns where the bracket closes; one within quotes does not count.
func pathEnd(s string) int {
	quoted := false
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\' && quoted:
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == '>' && !quoted:
			return i
		}
	}
	return -1
}
