package command

import "google.golang.org/protobuf/proto"

// Type is the number of a command. Numbers are append-only and never reused.
type Type uint8

// IgnorableBit marks types that a server too old to know them may skip. A
// server that meets any other unknown type halts, because skipping it would
// make its state differ.
const IgnorableBit Type = 0x80

// The commands.
const (
	TypeClusterInit      Type = 1
	TypeTokenCreate      Type = 2
	TypeTokenRedeem      Type = 3
	TypeTokenRevoke      Type = 4
	TypeNodeUpsert       Type = 5
	TypeNodeSetState     Type = 6
	TypeServerUpsert     Type = 7
	TypeTenantPut        Type = 8
	TypeProjectPut       Type = 9
	TypeDomainPut        Type = 10
	TypeCredentialPut    Type = 11
	TypeCredentialRevoke Type = 12
	TypePoolPut          Type = 13
	TypeIPPut            Type = 14
	TypeIPAssign         Type = 15
	TypePolicyPut        Type = 16
	TypeOperatorPut      Type = 17
	TypeAPIKeyPut        Type = 18
	TypeReturnPathKeyPut Type = 19
	TypeFSMVersionSet    Type = 20
	TypeNodeDrain        Type = 41
	TypeCredentialRotate Type = 42
	TypeIPVerify         Type = 43
	TypeDomainVerify     Type = 44
	TypeClusterRecover   Type = 50
	TypeRecoveryEnd      Type = 51
	TypeCARotate         Type = 60
	TypeCAAck            Type = 61
	TypeCAAdvance        Type = 62
	TypeCASkip           Type = 63
	TypeCARollback       Type = 64
	TypeCAPrune          Type = 65
	TypeIPRelease        Type = 66
	TypeDomainKeysAdd    Type = 70
	TypeDomainKeyStep    Type = 71

	TypeDomainKeysRollback Type = 72

	TypeCredentialPutScoped Type = 80

	TypeWarmPut   Type = 90
	TypeWarmStop  Type = 91
	TypeWarmRoll  Type = 92
	TypeWarmJudge Type = 93
	TypeWarmBatch Type = 94
	TypeWarmTell  Type = 120

	TypeStateHash Type = 1 | IgnorableBit // says nothing that changes the state
)

// Command is the body of a log entry.
type Command interface {
	proto.Message
	GetMeta() *Meta
	// Validate checks the form of the command before it is proposed: ids,
	// lengths, enumerations. The state checks again what it relies on.
	Validate() error
}

type registration struct {
	typ  Type
	name string
	make func() Command
}

