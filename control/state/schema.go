package state

import (
	"fmt"

	"github.com/hashicorp/go-memdb"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/shared/fault"
)

// The section numbers of snapshots and row hashes. Append only.
const (
	sectionProgress       = 1
	sectionCluster        = 2
	sectionServers        = 3
	sectionNodes          = 4
	sectionTokens         = 5
	sectionTenants        = 6
	sectionProjects       = 7
	sectionDomains        = 8
	sectionCredentials    = 9
	sectionPools          = 10
	sectionSources        = 11
	sectionPolicy         = 12
	sectionOperators      = 13
	sectionAPIKeys        = 14
	sectionReturnPathKeys = 15
	sectionAudit          = 16
	sectionPolicyVersions = 20
	sectionRecovery       = 24
	sectionRotation       = 26
	sectionRefusedCAs     = 27
	sectionRevoked        = 28
	sectionWarmCalendar   = 40
	sectionWarmSubjects   = 41
	sectionWarmBlocks     = 42
	sectionLease          = 30
	sectionSharedLimits   = 31
	sectionLeaseNodes     = 32
	sectionHoldings       = 33
	maxSections           = 64
)

// The bounds of the tables, in rows.
const (
	maxServers        = 16
	maxNodes          = 5_000
	maxTokens         = 1_000
	maxTenants        = 100_000
	maxProjects       = 200_000
	maxDomains        = 100_000
	maxCredentials    = 500_000
	maxPools          = 10_000
	maxSources        = 100_000
	maxOperators      = 1_000
	maxAPIKeys        = 10_000
	maxReturnPathKeys = 16
	maxAuditEntries   = 10_000
	maxRefusedCAs     = 16
	maxRevoked        = 64
)

const progressTable = "progress"

var progressKey = []byte{1}

func schema() *memdb.DBSchema {
	s := &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{
		progressTable: {Name: progressTable, Indexes: map[string]*memdb.IndexSchema{
			"id": {Name: "id", Unique: true, Indexer: indexer[progress]{func(*progress) []byte { return progressKey }}},
		}},
	}}
	for _, t := range sections {
		ts := t.schema()
		s.Tables[ts.Name] = ts
	}
	return s
}

// sections are the tables in the order in which snapshots hold them.
var sections = []interface {
	schema() *memdb.TableSchema
	sectionNumber() uint16
	dump(txn *memdb.Txn, fn func(encoded []byte) error) error
	load(a *applier, encoded []byte) error
}{
	warmCalendarTable, warmSubjectsTable, warmBlocksTable,
	clusterTable, serversTable, nodesTable, tokensTable, tenantsTable, projectsTable, domainsTable, credentialsTable,
	poolsTable, sourcesTable, policyTable, operatorsTable, apiKeysTable, returnPathKeysTable, auditTable,
	recoveryTable, policyVersionsTable, rotationTable, refusedCAsTable, revokedTable, leaseTable, sharedLimitsTable, leaseNodesTable, holdingsTable, brakesTable,
}

// apply dispatches an entry to the function of its command.
func (a *applier) apply(body command.Command) (any, error) {
	switch c := body.(type) {
	case nil:
		return nil, nil // a type that may be skipped
	case *command.ClusterInit:
		return a.clusterInit(c)
	case *command.TokenCreate:
		return a.tokenCreate(c)
	case *command.TokenRedeem:
		return a.tokenRedeem(c)
	case *command.TokenRevoke:
		return a.tokenRevoke(c)
	case *command.NodeUpsert:
		return a.nodeUpsert(c)
	case *command.NodeSetState:
		return a.nodeSetState(c)
	case *command.ServerUpsert:
		return a.serverUpsert(c)
	case *command.TenantPut:
		return a.tenantPut(c)
	case *command.ProjectPut:
		return a.projectPut(c)
	case *command.DomainPut:
		return a.domainPut(c)
	case *command.CredentialPut:
		return a.credentialPut(c)
	case *command.CredentialPutScoped:
		return a.credentialPut(c)
	case *command.CredentialRevoke:
		return a.credentialRevoke(c)
	case *command.PoolPut:
		return a.poolPut(c)
	case *command.IPPut:
		return a.sourcePut(c)
	case *command.IPAssign:
		return a.sourceAssign(c)
	case *command.PolicyPut:
		return a.policyPut(c)
	case *command.OperatorPut:
		return a.operatorPut(c)
	case *command.APIKeyPut:
		return a.apiKeyPut(c)
	case *command.ReturnPathKeyPut:
		return a.returnPathKeyPut(c)
	case *command.FSMVersionSet:
		return a.fsmVersionSet(c)
	case *command.NodeDrain:
		return a.nodeDrain(c)
	case *command.CredentialRotate:
		return a.credentialRotate(c)
	case *command.IPVerify:
		return a.sourceVerify(c)
	case *command.IPRelease:
		return a.sourceRelease(c)
	case *command.DomainVerify:
		return a.domainVerify(c)
	case *command.ClusterRecover:
		return a.clusterRecover(c)
	case *command.RecoveryEnd:
		return a.recoveryEnd(c)
	case *command.StateHash:
		return nil, nil // compared by Store.Apply
	}
	if row, known, err := a.applyWarm(body); known {
		return row, err
	}
	if row, known, err := a.applyKeys(body); known {
		return row, err
	}
	if row, known, err := a.applyBrakes(body); known {
		return row, err
	}
	if row, known, err := a.applyLeases(body); known {
		return row, err
	}
	if row, known, err := a.applyOwn(body); known {
		return row, err
	}
	return a.applyRotation(body)
}

// applyRotation dispatches the commands about the issuing key.
func (a *applier) applyRotation(body command.Command) (any, error) {
	switch c := body.(type) {
	case *command.CARotate:
		return a.caRotate(c)
	case *command.CAAck:
		return a.caAck(c)
	case *command.CAAdvance:
		return a.caAdvance(c)
	case *command.CASkip:
		return a.caSkip(c)
	case *command.CARollback:
		return a.caRollback(c)
	case *command.CAPrune:
		return a.caPrune(c)
	}
	return nil, fault.New(fault.Internal, op, "no rule applies a %T", body)
}

// change describes one write to putRow.
type change[T any] struct {
	what   string // the object in the user's words, for errors
	object string // the object's key as the audit tail shows it
	expect uint64
	check  func(old *T) error // the table's own rules; old is nil for a new row
}

type summarised[T any] interface {
	*T
	Summary() string
}

// putRow writes a row under compare-and-swap. A change that leaves the row as
// it is succeeds without a new revision, whatever it expected: so a proposal
// whose outcome was unknown can be repeated.
func putRow[T any, P summarised[T]](a *applier, t *table[T], row *T, c change[T]) (any, error) {
	old := get(a.txn, t, "id", t.key(row))
	if old != nil && same(t, old, row) {
		return old, nil
	}
	if err := checkRevision(t, c.what, old, c.expect); err != nil {
		return nil, err
	}
	if c.check != nil {
		if err := c.check(old); err != nil {
			return nil, err
		}
	}
	if err := put(a, t, row); err != nil {
		return nil, err
	}
	before := ""
	if old != nil {
		before = P(old).Summary()
	}
	a.audit(c.object, before, P(row).Summary())
	return row, nil
}

func quoted(kind, name string) string { return fmt.Sprintf("%s %q", kind, name) }
