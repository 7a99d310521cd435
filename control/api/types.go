package api

import (
	"time"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/control/service"
)

// The types below are the JSON of the management API. Fields are only added.
// Times are RFC 3339 in UTC; ids are their text form; a revision is what
// If-Match takes.

// Token is a join token.
type Token struct {
	ID        string            `json:"id"`
	Role      string            `json:"role" enum:"relay,control"`
	UsesMax   int               `json:"uses_max"`
	UsesLeft  int               `json:"uses_left"`
	NotAfter  time.Time         `json:"not_after"`
	Labels    map[string]string `json:"labels,omitempty"`
	CIDRs     []string          `json:"cidrs,omitempty" doc:"Networks the machine may come from; empty: any"`
	NameGlob  string            `json:"name_glob,omitempty" doc:"Pattern its name must match; empty: any"`
	Approve   bool              `json:"approve,omitempty" doc:"The machine waits, pending, until an operator accepts it"`
	Nodes     []string          `json:"nodes,omitempty" doc:"Nodes that joined with it"`
	Revoked   bool              `json:"revoked"`
	CreatedAt time.Time         `json:"created_at"`
	Revision  uint64            `json:"revision"`
	Secret    string            `json:"token,omitempty" doc:"The text to paste, shown only when the token is created"`
}

// TokenCreate asks for a join token.
type TokenCreate struct {
	Role       string            `json:"role" enum:"relay,control"`
	TTLSeconds int64             `json:"ttl_seconds,omitempty" minimum:"0" doc:"Life in seconds, at most 86400; 0: an hour for relays, 15 minutes for servers"`
	Uses       int               `json:"uses,omitempty" minimum:"0" doc:"How many machines may join with it; 0: one"`
	Labels     map[string]string `json:"labels,omitempty" doc:"Given to every node that joins with it"`
	CIDRs      []string          `json:"cidrs,omitempty" doc:"Networks the machine may come from; empty: any"`
	NameGlob   string            `json:"name_glob,omitempty" doc:"Pattern its name must match; empty: any"`
	Approve    bool              `json:"approve,omitempty" doc:"The machine waits, pending, until an operator accepts it"`
}

// Node is a relay.
type Node struct {
	ID             string            `json:"id"`
	Name           string            `json:"name"`
	State          string            `json:"state" enum:"pending,active,draining,drained,evicted"`
	Labels         map[string]string `json:"labels,omitempty"`
	Version        string            `json:"version,omitempty"`
	JoinedAt       time.Time         `json:"joined_at"`
	CertNotAfter   *time.Time        `json:"cert_not_after,omitempty"`
	Connected      bool              `json:"connected" doc:"To any server"`
	LastContact    *time.Time        `json:"last_contact,omitempty" doc:"With any server that runs, since that started"`
	LocalAddresses []string          `json:"local_addresses,omitempty" doc:"Present on its host, as it said when it connected"`
	AckedRevision  uint64            `json:"acked_revision" doc:"Revision it works with, as far as any server heard"`
	Report         *NodeReport       `json:"report,omitempty" doc:"What it said last of its queue"`
	Refused        uint64            `json:"refused_revision,omitempty"`
	Clone          *NodeClone        `json:"clone,omitempty" doc:"Two machines claim to be this relay: a copy of its disk is running"`
	RefusedWhy     string            `json:"refused_why,omitempty"`
	Sources        []string          `json:"sources,omitempty" doc:"Addresses assigned to it"`
	Handover       string            `json:"handover_address,omitempty" doc:"Where it takes mail of other relays"`
	Revision       uint64            `json:"revision"`
}

// NodeClone says that two machines came with the key of one relay.
type NodeClone struct {
	At      time.Time `json:"at" doc:"Last time"`
	Holder  string    `json:"holder" doc:"Address of the machine that works as the relay"`
	Refused string    `json:"refused" doc:"Address of the machine that came later and was refused"`
	Times   int       `json:"times" doc:"How often, since the server that refused it started"`
}

func cloneOf(c *service.Clone) *NodeClone {
	if c == nil {
		return nil
	}
	return &NodeClone{At: c.At, Holder: c.Holder.String(), Refused: c.Refused.String(), Times: c.Times}
}

