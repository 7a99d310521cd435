package wire

import (
	"crypto/sha256"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/relais-mta/relais/shared/fault"
)

// A view changes a little at a time, so a relay that holds one is sent what has
// changed. A delta works on the encodings, not on the objects: what comes out
// is byte for byte what the server encoded, which a checksum proves, and fields
// that a relay does not know pass through it unharmed.

// records cuts the encoding of a view into its top-level fields, each with its tag.
func records(encoded []byte) ([][]byte, error) {
	out := make([][]byte, 0, 64)
	for len(encoded) > 0 {
		_, _, n := protowire.ConsumeField(encoded)
		if n < 0 {
			return nil, fault.Wrap(protowire.ParseError(n), fault.Invalid, "wire.records", "the view is damaged")
		}
		out = append(out, encoded[:n:n])
		encoded = encoded[n:]
	}
	return out, nil
}

// DiffViews returns the delta that makes the encoding b from the encoding a.
func DiffViews(a, b []byte) ([]byte, error) {
	old, err := records(a)
	if err != nil {
		return nil, err
	}
	next, err := records(b)
	if err != nil {
		return nil, err
	}
	at := make(map[string]int, len(old))
	for i := len(old) - 1; i >= 0; i-- {
		at[string(old[i])] = i // equal records: the first
	}
	delta := &ViewDelta{}
	var edit *ViewEdit
	for _, record := range next {
		i, held := at[string(record)]
		switch {
		case !held:
			if edit == nil {
				edit = &ViewEdit{}
				delta.Edits = append(delta.Edits, edit)
			}
			edit.Put = append(edit.Put, record)
		case edit != nil && len(edit.Put) == 0 && follows(old, edit, record):
			edit.KeepCount++
		default:
			edit = &ViewEdit{KeepFrom: uint32(i), KeepCount: 1}
			delta.Edits = append(delta.Edits, edit)
		}
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(delta)
	return encoded, fault.Wrap(err, fault.Internal, "wire.DiffViews", "cannot encode the change of a view")
}

// follows reports whether record is the next one of the old encoding.
func follows(old [][]byte, edit *ViewEdit, record []byte) bool {
	next := int(edit.KeepFrom + edit.KeepCount)
	return next < len(old) && string(old[next]) == string(record)
}

// ApplyDelta makes the encoding that a delta leads to from the one it starts
// from. Whether that is the right one is for the caller to check by its sum.
func ApplyDelta(a, delta []byte) ([]byte, error) {
	const op = "wire.ApplyDelta"
	var in ViewDelta
	if err := proto.Unmarshal(delta, &in); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, op, "the change of a view is damaged")
	}
	old, err := records(a)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, len(a)+len(delta))
	room := func(n int) error {
		if len(out)+n > MaxViewBytes {
			return fault.New(fault.TooLarge, op, "the change leads to a view of more than %d bytes", MaxViewBytes)
		}
		return nil
	}
	for _, edit := range in.GetEdits() {
		from, count := uint64(edit.GetKeepFrom()), uint64(edit.GetKeepCount())
		if from+count > uint64(len(old)) {
			return nil, fault.New(fault.Invalid, op, "the change keeps records %d to %d of a view of %d", from, from+count, len(old))
		}
		for _, record := range append(old[from:from+count:from+count], edit.GetPut()...) {
			if err := room(len(record)); err != nil {
				return nil, err
			}
			out = append(out, record...)
		}
	}
	return out, nil
}

// SendDelta sends an encoded delta.
func SendDelta(c *Conn, begin *DeltaBegin, delta []byte) error {
	if len(delta) > MaxViewBytes {
		return fault.New(fault.TooLarge, "wire.SendDelta", "the change of a view has %d bytes, the limit is %d", len(delta), MaxViewBytes)
	}
	begin.TotalBytes = uint64(len(delta))
	if err := c.Send(begin); err != nil {
		return err
	}
	return sendChunks(c, delta)
}

// ReceiveDelta receives what follows begin.
func ReceiveDelta(c *Conn, begin *DeltaBegin) ([]byte, error) {
	return receiveChunks(c, begin.GetTotalBytes())
}

// CheckSum returns an error unless encoded has the sum that was announced.
func CheckSum(encoded, want []byte) error {
	if sum := sha256.Sum256(encoded); string(sum[:]) != string(want) {
		return fault.New(fault.Invalid, "wire.CheckSum", "the change does not lead to the view that was announced")
	}
	return nil
}

// nodeField is the number of View.node_id.
const nodeField = 4

// NodeOffset returns where the node belongs in the encoding of a view for no
// node: behind the fields with lower numbers.
func NodeOffset(encoded []byte) (int, error) {
	rest := encoded
	for len(rest) > 0 {
		number, _, n := protowire.ConsumeField(rest)
		if n < 0 {
			return 0, fault.Wrap(protowire.ParseError(n), fault.Internal, "wire.NodeOffset", "the view is damaged")
		}
		if number >= nodeField {
			break
		}
		rest = rest[n:]
	}
	return len(encoded) - len(rest), nil
}
