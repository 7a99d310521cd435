package peers

import (
	"context"
	"fmt"
)

// Exim starts an Exim. 8BITMIME, SMTPUTF8, CHUNKING, PIPELINING and STARTTLS
// can be taken from it. The field X-Peer-Command holds the command that ended a
// mail: DATA, or the last BDAT.
func Exim(ctx context.Context, cfg Config) (*Server, error) {
	options := map[string]string{
		"8BITMIME": "accept_8bitmime = false\n", "SMTPUTF8": "smtputf8_advertise_hosts =\n", "CHUNKING": "chunking_advertise_hosts =\n",
		"PIPELINING": "pipelining_advertise_hosts =\n", "STARTTLS": "tls_advertise_hosts =\n",
	}
	without := ""
	for _, keyword := range cfg.Without {
		option, ok := options[keyword]
		if !ok {
			return nil, fmt.Errorf("peers: Exim cannot do without %s", keyword)
		}
		without += option
		delete(options, keyword)
	}
	if _, ok := options["SMTPUTF8"]; ok {
		without += "smtputf8_advertise_hosts = *\n"
	}
	if _, ok := options["STARTTLS"]; ok {
		without += "tls_advertise_hosts = *\n"
	}
	config := fmt.Sprintf(`primary_hostname = %[1]s
local_interfaces = %[2]s
daemon_smtp_ports = %[3]d

tls_certificate = /etc/peer.pem
host_lookup =
rfc1413_query_timeout = 0s
keep_environment =
dkim_verify_signers =
recipients_max = 0
smtp_accept_max = 100
smtp_accept_queue_per_connection = 0
message_size_limit = %[4]d
acl_smtp_rcpt = rcpt
acl_smtp_data = data
%[5]sbegin acl
data:
  accept add_header = X-Peer-Command: $smtp_command
rcpt:
  accept domains = %[6]s
begin routers
mailbox:
  driver = accept
  transport = mailbox
begin transports
mailbox:
  driver = appendfile
  directory = /peer/mail
  maildir_format
  create_directory = false
  user = %[7]d
  group = %[7]d
  envelope_to_add
  return_path_add
begin retry
* * F,1h,1s
`, cfg.Host, cfg.Addr.Addr(), cfg.Addr.Port(), maxMessageBytes, without, cfg.Domain, mailboxID)
	return run(ctx, cfg, recipe{debian: "exim", args: []string{"exim4", "-bdf", "-v"}, files: map[string]string{"etc/exim4/exim4.conf": config}})
}