// NodeReport is what a relay says of itself from time to time.
type NodeReport struct {
	WaitingRecipients  uint64   `json:"waiting_recipients"`
	InFlightRecipients uint64   `json:"in_flight_recipients"`
	HeldRecipients     uint64   `json:"held_recipients"`
	QueueBytes         uint64   `json:"queue_bytes"`
	HandedOver         uint64   `json:"handed_over_recipients" doc:"Recipients handed over to other relays since its start"`
	HandoverPerSecond  uint64   `json:"handover_recipients_per_second" doc:"Of late"`
	HandoverOffered    uint64   `json:"handover_offered_messages" doc:"Offered to other relays and not answered"`
	HandoverPools      uint32   `json:"handover_pools" doc:"Pools whose mail goes to other relays"`
	FreeBytes          uint64   `json:"free_bytes"`
	ClockOffsetMillis  int64    `json:"clock_offset_ms"`
	MissingSources     []string `json:"missing_sources,omitempty" doc:"Ids of addresses assigned to it that are not on its host"`
	Problems           []string `json:"problems,omitempty"`
}

func reportOf(r *service.ReportInfo) *NodeReport {
	if r == nil {
		return nil
	}
	out := &NodeReport{WaitingRecipients: r.WaitingRecipients, InFlightRecipients: r.InFlightRecipients, HeldRecipients: r.HeldRecipients, QueueBytes: r.QueueBytes, FreeBytes: r.FreeBytes,
		ClockOffsetMillis: r.ClockOffset.Milliseconds(), Problems: r.Problems,
		HandedOver: r.Handover.Given, HandoverPerSecond: r.Handover.PerSecond, HandoverOffered: r.Handover.Offered, HandoverPools: r.Handover.Pools}
	for _, id := range r.Missing {
		out.MissingSources = append(out.MissingSources, id.String())
	}
	return out
}

// Tenant is a customer of the installation.
type Tenant struct {
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	Suspended      bool      `json:"suspended" doc:"Its credentials are refused; its queue goes on"`
	OwnershipToken string    `json:"ownership_token" doc:"Published in DNS to prove that a domain is its own"`
	FeedbackName   string    `json:"feedback_name,omitempty" doc:"What {tenant} of the policy's section feedback becomes in a Feedback-ID"`
	CreatedAt      time.Time `json:"created_at"`
	Revision       uint64    `json:"revision"`
}

