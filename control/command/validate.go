package command

import (
	"net/netip"
	"path"
	"strings"

	"github.com/relais-mta/relais/control"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// Bounds of what operators write, checked before a command is proposed.
const (
	MaxNameBytes       = 63
	MaxTextBytes       = 255
	MaxLabels          = 32
	MaxCIDRs           = 64
	MaxTokenUses       = 1000
	MaxNodeAddresses   = 4096
	MaxHostNameBytes   = 253
	MaxDKIMKeys        = 4
	MaxSealedBytes     = 8 << 10
	MaxCABytes         = 64 << 10
	MaxPolicySections  = 32
	MaxPolicyBytes     = policy.MaxSectionBytes // all sections of one change together
	maxSelectorBytes   = 63
	maxPasswordHashLen = 255
)

const opValidate = "command.Validate"

// CheckName checks a name that operators give: letters, digits, dot, hyphen
// and underscore, beginning with a letter or digit.
func CheckName(field, name string) error { return checkName(field, name, MaxNameBytes) }

// checkName is CheckName with another bound: nodes are named after their host.
func checkName(field, name string, maxBytes int) error {
	if name == "" {
		return fault.Field(opValidate, field, "is missing: give a name of letters, digits, '.', '-' and '_'")
	}
	if len(name) > maxBytes {
		return fault.Field(opValidate, field, "has %d bytes, allowed are %d: choose a shorter name", len(name), maxBytes)
	}
	for i := 0; i < len(name); i++ {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if alnum || i > 0 && strings.IndexByte("._-", c) >= 0 {
			continue
		}
		return fault.Field(opValidate, field, "%q is not a name: use letters, digits, '.', '-' and '_', a letter or digit first", name)
	}
	return nil
}

func checkText(field, text string) error {
	if len(text) > MaxTextBytes {
		return fault.Field(opValidate, field, "has %d bytes, allowed are %d", len(text), MaxTextBytes)
	}
	for i := 0; i < len(text); i++ {
		if text[i] < 0x20 || text[i] == 0x7f {
			return fault.Field(opValidate, field, "holds a control character: write it on one line")
		}
	}
	return nil
}

func checkBytes(field string, b []byte, least, most int) error {
	if len(b) < least || len(b) > most {
		return fault.Field(opValidate, field, "has %d bytes, allowed are %d to %d", len(b), least, most)
	}
	return nil
}

func checkLabels(labels []*Label) error {
	if len(labels) > MaxLabels {
		return fault.Field(opValidate, "label", "%d labels are too many, allowed are %d", len(labels), MaxLabels)
	}
	last := ""
	for _, l := range labels {
		if err := CheckName("label", l.GetKey()); err != nil {
			return err
		}
		if err := checkText("label "+l.GetKey(), l.GetValue()); err != nil {
			return err
		}
		if l.GetKey() <= last {
			return fault.Field(opValidate, "label", "%q is given twice or out of order: give each key once", l.GetKey())
		}
		last = l.GetKey()
	}
	return nil
}

func oneOf(field, value string, allowed ...string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return fault.Field(opValidate, field, "%q is unknown: use one of %s", value, strings.Join(allowed, ", "))
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func checkMeta(m *Meta) error {
	return first(checkText("actor", m.GetActor()), checkText("reason", m.GetReason()))
}

// missing is the error for a command without its record.
func missing(what string) error { return fault.Field(opValidate, what, "is missing") }

// Validate implements Command.
func (c *ClusterInit) Validate() error {
	r := c.GetCluster()
	if r == nil {
		return missing("cluster")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, checkBytes("ca_bundle", r.GetCaBundle(), 1, MaxCABytes), checkBytes("ca_sealed", r.GetCaSealed(), 0, MaxCABytes),
		checkText("kek_id", r.GetKekId()), checkBytes("recovery_sealed", r.GetRecoverySealed(), 0, MaxSealedBytes),
		checkBytes("credential_key_sealed", r.GetCredentialKeySealed(), 1, MaxSealedBytes))
}

// Validate implements Command.
func (c *TokenCreate) Validate() error {
	r := c.GetToken()
	if r == nil {
		return missing("token")
	}
	if _, err := r.Row(); err != nil {
		return err
	}
	if r.GetUsesMax() < 1 || r.GetUsesMax() > MaxTokenUses {
		return fault.Field(opValidate, "uses", "%d is out of range: a token is good for 1 to %d uses", r.GetUsesMax(), MaxTokenUses)
	}
	if len(r.GetCidrs()) > MaxCIDRs {
		return fault.Field(opValidate, "cidr", "%d networks are too many, allowed are %d", len(r.GetCidrs()), MaxCIDRs)
	}
	if _, err := path.Match(r.GetNameGlob(), ""); err != nil {
		return fault.Field(opValidate, "name", "%q is not a pattern: use '*', '?' and [a-z]", r.GetNameGlob())
	}
	if r.GetNotAfterMs() <= 0 {
		return missing("ttl")
	}
	return first(checkMeta(c.GetMeta()), oneOf("role", r.GetRole(), string(control.NodeRelay), string(control.NodeControl)),
		checkLabels(r.GetLabels()), checkText("name", r.GetNameGlob()))
}

// Validate implements Command.
func (c *TokenRedeem) Validate() error {
	if len(c.GetAddresses()) > MaxNodeAddresses {
		return fault.Field(opValidate, "addresses", "%d addresses are too many, allowed are %d", len(c.GetAddresses()), MaxNodeAddresses)
	}
	for _, b := range append([][]byte{c.GetRemote()}, c.GetAddresses()...) {
		if _, ok := netip.AddrFromSlice(b); !ok {
			return fault.Field(opValidate, "addresses", "an address has 4 or 16 bytes, this one has %d", len(b))
		}
	}
	return first(checkMeta(c.GetMeta()), checkBytes("token", c.GetToken(), 16, 16), checkBytes("csr_hash", c.GetCsrHash(), 32, 32),
		checkBytes("node", c.GetNode(), 16, 16), checkName("name", c.GetName(), MaxHostNameBytes), checkLabels(c.GetLabels()), checkText("version", c.GetVersion()),
		oneOf("role", c.GetRole(), string(control.NodeRelay), string(control.NodeControl)), checkServer(c.GetServer()))
}

// checkServer checks how a control server that joins is reached.
func checkServer(r *Server) error {
	if r == nil {
		return nil
	}
	_, err := r.Row()
	return first(err, checkName("name", r.GetName(), MaxHostNameBytes), checkText("raft_address", r.GetRaftAddress()), checkText("link_address", r.GetLinkAddress()),
		checkText("http_address", r.GetHttpAddress()), checkText("version", r.GetVersion()), checkText("zone", r.GetZone()), checkBytes("spki", r.GetSpki(), 0, 32), oneOf("state", r.GetState(), nodeStates...), checkCertificates(r.GetCertificates()))
}

// Validate implements Command.
func (c *TokenRevoke) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("token", c.GetToken(), 16, 16))
}

