package peers

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// senderSettings let a Postfix take mail for anybody from this machine and
// deliver it to the MX, with what its tuning guide advises for much mail. The
// queue is on the disk, synced as always: Postfix has no switch for it.
const senderSettings = `in_flow_delay = 0
default_process_limit = 200
default_destination_concurrency_limit = 50
initial_destination_concurrency = 20
qmgr_message_active_limit = 40000
qmgr_message_recipient_limit = 40000
smtp_connection_cache_on_demand = yes
`

// PostfixSenderSettings are the settings in which a PostfixSender differs from
// Postfix's defaults for the sake of speed.
func PostfixSenderSettings() string { return senderSettings }

// PostfixSender starts a Postfix that takes mail for anybody from this machine
// and delivers it to port 25 of the MX that the name server tells.
func PostfixSender(ctx context.Context, cfg Config, nameServer netip.Addr) (*Server, error) {
	main := fmt.Sprintf(`compatibility_level = 3.6
myhostname = %s
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
queue_directory = /peer/queue
maillog_file = /peer/maillog
maillog_file_prefixes = /peer
alias_maps =
alias_database =
message_size_limit = %d
smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination
smtpd_client_connection_count_limit = 0
smtpd_peername_lookup = no
%s`, cfg.Host, maxMessageBytes, senderSettings)
	master := fmt.Sprintf("%s inet n - n - - smtpd\n", cfg.Addr)
	for _, service := range []string{"cleanup unix n - n - 0 cleanup", "qmgr unix n - n 300 1 qmgr", "tlsmgr unix - - n 1000? 1 tlsmgr",
		"rewrite unix - - n - - trivial-rewrite", "bounce unix - - n - 0 bounce", "defer unix - - n - 0 bounce", "trace unix - - n - 0 bounce",
		"proxymap unix - - n - - proxymap", "smtp unix - - n - - smtp", "error unix - - n - - error", "retry unix - - n - - error",
		"anvil unix - - n - 1 anvil", "scache unix - - n - 1 scache", "postlog unix-dgram n - n - 1 postlogd"} {
		master += service + "\n"
	}
	// Postfix makes all below its queue directory, but not the directory.
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "peer", "queue"), 0o755); err != nil {
		return nil, err
	}
	return run(ctx, cfg, recipe{debian: "postfix", args: []string{"postfix", "start-fg"}, files: map[string]string{
		"etc/postfix/main.cf": main, "etc/postfix/master.cf": master, "etc/resolv.conf": "nameserver " + nameServer.String() + "\n"}})
}

// PID is the first process of the server; all its others descend from it.
func (s *Server) PID() int { return s.cmd.Process.Pid }