// Project groups streams and credentials of a tenant.
type Project struct {
	ID        string    `json:"id"`
	Tenant    string    `json:"tenant"`
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"created_at"`
	Revision  uint64    `json:"revision"`
}

// Domain is a sending domain.
type Domain struct {
	Name       string      `json:"name"`
	Tenant     string      `json:"tenant"`
	TenantName string      `json:"tenant_name"`
	ReturnPath string      `json:"return_path"`
	Selectors  []string    `json:"selectors"`
	Keys       []DomainKey `json:"keys,omitempty" doc:"The DKIM keys, oldest first"`
	Records    []DNSRecord `json:"records,omitempty" doc:"What to publish in DNS"`
	Notes      []string    `json:"notes,omitempty"`
	VerifiedAt *time.Time  `json:"verified_at,omitempty" doc:"When its ownership record was first seen in DNS; absent: never"`
	CreatedAt  time.Time   `json:"created_at"`
	Revision   uint64      `json:"revision"`
}

// DNSRecord is a record to publish.
type DNSRecord struct {
	Name     string   `json:"name"`
	Type     string   `json:"type"`
	Values   []string `json:"values" doc:"Of a TXT record its character-strings, which readers put together without a space"`
	Purpose  string   `json:"purpose"`
	Required bool     `json:"required"`
	Zone     string   `json:"zone" doc:"The record as a line of a zone file"`
}

// Credential lets a client submit mail.
type Credential struct {
	ID        string     `json:"id" doc:"Also the user name"`
	Tenant    string     `json:"tenant"`
	Project   string     `json:"project"`
	Name      string     `json:"name,omitempty"`
	Stream    string     `json:"stream,omitempty"`
	NotAfter  *time.Time `json:"not_after,omitempty"`
	Revoked   bool       `json:"revoked"`
	CreatedAt time.Time  `json:"created_at"`
	Revision  uint64     `json:"revision"`
	Secret    string     `json:"secret,omitempty" doc:"The password, shown only when the credential is created or rotated"`

	PreviousUntil *time.Time `json:"previous_until,omitempty" doc:"The secret before the last rotation is good until then"`

	CredentialScope
}

// CredentialScope narrows what a credential is good for.
type CredentialScope struct {
	Domains         []string `json:"domains,omitempty" doc:"From and Sender must be at one of them or below; empty: any sending domain of the tenant"`
	Networks        []string `json:"networks,omitempty" doc:"Networks of clients, such as 192.0.2.0/24; empty: all"`
	MessagesPerHour uint32   `json:"messages_per_hour,omitempty" doc:"Each relay takes so many in any 60 minutes; 0: no limit"`
	Certificates    []string `json:"certificates,omitempty" doc:"SHA-256 fingerprints, hexadecimal, of certificates of which the client must show one in TLS; empty: none is needed"`
}

// CredentialRotate asks for a new secret.
type CredentialRotate struct {
	OverlapSeconds *int64 `json:"overlap_seconds,omitempty" minimum:"0" maximum:"2592000" doc:"The old secret stays good this long; absent: a day"`
}

// CredentialCreate asks for a credential.
type CredentialCreate struct {
	Tenant   string     `json:"tenant" doc:"Id or name"`
	Project  string     `json:"project,omitempty" doc:"Id or name; empty: the default project"`
	Name     string     `json:"name,omitempty" doc:"What it is for"`
	Stream   string     `json:"stream,omitempty" doc:"Used when a message names none"`
	NotAfter *time.Time `json:"not_after,omitempty"`

	CredentialScope
}

// IP is an address that mail leaves from.
type IP struct {
	ID        string    `json:"id"`
	Bind      string    `json:"bind"`
	Public    string    `json:"public"`
	EHLO      string    `json:"ehlo"`
	PTR       string    `json:"ptr,omitempty"`
	Pool      string    `json:"pool,omitempty"`
	PoolName  string    `json:"pool_name,omitempty"`
	Node      string    `json:"node,omitempty"`
	NodeName  string    `json:"node_name,omitempty"`
	Epoch     uint64    `json:"epoch"`
	Pinned    bool      `json:"pinned"`
	State     string    `json:"state" enum:"free,assigned,releasing,quarantined"`
	Present   *bool     `json:"present,omitempty" doc:"Whether its relay found it on its host; absent while the relay is not connected"`
	CreatedAt time.Time `json:"created_at"`
	Revision  uint64    `json:"revision"`

	Leased       bool       `json:"leased,omitempty" doc:"It is floating, and its relay uses it only while it is heard"`
	LeaseUntil   *time.Time `json:"lease_until,omitempty" doc:"Its relay uses it until then if nothing more is heard of it, by the leader"`
	FreeAt       *time.Time `json:"free_at,omitempty" doc:"It is taken from its relay then if nothing more is heard of it"`
	LeaseHeard   bool       `json:"lease_heard,omitempty" doc:"Its relay has reported since the leader leads"`
	LeaseProblem string     `json:"lease_problem,omitempty" doc:"Why it is not known when the lease ends"`

	Usable        bool       `json:"usable" doc:"Mail may leave from it"`
	Unused        string     `json:"unused,omitempty" doc:"Why no mail leaves from it"`
	Quarantine    string     `json:"quarantine,omitempty" doc:"Why it is in quarantine"`
	Reverse       string     `json:"reverse,omitempty" enum:"confirmed,failed" doc:"Verdict on its reverse DNS; absent: not checked yet"`
	ReverseDetail string     `json:"reverse_detail,omitempty" doc:"What the check found"`
	ReverseAt     *time.Time `json:"reverse_at,omitempty" doc:"When the verdict was reached"`
	Overridden    bool       `json:"overridden,omitempty" doc:"An operator uses it without confirmed reverse DNS"`
}

// IPAdd asks for a source address.
type IPAdd struct {
	Bind     string `json:"bind" doc:"Address the relay binds"`
	Public   string `json:"public,omitempty" doc:"What the world sees, with 1:1 NAT; empty: the same"`
	EHLO     string `json:"ehlo" doc:"Name said in EHLO; it must lead to the public address"`
	PTR      string `json:"ptr,omitempty" doc:"Name the PTR record gives; empty: the EHLO name"`
	Floating bool   `json:"floating,omitempty" doc:"The address can move between machines: its relay uses it by a lease, and it is free by itself when that relay is silent"`
	Node     string `json:"node,omitempty" doc:"Relay that gets it, id or name"`
	Pool     string `json:"pool,omitempty" doc:"Pool it joins, id or name"`
}

// IPAssign asks for an assignment.
type IPAssign struct {
	Node          string `json:"node,omitempty" doc:"Relay that gets it, id or name"`
	Pool          string `json:"pool,omitempty" doc:"Pool it joins, id or name"`
	OldOwnerIsOff bool   `json:"old_owner_is_off,omitempty" doc:"Your word that the machine that held the address is switched off"`
}

// Pool is a named set of addresses.
type Pool struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Kind      string    `json:"kind" enum:"shared,dedicated"`
	Tenant    string    `json:"tenant,omitempty"`
	IPs       []string  `json:"ips,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	Revision  uint64    `json:"revision"`
}

