package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/link"
)

func (e *Eviction) text() string {
	return fmt.Sprintf("this relay was evicted from its cluster (told at %s): it accepts and delivers nothing, its queue is kept; stop it and run relais-relay join with a new token",
		e.At.UTC().Format(time.RFC3339))
}

// Evicted returns why this relay may not work any more; nil while it may.
func (a *Agent) Evicted() *Eviction {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.member.Evicted
}

// noteEviction takes over the cluster's word that this relay is out, if err is
// that. Only a control server of the cluster, known by its certificate, closes a
// session with this code. The word is kept across restarts: an evicted relay
// that forgot it would work on until somebody reached it again.
func (a *Agent) noteEviction(err error) bool {
	closed, ok := link.ClosedByPeer(err)
	if !ok || closed.Code != link.CodeEvicted {
		return false
	}
	a.mu.Lock()
	if a.member.Evicted == nil {
		a.member.Evicted = &Eviction{At: time.Now().UTC().Truncate(time.Second), Why: closed.Text}
		a.saveMember()
		a.options.Logger.Error("evicted from the cluster: nothing is accepted and delivered any more", "why", closed.Text)
	}
	a.connected = false
	if a.stopWork != nil {
		a.stopWork()
	}
	a.mu.Unlock()
	a.notify()
	return true
}

// leaveEvicted moves the identity of an evicted relay aside, so that the machine
// joins as a new node with a new key. The queue beside it is not touched.
func leaveEvicted(dir string, m Membership) error {
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	old := filepath.Join(dir, identityDir)
	aside := filepath.Join(dir, identityDir+"-evicted-"+m.Node.String())
	return fault.Wrap(os.Rename(old, aside), fault.Internal, "agent.Join", "cannot move %s to %s", old, aside)
}
