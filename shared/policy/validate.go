package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/mailaddr"
)

// Bounds on the lists of a document.
const (
	maxRetrySteps    = 64
	maxStreams       = 10_000
	maxTenantWeights = 10_000
	maxPools         = 1_000
	maxPoolWeights   = 10_000
	maxWeight        = 1_000
	maxInboundHosts  = 20
	maxProviders     = 1_000
	maxSuffixes      = 200 // of one provider
	maxLimits        = 32  // of one provider
	maxOverrides     = 10_000
	maxNameBytes     = 64
	maxLimitCount    = 1_000_000
	maxBurst         = 100_000
	maxBurstSaved    = Duration(30 * 24 * time.Hour) // time in which an idle rate saves up its burst
	maxExpiry        = Duration(30 * 24 * time.Hour)
	maxCount         = 10_000_000
	maxStorageBytes  = 1 << 50
	maxMessageBytes  = 1 << 30
	maxInboundMail   = 256 << 20
	maxSectionHeader = 16 << 20

	maxCheckExceptions = 1_000 // domains that are never held by their self-check
)

// Short names that keep the tables below readable.
const (
	second = Duration(time.Second)
	minute = Duration(time.Minute)
	hour   = Duration(time.Hour)
	day    = 24 * hour
)

// Validate checks every range and rule that can be judged without the
// cluster's objects. The error is fault.Invalid; it names each field and its
// fix, up to 20 of them.
func (d *Document) Validate() error {
	var p problems
	d.Submission.validate(&p)
	d.Inbound.validate(&p)
	d.Queue.validate(&p)
	d.Delivery.validate(&p)
	d.Storage.validate(&p)
	d.Streams.validate(&p)
	d.Pools.validate(&p)
	providers := newProviderTable(&d.Providers, &p)
	d.Feedback.validate(&p, &d.Streams)
	d.Warmup.validate(&p, providers)
	d.Limits.validate(providers, &p)
	return p.err("policy.Validate")
}

func (s *Submission) validate(p *problems) {
	const in = "submission."
	p.between(in+"max_connections", int64(s.MaxConnections), 1, 100_000)
	p.between(in+"max_connections_per_ip", int64(s.MaxConnectionsPerIP), 1, 100_000)
	p.between(in+"max_messages_per_session", int64(s.MaxMessagesPerSession), 1, maxCount)
	p.between(in+"max_commands_per_session", int64(s.MaxCommandsPerSession), 10, maxCount)
	p.between(in+"max_errors_per_session", int64(s.MaxErrorsPerSession), 1, maxCount)
	p.between(in+"max_recipients", int64(s.MaxRecipients), 1, 65_535) // a recipient's index has 16 bits
	p.between(in+"max_message_bytes", s.MaxMessageBytes, 1<<10, maxMessageBytes)
	p.between(in+"max_header_bytes", int64(s.MaxHeaderBytes), 1<<10, maxSectionHeader)
	p.between(in+"max_line_bytes", int64(s.MaxLineBytes), 78, 65_536)
	p.between(in+"max_received_fields", int64(s.MaxReceivedFields), 5, 1_000)
	p.lasts(in+"command_timeout", s.CommandTimeout, second, hour)
	p.between(in+"min_bytes_per_second", s.MinBytesPerSecond, 0, 1<<30)
	p.between(in+"auth_failures_per_ip", int64(s.AuthFailuresPerIP), 1, maxCount)
	p.lasts(in+"auth_failure_window", s.AuthFailureWindow, second, day)
	p.between(in+"auth_failures_per_network", int64(s.AuthFailuresPerNetwork), 1, maxCount)
	p.between(in+"auth_failures_per_account", int64(s.AuthFailuresPerAccount), 1, maxCount)
	p.lasts(in+"auth_lock_max", s.AuthLockMax, second, day)
	p.between(in+"max_connections_per_minute", int64(s.MaxConnectionsPerMinute), 1, maxCount)
	p.between(in+"max_connections_per_minute_per_ip", int64(s.MaxConnectionsPerMinutePerIP), 1, maxCount)
	s.ClientRates.validate(in, p)
	if s.MaxConnectionsPerIP > s.MaxConnections {
		p.add(in+"max_connections_per_ip", "is %d, more than max_connections: write at most %d or raise that", s.MaxConnectionsPerIP, s.MaxConnections)
	}
	if int64(s.MaxHeaderBytes) > s.MaxMessageBytes {
		p.add(in+"max_header_bytes", "is %d, more than max_message_bytes: write at most %d", s.MaxHeaderBytes, s.MaxMessageBytes)
	}
}

