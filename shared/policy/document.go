// Package policy holds what operators decide and relays obey: the versioned
// policy document, its validation, and the View of cluster objects that a
// relay works from. It is pure, because control validates and previews with
// the very code that relays run.
package policy

import (
	"time"
)

// Format is the version of the document's schema. A relay refuses a document
// of a newer format and keeps its last good one.
const Format = 1

// MaxSectionBytes bounds one section's text, as it travels in one command.
const MaxSectionBytes = 256 << 10

// StreamKind says what sort of mail a stream carries.
type StreamKind string

// The stream kinds.
const (
	Transactional StreamKind = "transactional"
	Bulk          StreamKind = "bulk"
)

// Document is the whole policy, the shipped defaults overlaid by what the
// operators put. Each field is one section, edited as one TOML file.
type Document struct {
	Submission Submission
	Inbound    Inbound
	Queue      Queue
	Delivery   Delivery
	Storage    Storage
	Streams    Streams
	Pools      Pools
	Providers  Providers
	Feedback   Feedback
	Limits     Limits
	Warmup     Warmup
}

// Submission bounds what clients may do on ports 465 and 587.
type Submission struct {
	MaxConnections        int      `toml:"max_connections"`          // at once, all clients
	MaxConnectionsPerIP   int      `toml:"max_connections_per_ip"`   // at once, one client address
	MaxMessagesPerSession int      `toml:"max_messages_per_session"` // then 421
	MaxCommandsPerSession int      `toml:"max_commands_per_session"` // then 421
	MaxErrorsPerSession   int      `toml:"max_errors_per_session"`   // refused commands, then 421
	MaxRecipients         int      `toml:"max_recipients"`           // of one message
	MaxMessageBytes       int64    `toml:"max_message_bytes"`        // header section included
	MaxHeaderBytes        int      `toml:"max_header_bytes"`         // of the header section
	MaxLineBytes          int      `toml:"max_line_bytes"`           // of a line of the message, CRLF not counted (RFC 5322 section 2.1.1: 998)
	MaxReceivedFields     int      `toml:"max_received_fields"`      // more is a loop (RFC 5321 section 6.3)
	CommandTimeout        Duration `toml:"command_timeout"`          // a client may be silent this long
	MinBytesPerSecond     int64    `toml:"min_bytes_per_second"`     // of message data, averaged over 30 s; slower clients get 421
	AuthFailuresPerIP     int      `toml:"auth_failures_per_ip"`     // within AuthFailureWindow, then 454 until it has passed
	AuthFailureWindow     Duration `toml:"auth_failure_window"`

	AuthFailuresPerNetwork int      `toml:"auth_failures_per_network"` // of an IPv4 /24 or IPv6 /56
	AuthFailuresPerAccount int      `toml:"auth_failures_per_account"` // with one user name from one IPv4 /24 or IPv6 /64
	AuthLockMax            Duration `toml:"auth_lock_max"`             // a lock that is earned again lasts twice as long, at most this

	MaxConnectionsPerMinute      int `toml:"max_connections_per_minute"`        // new ones, all clients
	MaxConnectionsPerMinutePerIP int `toml:"max_connections_per_minute_per_ip"` // new ones, one client address

	RequireOwnership bool `toml:"require_ownership"` // mail from a domain whose ownership record was never seen is refused

	ClientRates
}

// ClientRates bounds what clients may do in a time, and says when new sessions
// are turned away because memory is short. Where a rate is 0 there is no bound.
type ClientRates struct {
	MaxCommandsPerSecond           int `toml:"max_commands_per_second"`             // all clients
	MaxCommandsPerSecondPerNetwork int `toml:"max_commands_per_second_per_network"` // one client network
	MaxCommandsPerSecondPerSession int `toml:"max_commands_per_second_per_session"`
	MaxErrorsPerMinute             int `toml:"max_errors_per_minute"`             // commands refused with 5xx, all clients
	MaxErrorsPerMinutePerNetwork   int `toml:"max_errors_per_minute_per_network"` // one client network
	NetworkBitsIPv4                int `toml:"network_bits_ipv4"`                 // how much of an address names the client network
	NetworkBitsIPv6                int `toml:"network_bits_ipv6"`
	MaxMemoryPercent               int `toml:"max_memory_percent"` // of the memory the relay may use; 0: do not look
}

// Inbound bounds port 25, where only our own signed return paths are accepted.
type Inbound struct {
	Hosts               []string `toml:"hosts"` // names for the MX records of return-path domains; empty: the EHLO names of the sources
	MaxConnections      int      `toml:"max_connections"`
	MaxConnectionsPerIP int      `toml:"max_connections_per_ip"`
	MaxMessageBytes     int64    `toml:"max_message_bytes"`
	MaxRecipients       int      `toml:"max_recipients"`
	CommandTimeout      Duration `toml:"command_timeout"`
	ReturnPathDays      int      `toml:"return_path_days"` // a signed return path is good this long
	MaxStoredBytes      int64    `toml:"max_stored_bytes"` // of mail kept until it is read; more gets 452

	MaxConnectionsPerMinute      int `toml:"max_connections_per_minute"`        // new ones, from everywhere
	MaxConnectionsPerMinutePerIP int `toml:"max_connections_per_minute_per_ip"` // new ones, one address

	ClientRates
}

