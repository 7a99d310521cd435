package ids

import (
	"sort"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/relais-mta/relais/shared/fault"
)

func TestTextFormRoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var id Message
		copy(id[:], rapid.SliceOfN(rapid.Byte(), Size, Size).Draw(t, "bytes"))
		if id.IsZero() {
			return
		}
		back, err := ParseMessage(id.String())
		if err != nil || back != id {
			t.Fatalf("%v parsed back as %v, %v", id, back, err)
		}
		r := Recipient{Message: id, Index: rapid.Uint16().Draw(t, "index")}
		rb, err := ParseRecipient(r.String())
		if err != nil || rb != r {
			t.Fatalf("%v parsed back as %v, %v", r, rb, err)
		}
	})
}

func TestTextSortsByTime(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_000)
	var texts []string
	for i := range 100 {
		texts = append(texts, New[messageKind](at.Add(time.Duration(i)*time.Millisecond)).String())
	}
	if !sort.StringsAreSorted(texts) {
		t.Error("text forms do not sort by time")
	}
	if got := New[tenantKind](at).Time(); !got.Equal(at) {
		t.Errorf("Time() = %v, want %v", got, at)
	}
}

func TestGoldenForm(t *testing.T) {
	id := Make[messageKind](time.UnixMilli(1_763_779_200_000), [10]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	if got, want := id.String(), "msg_01kampxh00041061050r3gg28a"; got != want {
		t.Errorf("String() = %q, want %q: stored ids would change their names", got, want)
	}
}

func TestParseRefuses(t *testing.T) {
	good := New[tenantKind](time.UnixMilli(1)).String()
	for _, text := range []string{"", "x", "msg_", "tnt_", good[:len(good)-1], good + "0", "msg" + good[3:], "tnt_u" + good[5:], "tnt_z" + good[5:]} {
		if _, err := Parse[tenantKind](text); !fault.Is(err, fault.Invalid) {
			t.Errorf("Parse(%q) = %v, want an invalid fault", text, err)
		}
	}
	var id Tenant
	if err := id.UnmarshalText(nil); err != nil || !id.IsZero() {
		t.Error("empty text must be the zero id")
	}
}
