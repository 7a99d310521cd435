package peers

import (
	"context"
	"errors"
	"fmt"
)

// OpenSMTPD starts an OpenSMTPD. Nothing can be taken from it; it offers
// neither SMTPUTF8 nor CHUNKING. That of Debian 12 announces STARTTLS and then
// breaks every handshake (its version 6.8 cannot hide keys from OpenSSL 3), as
// some hosts out there do.
func OpenSMTPD(ctx context.Context, cfg Config) (*Server, error) {
	if len(cfg.Without) > 0 {
		return nil, errors.New("peers: OpenSMTPD offers what it offers")
	}
	config := fmt.Sprintf(`pki peer cert "/etc/peer.pem"
pki peer key "/etc/peer.key"
smtp max-message-size "%[1]d"
table everybody { "@" = "mailbox" }
listen on %[2]s port %[3]d tls pki peer hostname %[4]q
action "in" maildir "/peer/mail" virtual <everybody>
match from any for domain %[5]q action "in"
`, maxMessageBytes, cfg.Addr.Addr(), cfg.Addr.Port(), cfg.Host, cfg.Domain)
	// It wants its key and its configuration to itself.
	const start = "cp /etc/peer.pem /etc/peer.key && chmod 600 /etc/peer.key /etc/smtpd.conf && exec smtpd -d"
	return run(ctx, cfg, recipe{debian: "opensmtpd", args: []string{"sh", "-c", start}, files: map[string]string{"etc/smtpd.conf": config}})
}
