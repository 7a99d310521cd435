package queue

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/relais-mta/relais/relay"
)

// TestStateRoundTrips fills every field of a state, and adds one that a later
// release may know.
func TestStateRoundTrips(t *testing.T) {
	at := time.UnixMilli(1_800_000_000_123).UTC()
	want := relay.RecipientState{
		State: relay.StateWaiting, Attempts: 3, Next: at, LastAttempt: at.Add(-time.Hour), InDoubt: 1,
		LastReply: relay.Reply{Code: 450, Enhanced: "4.2.0", Text: "busy"}, LastClass: "busy", LastMX: "mx.there.test",
		Sticky: netip.MustParseAddr("192.0.2.1"), DelayTold: true,
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