// Queue holds retry schedule and expiry. Times are per stream kind.
type Queue struct {
	Retry               []Duration `toml:"retry"`                 // waits after the 1st, 2nd, … failed attempt; then doubling
	RetryMax            Duration   `toml:"retry_max"`             // no wait is longer
	RetryJitterPercent  int        `toml:"retry_jitter_percent"`  // each wait is moved by up to ± this part
	GreylistRetry       Duration   `toml:"greylist_retry"`        // first retry after greylisting, from the same source
	ExpireBulk          Duration   `toml:"expire_bulk"`           // after acceptance
	ExpireTransactional Duration   `toml:"expire_transactional"`  // after acceptance
	DelayNotice         Duration   `toml:"delay_notice"`          // transactional mail waiting this long is reported once; 0 = never
	NoticesPerHour      int        `toml:"notices_per_hour"`      // notifications that one sender gets within an hour, per relay; 0 = no bound
	NoticesPerDay       int        `toml:"notices_per_day"`       // within a day, likewise
	InDoubtRetry        Duration   `toml:"in_doubt_retry"`        // wait before the retry of an attempt whose end a crash hid
	InDoubtRetries      int        `toml:"in_doubt_retries"`      // retries of a recipient in doubt; then it ends as unknown
	MaxMemoryRecipients int        `toml:"max_memory_recipients"` // recipients held in memory, all queues; the others wait on disk
}

// Delivery bounds outbound work of one relay.
type Delivery struct {
	MaxSessions         int      `toml:"max_sessions"`                  // SMTP sessions at once, all providers
	MaxConnectsInFlight int      `toml:"max_connects_in_flight"`        // connections being opened at once
	ProviderPercent     int      `toml:"provider_percent"`              // part of both that one provider may have
	UnprovenPercent     int      `toml:"unproven_percent"`              // part of both that hosts may have that have not taken mail promptly of late
	ReservePercent      int      `toml:"transactional_reserve_percent"` // part of every lane's turns that transactional mail has first
	IdleSession         Duration `toml:"idle_session"`                  // an idle session is kept this long
	ConnectTimeout      Duration `toml:"connect_timeout"`
	GreetingTimeout     Duration `toml:"greeting_timeout"` // RFC 5321 section 4.5.3.2.1: 5 min
	EHLOTimeout         Duration `toml:"ehlo_timeout"`
	MailTimeout         Duration `toml:"mail_timeout"`      // section 4.5.3.2.2: 5 min
	RcptTimeout         Duration `toml:"rcpt_timeout"`      // section 4.5.3.2.3: 5 min
	DataTimeout         Duration `toml:"data_timeout"`      // section 4.5.3.2.4: 2 min
	BlockTimeout        Duration `toml:"block_timeout"`     // section 4.5.3.2.5: 3 min
	FinalDotTimeout     Duration `toml:"final_dot_timeout"` // section 4.5.3.2.6: 10 min
	MaxHostsPerAttempt  int      `toml:"max_hosts_per_attempt"`
	BrokenTLSMemory     Duration `toml:"broken_tls_memory"` // a host whose STARTTLS failed is used in clear text this long, unless TLS is required
	MaxResolvesInFlight int      `toml:"max_resolves_in_flight"`
	MinDNSTTL           Duration `toml:"min_dns_ttl"`
	MaxDNSTTL           Duration `toml:"max_dns_ttl"`
	HostBackoff         Duration `toml:"host_backoff"`     // a host that refused a connection is not tried again for this long
	Chunking            string   `toml:"chunking"`         // "auto", "binary-only", "off": mail by BDAT (RFC 3030) to hosts that take it
	ChunkFromBytes      int64    `toml:"chunk_from_bytes"` // text as large as this goes by BDAT with "auto"
	SignDKIM            bool     `toml:"sign_dkim"`
	DKIMPublishHold     Duration `toml:"dkim_publish_hold"` // a new key signs once DNS has shown its record for so long
	DKIMRotateEvery     Duration `toml:"dkim_rotate_every"` // keys that have signed for so long get successors; 0: never by itself

	DKIMCheckEvery      Duration `toml:"dkim_check_every"`       // one signature of each key is checked against DNS in such a time; 0: none
	DKIMCheckHold       bool     `toml:"dkim_check_hold"`        // mail of a domain whose signatures do not verify is held
	DKIMCheckHoldExcept []string `toml:"dkim_check_hold_except"` // sending domains whose mail never is
}

// Storage guards the relay's disk.
type Storage struct {
	MinFreeBytes   int64 `toml:"min_free_bytes"`   // below it new mail gets 452
	MinFreeInodes  int64 `toml:"min_free_inodes"`  // below it new mail gets 452
	ReserveBytes   int64 `toml:"reserve_bytes"`    // preallocated for the queue's own growth
	SegmentBytes   int64 `toml:"segment_bytes"`    // a body segment is closed at this size
	MaxOutboxBytes int64 `toml:"max_outbox_bytes"` // events kept for upload; the oldest are dropped as a counted gap
}

