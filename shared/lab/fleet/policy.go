package fleet

import "fmt"

// labPolicy is the policy of the lab: real limits, but times that let a run
// end while somebody watches. An older release knows no reflex.
func labPolicy(open, dkim, older bool) map[string]string {
	sections := map[string]string{
		"queue": `retry = ["1s", "2s", "3s"]
retry_max = "5s"
greylist_retry = "1s"
in_doubt_retry = "2s"
in_doubt_retries = 100
`,
		"delivery": fmt.Sprintf(`connect_timeout = "3s"
greeting_timeout = "10s"
host_backoff = "1s"
min_dns_ttl = "1s"
idle_session = "3s"
sign_dkim = %v
`, dkim),
		"storage": `min_free_bytes = 268435456
reserve_bytes = 67108864
segment_bytes = 67108864
max_outbox_bytes = 268435456
`,
		"inbound": fmt.Sprintf("hosts = [%q]\n", inboundHost),
		// One client submits everything.
		"submission": `max_connections_per_ip = 1000
max_messages_per_session = 1000000
max_commands_per_session = 1000000
`,
	}
	if open {
		sections["providers"] = NoProviderLimits
	}
	if !older {
		sections["providers"] += quickReflex
	}
	return sections
}

// quickReflex has lanes come back within seconds from what a test made a provider
// answer.
const quickReflex = `
[reflex]
min_per_hour = 3600
spacing = "1s"
step = "1s"
hold = "1s"
max_hold = "2s"
probe = 1
`

// NoProviderLimits is the section providers of a policy under which only the
// machine bounds how fast mail goes.
const NoProviderLimits = `limit = [
  { provider = "*", kind = "connections", scope = "source", max = 0 },
  { provider = "*", kind = "connections", scope = "relay", max = 0 },
  { provider = "*", kind = "messages_per_connection", scope = "source", max = 0 },
  { provider = "*", kind = "recipients_per_transaction", scope = "source", max = 0 },
  { provider = "*", kind = "message_rate", scope = "source", max = 0 },
  { provider = "*", kind = "message_rate", scope = "relay", max = 0 },
  { provider = "*", kind = "connection_rate", scope = "source", max = 0 },
  { provider = "*", kind = "connection_rate", scope = "relay", max = 0 },
]
`