func (s *Inbound) validate(p *problems) {
	const in = "inbound."
	if len(s.Hosts) > maxInboundHosts {
		p.add(in+"hosts", "has %d names, write at most %d", len(s.Hosts), maxInboundHosts)
	}
	for i, h := range s.Hosts {
		if n, err := mailaddr.ParseDomain(h); err != nil || n.IsLiteral() {
			p.add(fmt.Sprintf("%shosts[%d]", in, i), "%q is not a host name, write one such as \"mx.example.com\"", clip(h))
		}
	}
	p.between(in+"max_connections", int64(s.MaxConnections), 1, 100_000)
	p.between(in+"max_connections_per_ip", int64(s.MaxConnectionsPerIP), 1, 100_000)
	p.between(in+"max_message_bytes", s.MaxMessageBytes, 64<<10, maxInboundMail) // RFC 5321 section 4.5.3.1.7: 64 KiB at least
	p.between(in+"max_recipients", int64(s.MaxRecipients), 1, 10_000)
	p.lasts(in+"command_timeout", s.CommandTimeout, second, hour)
	p.between(in+"return_path_days", int64(s.ReturnPathDays), 1, 366)
	p.between(in+"max_stored_bytes", s.MaxStoredBytes, 1<<20, maxStorageBytes)
	p.between(in+"max_connections_per_minute", int64(s.MaxConnectionsPerMinute), 1, maxCount)
	p.between(in+"max_connections_per_minute_per_ip", int64(s.MaxConnectionsPerMinutePerIP), 1, maxCount)
	s.ClientRates.validate(in, p)
}

// Bounds of ClientRates: what the token buckets of a relay can count.
const (
	maxCommandsPerSecond = 200_000
	maxErrorsPerMinute   = 1_000_000
)

func (r *ClientRates) validate(in string, p *problems) {
	p.between(in+"max_commands_per_second", int64(r.MaxCommandsPerSecond), 0, maxCommandsPerSecond)
	p.between(in+"max_commands_per_second_per_network", int64(r.MaxCommandsPerSecondPerNetwork), 0, maxCommandsPerSecond)
	p.between(in+"max_commands_per_second_per_session", int64(r.MaxCommandsPerSecondPerSession), 0, maxCommandsPerSecond)
	p.between(in+"max_errors_per_minute", int64(r.MaxErrorsPerMinute), 0, maxErrorsPerMinute)
	p.between(in+"max_errors_per_minute_per_network", int64(r.MaxErrorsPerMinutePerNetwork), 0, maxErrorsPerMinute)
	p.between(in+"network_bits_ipv4", int64(r.NetworkBitsIPv4), 8, 32)
	p.between(in+"network_bits_ipv6", int64(r.NetworkBitsIPv6), 16, 64) // a host owns a /64 at least
	if r.MaxMemoryPercent != 0 {
		p.between(in+"max_memory_percent", int64(r.MaxMemoryPercent), 10, 95)
	}
}

func (s *Queue) validate(p *problems) {
	const in = "queue."
	if n := len(s.Retry); n < 1 || n > maxRetrySteps {
		p.add(in+"retry", "has %d waits, write 1 to %d", n, maxRetrySteps)
	}
	for i, w := range s.Retry {
		field := fmt.Sprintf("%sretry[%d]", in, i)
		p.lasts(field, w, second, day)
		if w > s.RetryMax {
			p.add(field, "is %q, longer than retry_max: write at most \"%v\" or raise that", w, s.RetryMax)
		}
	}
	p.lasts(in+"retry_max", s.RetryMax, second, 7*day)
	p.between(in+"retry_jitter_percent", int64(s.RetryJitterPercent), 0, 50)
	p.lasts(in+"greylist_retry", s.GreylistRetry, second, day)
	p.lasts(in+"expire_bulk", s.ExpireBulk, second, maxExpiry)
	p.lasts(in+"expire_transactional", s.ExpireTransactional, second, maxExpiry)
	if s.DelayNotice != 0 {
		p.lasts(in+"delay_notice", s.DelayNotice, second, maxExpiry)
	}
	p.between(in+"notices_per_hour", int64(s.NoticesPerHour), 0, maxCount)
	p.between(in+"notices_per_day", int64(s.NoticesPerDay), 0, maxCount)
	p.lasts(in+"in_doubt_retry", s.InDoubtRetry, second, 7*day)
	p.between(in+"in_doubt_retries", int64(s.InDoubtRetries), 0, 200)
	p.between(in+"max_memory_recipients", int64(s.MaxMemoryRecipients), 1_000, maxCount)
}