var nodeStates = []string{string(control.NodePending), string(control.NodeActive), string(control.NodeDraining), string(control.NodeDrained), string(control.NodeEvicted)}

// Validate implements Command.
func (c *NodeUpsert) Validate() error {
	r := c.GetNode()
	if r == nil {
		return missing("node")
	}
	_, err := r.Row()
	if len(r.GetAddresses()) > MaxNodeAddresses {
		return fault.Field(opValidate, "addresses", "%d addresses are too many, allowed are %d", len(r.GetAddresses()), MaxNodeAddresses)
	}
	return first(checkMeta(c.GetMeta()), err, checkName("name", r.GetName(), MaxHostNameBytes), checkText("zone", r.GetZone()), checkLabels(r.GetLabels()),
		checkText("version", r.GetVersion()), checkText("cert_serial", r.GetCertSerial()), checkBytes("cert_spki", r.GetCertSpki(), 0, 32), oneOf("state", r.GetState(), nodeStates...))
}

// Validate implements Command.
func (c *NodeSetState) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("node", c.GetNode(), 16, 16), oneOf("state", c.GetState(), nodeStates...))
}

// Validate implements Command.
func (c *ServerUpsert) Validate() error {
	r := c.GetServer()
	if r == nil {
		return missing("server")
	}
	return first(checkMeta(c.GetMeta()), checkServer(r))
}

// Validate implements Command.
func (c *TenantPut) Validate() error {
	r := c.GetTenant()
	if r == nil {
		return missing("tenant")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, CheckName("name", r.GetName()), CheckName("ownership_token", r.GetOwnershipToken()), checkOptionalID("default_project", c.GetDefaultProject()))
}

// Validate implements Command.
func (c *ProjectPut) Validate() error {
	r := c.GetProject()
	if r == nil {
		return missing("project")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, CheckName("name", r.GetName()))
}

func checkDomain(field string, d mailaddr.Domain) error {
	if d.IsLiteral() || !strings.Contains(string(d), ".") {
		return fault.Field(opValidate, field, "%q is not a domain name below a top-level domain", d)
	}
	return nil
}