// PoolAdd asks for a pool.
type PoolAdd struct {
	Name   string `json:"name"`
	Kind   string `json:"kind,omitempty" enum:"shared,dedicated" doc:"Default: dedicated if a tenant is named, else shared"`
	Tenant string `json:"tenant,omitempty" doc:"Owner of a dedicated pool, id or name"`
}

// Policy is the policy document.
type Policy struct {
	Revision uint64          `json:"revision"`
	Sections []PolicySection `json:"sections"`
}

// PolicySection is one section as TOML.
type PolicySection struct {
	Name    string `json:"name"`
	Text    string `json:"text" doc:"What was put, or the shipped default"`
	Default bool   `json:"default" doc:"Nothing was put: the shipped default holds"`
}

// PolicyPut changes sections.
type PolicyPut struct {
	Sections map[string]string `json:"sections" doc:"Section name to TOML text; an empty text returns to the shipped default"`
}

// AuditEntry is one change.
type AuditEntry struct {
	Index  uint64    `json:"index"`
	Time   time.Time `json:"time"`
	Actor  string    `json:"actor"`
	Reason string    `json:"reason,omitempty"`
	Action string    `json:"action"`
	Object string    `json:"object"`
	Before string    `json:"before,omitempty"`
	After  string    `json:"after,omitempty"`
}

// Version tells what answers.
type Version struct {
	Version  string `json:"version"`
	Cluster  string `json:"cluster,omitempty"`
	Commands uint16 `json:"commands" doc:"Version of the commands that the cluster works at"`
	Leader   bool   `json:"leader"`
	Index    uint64 `json:"index" doc:"Last change applied here"`
	Revision uint64 `json:"revision" doc:"Last change that relays must hear of"`
}

// Health tells whether this server serves.
type Health struct {
	Status string `json:"status" enum:"ok,no-leader,unsound"`
	Detail string `json:"detail,omitempty"`
}

func optionalTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func labels(in []control.Label) map[string]string {
	out := make(map[string]string, len(in))
	for _, l := range in {
		out[l.Key] = l.Value
	}
	return out
}

func tokenOf(t *control.JoinToken) Token {
	out := Token{ID: t.ID.String(), Role: string(t.Role), UsesMax: int(t.UsesMax), UsesLeft: int(t.UsesLeft), NotAfter: t.NotAfter, Labels: labels(t.Labels),
		NameGlob: t.NameGlob, Approve: t.Approve, Revoked: t.Revoked, CreatedAt: t.CreatedAt, Revision: t.Revision}
	for _, p := range t.CIDRs {
		out.CIDRs = append(out.CIDRs, p.String())
	}
	for _, r := range t.Redemptions {
		out.Nodes = append(out.Nodes, r.Node.String())
	}
	return out
}

