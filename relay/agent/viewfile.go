package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/pki"
	"github.com/relais-mta/relais/shared/wire"
)

// A view file: 7 bytes magic, 1 byte format, generation (u64), revision (u64),
// length of the sealed part (u32), the wire encoding of the view sealed under a
// key derived from the node key, SHA-256 over all before it. Numbers are
// big-endian. All of the view is sealed, because it holds DKIM private keys,
// return-path keys and the credential key.
const (
	viewMagic     = "RLSVIEW"
	viewFormat    = 1
	viewHeadBytes = len(viewMagic) + 1 + 8 + 8 + 4
	maxViewFile   = int64(viewHeadBytes + wire.MaxViewBytes + pki.SealOverheadBytes + sha256.Size)
	viewPurpose   = "view on disk"
)

// viewStore keeps the last good view of one relay.
type viewStore struct {
	path   string
	sealer *pki.Sealer
	bind   []byte // cluster and node, to which the file belongs
}

func newViewStore(dir string, key *pki.NodeKey, m Membership) (*viewStore, error) {
	folder := filepath.Join(dir, viewDir)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "agent.newViewStore", "cannot make %s", folder)
	}
	return &viewStore{
		path:   filepath.Join(folder, viewFile),
		sealer: pki.NewSealer(key.Derive(viewPurpose)),
		bind:   append(append([]byte(nil), m.Cluster[:]...), m.Node[:]...),
	}, nil
}

// save writes the encoding of a view, durably and in one step.
func (s *viewStore) save(encoded []byte, generation, revision uint64) error {
	file := make([]byte, viewHeadBytes, int64(viewHeadBytes+len(encoded)+pki.SealOverheadBytes+sha256.Size))
	copy(file, viewMagic)
	file[len(viewMagic)] = viewFormat
	binary.BigEndian.PutUint64(file[len(viewMagic)+1:], generation)
	binary.BigEndian.PutUint64(file[len(viewMagic)+9:], revision)
	binary.BigEndian.PutUint32(file[len(viewMagic)+17:], uint32(len(encoded)+pki.SealOverheadBytes))
	sealed, err := s.sealer.Seal(encoded, s.aad(file))
	if err != nil {
		return err
	}
	file = append(file, sealed...)
	sum := sha256.Sum256(file)
	return pki.WriteFile(s.path, append(file, sum[:]...), 0o600)
}

func (s *viewStore) aad(head []byte) []byte {
	return append(append([]byte(nil), head[:viewHeadBytes]...), s.bind...)
}

// load returns the encoding of the stored view and when it was stored. No file is fault.NotFound; a
// file that is damaged or foreign is fault.Invalid and says so.
func (s *viewStore) load() (encoded []byte, stored time.Time, err error) {
	const op = "agent.loadView"
	info, err := os.Stat(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, stored, fault.Wrap(err, fault.NotFound, op, "no view is stored yet")
	}
	if err != nil {
		return nil, stored, fault.Wrap(err, fault.Internal, op, "cannot read %s", s.path)
	}
	damaged := func(cause error, what string) ([]byte, time.Time, error) {
		return nil, stored, &fault.Error{Kind: fault.Invalid, Op: op, Public: s.path + " " + what + ": it is not used, the relay waits for control to send the view again", Cause: cause}
	}
	if info.Size() > maxViewFile {
		return damaged(nil, "is longer than any view")
	}
	file, err := os.ReadFile(s.path)
	if err != nil {
		return nil, stored, fault.Wrap(err, fault.Internal, op, "cannot read %s", s.path)
	}
	if len(file) < viewHeadBytes+sha256.Size || string(file[:len(viewMagic)]) != viewMagic {
		return damaged(nil, "is not a view file")
	}
	if format := file[len(viewMagic)]; format != viewFormat {
		return damaged(nil, "has a format that this version does not know")
	}
	body, want := file[:len(file)-sha256.Size], file[len(file)-sha256.Size:]
	if sum := sha256.Sum256(body); string(sum[:]) != string(want) {
		return damaged(nil, "is damaged (its checksum does not match)")
	}
	if n := binary.BigEndian.Uint32(file[len(viewMagic)+17:]); int64(n) != int64(len(body)-viewHeadBytes) {
		return damaged(nil, "is damaged (its length does not match)")
	}
	encoded, err = s.sealer.Open(body[viewHeadBytes:], s.aad(file))
	if err != nil {
		return damaged(err, "belongs to another node or key")
	}
	return encoded, info.ModTime(), nil
}
