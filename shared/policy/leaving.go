package policy

import "github.com/relais-mta/relais/shared/ids"

// LeavingSource is an address that its owner is to stop using: it is not among the
// sources of the view any more. The owner says when it has nothing open from it.
type LeavingSource struct {
	ID    ids.Source
	Owner ids.Node
	Epoch uint64 // of the assignment that ends
}
