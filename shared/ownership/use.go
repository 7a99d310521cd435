package ownership

import (
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/lease"
)

// News is what control says of an address, as one relay keeps it on its disk.
type News struct {
	Revision uint64 // index of the log entry that changed the address last
	Address
}

// Standing is what a relay may do from an address.
type Standing uint8

// The standings, from nothing to everything.
const (
	Gone      Standing = iota // no session may be open from it
	Finishing                 // no new session; idle ones are closed, others after what they do now
	Usable
)

// Use is a relay's half for one address. The zero value may do nothing. One
// goroutine owns it. Instants given to it never go back.
type Use struct {
	cfg   Config
	node  ids.Node
	news  News
	saved uint64 // revision of the news on disk
	until lease.Instant
	open  int
}

// NewUse returns the half of a relay's process that begins with what its disk says.
// A pinned address goes on. A floating one waits for a report that this process
// sends: nobody knows what was granted to the former.
func NewUse(cfg Config, node ids.Node, disk News) Use {
	return Use{cfg: cfg, node: node, news: disk, saved: disk.Revision}
}

// Hear takes news, and reports whether they are: former ones change nothing.
func (u *Use) Hear(n News) bool {
	if n.Revision <= u.news.Revision {
		return false
	}
	if n.Epoch != u.news.Epoch {
		u.until = 0 // what was earned was earned under another assignment
	}
	u.news = n
	return true
}

// Saved says that news of a revision are on stable storage.
func (u *Use) Saved(revision uint64) { u.saved = max(u.saved, revision) }

// Renew takes it that control answered the report that this process sent at an
// instant, and that the answer names the address under an epoch. When the answer
// arrives means nothing.
func (u *Use) Renew(sent lease.Instant, epoch uint64) {
	if epoch == u.news.Epoch {
		u.until = max(u.until, sent.Add(u.cfg.TTL))
	}
}

// Standing returns what may be done at an instant.
func (u *Use) Standing(now lease.Instant) Standing {
	switch {
	case u.news.Owner != u.node || u.node.IsZero():
		return Gone
	case !u.news.Pinned && now >= u.until:
		return Gone
	case u.news.State != Assigned, !u.news.Pinned && now >= u.until.Add(-u.cfg.Guard):
		return Finishing
	}
	return Usable
}

// MayOpen reports whether a session for a tenant's mail may be opened now. It is
// asked for each, with the time of the moment.
func (u *Use) MayOpen(now lease.Instant, tenant ids.Tenant) bool {
	return u.Standing(now) == Usable && u.news.Carries(tenant)
}

// CloseBy returns the instant at which what is open must be closed, whatever it
// does, unless an answer comes before; 0 if there is none. The caller must be there
// in time.
func (u *Use) CloseBy() lease.Instant {
	if u.news.Pinned || u.open == 0 {
		return 0
	}
	return u.until
}

// Until returns the instant at which the lease of a floating address ends, or ended;
// 0 if there was none under the present assignment, and for any other address.
func (u *Use) Until() lease.Instant {
	if u.news.Pinned || u.news.Owner != u.node || u.node.IsZero() {
		return 0
	}
	return u.until
}

// Owner returns who has the address by the last news of it.
func (u *Use) Owner() ids.Node { return u.news.Owner }

// Opened and Closed count sessions.
func (u *Use) Opened() { u.open++ }

// Closed takes it that a session ended.
func (u *Use) Closed() { u.open = max(0, u.open-1) }

// Open returns how many sessions there are.
func (u *Use) Open() int { return u.open }

// Epoch returns the assignment that the relay acts under: it goes into every event
// and report.
func (u *Use) Epoch() uint64 { return u.news.Epoch }

// Acknowledge returns the epoch that may be acknowledged: the relay was asked to
// stop, has, and will not begin again, for the news are on its disk, which a
// restart reads.
func (u *Use) Acknowledge() (epoch uint64, ok bool) {
	stopping := u.news.State == Releasing || u.news.State == Quarantined
	ok = stopping && u.news.Owner == u.node && u.open == 0 && u.saved >= u.news.Revision
	return u.news.Epoch, ok
}