var registry = []registration{
	{TypeClusterInit, "cluster.init", func() Command { return new(ClusterInit) }},
	{TypeTokenCreate, "token.create", func() Command { return new(TokenCreate) }},
	{TypeTokenRedeem, "token.redeem", func() Command { return new(TokenRedeem) }},
	{TypeTokenRevoke, "token.revoke", func() Command { return new(TokenRevoke) }},
	{TypeNodeUpsert, "node.upsert", func() Command { return new(NodeUpsert) }},
	{TypeNodeSetState, "node.set-state", func() Command { return new(NodeSetState) }},
	{TypeServerUpsert, "server.upsert", func() Command { return new(ServerUpsert) }},
	{TypeTenantPut, "tenant.put", func() Command { return new(TenantPut) }},
	{TypeProjectPut, "project.put", func() Command { return new(ProjectPut) }},
	{TypeDomainPut, "domain.put", func() Command { return new(DomainPut) }},
	{TypeCredentialPut, "credential.put", func() Command { return new(CredentialPut) }},
	{TypeCredentialRevoke, "credential.revoke", func() Command { return new(CredentialRevoke) }},
	{TypePoolPut, "pool.put", func() Command { return new(PoolPut) }},
	{TypeIPPut, "ip.put", func() Command { return new(IPPut) }},
	{TypeIPAssign, "ip.assign", func() Command { return new(IPAssign) }},
	{TypePolicyPut, "policy.put", func() Command { return new(PolicyPut) }},
	{TypeOperatorPut, "operator.put", func() Command { return new(OperatorPut) }},
	{TypeAPIKeyPut, "api-key.put", func() Command { return new(APIKeyPut) }},
	{TypeReturnPathKeyPut, "return-path-key.put", func() Command { return new(ReturnPathKeyPut) }},
	{TypeFSMVersionSet, "fsm-version.set", func() Command { return new(FSMVersionSet) }},
	{TypeNodeDrain, "node.drain", func() Command { return new(NodeDrain) }},
	{TypeCredentialRotate, "credential.rotate", func() Command { return new(CredentialRotate) }},
	{TypeIPVerify, "ip.verify", func() Command { return new(IPVerify) }},
	{TypeDomainVerify, "domain.verify", func() Command { return new(DomainVerify) }},
	{TypeClusterRecover, "cluster.recover", func() Command { return new(ClusterRecover) }},
	{TypeRecoveryEnd, "recovery.end", func() Command { return new(RecoveryEnd) }},
	{TypeCARotate, "ca.rotate", func() Command { return new(CARotate) }},
	{TypeCAAck, "ca.ack", func() Command { return new(CAAck) }},
	{TypeCAAdvance, "ca.advance", func() Command { return new(CAAdvance) }},
	{TypeCASkip, "ca.skip", func() Command { return new(CASkip) }},
	{TypeCARollback, "ca.rollback", func() Command { return new(CARollback) }},
	{TypeCAPrune, "ca.prune", func() Command { return new(CAPrune) }},
	{TypeIPRelease, "ip.release", func() Command { return new(IPRelease) }},
	{TypeDomainKeysAdd, "domain.keys-add", func() Command { return new(DomainKeysAdd) }},
	{TypeDomainKeyStep, "domain.key-step", func() Command { return new(DomainKeyStep) }},
	{TypeDomainKeysRollback, "domain.keys-rollback", func() Command { return new(DomainKeysRollback) }},
	{TypeWarmPut, "warm-up.put", func() Command { return new(WarmPut) }},
	{TypeWarmStop, "warm-up.stop", func() Command { return new(WarmStop) }},
	{TypeWarmRoll, "warm-up.roll", func() Command { return new(WarmRoll) }},
	{TypeWarmJudge, "warm-up.judge", func() Command { return new(WarmJudge) }},
	{TypeWarmBatch, "warm-up.batch", func() Command { return new(WarmBatch) }},
	{TypeWarmTell, "warm-up.tell", func() Command { return new(WarmTell) }},
	{TypeCredentialPutScoped, "credential.put-scoped", func() Command { return new(CredentialPutScoped) }},
	{TypeBrakeSet, "brake.set", func() Command { return new(BrakeSet) }},
	{TypeBrakeCancel, "brake.cancel", func() Command { return new(BrakeCancel) }},
	{TypeBrakePin, "brake.pin", func() Command { return new(BrakePin) }},
	{TypeBrakeSweep, "brake.sweep", func() Command { return new(BrakeSweep) }},
	{TypeLimitsSet, "limits.set", func() Command { return new(LimitsSet) }},
	{TypeLeaseBegin, "lease.begin", func() Command { return new(LeaseBegin) }},
	{TypeLeaseNumber, "lease.number", func() Command { return new(LeaseNumber) }},
	{TypeLeaseTick, "lease.tick", func() Command { return new(LeaseTick) }},
	{TypeLeaseDeclare, "lease.declare", func() Command { return new(LeaseDeclare) }},
	{TypeNodeHandover, "node.handover", func() Command { return new(NodeHandover) }},
	{TypeIPRetire, "ip.retire", func() Command { return new(IPRetire) }},
	{TypeIPLeft, "ip.left", func() Command { return new(IPLeft) }},
	{TypeIPQuarantine, "ip.quarantine", func() Command { return new(IPQuarantine) }},
	{TypeIPReclaim, "ip.reclaim", func() Command { return new(IPReclaim) }},
	{TypeIPHeard, "ip.heard", func() Command { return new(IPHeard) }},
	{TypeStateHash, "state-hash", func() Command { return new(StateHash) }},
}

var byType = func() (table [256]*registration) {
	for i := range registry {
		table[registry[i].typ] = &registry[i]
	}
	return table
}()

// String returns the stable name of the type, as audit entries and metrics show it.
func (t Type) String() string {
	if r := byType[t]; r != nil {
		return r.name
	}
	return "unknown"
}

// TypeOf returns the number of a command's type.
func TypeOf(c Command) Type {
	switch c.(type) {
	case *ClusterInit:
		return TypeClusterInit
	case *TokenCreate:
		return TypeTokenCreate
	case *TokenRedeem:
		return TypeTokenRedeem
	case *TokenRevoke:
		return TypeTokenRevoke
	case *NodeUpsert:
		return TypeNodeUpsert
	case *NodeSetState:
		return TypeNodeSetState
	case *ServerUpsert:
		return TypeServerUpsert
	case *TenantPut:
		return TypeTenantPut
	case *ProjectPut:
		return TypeProjectPut
	case *DomainPut:
		return TypeDomainPut
	case *CredentialPut:
		return TypeCredentialPut
	case *CredentialRevoke:
		return TypeCredentialRevoke
	case *PoolPut:
		return TypePoolPut
	case *IPPut:
		return TypeIPPut
	case *IPAssign:
		return TypeIPAssign
	case *PolicyPut:
		return TypePolicyPut
	case *OperatorPut:
		return TypeOperatorPut
	case *APIKeyPut:
		return TypeAPIKeyPut
	case *ReturnPathKeyPut:
		return TypeReturnPathKeyPut
	case *FSMVersionSet:
		return TypeFSMVersionSet
	case *NodeDrain:
		return TypeNodeDrain
	case *CredentialRotate:
		return TypeCredentialRotate
	case *IPVerify:
		return TypeIPVerify
	case *IPRelease:
		return TypeIPRelease
	case *DomainVerify:
		return TypeDomainVerify
	case *ClusterRecover:
		return TypeClusterRecover
	case *RecoveryEnd:
		return TypeRecoveryEnd
	case *CredentialPutScoped:
		return TypeCredentialPutScoped
	case *StateHash:
		return TypeStateHash
	}
	if t := warmType(c); t != 0 {
		return t
	}
	if t := keysType(c); t != 0 {
		return t
	}
	if t := brakesType(c); t != 0 {
		return t
	}
	if t := leasesType(c); t != 0 {
		return t
	}
	if t := ownType(c); t != 0 {
		return t
	}
	return rotationType(c)
}
