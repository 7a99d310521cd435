package wire

import (
	"errors"
	"net/netip"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
)

// maxErrorTextBytes bounds the text of an Error frame, ours or a peer's.
const maxErrorTextBytes = 1024

// NewError returns the frame that tells a peer about err. Only public words go
// out; an error that is not ours becomes a sentence that gives nothing away.
func NewError(err error) *Error {
	out := &Error{Kind: uint32(fault.KindOf(err)), Text: clip(fault.Public(err))}
	var e *fault.Error
	if errors.As(err, &e) {
		out.Field, out.Text = clip(e.Field), clip(e.Public)
	}
	return out
}

// PeerOp is the operation of faults that came from a peer.
const PeerOp = "peer"

// Fault returns the error that a peer told us of.
func (e *Error) Fault() error {
	kind := fault.Internal
	if e.GetKind() <= uint32(fault.TooLarge) {
		kind = fault.Kind(e.GetKind())
	}
	return &fault.Error{Kind: kind, Op: PeerOp, Field: clip(e.GetField()), Public: clip(e.GetText())}
}

// Negotiate returns the protocol version to speak with a peer: the highest
// that both know.
func Negotiate(peer *Preface) (uint32, error) {
	const op = "wire.Negotiate"
	if peer.GetProtocolMin() == 0 || peer.GetProtocolMin() > peer.GetProtocolMax() {
		return 0, fault.New(fault.Invalid, op, "the peer's range of versions, %d to %d, is empty", peer.GetProtocolMin(), peer.GetProtocolMax())
	}
	version := min(peer.GetProtocolMax(), ProtocolMax)
	if version < max(peer.GetProtocolMin(), ProtocolMin) {
		return 0, fault.New(fault.Invalid, op, "the peer (%s) speaks versions %d to %d of the protocol, we speak %d to %d: upgrade the older side",
			clip(peer.GetVersion()), peer.GetProtocolMin(), peer.GetProtocolMax(), ProtocolMin, ProtocolMax)
	}
	return version, nil
}

// EncodeAddresses returns the wire form of addresses, without zones.
func EncodeAddresses(addresses []netip.Addr) [][]byte {
	out := make([][]byte, 0, len(addresses))
	for _, address := range addresses {
		out = append(out, encodeAddress(address))
	}
	return out
}

// DecodeAddresses reads at most limit addresses.
func DecodeAddresses(raw [][]byte, limit int) ([]netip.Addr, error) {
	if len(raw) > limit {
		return nil, fault.New(fault.TooLarge, "wire.DecodeAddresses", "%d addresses, at most %d", len(raw), limit)
	}
	out := make([]netip.Addr, 0, len(raw))
	for _, b := range raw {
		address, err := decodeAddress(b)
		if err != nil {
			return nil, err
		}
		out = append(out, address)
	}
	return out, nil
}

func encodeAddress(address netip.Addr) []byte {
	if !address.IsValid() {
		return nil
	}
	return address.Unmap().WithZone("").AsSlice()
}

// decodeAddress reads an address; no bytes are the zero address.
func decodeAddress(b []byte) (netip.Addr, error) {
	if len(b) == 0 {
		return netip.Addr{}, nil
	}
	address, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fault.New(fault.Invalid, "wire.decodeAddress", "an address has %d bytes, want 4 or 16", len(b))
	}
	return address.Unmap(), nil
}

// EncodeID returns the wire form of an id; the zero id is no bytes.
func EncodeID[K ids.Kind](id ids.ID[K]) []byte {
	if id.IsZero() {
		return nil
	}
	return id[:]
}

// DecodeID reads an id into id; no bytes are the zero id.
func DecodeID[K ids.Kind](b []byte, id *ids.ID[K]) error {
	if len(b) == 0 {
		*id = ids.ID[K]{}
		return nil
	}
	v, err := ids.FromBytes[K](b)
	*id = v
	return err
}

func clip(s string) string {
	if len(s) > maxErrorTextBytes {
		return s[:maxErrorTextBytes] + "…"
	}
	return s
}