// Streams maps mail to pools.
type Streams struct {
	Stream []Stream       `toml:"stream"`
	Tenant []TenantWeight `toml:"tenant"`
}

// TenantWeight is the part of a tenant where mail of several waits for the same
// rates or connections. A tenant that is not listed has DefaultWeight.
type TenantWeight struct {
	Name   string `toml:"name"`
	Weight int    `toml:"weight"` // 1 to 1000
}

// What a stream or tenant has of which the policy says nothing.
const (
	DefaultWeight   = 10
	DefaultPriority = 50
)

// Stream says what kind of mail a named stream of a project is and which pool
// carries it. The most specific entry wins: tenant and project named, tenant
// named, none named.
type Stream struct {
	Tenant     string     `toml:"tenant"`  // tenant name or "*"
	Project    string     `toml:"project"` // project name or "*"
	Name       string     `toml:"name"`
	Kind       StreamKind `toml:"kind"`
	Pool       string     `toml:"pool"`
	ReturnPath string     `toml:"return_path"` // "message" or "recipient"; empty: by kind
	Expire     Duration   `toml:"expire"`      // 0: by kind
	Priority   *int       `toml:"priority"`    // 0 to 100 among the streams of a tenant; nil: DefaultPriority
	Weight     int        `toml:"weight"`      // 1 to 1000 among those of equal priority; 0: DefaultWeight

	// What a message may say in X-Relais-Priority, which orders the mail of one
	// stream. nil: MinPriority and MaxPriority.
	MessagePriorityMin *int `toml:"message_priority_min"`
	MessagePriorityMax *int `toml:"message_priority_max"`
}

// Pools weighs the sources of pools.
type Pools struct {
	Pool []PoolWeights `toml:"pool"`
}

// PoolWeights gives each source of a pool its share of new work. A source that
// is not listed has weight 1; weight 0 takes it out of use.
type PoolWeights struct {
	Name    string         `toml:"name"`
	Weights map[string]int `toml:"weights"` // bind address → 0 to 1000
}

// Providers holds the receiving side: how each provider is recognised and what
// it allows.
type Providers struct {
	Default  []Limit    `toml:"default"` // limits of a provider without its own
	Provider []Provider `toml:"provider"`
	Limit    []Override `toml:"limit"` // changes to a provider's limits, by name
	Reflex   Reflex     `toml:"reflex"`
	ReflexOf []ReflexOf `toml:"reflex_of"` // changes to the Reflex, by provider
}

// Provider is the profile of one mailbox provider.
type Provider struct {
	Name       string   `toml:"name"`
	MXSuffixes []string `toml:"mx_suffixes"` // host names equal to or below one of these
	MXExamples []string `toml:"mx_examples"` // real host names; each suffix must match one
	TLS        TLSMode  `toml:"tls"`
	Family     string   `toml:"family"`   // "any", "ipv4", "ipv4-first", "ipv6-first"
	Chunking   string   `toml:"chunking"` // "auto", "binary-only", "off"; empty: as section delivery says
	// SignAlgorithms are those of the DKIM signatures that the provider gets, for
	// one that refuses mail with several; empty: of every key of the domain. A
	// domain without a key of any of them signs with every key it has.
	SignAlgorithms []string `toml:"sign_algorithms"`
	Limits         []Limit  `toml:"limit"`
}

// TLSMode says how much TLS a provider needs.
type TLSMode string

// The TLS modes.
const (
	TLSOpportunistic TLSMode = "opportunistic"
	TLSRequired      TLSMode = "required"
	TLSOff           TLSMode = "off" // never try STARTTLS; for peers whose TLS is broken for good, and labs
)

// LimitKind says what a limit counts.
type LimitKind string

// The kinds of limits.
const (
	Connections              LimitKind = "connections"                // open or opening at once
	MessagesPerConnection    LimitKind = "messages_per_connection"    // then QUIT
	RecipientsPerTransaction LimitKind = "recipients_per_transaction" // RCPT commands of one message
	MessageRate              LimitKind = "message_rate"               // transactions per Per
	ConnectionRate           LimitKind = "connection_rate"            // connections opened per Per
)

// Scope says whom a limit counts together.
type Scope string

// The scopes. This version enforces source and relay; a document that names
// another scope is refused.
const (
	ScopeSource Scope = "source" // each source address by itself
	ScopeRelay  Scope = "relay"  // all sources of one relay together
)

// Limit is one limit of a provider with its scope.
type Limit struct {
	Kind  LimitKind `toml:"kind"`
	Scope Scope     `toml:"scope"`
	Max   int       `toml:"max"`
	Per   Duration  `toml:"per"`   // rates only
	Burst int       `toml:"burst"` // rates only: how many may start at once after a pause; 0 = 1
}

// Override replaces or, with Max 0, removes one limit of a named provider, or of "*" for all.
type Override struct {
	Provider string `toml:"provider"`
	Limit
}

// Duration is a time span that TOML writes as "5m" or "4d12h".
type Duration time.Duration

// D returns d as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }
