package peers

import (
	"context"
	"fmt"
	"strings"
)

// Relay is where a Postfix sends mail on, as a customer's own server does. It
// wants TLS there, and asks for no name in the certificate: an address has none.
type Relay struct {
	Addr     string // [host]:port
	User     string
	Password string
}

// Postfix starts a Postfix. Every EHLO keyword can be taken from it.
func Postfix(ctx context.Context, cfg Config) (*Server, error) {
	return postfix(ctx, cfg, "mynetworks =\n")
}

// PostfixClient starts a Postfix that takes mail for anybody from this machine
// and gives it to another server, with AUTH over TLS.
func PostfixClient(ctx context.Context, cfg Config, to Relay) (*Server, error) {
	return postfix(ctx, cfg, fmt.Sprintf(`mynetworks = 127.0.0.0/8
relayhost = %[1]s
smtp_sasl_auth_enable = yes
smtp_sasl_password_maps = inline:{ { %[1]s = %[2]s:%[3]s } }
smtp_sasl_tls_security_options = noanonymous
smtp_tls_security_level = encrypt
minimal_backoff_time = 1s
queue_run_delay = 1s
`, to.Addr, to.User, to.Password))
}

func postfix(ctx context.Context, cfg Config, more string) (*Server, error) {
	main := fmt.Sprintf(`compatibility_level = 3.6
myhostname = %[1]s
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
maillog_file = /dev/stdout
alias_maps =
alias_database =
virtual_mailbox_domains = %[2]s
virtual_mailbox_base = /peer
virtual_mailbox_maps = static:mail/
virtual_uid_maps = static:%[3]d
virtual_gid_maps = static:%[3]d
virtual_mailbox_limit = 0
message_size_limit = %[4]d
smtpd_discard_ehlo_keywords = %[5]s
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_client_connection_count_limit = 0
smtpd_tls_security_level = may
smtpd_tls_chain_files = /etc/peer.pem
smtputf8_enable = yes
disable_dns_lookups = yes
smtpd_peername_lookup = no
%[6]s`, cfg.Host, cfg.Domain, mailboxID, maxMessageBytes, strings.Join(cfg.Without, ", "), more)
	// Here and not in inet_interfaces, where only an address will do that the
	// machine's own list has.
	master := fmt.Sprintf("%s inet n - n - - smtpd\n", cfg.Addr)
	for _, service := range []string{"cleanup unix n - n - 0 cleanup", "qmgr unix n - n 300 1 qmgr", "tlsmgr unix - - n 1000? 1 tlsmgr",
		"rewrite unix - - n - - trivial-rewrite", "bounce unix - - n - 0 bounce", "defer unix - - n - 0 bounce", "trace unix - - n - 0 bounce",
		"proxymap unix - - n - - proxymap", "smtp unix - - n - - smtp", "error unix - - n - - error", "retry unix - - n - - error",
		"virtual unix - n n - - virtual", "anvil unix - - n - 1 anvil", "scache unix - - n - 1 scache", "postlog unix-dgram n - n - 1 postlogd"} {
		master += service + "\n"
	}
	return run(ctx, cfg, recipe{debian: "postfix", args: []string{"postfix", "start-fg"},
		files: map[string]string{"etc/postfix/main.cf": main, "etc/postfix/master.cf": master}})
}