// Validate implements Command.
func (c *DomainPut) Validate() error {
	r := c.GetDomain()
	if r == nil {
		return missing("domain")
	}
	row, err := r.Row()
	if err != nil {
		return err
	}
	if err := first(checkDomain("domain", row.Name), checkDomain("return_path", row.ReturnPath)); err != nil {
		return err
	}
	if err := checkKeys(row.DKIM, MaxDKIMKeys); err != nil {
		return err
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *CredentialPut) Validate() error {
	r := c.GetCredential()
	if r == nil {
		return missing("credential")
	}
	if r.GetScope() != nil {
		return fault.Field(opValidate, "scope", "older servers would drop it: use a scoped put")
	}
	return checkCredential(c.GetMeta(), r)
}

// Validate implements Command.
func (c *CredentialRevoke) Validate() error {
	return first(checkMeta(c.GetMeta()), checkBytes("credential", c.GetCredential(), 16, 16))
}

// Validate implements Command.
func (c *PoolPut) Validate() error {
	r := c.GetPool()
	if r == nil {
		return missing("pool")
	}
	row, err := r.Row()
	if err := first(checkMeta(c.GetMeta()), err, CheckName("name", r.GetName()), oneOf("kind", r.GetKind(), string(policy.PoolShared), string(policy.PoolDedicated))); err != nil {
		return err
	}
	if row.Kind == policy.PoolDedicated && row.Tenant.IsZero() {
		return fault.Field(opValidate, "tenant", "is missing: a dedicated pool belongs to one tenant")
	}
	if row.Kind == policy.PoolShared && !row.Tenant.IsZero() {
		return fault.Field(opValidate, "tenant", "must be empty: a shared pool belongs to no tenant; use kind dedicated")
	}
	return nil
}

func checkSourceAddr(field string, a netip.Addr) error {
	if a.IsUnspecified() || a.IsMulticast() {
		return fault.Field(opValidate, field, "%s cannot be a source address: give the address of one interface", a)
	}
	return nil
}

// Validate implements Command.
func (c *IPPut) Validate() error {
	r := c.GetSource()
	if r == nil {
		return missing("ip")
	}
	row, err := r.Row()
	if err != nil {
		return err
	}
	if err := first(checkSourceAddr("bind", row.Bind), checkSourceAddr("public", row.Public)); err != nil {
		return err
	}
	if row.Bind.Is4() != row.Public.Is4() {
		return fault.Field(opValidate, "public", "%s and the bind address %s are of different families", row.Public, row.Bind)
	}
	ehlo, err := mailaddr.ParseDomain(row.EHLO)
	if err != nil || ehlo.IsLiteral() || string(ehlo) != row.EHLO || !strings.Contains(row.EHLO, ".") {
		return fault.Field(opValidate, "ehlo", "%q is not a full host name in lower case, such as mta1.example.com", row.EHLO)
	}
	return first(checkMeta(c.GetMeta()), checkText("ptr", row.PTR), oneOf("state", r.GetState(), string(control.SourceFree), string(control.SourceAssigned), string(control.SourceQuarantined)), checkText("quarantine", r.GetQuarantine()),
		checkOptionalID("node", c.GetNode()), checkOptionalID("pool", c.GetPool()))
}

func checkOptionalID(field string, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return checkBytes(field, b, 16, 16)
}

// Validate implements Command.
func (c *IPAssign) Validate() error {
	if len(c.GetNode()) == 0 && len(c.GetPool()) == 0 {
		return fault.Field(opValidate, "node", "is missing: name the relay or the pool that gets the address")
	}
	return first(checkMeta(c.GetMeta()), checkBytes("ip", c.GetSource(), 16, 16), checkOptionalID("node", c.GetNode()), checkOptionalID("pool", c.GetPool()))
}

// Validate implements Command.
func (c *PolicyPut) Validate() error {
	if len(c.GetSections()) == 0 || len(c.GetSections()) > MaxPolicySections {
		return fault.Field(opValidate, "sections", "%d sections are out of range: put 1 to %d", len(c.GetSections()), MaxPolicySections)
	}
	total, last := 0, ""
	for _, s := range c.GetSections() {
		if err := CheckName("section", s.GetName()); err != nil {
			return err
		}
		if s.GetName() <= last {
			return fault.Field(opValidate, "sections", "%q is given twice or out of order", s.GetName())
		}
		last = s.GetName()
		total += len(s.GetText())
	}
	if total > MaxPolicyBytes {
		return fault.New(fault.TooLarge, opValidate, "the sections have %d bytes together, allowed are %d a change: put them one by one", total, MaxPolicyBytes)
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *OperatorPut) Validate() error {
	r := c.GetOperator()
	if r == nil {
		return missing("operator")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, CheckName("name", r.GetName()), oneOf("role", r.GetRole(), string(control.RoleAdmin), string(control.RoleOperator), string(control.RoleViewer)),
		checkBytes("password_hash", []byte(r.GetPasswordHash()), 0, maxPasswordHashLen))
}

// Validate implements Command.
func (c *APIKeyPut) Validate() error {
	r := c.GetKey()
	if r == nil {
		return missing("key")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, CheckName("name", r.GetName()))
}

// Validate implements Command.
func (c *ReturnPathKeyPut) Validate() error {
	r := c.GetKey()
	if r == nil {
		return missing("key")
	}
	_, err := r.Row()
	return first(checkMeta(c.GetMeta()), err, checkBytes("key_sealed", r.GetKeySealed(), 1, MaxSealedBytes))
}

// Validate implements Command.
func (c *FSMVersionSet) Validate() error {
	if c.GetVersion() == 0 || c.GetVersion() > uint32(FSMVersion) {
		return fault.Field(opValidate, "version", "%d is out of range: this program applies versions 1 to %d", c.GetVersion(), FSMVersion)
	}
	return checkMeta(c.GetMeta())
}

// Validate implements Command.
func (c *StateHash) Validate() error { return checkBytes("hash", c.GetHash(), 32, 32) }
