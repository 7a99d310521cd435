package outbox

import (
	"reflect"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
	"github.com/relais-mta/relais/shared/ids"
)

// Events that belong to no mail are numbered with the others and outlive the
// process.
func TestWrite(t *testing.T) {
	b := &box{t: t, dir: t.TempDir()}
	b.open()
	at := time.UnixMilli(1_800_000_000_000).UTC()
	lock := Event{Type: Locked, At: at, Class: "account", Address: "192.0.2.0/24", Tenant: ids.Tenant{1}, Credential: ids.Credential{2, 3}, Attempts: 5,
		StartedAt: at, Next: at.Add(time.Minute), Reply: relay.Reply{Enhanced: "4.7.0", Text: "5 failed logins"}}
	over := Event{Type: Unlocked, At: at.Add(time.Minute), Class: "account", Address: "192.0.2.0/24", Actor: "nobody"}
	if err := b.ob.Write(t.Context(), nil); err != nil || b.ob.Last() != 0 {
		t.Errorf("nothing is event %d: %v", b.ob.Last(), err)
	}
	if err := b.ob.Write(t.Context(), []Event{lock, over}); err != nil {
		t.Fatal(err)
	}
	b.close()
	b.open()
	defer b.close()
	got, err := b.ob.Read(0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	lock.Seq, over.Seq = 1, 2
	if want := []Event{lock, over}; !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, want %+v", got, want)
	}
	if lock.Type.String() != "locked" || over.Type.String() != "unlocked" {
		t.Errorf("they are called %s and %s", lock.Type, over.Type)
	}
}
