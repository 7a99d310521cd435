package wire

import (
	"crypto/sha256"

	"github.com/relais-mta/relais/shared/fault"
)

const (
	// MaxViewBytes bounds the encoding of a view.
	MaxViewBytes = 64 << 20
	// chunkBytes is small enough that a frame of the control stream is never
	// long behind one, and large enough to cost little.
	chunkBytes = 256 << 10
)

// SendView sends an encoded view as begin, chunks and end.
func SendView(c *Conn, revision *Revision, encoded []byte) error {
	if len(encoded) > MaxViewBytes {
		return fault.New(fault.TooLarge, "wire.SendView", "the view has %d bytes, the limit is %d", len(encoded), MaxViewBytes)
	}
	if err := c.Send(&ViewBegin{Revision: revision, TotalBytes: uint64(len(encoded))}); err != nil {
		return err
	}
	return sendChunks(c, encoded)
}

// sendChunks sends what follows an announcement.
func sendChunks(c *Conn, encoded []byte) error {
	for rest := encoded; len(rest) > 0; {
		n := min(len(rest), chunkBytes)
		if err := c.Send(&ViewChunk{Data: rest[:n]}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	sum := sha256.Sum256(encoded)
	return c.Send(&ViewEnd{Sha256: sum[:]})
}

// ReceiveView receives what follows begin and returns the encoded view, whole
// and with its checksum verified.
func ReceiveView(c *Conn, begin *ViewBegin) ([]byte, error) {
	return receiveChunks(c, begin.GetTotalBytes())
}

// receiveChunks receives what follows an announcement of total bytes.
func receiveChunks(c *Conn, total uint64) ([]byte, error) {
	const op = "wire.receiveChunks"
	if total > MaxViewBytes {
		return nil, fault.New(fault.TooLarge, op, "the server announces a view of %d bytes, the limit is %d", total, MaxViewBytes)
	}
	encoded := make([]byte, 0, total)
	for {
		message, err := c.Receive()
		if err != nil {
			return nil, fault.Wrap(err, fault.Unavailable, op, "the connection broke within a view")
		}
		switch m := message.(type) {
		case *ViewChunk:
			if uint64(len(encoded)+len(m.GetData())) > total {
				return nil, fault.New(fault.Invalid, op, "the view is longer than the %d bytes announced", total)
			}
			encoded = append(encoded, m.GetData()...)
		case *ViewEnd:
			if uint64(len(encoded)) != total {
				return nil, fault.New(fault.Invalid, op, "the view has %d bytes of the %d announced", len(encoded), total)
			}
			if sum := sha256.Sum256(encoded); string(sum[:]) != string(m.GetSha256()) {
				return nil, fault.New(fault.Invalid, op, "the view does not match its checksum")
			}
			return encoded, nil
		default:
			return nil, fault.New(fault.Invalid, op, "the server sent a %T within a view", message)
		}
	}
}