func (s *Delivery) validate(p *problems) {
	const in = "delivery."
	p.between(in+"max_sessions", int64(s.MaxSessions), 1, 100_000)
	p.between(in+"max_connects_in_flight", int64(s.MaxConnectsInFlight), 1, 100_000)
	p.between(in+"provider_percent", int64(s.ProviderPercent), 1, 100)
	p.between(in+"unproven_percent", int64(s.UnprovenPercent), 1, 100)
	p.between(in+"transactional_reserve_percent", int64(s.ReservePercent), 0, 90)
	p.lasts(in+"idle_session", s.IdleSession, 0, 5*minute)
	for _, t := range [...]struct {
		name string
		v    Duration
	}{
		{"connect_timeout", s.ConnectTimeout}, {"greeting_timeout", s.GreetingTimeout}, {"ehlo_timeout", s.EHLOTimeout},
		{"mail_timeout", s.MailTimeout}, {"rcpt_timeout", s.RcptTimeout}, {"data_timeout", s.DataTimeout},
		{"block_timeout", s.BlockTimeout}, {"final_dot_timeout", s.FinalDotTimeout},
	} {
		p.lasts(in+t.name, t.v, second, hour)
	}
	p.between(in+"max_hosts_per_attempt", int64(s.MaxHostsPerAttempt), 1, 50)
	p.lasts(in+"broken_tls_memory", s.BrokenTLSMemory, 0, 7*day)
	p.between(in+"max_resolves_in_flight", int64(s.MaxResolvesInFlight), 1, 10_000)
	p.lasts(in+"min_dns_ttl", s.MinDNSTTL, 0, hour)
	p.lasts(in+"max_dns_ttl", s.MaxDNSTTL, second, 7*day)
	if s.MinDNSTTL > s.MaxDNSTTL {
		p.add(in+"min_dns_ttl", "is %q, longer than max_dns_ttl: write at most \"%v\"", s.MinDNSTTL, s.MaxDNSTTL)
	}
	p.lasts(in+"host_backoff", s.HostBackoff, 0, day)
	p.oneOf(in+"chunking", s.Chunking, ChunkAuto, ChunkBinaryOnly, ChunkOff)
	p.between(in+"chunk_from_bytes", s.ChunkFromBytes, 0, maxMessageBytes)
	p.lasts(in+"dkim_publish_hold", s.DKIMPublishHold, 0, 7*day)
	if s.DKIMRotateEvery != 0 {
		p.lasts(in+"dkim_rotate_every", s.DKIMRotateEvery, 30*day, 3650*day)
	}
	if s.DKIMCheckEvery != 0 {
		p.lasts(in+"dkim_check_every", s.DKIMCheckEvery, second, day)
	}
	if len(s.DKIMCheckHoldExcept) > maxCheckExceptions {
		p.add(in+"dkim_check_hold_except", "has %d domains, write at most %d or dkim_check_hold = false", len(s.DKIMCheckHoldExcept), maxCheckExceptions)
	}
	for i, d := range s.DKIMCheckHoldExcept {
		if n, err := mailaddr.ParseDomain(d); err != nil || n.IsLiteral() || string(n) != d {
			p.add(fmt.Sprintf("%sdkim_check_hold_except[%d]", in, i), "%q is not a sending domain: write its name as `domain list` shows it", clip(d))
		}
	}
}

func (s *Storage) validate(p *problems) {
	const in = "storage."
	p.between(in+"min_free_bytes", s.MinFreeBytes, 1<<20, maxStorageBytes)
	p.between(in+"min_free_inodes", s.MinFreeInodes, 0, 1<<40)
	p.between(in+"reserve_bytes", s.ReserveBytes, 1<<20, maxStorageBytes)
	p.between(in+"segment_bytes", s.SegmentBytes, 1<<20, 8<<30)
	p.between(in+"max_outbox_bytes", s.MaxOutboxBytes, 1<<20, maxStorageBytes)
}

// everyone is the word for all tenants or projects.
const everyone = "*"

