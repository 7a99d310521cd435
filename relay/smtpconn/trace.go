package smtpconn

import "time"

// AppendReceived appends the trace field of a message that came over c (RFC
// 5321 section 4.4). id is the message's own; forPath is the only recipient, or
// empty, because a list would show blind copies to each other.
func (c *Conn) AppendReceived(dst []byte, id, forPath string, now time.Time) []byte {
	dst = append(dst, "Received: from "...)
	dst = append(dst, c.helo...)
	dst = append(dst, " (["...)
	if c.remote.Is6() {
		dst = append(dst, "IPv6:"...) // RFC 5321 section 4.1.3
	}
	dst = c.remote.AppendTo(dst)
	dst = append(dst, "])\r\n\tby "...)
	dst = append(dst, c.server.cfg.Hostname...)
	dst = append(dst, " with "...)
	dst = append(dst, c.protocol()...)
	if c.tls != nil {
		dst = append(dst, "\r\n\ttls "...) // RFC 8314 section 4.3
		dst = append(dst, c.suite...)
	}
	dst = append(dst, "\r\n\tid "...)
	dst = append(dst, id...)
	if forPath != "" {
		dst = append(dst, "\r\n\tfor <"...)
		dst = append(dst, forPath...)
		dst = append(dst, '>')
	}
	dst = append(dst, "; "...)
	dst = now.UTC().AppendFormat(dst, time.RFC1123Z)
	return append(dst, '\r', '\n')
}

// protocol returns the keyword of RFC 3848, or of RFC 6531 section 4.3.
func (c *Conn) protocol() string {
	switch {
	case c.mailParams.UTF8 && c.tls != nil && c.authed:
		return "UTF8SMTPSA"
	case c.mailParams.UTF8 && c.tls != nil:
		return "UTF8SMTPS"
	case c.mailParams.UTF8:
		return "UTF8SMTP"
	case c.tls != nil && c.authed:
		return "ESMTPSA"
	case c.tls != nil:
		return "ESMTPS"
	case c.esmtp:
		return "ESMTP"
	}
	return "SMTP"
}
