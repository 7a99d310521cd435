// Package store is the relay's only door to its disk: it owns Badger, where
// envelopes and recipients' states live, and the files that hold message
// bodies. It exists so that one place decides what "on stable storage" means.
package store

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// Config says where the store lives and what bounds it.
type Config struct {
	Dir        string                // data directory; created with mode 0700 if absent
	Storage    policy.Storage        // limits; SetLimits changes them later
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // nil: metrics are not exported
}

// Store is an open data directory. Its methods may be called concurrently.
type Store struct{ cfg Config }

// Open opens or creates the data directory.
func Open(_ context.Context, cfg Config) (*Store, error) {
	return &Store{cfg: cfg}, nil
}

var errClosed = fault.New(fault.Unavailable, "store", "the store is not open")

// Close finishes what was submitted and closes the files.
func (s *Store) Close() error { return nil }

// Health is nil while the store can accept mail, and otherwise says why not.
func (s *Store) Health() error { return errClosed }

// Admit says whether a message of so many bytes may be accepted now; if not,
// it returns a fault of kind NoSpace (or Unavailable when the disk failed).
// Call it before the message is received, with the size the client declared.
func (s *Store) Admit(bytes int64) error { return errClosed }

// SetLimits changes the limits while the store runs.
func (s *Store) SetLimits(limits policy.Storage) {}

// Body is a message being received: an io.Writer that keeps at most 64 KiB in
// memory and spills larger messages into a file of their own. After the last
// Write call Seal, then hand it to queue.Accept, which consumes it, or Discard it.
type Body struct{ ref relay.BodyRef }

// NewBody begins a body.
func (s *Store) NewBody() *Body { return &Body{} }

// Write appends bytes of the message, header section first.
func (b *Body) Write(p []byte) (int, error) { return 0, errClosed }

// Len is the number of bytes written so far.
func (b *Body) Len() int64 { return b.ref.Length }

// Seal ends the body and records the length of its header section and the
// SHA-256 of its relaxed-canonical body, which go into its reference.
func (b *Body) Seal(headerBytes int64, bodyHash [32]byte) error { return errClosed }

// Ref is the body's place on disk. It is complete once the batch that carries
// the body is committed.
func (b *Body) Ref() relay.BodyRef { return b.ref }

// Discard gives up a body that was not committed. It is safe to call after a
// commit, where it does nothing.
func (b *Body) Discard() {}

// BodyReader reads a stored body.
type BodyReader struct{ ref relay.BodyRef }

// ReadAt implements io.ReaderAt over the body alone: offset 0 is its first byte.
func (r *BodyReader) ReadAt(p []byte, off int64) (int, error) { return 0, errClosed }

// Size is the length of the body in bytes.
func (r *BodyReader) Size() int64 { return r.ref.Length }

// Verify reads the whole body and compares its checksum.
func (r *BodyReader) Verify() error { return errClosed }

// Close lets go of the file.
func (r *BodyReader) Close() error { return nil }

// OpenBody opens a stored body for reading in pieces.
func (s *Store) OpenBody(ref relay.BodyRef) (*BodyReader, error) { return nil, errClosed }

// ReadBody appends the whole body to dst[:0], growing it if needed, and checks
// its checksum. Use it for bodies up to 64 KiB and OpenBody for larger ones.
func (s *Store) ReadBody(ref relay.BodyRef, dst []byte) ([]byte, error) { return nil, errClosed }
