package sign

import (
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/mailaddr"
	"github.com/relais-mta/relais/shared/policy"
)

func testKeys() []policy.ReturnPathKey {
	keys := []policy.ReturnPathKey{{ID: 7}, {ID: 3}}
	for i := range keys[0].Key {
		keys[0].Key[i] = byte(i)
		keys[1].Key[i] = byte(200 + i)
	}
	return keys
}

var testMessage = func() ids.Message {
	m, err := ids.ParseMessage("msg_06c8000000000000000000000z")
	if err != nil {
		panic(err)
	}
	return m
}()

var testDay = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// The golden text pins version 1 of the format: return paths that are out in
// the world must stay readable. A change here needs a new version letter.
func TestReturnPathGolden(t *testing.T) {
	tests := []struct {
		recipient int
		want      string
	}{
		{NoRecipient, goldenWhole},
		{0, goldenFirst},
		{65535, goldenLast},
	}
	for _, tt := range tests {
		got, err := EncodeReturnPath(testKeys(), testMessage, tt.recipient, testDay)
		if err != nil {
			t.Fatal(err)
		}
		if got != tt.want {
			t.Errorf("recipient %d: %q, want %q", tt.recipient, got, tt.want)
		}
		if len(got) != ReturnPathBytes || len(got) > mailaddr.MaxLocalBytes {
			t.Errorf("recipient %d: %d octets", tt.recipient, len(got))
		}
		for _, spelling := range []string{tt.want, strings.ToUpper(tt.want)} {
			rp, err := VerifyReturnPath(testKeys(), spelling, testDay)
			want := ReturnPath{Message: testMessage, Recipient: tt.recipient, Expires: time.Date(2026, 3, 5, 0, 0, 0, 0, time.UTC), KeyID: 7}
			if err != nil || rp != want {
				t.Errorf("%q says %+v, error %v; want %+v", spelling, rp, err, want)
			}
		}
	}
}

func TestReturnPathExpiry(t *testing.T) {
	local, err := EncodeReturnPath(testKeys(), testMessage, 1, testDay)
	if err != nil {
		t.Fatal(err)
	}
	midnight := time.Date(2026, 3, 5, 0, 0, 0, 0, time.UTC)
	if _, err := VerifyReturnPath(testKeys(), local, midnight.Add(-time.Nanosecond)); err != nil {
		t.Errorf("refused on its last day: %v", err)
	}
	if _, err := VerifyReturnPath(testKeys(), local, midnight); !fault.Is(err, fault.Denied) {
		t.Errorf("after its last day: error %v, want denied", err)
	}
}

func TestReturnPathKeys(t *testing.T) {
	keys := testKeys()
	old, err := EncodeReturnPath(keys[1:], testMessage, 1, testDay)
	if err != nil {
		t.Fatal(err)
	}
	if rp, err := VerifyReturnPath(keys, old, testDay); err != nil || rp.KeyID != 3 {
		t.Errorf("signed by an older key of the view: %+v, error %v", rp, err)
	}
	if _, err := VerifyReturnPath(keys[:1], old, testDay); !fault.Is(err, fault.Denied) {
		t.Errorf("signed by a key that is gone: error %v, want denied", err)
	}
	other := []policy.ReturnPathKey{{ID: 3}}
	if _, err := VerifyReturnPath(other, old, testDay); !fault.Is(err, fault.Denied) {
		t.Errorf("same key id, other key: error %v, want denied", err)
	}
	if _, err := EncodeReturnPath(nil, testMessage, 1, testDay); !fault.Is(err, fault.Unavailable) {
		t.Errorf("no keys: error %v, want unavailable", err)
	}
}

func TestReturnPathRefusesForgeries(t *testing.T) {
	good, err := EncodeReturnPath(testKeys(), testMessage, 5, testDay)
	if err != nil {
		t.Fatal(err)
	}
	// Every single changed digit must be noticed.
	for i := range good {
		for _, c := range []byte("0z") {
			if good[i] == c {
				continue
			}
			forged := good[:i] + string(c) + good[i+1:]
			if rp, err := VerifyReturnPath(testKeys(), forged, testDay); err == nil {
				t.Errorf("%q is taken for %+v", forged, rp)
			}
		}
	}
	for _, text := range []string{"", "r", "postmaster", good[:len(good)-1], good + "0", "s" + good[1:], "r" + strings.Repeat("u", 56), "r" + strings.Repeat("=", 56)} {
		if _, err := VerifyReturnPath(testKeys(), text, testDay); err == nil {
			t.Errorf("%q is taken for a return path", text)
		}
	}
	for _, bad := range []struct {
		recipient int
		expires   time.Time
	}{{-2, testDay}, {65536, testDay}, {0, time.Unix(-1e9, 0)}, {0, time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)}} {
		if _, err := EncodeReturnPath(testKeys(), testMessage, bad.recipient, bad.expires); !fault.Is(err, fault.Invalid) {
			t.Errorf("recipient %d, expires %v: error %v, want invalid", bad.recipient, bad.expires, err)
		}
	}
}

func FuzzVerifyReturnPath(f *testing.F) {
	keys := testKeys()
	f.Add(goldenWhole)
	f.Add("postmaster")
	f.Fuzz(func(t *testing.T, local string) {
		rp, err := VerifyReturnPath(keys, local, testDay)
		if err != nil {
			return
		}
		// Whatever verifies is exactly what we would have written.
		again, err := EncodeReturnPath(keys[keyIndex(rp.KeyID):], rp.Message, rp.Recipient, rp.Expires.Add(-time.Second))
		if err != nil || again != strings.ToLower(local) {
			t.Errorf("%q verifies as %+v, whose own text is %q, error %v", local, rp, again, err)
		}
	})
}

func keyIndex(id uint8) int {
	for i, k := range testKeys() {
		if k.ID == id {
			return i
		}
	}
	return len(testKeys())
}

func BenchmarkVerifyReturnPath(b *testing.B) {
	keys := testKeys()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := VerifyReturnPath(keys, goldenWhole, testDay); err != nil {
			b.Fatal(err)
		}
	}
}

const (
	goldenWhole = "r0w364000000000000000000000fg0000a0j7wx1tqgnkjxp5zmtb3w8m"
	goldenFirst = "r0w364000000000000000000000fg0001a0j0868hdqfahetkstysxfyh"
	goldenLast  = "r0w364000000000000000000000fg2000a0j38yrm43dpn58s4ekxw85c"
)
