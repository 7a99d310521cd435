package limits

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/relais-mta/relais/shared/lease"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	floorsFile   = "limits.json"
	floorsFormat = 1
	maxFloors    = 32 << 20 // bytes
)

// save is floors on their way to the disk.
type save struct {
	floors  []lease.Floor
	version uint64
}

// floorsOnDisk is the file. Instants mean something only within one run of the
// machine, so the time of day stands beside them.
type floorsOnDisk struct {
	Format int           `json:"format"`
	Boot   string        `json:"boot"`
	At     lease.Instant `json:"at"`   // when it was written
	Time   time.Time     `json:"time"` // likewise
	Floors []floorOnDisk `json:"floors"`
}

type floorOnDisk struct {
	Limit  lease.LimitID `json:"limit"`
	Kind   lease.Kind    `json:"kind"`
	Per    time.Duration `json:"per_ns,omitempty"`
	Amount int64         `json:"amount"`
	Burst  int64         `json:"burst,omitempty"`
	Until  lease.Instant `json:"until"`
	Soft   bool          `json:"soft,omitempty"`
}

func bootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// load reads the floors that the disk holds. What cannot be read is no floor: the
// relay does nothing under the limit until it has heard of the leader.
func (l *Limits) load(now lease.Instant) []lease.Floor {
	text, err := os.ReadFile(l.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var d floorsOnDisk
	if err == nil {
		err = json.Unmarshal(text, &d)
	}
	if err != nil || d.Format > floorsFormat || len(text) > maxFloors {
		l.log.Error("the floors of shared limits cannot be read: until control is heard nothing is sent under them", "file", l.path(), "format", d.Format, "error", err)
		return nil
	}
	shift, known := time.Duration(0), true
	if boot := l.cfg.Boot(); boot == "" || boot != d.Boot {
		// The machine was off. By how much the time of day has moved on since then,
		// so much of the floor is over; a clock that went back tells nothing.
		away := time.Since(d.Time)
		known = away >= 0
		shift = now.Sub(d.At) - away
	}
	var out []lease.Floor
	for _, f := range d.Floors {
		if !known && !f.Soft || f.Kind != lease.Rate && f.Kind != lease.Slots || f.Amount < 0 || f.Burst < 0 {
			continue
		}
		out = append(out, lease.Floor{Limit: f.Limit, Kind: f.Kind, Per: f.Per, Share: lease.Share{Amount: f.Amount, Burst: f.Burst}, Until: f.Until.Add(shift), Soft: f.Soft})
	}
	return out
}

// write puts floors on stable storage.
func (l *Limits) write(floors []lease.Floor) error {
	d := floorsOnDisk{Format: floorsFormat, Boot: l.cfg.Boot(), At: l.cfg.Clock(), Time: time.Now().Round(0).UTC(), Floors: []floorOnDisk{}}
	for _, f := range floors {
		d.Floors = append(d.Floors, floorOnDisk{f.Limit, f.Kind, f.Per, f.Share.Amount, f.Share.Burst, f.Until, f.Soft})
	}
	text, err := json.MarshalIndent(d, "", " ")
	if err != nil {
		return err
	}
	return pki.WriteFile(l.path(), append(text, '\n'), 0o600)
}

// saveFloors hands floors to the writer if the disk should know others: at once if
// one became smaller, because the leader lends the rest only when that is saved.
// l.mu is held.
func (l *Limits) saveFloors() {
	if l.saving || !l.holder.FloorsUnsaved() && !l.grown() {
		return
	}
	floors, version := l.holder.SaveFloors()
	l.saving = true
	l.saves <- save{floors, version} // there is room: one is on its way at a time
}

// floorsKeep is the part of a floor's time after which its longer life is saved.
const floorsKeep = 24

// grown reports whether the disk would give a restart less than there is.
func (l *Limits) grown() bool {
	floors := l.holder.Floors()
	if len(floors) != len(l.saved) {
		return true
	}
	late := l.holder.Config().FloorTTL / floorsKeep
	for i := range floors {
		a, b := &floors[i], &l.saved[i]
		if a.Limit != b.Limit || a.Share != b.Share || a.Soft != b.Soft || a.Until.Sub(b.Until) > late {
			return true
		}
	}
	return false
}

// declared returns what a greeting says of floors: the larger of what is in use and
// what a restart would use. After a restore of the cluster nothing else is known.
func (l *Limits) declared() []lease.Floor {
	out := l.holder.Floors()
	for _, f := range l.saved {
		at := slices.IndexFunc(out, func(o lease.Floor) bool { return o.Limit == f.Limit })
		if at < 0 {
			out = append(out, f)
			continue
		}
		out[at].Share = lease.Share{Amount: max(out[at].Share.Amount, f.Share.Amount), Burst: max(out[at].Share.Burst, f.Share.Burst)}
	}
	return out
}

// saver writes floors until stop closes.
func (l *Limits) saver(stop <-chan struct{}) {
	for {
		select {
		case s := <-l.saves:
			l.store(s)
		case <-stop:
			return
		}
	}
}

// store puts floors on stable storage and says so to the holder.
func (l *Limits) store(s save) {
	err := l.write(s.floors)
	l.mu.Lock()
	l.saving = false
	failed := l.saveFailed
	l.saveFailed = err != nil
	if err == nil {
		l.saved = s.floors
		l.holder.FloorsSaved(s.version)
	}
	l.mu.Unlock()
	switch {
	case err == nil:
		l.wake()
	case !failed:
		l.log.Error("the floors of shared limits cannot be stored: smaller ones are not confirmed, and a restart while cut off has the former", "error", err)
	}
}
