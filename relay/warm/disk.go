package warm

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/warmup"
)

const (
	marksFile   = "warmup.json"
	marksFormat = 1
	maxMarks    = 64 << 20 // bytes
)

// onDisk is the file of marks.
type onDisk struct {
	Format     int          `json:"format"`
	Life       uint32       `json:"life"` // how often this relay was started
	Generation uint64       `json:"generation"`
	Marks      []markOnDisk `json:"marks"`
}

type markOnDisk struct {
	Subject warmup.Subject `json:"s"`
	Class   warmup.Class   `json:"c"`
	Day     warmup.Day     `json:"d"`
	Epoch   uint64         `json:"e,omitempty"`
	Used    uint32         `json:"u"`
	Amount  uint32         `json:"a"`
	Tally   []int64        `json:"t,omitempty"` // attempts, accepted, deferred, blocked, hard, signatures
}

// row is what the file says of a reservation.
type row struct {
	warmup.Mark
	tally warmup.Tally
}

func tallyOnDisk(t warmup.Tally) []int64 {
	if t == (warmup.Tally{}) {
		return nil
	}
	return []int64{t.Attempts, t.Accepted, t.Deferred, t.Blocked, t.Hard, t.Signatures}
}

// tally reads the counts. Those that cannot be begin anew: they guard nothing.
func (m *markOnDisk) tally() (t warmup.Tally) {
	if n := m.Tally; len(n) == 6 {
		t = warmup.Tally{Attempts: n[0], Accepted: n[1], Deferred: n[2], Blocked: n[3], Hard: n[4], Signatures: n[5]}
	}
	if !t.Sound() {
		return warmup.Tally{}
	}
	return t
}

// load reads the marks and begins a new life, on the disk before it is returned.
// Marks that cannot be read are an error: to go on without them would spend twice.
func (k *Keeper) load() error {
	const op = "warm.Open"
	path := filepath.Join(k.cfg.Dir, marksFile)
	text, err := os.ReadFile(path)
	var file onDisk
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil || len(text) > maxMarks:
		return fault.Wrap(errors.Join(err, fs.ErrInvalid), fault.Internal, op, "%s cannot be read", path)
	default:
		if err := json.Unmarshal(text, &file); err != nil || file.Format != marksFormat {
			// All that was reserved counts as spent then: the slots are new.
			k.cfg.Logger.Error("the marks of warm-up are damaged: what was reserved before counts as spent", "file", path)
			file = onDisk{}
		}
	}
	// Lives rise even if the file was lost.
	k.life, k.generation = max(file.Life+1, uint32(k.cfg.Now().Unix())), file.Generation
	for _, m := range file.Marks {
		s := &slot{key: key{m.Subject, m.Class, m.Day, m.Epoch}, saved: true, probed: true, owed: m.Used, spender: warmup.Resume(warmup.Mark{Used: m.Used, Amount: m.Amount}), tally: m.tally()}
		k.slots[s.key] = s
		k.disk[s.key] = row{warmup.Mark{Used: m.Used, Amount: m.Amount}, s.tally}
	}
	return k.write()
}

// write puts the marks of k.disk on stable storage. Only the keeper's own goroutine
// calls it.
func (k *Keeper) write() error {
	file := onDisk{Format: marksFormat, Life: k.life, Generation: k.generation, Marks: make([]markOnDisk, 0, len(k.disk))}
	for key, m := range k.disk {
		file.Marks = append(file.Marks, markOnDisk{key.Subject, key.Class, key.Day, key.Epoch, m.Used, m.Amount, tallyOnDisk(m.tally)})
	}
	text, err := json.Marshal(file)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "warm.write", "the marks of warm-up cannot be encoded")
	}
	return pki.WriteFile(filepath.Join(k.cfg.Dir, marksFile), text, 0o600)
}