func (s *Streams) validate(p *problems) {
	if len(s.Stream) > maxStreams {
		p.add("streams.stream", "has %d entries, write at most %d", len(s.Stream), maxStreams)
		return
	}
	type key struct{ tenant, project, name string }
	seen := make(map[key]int, len(s.Stream))
	for i := range s.Stream {
		st := &s.Stream[i]
		at := fmt.Sprintf("streams.stream[%d].", i)
		if st.Tenant != everyone {
			p.name(at+"tenant", st.Tenant)
		}
		if st.Project != everyone {
			p.name(at+"project", st.Project)
			if st.Tenant == everyone {
				p.add(at+"project", "is %q for tenant \"*\": name the tenant, or write project = \"*\"", clip(st.Project))
			}
		}
		p.name(at+"name", st.Name)
		p.name(at+"pool", st.Pool)
		p.oneOf(at+"kind", string(st.Kind), string(Transactional), string(Bulk))
		if st.ReturnPath != "" {
			p.oneOf(at+"return_path", st.ReturnPath, ReturnPathMessage, ReturnPathRecipient)
		}
		if st.Expire != 0 {
			p.lasts(at+"expire", st.Expire, second, maxExpiry)
		}
		if st.Priority != nil {
			p.between(at+"priority", int64(*st.Priority), 0, 100)
		}
		if st.Weight != 0 {
			p.between(at+"weight", int64(st.Weight), 1, maxWeight)
		}
		st.validatePriorities(p, at)
		k := key{st.Tenant, st.Project, st.Name}
		if first, dup := seen[k]; dup {
			p.add(at+"name", "says the same tenant, project and name as stream[%d]: remove one of them", first)
		}
		seen[k] = i
	}
	s.validateTenants(p)
}

// validatePriorities checks what messages of the stream may ask for. The default
// is always allowed, because it is what mail has that says nothing.
func (s *Stream) validatePriorities(p *problems, at string) {
	if strings.Contains(s.Name, PriorityMark) {
		p.add(at+"name", "%q holds %q, which marks priorities in the queue: name it otherwise", clip(s.Name), PriorityMark)
	}
	if s.MessagePriorityMin != nil {
		p.between(at+"message_priority_min", int64(*s.MessagePriorityMin), MinPriority, DefaultPriority)
	}
	if s.MessagePriorityMax != nil {
		p.between(at+"message_priority_max", int64(*s.MessagePriorityMax), DefaultPriority, MaxPriority)
	}
}

func (s *Streams) validateTenants(p *problems) {
	if len(s.Tenant) > maxTenantWeights {
		p.add("streams.tenant", "has %d entries, write at most %d", len(s.Tenant), maxTenantWeights)
		return
	}
	seen := make(map[string]int, len(s.Tenant))
	for i := range s.Tenant {
		t := &s.Tenant[i]
		at := fmt.Sprintf("streams.tenant[%d].", i)
		p.name(at+"name", t.Name)
		p.between(at+"weight", int64(t.Weight), 1, maxWeight)
		if first, dup := seen[t.Name]; dup {
			p.add(at+"name", "%q is tenant[%d] already: remove one of them", clip(t.Name), first)
		}
		seen[t.Name] = i
	}
}

func (s *Pools) validate(p *problems) {
	if len(s.Pool) > maxPools {
		p.add("pools.pool", "has %d entries, write at most %d", len(s.Pool), maxPools)
		return
	}
	seen := make(map[string]int, len(s.Pool))
	for i := range s.Pool {
		pool := &s.Pool[i]
		at := fmt.Sprintf("pools.pool[%d].", i)
		p.name(at+"name", pool.Name)
		if first, dup := seen[pool.Name]; dup {
			p.add(at+"name", "%q is pool[%d] already: join the two", clip(pool.Name), first)
		}
		seen[pool.Name] = i
		if len(pool.Weights) > maxPoolWeights {
			p.add(at+"weights", "has %d addresses, write at most %d", len(pool.Weights), maxPoolWeights)
			continue
		}
		listed := make(map[netip.Addr]string, len(pool.Weights))
		for _, text := range sortedKeys(pool.Weights) {
			field := at + "weights.\"" + clip(text) + "\""
			ip, err := netip.ParseAddr(text)
			if err != nil || ip.Zone() != "" {
				p.add(field, "is not an IP address, write one such as \"192.0.2.10\"")
				continue
			}
			if first, dup := listed[ip.Unmap()]; dup {
				p.add(field, "is the same address as %q: remove one of them", first)
			}
			listed[ip.Unmap()] = text
			p.between(field, int64(pool.Weights[text]), 0, maxWeight)
		}
	}
}

// name checks the name of a tenant, project, stream or pool.
func (p *problems) name(field, v string) {
	switch {
	case v == "":
		p.add(field, "is missing, write a name")
	case len(v) > maxNameBytes:
		p.add(field, "has %d octets, write at most %d", len(v), maxNameBytes)
	case slices.ContainsFunc([]byte(v), func(c byte) bool { return c < 0x20 || c == 0x7f }):
		p.add(field, "%q holds a control character: remove it", v)
	case v == everyone:
		p.add(field, "is \"*\", which is no name here")
	}
}
