package queue

import (
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

// TestEnvelopeRoundTrips fills every field, so that a field which is added and
// not encoded fails here instead of on somebody's disk.
func TestEnvelopeRoundTrips(t *testing.T) {
	at := time.UnixMilli(1_800_000_000_123).UTC()
	want := relay.Envelope{
		ID: ids.NewMessage(at), Tenant: ids.Tenant{1}, Project: ids.Project{2}, Credential: ids.Credential{3},
		Stream: "news", Kind: policy.Bulk, Priority: policy.PriorityOf(80), Pool: ids.Pool{4}, Sender: mailaddr.Address{Local: "me", Domain: "brand.test"}, From: "brand.test",
		Recipients: []relay.Recipient{
			{Address: mailaddr.Address{Local: "a", Domain: "x.test"}, Notify: relay.NotifyFailure, ORCPT: "rfc822;a@x.test"},
			{Address: mailaddr.Address{Local: `"b c"`, Domain: "y.test"}, Notify: relay.NotifyNever, ORCPT: "rfc822;b"},
		},
		Body: relay.BodyRef{
			Kind: relay.BodySegment, Segment: 7, Offset: 8, Length: 9, HeaderBytes: 5, CRC32C: 10, BodyHash: [32]byte{11},
		},
		EightBit: true, SMTPUTF8: true, BinaryMIME: true, ClientDKIM: true, Internal: true, ClientIP: netip.MustParseAddr("2001:db8::1"), EnvID: "env", RetFull: true,
		Tag: "spring sale", AcceptedAt: at, NotBefore: at.Add(time.Hour), ExpiresAt: at.Add(2 * time.Hour), Revision: 12, Hops: 2, HandedFrom: ids.Node{5}, HandedAt: 13,
	}
	for v, i := reflect.ValueOf(want), 0; i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("the test leaves the field %s empty", v.Type().Field(i).Name)
		}
	}
	b := appendEnvelope(nil, &want, want.Body, 42)
	got, firstDue, err := parseEnvelope(want.ID, b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*got, want) || firstDue != 42 {
		t.Errorf("read back, due %d\n%+v, want\n%+v", firstDue, *got, want)
	}
	for n := range b {
		if _, _, err := parseEnvelope(want.ID, b[:n]); err == nil && n < 20 {
			t.Errorf("%d of %d bytes were taken for a whole envelope", n, len(b))
		}
	}
}