func nodeOf(n service.NodeView) Node {
	out := Node{ID: n.ID.String(), Name: n.Name, State: string(n.State), Labels: labels(n.Labels), Version: n.Version, JoinedAt: n.JoinedAt,
		CertNotAfter: optionalTime(n.CertNotAfter), Connected: n.Seen.Connected, LastContact: optionalTime(n.Seen.LastContact.UTC()),
		AckedRevision: n.Seen.Acked, Report: reportOf(n.Seen.Report), Refused: n.Seen.Refused, RefusedWhy: n.Seen.RefusedWhy, Clone: cloneOf(n.Seen.Clone), Handover: n.HandoverAddress(), Revision: n.Revision}
	if n.Seen.Version != "" {
		out.Version = n.Seen.Version
	}
	for _, a := range n.Seen.Addresses {
		out.LocalAddresses = append(out.LocalAddresses, a.String())
	}
	for _, s := range n.Sources {
		out.Sources = append(out.Sources, s.Bind.String())
	}
	return out
}

func (s *server) tenantOf(t *control.Tenant) Tenant {
	return Tenant{ID: t.ID.String(), Name: t.Name, Suspended: t.Suspended, OwnershipToken: t.OwnershipToken, FeedbackName: s.svc.FeedbackName(t.ID), CreatedAt: t.CreatedAt, Revision: t.Revision}
}

func projectOf(p *control.Project) Project {
	return Project{ID: p.ID.String(), Tenant: p.Tenant.String(), Name: p.Name, CreatedAt: p.CreatedAt, Revision: p.Revision}
}

func domainOf(d service.DomainView) Domain {
	out := Domain{Name: string(d.Name), Tenant: d.Tenant.String(), TenantName: d.TenantName, ReturnPath: string(d.ReturnPath), Selectors: []string{}, Notes: d.Notes, VerifiedAt: optionalTime(d.VerifiedAt), CreatedAt: d.CreatedAt, Revision: d.Revision}
	for _, k := range d.DKIM {
		out.Selectors = append(out.Selectors, k.Selector)
	}
	out.Keys = keysOf(d.Keys)
	for _, r := range d.Records {
		out.Records = append(out.Records, DNSRecord{Name: r.Name, Type: r.Type, Values: r.Values, Purpose: r.Purpose, Required: r.Required, Zone: r.Zone()})
	}
	return out
}

func credentialOf(c *control.Credential) Credential {
	return Credential{ID: c.ID.String(), Tenant: c.Tenant.String(), Project: c.Project.String(), Name: c.Name, Stream: c.Stream, NotAfter: optionalTime(c.NotAfter), Revoked: c.Revoked, CreatedAt: c.CreatedAt, Revision: c.Revision,
		PreviousUntil: optionalTime(c.PreviousUntil), CredentialScope: scopeOf(&c.Scope)}
}

func ipOf(v service.IPView) IP {
	out := IP{ID: v.ID.String(), Bind: v.Bind.String(), Public: v.Public.String(), EHLO: v.EHLO, PTR: v.PTR, Pool: v.Pool.String(), PoolName: v.PoolName, Node: v.Owner.String(), NodeName: v.OwnerName,
		Epoch: v.Epoch, Pinned: v.Pinned, State: string(v.State), Present: v.Present, CreatedAt: v.CreatedAt, Revision: v.Revision,
		Usable: v.Unused == "", Unused: v.Unused, Quarantine: v.Quarantine, Reverse: string(v.Reverse), ReverseDetail: v.ReverseDetail, ReverseAt: optionalTime(v.ReverseAt), Overridden: v.Overridden}
	if l := v.Lease; l != nil {
		out.Leased, out.LeaseHeard, out.LeaseUntil, out.FreeAt, out.LeaseProblem = true, l.Heard, optionalTime(l.Until.UTC()), optionalTime(l.FreeAt.UTC()), l.Problem
	}
	return out
}

func poolOf(p service.PoolView) Pool {
	out := Pool{ID: p.ID.String(), Name: p.Name, Kind: string(p.Kind), Tenant: p.Tenant.String(), CreatedAt: p.CreatedAt, Revision: p.Revision}
	for _, s := range p.Sources {
		out.IPs = append(out.IPs, s.Bind.String())
	}
	return out
}

func policyOf(p service.PolicyView) Policy {
	out := Policy{Revision: p.Revision}
	for _, s := range p.Sections {
		out.Sections = append(out.Sections, PolicySection(s))
	}
	return out
}

func auditOf(e *control.AuditEntry) AuditEntry { return AuditEntry(*e) }
