package queue

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
)

// TestStateRoundTrips fills every field of a state, and adds one that a later
// release may know.
func TestStateRoundTrips(t *testing.T) {
	at := time.UnixMilli(1_800_000_000_123).UTC()
	want := relay.RecipientState{
		State: relay.StateHeld, Attempts: 3, Next: at, LastAttempt: at.Add(-time.Hour), InDoubt: 1,
		LastReply: relay.Reply{Code: 450, Enhanced: "4.2.0", Text: "busy"}, LastClass: "busy", LastMX: "mx.there.test",
		Sticky: netip.MustParseAddr("192.0.2.1"), DelayTold: true, Source: netip.MustParseAddr("192.0.2.2"), Provider: "google",
		Held: &relay.Held{Rule: ids.NewHold(at), By: "operator", Why: "a complaint", Since: at},
	}
	for v, i := reflect.ValueOf(want), 0; i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("the test leaves the field %s empty", v.Type().Field(i).Name)
		}
	}
	got, err := parseState(putUint(appendState(nil, &want), protowire.Number(99), 7))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read back\n%+v, %v, want\n%+v", got, err, want)
	}
}

// TestPurgedReadsAsBounced: releases before the state came refuse a number
// that they do not know.
func TestPurgedReadsAsBounced(t *testing.T) {
	record := appendState(nil, &relay.RecipientState{State: relay.StatePurged})
	stored := uint64(0)
	if err := fields(record[1:], func(n protowire.Number, v uint64, _ []byte) {
		if n == stState {
			stored = v
		}
	}); err != nil || stored != uint64(relay.StateBounced) {
		t.Errorf("stored as %d, %v", stored, err)
	}
	if got, err := parseState(record); err != nil || got.State != relay.StatePurged {
		t.Errorf("read back %v, %v", got.State, err)
	}
}
