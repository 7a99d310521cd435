package command

import (
	"encoding/binary"
	"errors"
	"testing"
)

// TestOldServersApplyWhatTheyKnow: an entry is stamped with the version its
// type came with, not with the proposer's newest, so that during an upgrade the
// servers that are not upgraded yet go on.
func TestOldServersApplyWhatTheyKnow(t *testing.T) {
	for _, c := range samples() {
		b, err := Encode(c, goldenTime, 1)
		if err != nil {
			t.Fatal(err)
		}
		want := uint16(1)
		if TypeOf(c)&^IgnorableBit > TypeFSMVersionSet {
			want = 2
		}
		if TypeOf(c) >= TypeCARotate && TypeOf(c)&IgnorableBit == 0 {
			want = 3
		}
		if TypeOf(c) > TypeCredentialPutScoped && TypeOf(c)&IgnorableBit == 0 {
			want = 4
		}
		if TypeOf(c) >= TypeWarmTell && TypeOf(c)&IgnorableBit == 0 {
			want = 5
		}
		if TypeOf(c) >= TypeIPReclaim && TypeOf(c)&IgnorableBit == 0 {
			want = 6
		}
		if got := binary.BigEndian.Uint16(b[1:]); got != want {
			t.Errorf("%s is stamped with version %d, want %d", TypeOf(c), got, want)
		}
	}
}

// TestDowngradePastTheVersionHalts: the entry that raised the version stops a
// program that does not know it.
func TestDowngradePastTheVersionHalts(t *testing.T) {
	for version, known := range map[uint16]bool{1: true, FSMVersion: true, FSMVersion + 1: false} {
		b, err := Encode(&FSMVersionSet{Version: uint32(version)}, goldenTime, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(b); (err == nil) != known || err != nil && !errors.Is(err, ErrUnknown) {
			t.Errorf("version %d: %v", version, err)
		}
	}
}
